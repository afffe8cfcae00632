"""Files that appear whole or not at all, with everybody's mode; damaged ones are named, with what to do."""

import multiprocessing
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from tiny_runs import KEEP_PROMPTS, cpu_trainer, plan_of, sample_plan, trajectory_config
from torchmetrics.image.fid import FrechetInceptionDistance

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.callbacks.image_grid import draw
from trce_lightning.compare import load_runs
from trce_lightning.data.trajectories import generator_of, load_rows, missing_shards
from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.package import load_judge
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import Scored
from trce_lightning.export import card_facts, save_pipeline
from trce_lightning.generation.image_folder import claim, load_images, manifest, write_png
from trce_lightning.jobs.trainers import WholeCheckpoints
from trce_lightning.metrics.collateral import Detection
from trce_lightning.metrics.detections import Detections, Source, _write, read_detections
from trce_lightning.metrics.fidelity import load_real_statistics, save_real_statistics
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.report.curves import save_loss_curves
from trce_lightning.runtime.storage import (
    clean_up,
    replacing,
    replacing_folder,
    write_json,
    write_safetensors,
)
from trce_lightning.textual import cached_kept

RECORDS = (PromptRecord("a", "a dog", seed=1), PromptRecord("b", "tea", seed=2))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": cut,
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: bytes(255 - byte for byte in content[:64]) + b"\xff\xfe{[" + content[64:],
    "another": lambda content: b"[1, 2]",
}


@dataclass
class Own:
    """A file of ours, and what reads it."""

    file: Path
    read: Callable[[], object]


