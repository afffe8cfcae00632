"""``erase()`` in a process that has its own affairs: afterwards only the weights are others."""

import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import StableDiffusionPipeline
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from omegaconf import OmegaConf
from tiny_runs import KEEP_PROMPTS

from trce_lightning import cli
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.api import compose, erase
from trce_lightning.concepts import Concept
from trce_lightning.errors import InputError
from trce_lightning.jobs import runs
from trce_lightning.module import TRCE
from trce_lightning.runtime import locks

WEAPONS = Concept("weapons", {"a gun": "a kite", "an axe": "a hat"}, templates=("{}", "see {}"))


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A run of the tiny pipeline in a second; captions of its own, since it isn't the embedded model."""
    (captions := tmp_path / "captions.txt").write_text("\n".join(KEEP_PROMPTS))
    return [
        "model=sd15",
        "model.resolution=16",
        f"textual.keep_prompts={captions}",
        "trajectory.num_trajectories=2",
        "trajectory.num_unconditional=2",
        "trajectory.num_steps=3",
        "trajectory.early_steps=2",
        "trajectory.batch_size=2",
        "trajectory.unconditional_per_malicious=1",
        "trajectory.epochs=1",
        "trajectory.gradient_checkpointing=true",
        "trajectory.offload=true",
        "model.channels_last=true",
        "optimizer.lr=0.01",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
    ]


@pytest.fixture(autouse=True)
def held_by_host(tmp_path: Path) -> Iterator[None]:
    """A process that is writing a run of its own when it erases."""
    (folder := tmp_path / "the host's run").mkdir()
    assert locks.hold(folder) is None
    yield
    locks.release()


def open_files() -> list[str]:
    """Return where the process's descriptors lead; the one that lists them is gone again."""
    return [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]


def of_process() -> dict[str, Any]:
    """Return the state of the process that others may rely on."""
    root, store = logging.getLogger(), ConfigStore.instance()
    names = ("hydra", "lightning", "lightning.pytorch", "diffusers", "transformers", "trce_lightning")
    return {
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "locks": [link for link in open_files() if ".lock" in link],
        "folder": Path.cwd(),
        "log": [root.level, *root.handlers, *(logging.getLogger(name).level for name in names)],
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "except hook": sys.excepthook,
        "python's random state": random.getstate(),
        "numpy's": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch's": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
        ),
        "hydra": (GlobalHydra.instance().hydra, VersionBase.instance().version_base),
        "choices": sorted(store.repo) + sorted(store.repo.get("concept", {})),
    }


