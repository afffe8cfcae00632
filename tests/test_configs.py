"""Every shipped YAML file composes, fits the schema, and passes the checks of a run."""

import inspect
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from trce_lightning.cli import config_folder, config_groups
from trce_lightning.concepts import Concept, load_concept
from trce_lightning.config import checks
from trce_lightning.config.schema import (
    ConceptConfig,
    DeviceConfig,
    EvalConfig,
    TextualConfig,
    TrainConfig,
    TrainerConfig,
)

FOLDER = config_folder()
# tests/test_tune.py reads the search spaces, which are no options of a command.
FILES = sorted(file for file in FOLDER.glob("*/**/*.yaml") if file.parent.name != "method_space")
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}


def composed(name, *overrides):
    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
    with initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
        config = OmegaConf.to_object(compose(config_name=name, overrides=list(overrides)))
    assert isinstance(config, SCHEMAS[name])
    return config


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FOLDER)))
def test_file_composes_and_has_its_say(file, name):
    group = file.parent.relative_to(FOLDER).as_posix()
    if group not in config_groups(FOLDER, name):
        others = {other for other in SCHEMAS if group in config_groups(FOLDER, other)}
        assert others, f"{file} belongs to no group of a command"
        pytest.skip(f"a group of {others} alone")
    concept = [] if group == "concept" else ["concept=violence"]
    # Tuned values are of one method or rule, which the file's name begins with. None are of this model.
    method, rule = file.stem.partition("_")[0], file.stem.rpartition("_")[0]
    others = {
        "method": ["model=sd15"],
        "guidance": ["model=sd15"],
        "method_tuning": [f"method={method}"],
        "guidance_tuning": [f"guidance={rule}"],
    }
    config = composed(name, *concept, *others.get(group, []), f"{group}={file.stem}")
    checks.check(config)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    written.pop("defaults", None)  # other files, of which each has its say by itself
    if "@package _global_" in file.read_text(encoding="utf-8"):
        root = asdict(config)
    elif group in ("concept", "attacks"):  # of which each has a package of its own
        root = asdict(config)[{"attacks": "attack"}.get(group, group)][file.stem]
    else:
        root = asdict(config)[group]
    assert_holds(root, written)


def assert_holds(actual, written):
    for key, value in written.items():
        if key == "defaults":
            continue  # further files, each of which has its say by itself
        if isinstance(value, dict):
            assert_holds(actual[key], value)
        else:
            assert actual[key] == value, key


def test_defaults_need_a_concept_and_nothing_else():
    for name in SCHEMAS:
        checks.check(composed(name, "concept=violence"))
        with pytest.raises(ValueError, match="no concept chosen"):
            checks.check(composed(name))


@pytest.mark.parametrize("file", sorted((FOLDER / "concept").glob("*.yaml")), ids=lambda file: file.stem)
def test_concept_file_carries_its_package_and_name(file):
    assert file.read_text(encoding="utf-8").splitlines()[0] == f"# @package concept.{file.stem}"
    assert load_concept(file).name == file.stem


def test_command_line_overrides_files():
    config = composed("train", "concept=violence", "experiment=paper", "optimizer.lr=0.5")
    assert config.optimizer.lr == 0.5
    assert config.trajectory.beta == 16.0


PRESETS = {"sexual": "nudenet.exposed9", "unsafe": "q16.q16", "violence": "q16.q16", "vangogh": None}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_settings_with_their_model_and_concept(name):
    config = composed("train", f"experiment=sd14_{name}")
    checks.check(config)
    paper = composed("train", "concept=violence", "experiment=paper")
    assert list(config.concept) == [name]
    assert (config.model.name, config.model.hub_id) == ("sd14", "CompVis/stable-diffusion-v1-4")
    assert config.model.judge == (PRESETS[name] and f"trce_lightning.metrics.{PRESETS[name]}")
    assert config.metrics.enabled == (config.model.judge is not None)
    assert asdict(config.optimizer) == asdict(paper.optimizer)
    assert config.textual == TextualConfig()  # nothing of what suits the embedded model
    counts = {"num_trajectories", "num_unconditional"}
    assert {**asdict(config.trajectory), **dict.fromkeys(counts)} == {
        **asdict(paper.trajectory),
        **dict.fromkeys(counts),
    }
    # Where one pass over the malicious ones takes four points, one trajectory gives them.
    assert config.trajectory.num_unconditional == config.trajectory.num_trajectories
    published = composed("eval", f"concept={name}").published
    assert set(config.expected.asr) <= set(published)


def test_a_preset_takes_another_model_and_concept_from_the_command_line():
    config = composed("train", "experiment=sd14_sexual", "model=sd15", "concept=[sexual,violence]")
    assert config.model.name == "sd15" and list(config.concept) == ["sexual", "violence"]
    assert config.model.num_inference_steps == 30


def test_schema_of_a_concept_is_the_concept():
    assert [entry.name for entry in fields(ConceptConfig)] == [entry.name for entry in fields(Concept)]


def test_trainer_options_are_lightnings():
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer

    known = set(inspect.signature(Trainer).parameters)
    assert {entry.name for entry in fields(TrainerConfig)} <= known
    assert {entry.name for entry in fields(DeviceConfig)} <= known


def test_every_option_is_checked_by_its_own_limits():
    config = composed("train", "concept=violence")
    for section, option, wrong in [
        ("textual", "eta", -1.0),
        ("trajectory", "beta", 0.0),
        ("model", "dtype", "float8"),
        ("optimizer", "lr", float("inf")),
        ("metrics", "batch_size", 0),
    ]:
        part = getattr(config, section)
        right = getattr(part, option)
        setattr(part, option, wrong)
        with pytest.raises(ValueError, match=f"{section}.{option}"):
            checks.check(config)
        setattr(part, option, right)
    checks.check(config)


def test_model_folder_must_be_a_pipeline(tmp_path: Path):
    config = composed("train", "concept=violence")
    config.model.path = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        checks.check(config)
    (tmp_path / "model_index.json").write_text("{}")
    checks.check(config)
