"""Run folders: a new one, the newest unfinished one of an equal configuration, or one that is refused."""

import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trce_lightning import __version__
from trce_lightning.config.schema import ConceptConfig, EvalConfig, ModelConfig, OptimizerConfig, TrainConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs import runs, train
from trce_lightning.jobs.evaluate import Evaluation
from trce_lightning.runtime import locks

pytestmark = pytest.mark.usefixtures("clean_process")
ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")  # nothing is imported anew


@pytest.fixture(autouse=True)
def no_lock_stays() -> Iterator[None]:
    yield
    locks.release()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Path, BaseProcess]]:
    """A folder that another process is writing, and that process."""
    process, said = claiming(tmp_path / "runs", time.time(), [0])
    yield said.recv()[0], process
    process.kill()
    process.join()


def claiming(place: Path, start: float, seeds: list[int]) -> tuple[BaseProcess, Connection]:
    """A process that claims a folder for each seed, one after the other, and keeps them all."""
    said, say = FORK.Pipe(duplex=False)

    def claim() -> None:
        claimed, held = [], []
        for number, seed in enumerate(seeds):
            config = config_of(place / str(number), seed=seed)
            time.sleep(max(0.0, start + 0.02 * number - time.time()))
            claimed.append(runs.open_folder(config))
            held.append(locks._held)
            locks._held = None
        say.send(claimed)
        time.sleep(300)

    process = FORK.Process(target=claim)
    process.start()
    return process, said


def config_of(folder: Path, **options: Any) -> TrainConfig:
    concept = {"weapons": ConceptConfig("weapons", {"a gun": "a kite"})}
    return TrainConfig(concept=concept, model=ModelConfig(name="tiny"), runs=str(folder), **options)


def test_a_run_has_a_folder_of_its_own_with_its_configuration(tmp_path: Path) -> None:
    config = config_of(tmp_path, seed=3)
    folder = runs.open_folder(config)
    assert folder.parent == tmp_path / "weapons" / "tiny"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    assert OmegaConf.load(folder / "config.yaml") == OmegaConf.structured(config)
    assert sorted(file.name for file in folder.iterdir()) == [".lock", "config.yaml", "run.log"]
    logging.getLogger().warning("written down")
    assert "written down" in (folder / "run.log").read_text()


def test_the_newest_unfinished_run_of_an_equal_configuration_continues(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = runs.open_folder(config)
    assert runs.open_folder(config) == first
    second = runs.open_folder(replace(config, fresh=True))
    assert second != first
    assert runs.open_folder(config) == second == max(first, second)
    # What says how to run, and not what, doesn't count.
    assert runs.claim_folder(replace(config, plan=True)) == second
    (second / "metrics.json").write_text("{}")
    assert runs.open_folder(config) == first
    (first / "metrics.json").write_text("{}")
    assert runs.open_folder(config) not in (first, second)


def test_another_configuration_is_another_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folders = [
        runs.open_folder(other)
        for other in (config, replace(config, seed=1), replace(config, optimizer=OptimizerConfig(lr=2e-5)))
    ]
    assert len(set(folders)) == 3
    assert [OmegaConf.load(folder / "config.yaml").seed for folder in folders] == [0, 1, 0]
    both = replace(config, concept=config.concept | {"blood": ConceptConfig("blood", {"blood": "paint"})})
    assert runs.open_folder(both).parent == tmp_path / "weapons+blood" / "tiny"


def test_a_chosen_output_is_continued_or_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "runs", output=str(tmp_path / "mine"))
    folder = runs.open_folder(config)
    assert folder == tmp_path / "mine" and not (tmp_path / "runs").exists()
    assert runs.open_folder(config) == folder
    parts = ("checkpoints/last.ckpt", "checkpoints/round-1/last.ckpt", "images/direct/0.png", "erased/a.json")
    left = [
        folder / name for name in (*parts, "delta.safetensors", "logs/version_0/metrics.csv", "metrics.json")
    ]
    mine = folder / "notes" / "mine.png"
    for file in (*left, mine):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"output: .*mine.*another configuration.*fresh=true"):
        runs.open_folder(replace(config, seed=1))
    assert (folder / "config.yaml").read_bytes() == before and all(file.exists() for file in left)
    assert runs.open_folder(replace(config, seed=1, fresh=True)) == folder
    assert not any(file.exists() for file in left) and mine.exists()


def test_a_folder_without_a_run_loses_nothing(tmp_path: Path) -> None:
    other = tmp_path / "images" / "mine.png"
    other.parent.mkdir()
    other.write_text("")
    assert runs.open_folder(config_of(tmp_path / "runs", output=str(tmp_path), fresh=True)) == tmp_path
    assert other.exists()