def of_pipeline(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """Return the state of a pipeline beside its weights."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    parameters = {
        f"{name}.{key}": (parameter.requires_grad, parameter.grad, parameter.dtype, parameter.stride())
        for name, network in networks.items()
        for key, parameter in network.named_parameters()
    }
    return parameters | {
        "modes": [module.training for network in networks.values() for module in network.modules()],
        "hooks": [len(module._forward_hooks) for n in networks.values() for module in n.modules()],
        "checkpointing": pipeline.unet.is_gradient_checkpointing,
        "scheduler": (pipeline.scheduler, dict(pipeline.scheduler.config)),
        "bar": dict(pipeline._progress_bar_config),
        "device": pipeline.device,
    }


def assert_same(found: dict[str, Any], before: dict[str, Any]) -> None:
    assert {key: value for key, value in found.items() if before[key] != value} == {}


def weights(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


@pytest.fixture(params=["frozen", "in training"])
def pipeline(
    request: pytest.FixtureRequest, tiny_pipeline: StableDiffusionPipeline
) -> StableDiffusionPipeline:
    """Once as a user would have it who draws, and once as one who trains it."""
    trains = request.param == "in training"
    for network in (tiny_pipeline.unet, tiny_pipeline.vae, tiny_pipeline.text_encoder):
        network.requires_grad_(trains).train(trains)
    if trains:
        tiny_pipeline.unet.enable_gradient_checkpointing()
    return tiny_pipeline


def test_all_but_the_weights_is_as_before(
    pipeline: StableDiffusionPipeline, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runs.FOLDER_VARIABLE, "the host's")
    process, state, original = of_process(), of_pipeline(pipeline), weights(pipeline)
    assert erase(pipeline, WEAPONS, *options) is pipeline
    assert_same(of_process(), process)
    assert_same(of_pipeline(pipeline), state)
    moved = {name for name, tensor in weights(pipeline).items() if not torch.equal(tensor, original[name])}
    assert {name.rpartition(".to_")[2] for name in moved} == {"q.weight", "k.weight", "v.weight"}
    logging.getLogger().warning("no handler has a file that is gone")


def test_what_fails_midway_leaves_the_process_as_it_was(
    pipeline: StableDiffusionPipeline, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(TRCE, "on_train_batch_end", fail)
    process, state = of_process(), of_pipeline(pipeline)
    with pytest.raises(RuntimeError, match="in the middle"):
        erase(pipeline, WEAPONS, *options)
    assert_same(of_process(), process)
    assert_same(of_pipeline(pipeline), state)


@pytest.mark.parametrize(
    "refused",
    ["trajectory.epochs=0", "trajectory.epoch=1", "trajectory.trainable=none", "plan=true", "streamed=true"],
)
def test_what_is_refused_changes_nothing(
    refused: str, tiny_pipeline: StableDiffusionPipeline, options: list[str]
) -> None:
    process, state, original = of_process(), of_pipeline(tiny_pipeline), weights(tiny_pipeline)
    with pytest.raises(ValueError, match=refused.split(".")[0].split("=")[0]):
        erase(tiny_pipeline, WEAPONS, *options, refused)
    assert_same(of_process(), process)
    assert_same(of_pipeline(tiny_pipeline), state)
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights(tiny_pipeline).items())


def test_a_concept_more_is_erased_with_those_of_the_run_before(options: list[str], tmp_path: Path) -> None:
    """Erase both concepts as ``train.py`` does, in either order, and not the second alone."""
    drinks, edit = Concept("drinks", {"beer": "milk"}), [*options, "stages=[textual]"]

    def erased(concept: Concept, *more: str) -> dict[str, torch.Tensor]:
        return weights(erase(build_tiny_pipeline(), concept, *edit, *more))

    for concept in (WEAPONS, drinks):
        (tmp_path / concept.name).mkdir()
        earlier = OmegaConf.structured(compose(concept, *edit))
        OmegaConf.save(earlier, tmp_path / concept.name / "config.yaml")
    both = erased(drinks, f"previous={tmp_path / 'weapons'}")
    again, alone = erased(WEAPONS, f"previous={tmp_path / 'drinks'}"), erased(drinks)
    assert all(torch.allclose(tensor, again[name], atol=1e-6) for name, tensor in both.items())
    assert not all(torch.allclose(tensor, alone[name], atol=1e-6) for name, tensor in both.items())


def test_the_random_state_of_the_caller_changes_no_weight(
    options: list[str], tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    from conftest import build_tiny_pipeline

    torch.manual_seed(1)
    first = weights(erase(tiny_pipeline, WEAPONS, *options, cache=tmp_path / "cache"))
    torch.manual_seed(2)
    second = weights(erase(build_tiny_pipeline(), WEAPONS, *options, cache=tmp_path / "cache"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def composed_as_before(compose_again: Callable[[], Any]) -> None:
    """A caller's own compose gives the same before and after ours, which has the words of `violence`."""
    before, application = compose_again(), GlobalHydra.instance().hydra
    config = compose("violence", "trajectory.epochs=7")
    assert config.trajectory.epochs == 7 and list(config.concept) == ["violence"]
    assert compose(WEAPONS).concept["weapons"].terms == dict(WEAPONS.terms)
    assert GlobalHydra.instance().hydra is application
    assert compose_again() == before


def test_a_hydra_application_of_the_caller_goes_on(tmp_path: Path) -> None:
    """Its choices may have the names of ours."""
    (tmp_path / "concept").mkdir()
    (tmp_path / "train.yaml").write_text("defaults: [{concept: violence}]\nmine: 1\n")
    (tmp_path / "concept" / "violence.yaml").write_text("other: 2\n")
    ConfigStore.instance().store("own_mine", {"stored": 3}, group="concept")
    choices = dict(ConfigStore.instance().repo["concept"])
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        composed_as_before(lambda: hydra.compose("train"))
        composed_as_before(lambda: hydra.compose("train", ["concept=own_mine"]))
        assert str(VersionBase.instance().version_base) == "1.2"
    assert ConfigStore.instance().repo["concept"] == choices
    del ConfigStore.instance().repo["concept"]["own_mine.yaml"]


def test_a_job_of_a_hydra_main_can_erase(
    tiny_pipeline: StableDiffusionPipeline,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["host.py", f"hydra.run.dir={tmp_path / 'host'}"])
    done: list[str] = []

    def job(config: Any) -> None:
        erase(tiny_pipeline, WEAPONS, *options)
        done.append(hydra.core.hydra_config.HydraConfig.get().job.name)

    hydra.main(config_path=str(cli.config_folder() / "model"), config_name="emoji", version_base="1.3")(job)()
    assert len(done) == 1


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.float16, "32-true", "16-mixed"),
        (torch.float16, "bf16-mixed", "16-mixed"),
        (torch.bfloat16, "32-true", "bf16-mixed"),
    ],
)
def test_half_precision_trains_beside_passes_in_the_same(
    dtype: torch.dtype, precision: str, expected: str, options: list[str]
) -> None:
    half = build_tiny_pipeline().to(dtype)
    before = {name: tensor.clone() for name, tensor in half.unet.state_dict().items()}
    with pytest.raises(InputError, match=rf"trainer\.precision: expected {expected} .* got {precision}"):
        erase(half, WEAPONS, *options, f"trainer.precision={precision}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.unet.state_dict().items())


def test_half_precision_stays_half_precision(options: list[str]) -> None:
    half = build_tiny_pipeline().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in half.unet.state_dict().items()}
    erase(half, WEAPONS, *options, "trainer.precision=bf16-mixed")
    after = half.unet.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"to_q", "to_k", "to_v"}
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}


def test_stage_1_alone_edits_half_precision_in_any_precision_of_passes(options: list[str]) -> None:
    half = build_tiny_pipeline().to(torch.float16)
    before = {name: tensor.clone() for name, tensor in half.unet.state_dict().items()}
    erase(half, WEAPONS, *options, "stages=[textual]", "trainer.precision=32-true")
    changed = {name for name, t in half.unet.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.split(".")[-2] for name in changed} == {"to_k", "to_v"}
    assert {tensor.dtype for tensor in half.unet.state_dict().values()} == {torch.float16}


def test_a_pipeline_that_was_opened_from_a_path_is_named_by_it(tmp_path: Path, options: list[str]) -> None:
    build_tiny_pipeline().save_pretrained(tmp_path / "tiny")
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "tiny", safety_checker=None, requires_safety_checker=False
    )
    assert StableDiffusionAdapter(pipeline).name == str(tmp_path / "tiny")
    erase(pipeline, WEAPONS, *options)
