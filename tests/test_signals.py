"""SIGTERM and failures in real processes: all end soon, with the right code, and nothing is lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STOPPED = 128 + signal.SIGTERM
STARTS_WITHIN, ENDS_WITHIN = 300, 60  # seconds; on a busy machine
SMALL = ["concept=violence", "experiment=smoke", "logger=csv", "trainer.precision=32-true"]
TWO = ["--trainer.devices", "2", "trainer.accelerator=cpu"]


def start(*command: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, start_new_session=True, **pipes)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: subprocess.Popen) -> str:
    """What all of its processes said; their common pipe closes with the last of them."""
    try:
        return process.communicate(timeout=ENDS_WITHIN)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def stop_two_processes(work: str, folder: Path) -> None:
    process = start(ROOT / "tests" / "two_processes.py", work, folder)
    wait_for((folder / "begun").exists, process)
    process.send_signal(signal.SIGTERM)
    said = end(process)
    assert process.returncode == STOPPED and "stopped by SIGTERM" in said, said


def test_a_fit_of_two_processes_stops_after_the_same_step(tmp_path: Path) -> None:
    stop_two_processes("fit", tmp_path)
    steps = [(tmp_path / f"stopped{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1] and int(steps[0]) > 0


def test_sigterm_ends_two_processes_that_draw(tmp_path: Path) -> None:
    stop_two_processes("draw", tmp_path)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_process_that_fails_ends_the_other(tmp_path: Path, culprit: int) -> None:
    process = start(ROOT / "tests" / "two_processes.py", f"fail{culprit}", tmp_path)
    wait_for((tmp_path / "begun").exists, process)
    said = end(process)
    assert process.returncode in (1, -signal.SIGKILL), said  # the latter if Lightning sees it first
    assert "ValueError: trainer.devices: expected a better day" in said


def test_sigterm_ends_one_process_that_draws(tmp_path: Path) -> None:
    command = [ROOT / "train.py", *SMALL, f"runs={tmp_path}", "stages=[textual]"]
    process = start(*command, "metrics.final_images_per_set=512")  # minutes
    wait_for(lambda: any(tmp_path.glob("cache/original/**/*.png")), process)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = end(process)
    assert process.returncode == STOPPED and said.endswith("stopped by SIGTERM; the same command continues\n")
    assert time.monotonic() - told < 15


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_after_sigterm_to_the_same_weights(tmp_path: Path) -> None:
    command = [ROOT / "train.py", *SMALL, *TWO, "metrics.enabled=false", f"cache={tmp_path / 'cache'}"]
    command += ["trajectory.epochs=3", "trajectory.num_trajectories=16", "trajectory.batch_size=2"]
    command += ["trajectory.draws_per_epoch=3"]
    steps_per_epoch = 24
    whole, stopped = (f"output={tmp_path / name}" for name in ("whole", "stopped"))
    process = start(*command, stopped)
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    wait_for(last.exists, process)
    process.send_signal(signal.SIGTERM)
    said = end(process)
    assert process.returncode == STOPPED, said
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"told to stop after step {step}:" in said or step % steps_per_epoch == 0
    for output in (stopped, whole):
        process = start(*command, output)
        said, _ = process.communicate(timeout=STARTS_WITHIN)
        assert process.returncode == 0, said
    unet = Path("erased", "unet", "diffusion_pytorch_model.safetensors")
    found, expected = (load_file(tmp_path / name / unet) for name in ("stopped", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
