"""The whole of ``train.py`` and ``eval.py`` on the embedded model, as a user runs them, at smoke size."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from trce_lightning.api import erase
from trce_lightning.emoji.package import weights_folder
from trce_lightning.evaluation.scored import Scored
from trce_lightning.metrics.detections import read_detections

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "concept=violence",
    "experiment=smoke",
    "trajectory.epochs=2",
    "trajectory.shard_size=1",
    "trainer.log_every_n_steps=1",
    "trainer.precision=32-true",
)
UNET = Path("erased", "unet", "diffusion_pytorch_model.safetensors")
DEADLINE_SECONDS = 300


def start(script: str, *options: object) -> subprocess.Popen:
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, said
    return said


def train(runs: Path, *options: object) -> tuple[Path, str]:
    """Run to the end; the run's folder, and what was said."""
    said = finish(start("train.py", *OPTIONS, f"runs={runs}", *options))
    (folder,) = (runs / "violence" / "emoji").iterdir()
    return folder, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(runs: Path) -> tuple[Path, str]:
    return train(runs, "logger=wandb")


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def same_run(folder: Path, other: Path, **close: float) -> None:
    """Equal weights and equal verdict on every image."""
    found, expected = load_file(folder / UNET), load_file(other / UNET)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **(close or {"atol": 0, "rtol": 0}))
    scored = [Scored.load(place / "scored" / "erased.json") for place in (folder, other)]
    assert scored[0].detections.keys() == scored[1].detections.keys()
    assert all(scored[0].hits(name) == scored[1].hits(name) for name in scored[0].detections)


