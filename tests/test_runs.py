"""Run folders: a new one, the newest unfinished one of an equal configuration, or one that is refused."""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trce_lightning import run, runs
from trce_lightning.schema import ConceptConfig, ModelConfig, OptimizerConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("clean_process")


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
    (folder / "checkpoints").mkdir()
    left = [folder / "checkpoints" / "last.ckpt", folder / "metrics.json"]
    for file in left:
        file.write_text("{}")
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"output: .*mine.*another configuration.*fresh=true"):
        runs.open_folder(replace(config, seed=1))
    assert (folder / "config.yaml").read_bytes() == before and all(file.exists() for file in left)
    assert runs.open_folder(replace(config, seed=1, fresh=True)) == folder
    assert not any(file.exists() for file in left)


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
    """As in a sweep."""
    first, second = (runs.open_folder(config_of(tmp_path, seed=seed)) for seed in (0, 1))
    assert first != second
    assert OmegaConf.load(first / "config.yaml").seed == 0


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
        OmegaConf.save(written, folder / runs.CONFIG)
    drinks = {"drinks": ConceptConfig("drinks", {"beer": "milk"})}
    config = replace(config_of(tmp_path, previous=str(folder)), concept=drinks)
    assert [concept.name for concept in run.merge_previous(config)] == ["weapons", "drinks"]
    drawn_otherwise = ModelConfig(name="tiny", guidance_scale=4, num_inference_steps=9, judge="a.judge")
    config = replace(config, concept=drinks, model=drawn_otherwise)
    assert [concept.name for concept in run.merge_previous(config)] == ["weapons", "drinks"]


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
        run.merge_previous(replace(config_of(tmp_path, previous=str(folder)), model=model))
