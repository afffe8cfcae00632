"""The plan: what is drawn, and that its cost is exactly what sampling takes."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from conftest import build_tiny_pipeline
from tiny_runs import WEAPONS, cpu_trainer, plan_of, trajectory_config

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import PromptPair
from trce_lightning.config.schema import TrajectoryConfig
from trce_lightning.data.plan import Trajectory, draw_plan
from trce_lightning.data.trajectories import sample_missing


def test_cost_by_hand() -> None:
    """Steps 0, 1, 2 with ∅ and c_m, and c_s at 0 and 2; alone, ∅ at 0 … 3."""
    malicious = Trajectory(0, seed=1, step_indices=(2, 0, 2), pair=PromptPair("a gun", "a kite", "a gun"))
    assert (malicious.num_steps, malicious.network_evaluations(guided=True)) == (3, 8)
    assert malicious.network_evaluations(guided=False) == 7
    unconditional = Trajectory(0, seed=1, step_indices=(3,), pair=None)
    assert {unconditional.network_evaluations(guided=guided) for guided in (True, False)} == {4}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shard_size": 3, "draws_per_epoch": 5},
        {"unconditional_per_malicious": 0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "draws_per_epoch": 1, "epochs": 1},
    ],
)
def test_sampling_takes_the_planned_evaluations(options: dict[str, float], tmp_path: Path) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    config = trajectory_config(**options)
    plan = plan_of(config)
    said = sample_missing(cpu_trainer(tmp_path), adapter, plan, tmp_path, config.shard_size)
    assert adapter.network_evaluations == plan.network_evaluations == said > 0
    assert sample_missing(cpu_trainer(tmp_path), adapter, plan, tmp_path, config.shard_size) == 0
    assert adapter.network_evaluations == said


def test_the_papers_setting_is_within_the_budget() -> None:
    plan = draw_plan(WEAPONS.pairs(), TrajectoryConfig(), seed=0)
    assert len(plan.malicious) == 100
    assert all(len(row.step_indices) == 3 for row in plan.malicious)
    assert plan.network_evaluations <= 15_000


@pytest.mark.parametrize("draws_per_epoch", [1, 3, 5])
def test_a_pass_over_the_steps_has_no_repeats(draws_per_epoch: int) -> None:
    plan = plan_of(trajectory_config(draws_per_epoch=draws_per_epoch, epochs=4))
    for rows, num_steps in ((plan.malicious, 3), (plan.unconditional, 5)):
        for row in rows:
            passes = [row.step_indices[i : i + num_steps] for i in range(0, len(row.step_indices), num_steps)]
            assert all(len(set(steps)) == len(steps) for steps in passes)
            assert all(set(steps) == set(range(num_steps)) for steps in passes[:-1])
    assert all(len(row.step_indices) == 4 * draws_per_epoch for row in plan.malicious)


def test_steps_are_uniform_and_prompts_take_turns() -> None:
    plan = plan_of(trajectory_config(num_trajectories=600, draws_per_epoch=1, epochs=1, early_steps=3))
    steps = Counter(row.step_indices[0] for row in plan.malicious)
    assert set(steps) == {0, 1, 2}
    # 200 ± 4.3 standard deviations of 11.5.
    assert all(abs(count - 200) < 50 for count in steps.values())
    assert set(Counter(row.pair for row in plan.malicious).values()) == {100}
    assert len({row.seed for row in (*plan.malicious, *plan.unconditional)}) == 603
    assert {row.pair for row in plan.unconditional} == {None}


def test_enough_unconditional_rows_for_every_epoch() -> None:
    config = trajectory_config(num_unconditional=7)
    wanted = (
        config.num_trajectories * config.draws_per_epoch * config.epochs * config.unconditional_per_malicious
    )
    plan = plan_of(config)
    assert 0 <= sum(len(row.step_indices) for row in plan.unconditional) - wanted < 7
    assert plan_of(trajectory_config(unconditional_per_malicious=0)).unconditional == ()


def test_the_same_seed_draws_the_same_plan() -> None:
    config = trajectory_config()
    assert plan_of(config) == plan_of(config)
    assert plan_of(config).fingerprint("model") == plan_of(config).fingerprint("model")
    steps, prompts = (
        [[getattr(row, name) for row in plan_of(config, seed).malicious] for seed in (0, 1)]
        for name in ("step_indices", "pair")
    )
    assert steps[0] != steps[1] and prompts[0] != prompts[1]


def test_the_fingerprint_covers_model_and_plan() -> None:
    plan = plan_of(trajectory_config())
    others = [
        plan_of(trajectory_config(), seed=1),
        plan_of(trajectory_config(num_steps=6)),
        plan_of(trajectory_config(guidance_scale=2.0)),
        dataclasses.replace(plan, malicious=plan.malicious[::-1]),
    ]
    prompts = [("a gun", "a kite"), ("a gun", "a hat")]
    others += [draw_plan([PromptPair(*pair, "a gun")], trajectory_config(), 0) for pair in prompts]
    found = {
        plan.fingerprint("model"),
        plan.fingerprint("other"),
        *(other.fingerprint("model") for other in others),
    }
    assert len(found) == 2 + len(others)


def test_more_early_steps_than_steps_are_refused() -> None:
    assert plan_of(trajectory_config(num_steps=4, early_steps=4)).num_steps == 4
    with pytest.raises(ValueError, match=r"trajectory\.early_steps.*= 4, got 5"):
        plan_of(trajectory_config(num_steps=4, early_steps=5))