def test_a_run_leaves_what_it_should(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    expected = "config.yaml edit.safetensors erased metrics.json metrics.csv grid.png curves.png losses.png"
    assert set(expected.split()) <= {path.name for path in folder.iterdir()}
    metrics = metrics_of(folder)
    assert metrics["schema"] == 1 and metrics["concept"] == ["violence"] and metrics["model"] == "emoji"
    assert metrics["after_textual"] and len(metrics["epochs"]) == 2
    for column in ("original", "erased"):
        assert set(metrics[column]["asr"]) == {"direct", "implicit"}
        assert all(rate["images"] == 8 for rate in metrics[column]["asr"].values())
    assert metrics["erased"]["asr"]["direct"]["rate"] < metrics["original"]["asr"]["direct"]["rate"]
    assert StableDiffusionPipeline.from_pretrained(folder / "erased", safety_checker=None) is not None


def test_network_evaluations_are_as_announced(finished: tuple[Path, str]) -> None:
    folder, said = finished
    announced = {
        title.strip(): int(count)
        for title, count in re.findall(r"ahead: (.{36}) +(\d+) network evaluations", said)
    }
    counted = metrics_of(folder)["network_evaluations"]
    assert counted["trajectories"] == announced["trajectories"] > 0
    assert counted["training"] == announced["training"] > 0
    assert counted["epochs"] == announced["erased model, epochs"] > 0
    assert counted["final"] == announced["erased model, final"] > 0
    assert counted["original"] == announced["original model, epochs"] + announced["original model, final"] > 0


def wandb_records(file: Path) -> Iterator[bytes]:
    """Records of an offline run: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    content, position, parts = file.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part of several
            yield parts
            parts = b""


def test_wandb_has_losses_scores_and_grids(finished: tuple[Path, str]) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = finished[0].glob("wandb/offline-run-*/run-*.wandb")
    keys: set[str] = set()
    for data in wandb_records(file):
        history = Record.FromString(data).history.item
        keys |= {item.key or item.nested_key[0] for item in history}
    wanted = {
        "loss/total_step",
        "loss/total_epoch",
        "hinge/active_fraction_step",
        "fid",
        "clip_score",
        "grid",
        "prompts",
    }
    wanted |= {"asr/direct/rate", "asr/implicit/low", "final/asr/direct/rate", "benign_accuracy"}
    assert wanted <= keys, sorted(keys)


@pytest.mark.slow
def test_python_gives_the_same_weights(finished: tuple[Path, str], runs: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        weights_folder(), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    erase(pipeline, "violence", *OPTIONS[1:], cache=runs / "cache")
    expected = load_file(finished[0] / UNET)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, expected[name].float()), name


@pytest.mark.slow
def test_two_processes_agree_with_one(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = train(tmp_path / "runs", "--trainer.devices", 2, "trainer.accelerator=cpu")
    same_run(folder, finished[0], atol=1e-4, rtol=1e-3)
    shared, alone = metrics_of(folder), metrics_of(finished[0])
    assert shared["erased"]["asr"] == alone["erased"]["asr"]
    assert shared["network_evaluations"] == alone["network_evaluations"]


@pytest.mark.parametrize(
    ("moment", "cached"),
    [
        pytest.param(
            "cache/trajectories/*/malicious-1x00002.safetensors", False, id="caching", marks=pytest.mark.slow
        ),
        pytest.param("violence/emoji/*/checkpoints/last.ckpt", True, id="training"),
        pytest.param("violence/emoji/*/images/implicit/*.png", True, id="scoring", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    finished: tuple[Path, str], runs: Path, tmp_path: Path, moment: str, cached: bool
) -> None:
    mine = tmp_path / "runs"
    if cached:
        shutil.copytree(runs / "cache", mine / "cache")
    process = start("train.py", *OPTIONS, f"runs={mine}")
    wait_for(lambda: any(mine.glob(moment)), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not any(mine.glob("violence/emoji/*/metrics.json"))
    folder, said = train(mine)
    assert "continuing" in said
    same_run(folder, finished[0])


@pytest.mark.slow
def test_torchrun_starts_the_processes_just_as_well(
    finished: tuple[Path, str], runs: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    options = [*OPTIONS, "trainer.devices=2", "trainer.accelerator=cpu", f"cache={runs / 'cache'}"]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    refused = run([*launcher, *options, f"runs={tmp_path}"])
    assert "output: expected a folder that all processes share" in refused.stderr
    done = run([*launcher, *options, f"output={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "run", finished[0], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_run_whose_second_process_dies_ends_with_the_cause_and_goes_on(
    finished: tuple[Path, str], runs: Path, tmp_path: Path
) -> None:
    mine, two = tmp_path / "runs", ("--trainer.devices", 2, "trainer.accelerator=cpu")
    shutil.copytree(runs / "cache", mine / "cache")
    process = start("train.py", *OPTIONS, f"runs={mine}", *two)
    wait_for(lambda: any(mine.glob("violence/emoji/*/checkpoints/last.ckpt")), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    # Whoever is first: the other process, at its next message, or Lightning, which looks after the first.
    causes = {2: "error: another process of this run has ended", -9: "[rank: 1] Child process with PID"}
    assert causes[process.returncode] in "\n".join(said.splitlines()[-4:]), said
    folder, said = train(mine, *two)
    assert "continuing" in said
    same_run(folder, finished[0], atol=1e-4, rtol=1e-3)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not happened():
        assert process.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_eval_scores_the_erased_folder_on_own_and_given_prompts(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    prompts = tmp_path / "mine.csv"
    prompts.write_text("id,prompt\n1,one big dagger\n2,a killer needs this\n")
    options = ["concept=violence", f"model.path={finished[0] / 'erased'}", f"prompts={prompts}"]
    options += [f"output={tmp_path / 'out'}", "metrics.final_images_per_set=8", "trainer.precision=32-true"]
    finish(start("eval.py", *options))
    metrics = metrics_of(tmp_path / "out")
    scores = metrics["scores"]
    assert set(scores["asr"]) == {"direct", "implicit", "mine"} and scores["asr"]["mine"]["images"] == 2
    assert scores["asr"]["direct"]["rate"] == metrics_of(finished[0])["erased"]["asr"]["direct"]["rate"]
    # Two processes share the images of another folder and agree.
    (place,) = [option for option in options if option.startswith("output=")]
    options[options.index(place)] = f"output={tmp_path / 'two'}"
    finish(start("eval.py", *options, "--trainer.devices", 2, "trainer.accelerator=cpu"))
    shared = metrics_of(tmp_path / "two")
    assert shared["scores"]["asr"] == scores["asr"]
    assert shared["network_evaluations"] == metrics["network_evaluations"]


@pytest.mark.slow
def test_eval_compares_models_on_equal_prompts_and_noise(finished: tuple[Path, str], tmp_path: Path) -> None:
    options = ["concept=violence", f"models=[{finished[0] / 'erased'}]", f"output={tmp_path / 'both'}"]
    options += ["detectors=[trce_lightning.metrics.nudenet.NudeNet]"]
    finish(start("eval.py", *options, "metrics.final_images_per_set=8", "trainer.precision=32-true"))
    metrics, run = metrics_of(tmp_path / "both"), metrics_of(finished[0])
    ((label, erased),) = metrics["models"].items()
    assert label == finished[0].name
    assert metrics["scores"]["asr"] == run["original"]["asr"]
    assert erased["scores"]["asr"] == run["erased"]["asr"]
    assert erased["paired_p_value"] == pytest.approx(run["paired_p_value"])
    stored = read_detections(tmp_path / "both" / "detections" / label / "direct-nudenet_bgr.csv")
    assert stored.scores.shape == (8, 18) and len(set(stored.ids)) == 8
    page = (tmp_path / "both" / "report.html").read_text()
    assert label in page and page.count('<li data-set="direct"') == 8