def kept(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    def read() -> object:
        return cached_kept(cpu_trainer(folder), adapter, KEEP_PROMPTS, folder / "cache")

    read()
    (file,) = (folder / "cache").iterdir()
    return Own(file, read)


def shard(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    config = trajectory_config(num_trajectories=2, num_unconditional=2)
    plan = sample_plan(adapter, config, folder)
    generator = generator_of(adapter.fingerprint(), cpu_trainer(folder))
    file = next(folder.glob("malicious-*.safetensors"))
    return Own(file, lambda: missing_shards(plan, folder, config.shard_size, generator))


def rows(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    own, config = shard(folder, adapter), trajectory_config(num_trajectories=2, num_unconditional=2)
    return Own(own.file, lambda: load_rows(plan_of(config), folder, config.shard_size, "malicious"))


def scored(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    file = folder / "scored.json"
    Scored({"fid": 1.0}, {"direct": {"a": Detection(0.5)}}).save(file)
    return Own(file, lambda: Scored.load(file))


def finished_run(folder: Path) -> None:
    for name in ("original", "erased"):
        Scored({"fid": 1.0}, {"direct": {"a": Detection(0.5)}}).save(folder / "scored" / f"{name}.json")
    OmegaConf.save({"stages": ["textual"]}, folder / "config.yaml")


def compared(name: str) -> Callable[[Path, StableDiffusionAdapter], Own]:
    def make(folder: Path, adapter: StableDiffusionAdapter) -> Own:
        finished_run(folder)
        return Own(folder / name, lambda: load_runs([folder]))

    return make


def checkpoint(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    file = folder / "last.ckpt"
    names = ("state_dict", "optimizer_states", "loops", "callbacks")
    content = {name: {"weight": torch.zeros(100)} for name in names} | {"epoch": 1, "global_step": 2}
    WholeCheckpoints().save_checkpoint(content, file)
    return Own(file, lambda: WholeCheckpoints().load_checkpoint(file, weights_only=True))


def images(name: str) -> Callable[[Path, StableDiffusionAdapter], Own]:
    def make(folder: Path, adapter: StableDiffusionAdapter) -> Own:
        entries, meta = manifest(RECORDS, 7.5), {"generator": "0123", "num_steps": 3}

        def read() -> object:
            claim(folder, entries, meta)
            return load_images(folder, RECORDS)

        claim(folder, entries, meta)
        for entry in entries:
            write_png(folder / entry["file"], torch.zeros(3, 8, 8, dtype=torch.uint8))
        return Own(folder / name, read)

    return make


def manifest_alone(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    own = images("manifest.jsonl")(folder, adapter)
    return Own(own.file, lambda: load_images(folder, RECORDS))


def detections(suffix: str) -> Callable[[Path, StableDiffusionAdapter], Own]:
    def make(folder: Path, adapter: StableDiffusionAdapter) -> Own:
        file = folder / "direct-net.csv"
        source = Source("net", "1", ("knife", "gun"), 0.1, "0123")
        _write(file, Detections(source, ("a", "b"), torch.tensor([[0.25, 0.5], [0.125, 1.0]])))
        return Own(file.with_suffix(suffix), lambda: read_detections(file))

    return make


def real_statistics(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    class Features(torch.nn.Module):
        num_features = 4

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3))[:, [0, 1, 2, 0]]

    def metric() -> FrechetInceptionDistance:
        return FrechetInceptionDistance(feature=Features(), normalize=False)

    first, file = metric(), folder / "real.safetensors"
    first.update(torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8), real=True)
    save_real_statistics(first, file)
    return Own(file, lambda: load_real_statistics(metric(), file))


def judge(folder: Path, adapter: StableDiffusionAdapter) -> Own:
    file = folder / "judge.safetensors"
    save_file(Judge().state_dict(), file)
    return Own(file, lambda: load_judge(folder))


OWN: dict[str, Callable[[Path, StableDiffusionAdapter], Own]] = {
    "kept": kept,
    "shard": shard,
    "rows": rows,
    "scored": scored,
    "compared scores": compared("scored/erased.json"),
    "compared original": compared("scored/original.json"),
    "compared configuration": compared("config.yaml"),
    "checkpoint": checkpoint,
    "manifest": images("manifest.jsonl"),
    "manifest alone": manifest_alone,
    "meta": images("meta.json"),
    "image": images("00001.png"),
    "detections": detections(".csv"),
    "detections' source": detections(".json"),
    "real statistics": real_statistics,
    "judge": judge,
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_a_damaged_file_is_named_with_what_to_do(
    make: Callable[[Path, StableDiffusionAdapter], Own], tmp_path: Path, tiny_adapter: StableDiffusionAdapter
) -> None:
    own = make(tmp_path, tiny_adapter)
    own.read()
    whole = own.file.read_bytes()
    for name, damage in DAMAGES.items():
        own.file.write_bytes(damage(whole))
        with pytest.raises(InputError) as raised:
            own.read()
        said = str(raised.value)
        assert own.file.name in said or own.file.parent.name in said, (name, said)
        assert any(word in said for word in ("delete", "leave that run out", "install")), (name, said)
    own.file.write_bytes(whole)
    own.read()


def test_what_a_killed_run_has_logged_is_drawn_and_the_rest_left_out(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_bytes(b"loss/total_step,step\n0.5,1\n0.25,2\n0.1\n0.x,3\n\xff\xfe\0\0,4\n,,,\n0.2,")
    save_loss_curves([log], tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        picture.verify()


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def plain_mode(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """The mode that ``open`` gives a new file, under several umasks."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_files_have_the_mode_that_any_new_file_has(plain_mode: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "delta.safetensors", {"a": torch.zeros(1)})
    write_json(tmp_path / "metrics.json", {"fid": 1})
    write_png(tmp_path / "0.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    pictures = {"original": {"direct": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}}
    draw({"direct": RECORDS}, pictures, tmp_path / "grid.png")
    WholeCheckpoints().save_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    save_pipeline(tmp_path / "erased", adapter, card_facts("base", ["weapons"], "TRCE", "", 1))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} >= {".safetensors", ".json", ".png", ".ckpt", ".md"}
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {oct(plain_mode)}


def test_a_failed_write_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "grid.png", tmp_path / "erased"
    file.write_text("old")
    folder.mkdir()
    (folder / "README.md").write_text("old")

    def fail(replacing_it: AbstractContextManager[Path], name: str) -> None:
        with replacing_it as aside:
            (aside / name).write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail(replacing(file), "")
    with pytest.raises(KeyError):
        fail(replacing_folder(folder), "README.md")
    assert sorted(tmp_path.rglob("*")) == [folder, folder / "README.md", file]
    assert file.read_text() == (folder / "README.md").read_text() == "old"


def kill_at(moment: int, folder: Path) -> bool:
    """Replace ``folder`` in a process that is killed before its n-th change; whether it was."""

    def replace() -> None:
        left = moment

        def change(event: str, _: object) -> None:
            nonlocal left
            if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "open"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(change)
        with replacing_folder(folder) as aside:
            (aside / "README.md").write_text("new")
            (aside / "index.json").write_text("new")

    process = multiprocessing.get_context("fork").Process(target=replace)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    found, killed, moment = [], True, 0
    while killed:
        place = tmp_path / str(moment)
        (place / "erased").mkdir(parents=True)
        for name in ("README.md", "old.json"):
            (place / "erased" / name).write_text("old")
        killed = kill_at(moment, place / "erased")
        clean_up(place)
        assert [path.name for path in place.iterdir()] == ["erased"]
        content = {file.name: file.read_text() for file in (place / "erased").iterdir()}
        found.append(content)
        moment += 1
    old, new = {"README.md": "old", "old.json": "old"}, {"README.md": "new", "index.json": "new"}
    assert len(found) > 8 and found[0] == old and found[-1] == new
    assert all(content in (old, new) for content in found)


def test_numbers_that_json_cannot_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finite"):
        write_json(tmp_path / "a.json", {"fid": float("nan")})
    assert not list(tmp_path.iterdir())
