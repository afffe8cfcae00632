"""The stages of TRCE are applied in the order in which they are named, to the scenes that are asked for."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from omegaconf import OmegaConf
from tiny_runs import WEAPONS
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.api import compose
from trce_lightning.compare import TITLES
from trce_lightning.jobs.erase import MethodRun
from trce_lightning.jobs.train import TrainingRun

TINY = (
    "metrics.enabled=false",
    "model=sd15",
    "model.resolution=16",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trajectory.num_trajectories=4",
    "trajectory.num_unconditional=2",
    "trajectory.num_steps=4",
    "trajectory.early_steps=2",
    "trajectory.trainable=*attn2.to_*",
    "optimizer.lr=1e-2",
)


Erased = dict[str, tuple[dict[str, Tensor], TrainingRun]]
"""The changed tensors and the run of each order of stages."""


@pytest.fixture(scope="module")
def erased(tmp_path_factory: pytest.TempPathFactory) -> Erased:
    """Return what runs of each order of stages change, and the runs."""
    found = {}
    for stages in ("trajectory", "textual", "trajectory,textual", "textual,trajectory"):
        folder = tmp_path_factory.mktemp("run")
        config = compose(WEAPONS, f"stages=[{stages}]", f"runs={folder}", *TINY)
        run = TrainingRun(config, [WEAPONS], StableDiffusionAdapter(build_tiny_pipeline()))
        run.open()
        run.erase_and_score()
        (changed,) = run.changed().values()
        found[stages] = {name: tensor.clone() for name, tensor in changed.items()}, run
    return found


def test_stage_1_edits_what_stage_2_has_trained_if_it_comes_last(
    erased: Erased,
) -> None:
    trained, _ = erased["trajectory"]
    last, run = erased["trajectory,textual"]
    assert run.edit is not None and last.keys() == trained.keys()
    moved = 0
    for name, weight in trained.items():
        edited = ".attn2.to_k." in name or ".attn2.to_v." in name
        expected = (weight.double() @ run.edit.transform).float() if edited else weight
        torch.testing.assert_close(last[name], expected, atol=1e-6, rtol=1e-5)
        moved += edited and not torch.allclose(weight, last[name], atol=1e-4)
    assert moved


def test_stage_1_comes_first_if_it_is_named_first(
    erased: Erased,
) -> None:
    """Another order gives other weights, because stage 2 then trains from edited ones."""
    first, _ = erased["textual,trajectory"]
    last, run = erased["trajectory,textual"]
    assert not all(torch.allclose(first[name], last[name], atol=1e-5) for name in first)
    assert run.tuning_passes == 3 and erased["textual,trajectory"][1].tuning_passes == 4
    assert "trajectory + textual" in run.method_title()
    assert TITLES["trajectory", "textual"] == "TRCE (V+T)"


def test_a_run_stores_its_edit_and_the_order_of_its_stages(
    erased: Erased,
) -> None:
    for stages, (_, run) in erased.items():
        assert (run.folder / "edit.safetensors").exists() == ("textual" in stages)
        assert OmegaConf.load(run.folder / "config.yaml").stages == stages.split(",")


@pytest.mark.parametrize(("scenes", "in_stage_2"), [(0, False), (6, True), (6, False)])
def test_scenes_reach_stage_1_and_where_they_are_asked_for_stage_2(
    scenes: int, in_stage_2: bool, tmp_path: Path
) -> None:
    options = (f"scene_templates={scenes}", f"trajectory.scenes={str(in_stage_2).lower()}")
    config = compose(WEAPONS, f"runs={tmp_path}", *TINY, *options, "trajectory.num_trajectories=40")
    run = TrainingRun(config, [WEAPONS], StableDiffusionAdapter(build_tiny_pipeline()))
    run.open()
    run.solve()
    assert run.statistics is not None and run.plan is not None
    assert run.statistics.pairs["weapons"].count == len(WEAPONS.terms) * (len(WEAPONS.templates) + scenes)
    alone = {pair.malicious for pair in WEAPONS.pairs()}
    trained = {row.pair.malicious for row in run.plan.malicious if row.pair}
    assert trained >= alone and (trained > alone) == (scenes > 0 and in_stage_2)


def test_a_method_gets_the_concepts_with_scenes_and_without(tmp_path: Path) -> None:
    config = compose(WEAPONS, f"runs={tmp_path}", "method=uce", "scene_templates=4", *TINY[:5])
    run = MethodRun(config, [WEAPONS], StableDiffusionAdapter(build_tiny_pipeline()))
    job = run._job()
    assert list(job.alone) == [WEAPONS]
    assert [len(each.templates) for each in job.concepts] == [len(WEAPONS.templates) + 4]