def test_further_processes_use_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.open_folder(config_of(tmp_path))
    assert os.environ[runs.FOLDER_VARIABLE] == str(folder)
    (folder / "metrics.json").write_text("{}")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.claim_folder(config_of(tmp_path)) == folder
    # What a process before all of this run left, which torchrun's processes inherit.
    elsewhere = str(tmp_path / "elsewhere")
    assert runs.claim_folder(config_of(tmp_path, output=elsewhere)) == Path(elsewhere)


def test_a_second_run_of_one_process_is_not_the_first(tmp_path: Path) -> None:
    """A sweep makes several runs in one process."""
    first, second = (runs.open_folder(config_of(tmp_path, seed=seed)) for seed in (0, 1))
    assert first != second
    assert OmegaConf.load(first / "config.yaml").seed == 0
    logging.getLogger().warning("of the second")
    assert "of the second" in (second / "run.log").read_text()
    assert "of the second" not in (first / "run.log").read_text()


def test_caches_lie_beside_the_runs_or_where_asked(tmp_path: Path) -> None:
    assert runs.cache_folder(config_of(tmp_path)) == tmp_path / "cache"
    assert runs.cache_folder(config_of(tmp_path, cache="/elsewhere")) == Path("/elsewhere")


@pytest.mark.parametrize("older", [False, True])
def test_a_concept_more_is_erased_with_those_of_the_run_before(tmp_path: Path, older: bool) -> None:
    """Options that an earlier version wrote otherwise, or did not know, are of no concern."""
    folder = runs.open_folder(config_of(tmp_path))
    if older:
        written = OmegaConf.load(folder / runs.CONFIG)
        written.export, written.gone = "both", 1
        del written.model["config"]
        written.model.keep = {"captions": "embedded"}
        OmegaConf.save(written, folder / runs.CONFIG)
    drinks = {"drinks": ConceptConfig("drinks", {"beer": "milk"})}
    config = replace(config_of(tmp_path, previous=str(folder)), concept=drinks)
    assert [concept.name for concept in train.merge_previous(config)] == ["weapons", "drinks"]
    drawn_otherwise = ModelConfig(name="tiny", guidance_scale=4, num_inference_steps=9, judge="a.judge")
    config = replace(config, concept=drinks, model=drawn_otherwise)
    assert [concept.name for concept in train.merge_previous(config)] == ["weapons", "drinks"]


@pytest.mark.parametrize(
    ("options", "asked", "got"),
    [
        ({"name": "huge"}, "model.name=huge", "model.name=tiny"),
        ({"path": "folder"}, "model.path=folder", "model.path=None"),
        ({"hub_id": "a/b"}, "model.hub_id=a/b", "model.hub_id=None"),
        ({"revision": "v2"}, "model.revision=v2", "model.revision=None"),
        ({"config": "folder"}, "model.config=folder", "model.config=None"),
        ({"dtype": "float16"}, "model.dtype=float16", "model.dtype=float32"),
    ],
)
def test_a_run_on_another_model_is_no_previous_one(
    options: dict[str, str], asked: str, got: str, tmp_path: Path
) -> None:
    folder = runs.open_folder(config_of(tmp_path))
    model = replace(ModelConfig(name="tiny"), **options)
    with pytest.raises(ValueError, match=f"previous: .*same model, with {asked}, got one with {got}$"):
        train.merge_previous(replace(config_of(tmp_path, previous=str(folder)), model=model))


def test_two_that_start_at_once_have_a_folder_each(tmp_path: Path) -> None:
    tries, start = 20, time.time() + 0.5
    # Every second time the two ask for one configuration.
    both = [claiming(tmp_path, start, [0, seed] * (tries // 2)) for seed in (1, 2)]
    found = [said.recv() for _, said in both]
    for process, _ in both:
        process.kill()
        process.join()
    assert [len(folders) for folders in found] == [tries, tries]
    assert len({*found[0], *found[1]}) == 2 * tries


@pytest.mark.parametrize("fresh", [False, True])
def test_a_live_run_is_not_continued(live: tuple[Path, BaseProcess], tmp_path: Path, fresh: bool) -> None:
    folder, process = live
    before = (folder / "config.yaml").stat().st_mtime_ns
    assert runs.open_folder(config_of(tmp_path / "runs" / "0", fresh=fresh)) != folder
    chosen = config_of(tmp_path, output=str(folder), fresh=fresh)
    with pytest.raises(InputError, match=rf"output: .*{folder}.*process {process.pid} on .* since \d{{4}}-"):
        runs.open_folder(chosen)
    with pytest.raises(InputError, match=rf"output: .*{folder}.*process {process.pid}"):
        evaluation_in(folder).claim()
    assert (folder / "config.yaml").stat().st_mtime_ns == before


def test_a_killed_run_blocks_nobody(live: tuple[Path, BaseProcess], tmp_path: Path) -> None:
    folder, process = live
    process.kill()
    process.join()
    evaluation_in(folder).claim()
    assert runs.open_folder(config_of(tmp_path / "runs" / "0")) == folder


NO_LOCKS = """
import errno, fcntl, os, signal, sys
from pathlib import Path

def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

fcntl.flock = flock  # what Lustre answers where locks are off
from trce_lightning.runtime import locks
assert locks.hold(Path(sys.argv[1])) is None
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_blocks_nobody_where_a_file_system_has_no_locks(tmp_path: Path) -> None:
    for _ in range(2):
        killed = subprocess.run(
            [sys.executable, "-c", NO_LOCKS, str(tmp_path)], capture_output=True, check=False
        )
        assert killed.returncode == -9 and b"start no second run there" in killed.stderr


def evaluation_in(folder: Path) -> Evaluation:
    config = config_of(folder)
    evaluation = Evaluation(EvalConfig(concept=config.concept, model=config.model))
    evaluation.folder = folder
    return evaluation


@pytest.mark.parametrize("content", [b"", b"seed: [1", b"- a", b"\xff\xfe\0", b"other: 1"])
def test_a_damaged_configuration_is_named_and_stops_no_other_run(content: bytes, tmp_path: Path) -> None:
    folder = runs.open_folder(config_of(tmp_path))
    (folder / "config.yaml").write_bytes(content)
    assert runs.open_folder(config_of(tmp_path)) != folder
    options = {"output": str(folder)}, {"previous": str(folder)}
    for option, act in zip(options, (runs.open_folder, train.merge_previous), strict=True):
        with pytest.raises(InputError, match=rf"{folder}.*(choose another|another run|fresh=true)"):
            act(config_of(tmp_path, **option))


def test_what_killed_processes_left_half_written_is_cleaned_up(tmp_path: Path) -> None:
    folder = runs.open_folder(config_of(tmp_path))
    (folder / "checkpoints").mkdir()
    asides = [folder / f".{'0' * 32}.grid.png", folder / "checkpoints" / f".{'1' * 32}.last.ckpt"]
    for aside in asides:
        aside.touch()
    (folder / f".{'2' * 32}.erased" / "unet").mkdir(parents=True)
    (folder / ".old.erased").mkdir()
    (folder / ".old.erased" / "README.md").touch()
    assert runs.open_folder(config_of(tmp_path)) == folder
    assert {file.name for file in folder.rglob("*") if file.is_file()} == {
        ".lock",
        "README.md",
        "config.yaml",
        "run.log",
    }
    assert (folder / "erased" / "README.md").is_file()


def committed(folder: Path) -> str:
    """A repository of ``folder`` as it is; its commit."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "x"], ["rev-parse", "HEAD"]):
        done = subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def recorded(project: Path, **environment: str) -> str:
    """Return the commit that a copy of the package in ``project`` takes for its own."""
    code = "import sys; from trce_lightning.runtime import checkout; sys.stdout.write(checkout.commit())"
    words = [sys.executable, "-c", code]
    changed = os.environ | {"PYTHONPATH": str(project)} | environment
    done = subprocess.run(words, cwd=project, env=changed, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The checkout's own files, in a folder ``project``."""
    project = tmp_path / "outer" / "project"
    ignore = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(ROOT / "trce_lightning", project / "trce_lightning", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", project)
    return project


def test_the_commit_is_this_projects_own(copy: Path) -> None:
    version = f"v{__version__}"
    assert recorded(copy) == version
    outer = committed(copy.parent)
    assert recorded(copy) == version, "that of the repository around"
    own = committed(copy)
    assert recorded(copy) == own != outer
    assert recorded(copy, GIT_DIR=str(copy.parent / ".git")) == own, "that of a hook"
    assert recorded(copy, PATH="/nowhere") == version
    (copy / "trce_lightning" / "errors.py").write_text("# changed\nclass InputError(ValueError): ...\n")
    assert recorded(copy) == f"{own}-dirty"
    (copy / "pyproject.toml").write_text("[project]\nname = 'another'\n")
    assert recorded(copy) == version, "that of a project that contains the package"
