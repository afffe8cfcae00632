"""The plan: what is drawn, and that its cost is exactly what sampling takes."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny_pipeline
from tiny_runs import KEEP_PROMPTS, WEAPONS, cpu_trainer, plan_of, trajectory_config

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
    kept = Trajectory(0, seed=1, step_indices=(1, 4), pair=None, prompt="a dog")
    assert [kept.network_evaluations(guided=guided) for guided in (True, False)] == [10, 5]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shard_size": 3, "draws_per_epoch": 5},
        {"unconditional_per_malicious": 0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "draws_per_epoch": 1, "epochs": 1},
        {"kept_per_malicious": 1, "num_kept": 3},
        {"kept_per_malicious": 2, "num_kept": 5, "guidance_scale": 1.0, "unconditional_per_malicious": 0},
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


def test_kept_prompts_take_turns_and_change_no_other_trajectory() -> None:
    config = trajectory_config(kept_per_malicious=2, num_kept=6)
    plan, without = plan_of(config), plan_of(trajectory_config())
    assert (plan.malicious, plan.unconditional) == (without.malicious, without.unconditional)
    prompts = [row.prompt for row in plan.kept]
    assert set(prompts[:4]) == set(KEEP_PROMPTS) and prompts[4:] == prompts[:2]
    # 4 trajectories of 2 epochs with 2 draws, 2 points each: 32 rows of 6 trajectories, from all 5 steps.
    assert [len(row.step_indices) for row in plan.kept] == [6] * 6
    assert {step for row in plan.kept for step in row.step_indices} == set(range(5))
    seeds = {row.seed for row in (*plan.malicious, *plan.unconditional, *plan.kept)}
    assert len(seeds) == len(plan.malicious) + len(plan.unconditional) + len(plan.kept)


def test_each_concept_has_its_number_of_trajectories_and_of_prompts_to_keep() -> None:
    config = trajectory_config(kept_per_malicious=2, num_kept=3)
    one, two = (draw_plan(WEAPONS.pairs(), config, 0, KEEP_PROMPTS, concepts=count) for count in (1, 2))
    assert (len(one.malicious), len(one.kept)) == (4, 3) and (len(two.malicious), len(two.kept)) == (8, 6)
    assert one == draw_plan(WEAPONS.pairs(), config, 0, KEEP_PROMPTS)
    points = len(two.malicious) * config.epochs * config.draws_per_epoch
    assert sum(len(row.step_indices) for row in two.kept) >= 2 * points
    assert sum(len(row.step_indices) for row in two.unconditional) >= 2 * points
    assert two.training_evaluations(config, 0) == 2 * one.training_evaluations(config, 0)


def test_a_plan_without_kept_prompts_has_its_earlier_fingerprint() -> None:
    """Caches of versions that knew no kept prompts stay valid."""
    plan = plan_of(trajectory_config())
    facts = {
        "malicious": [_earlier_facts(row) for row in plan.malicious],
        "unconditional": [_earlier_facts(row) for row in plan.unconditional],
        "num_steps": 5,
        "guidance_scale": 3.0,
    }
    text = json.dumps(["model", facts], sort_keys=True)
    assert plan.fingerprint("model") == hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    kept = [
        plan_of(trajectory_config(kept_per_malicious=1, num_kept=number)).fingerprint("model")
        for number in (3, 4)
    ]
    assert len({plan.fingerprint("model"), *kept}) == 3


def _earlier_facts(row: Trajectory) -> dict[str, Any]:
    return {"index": row.index, "seed": row.seed, "step_indices": row.step_indices, "pair": row.pair}


def test_no_prompts_to_keep_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trajectory\.kept_per_malicious: expected 0.*got 1"):
        draw_plan(WEAPONS.pairs(), trajectory_config(kept_per_malicious=1), 0)


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
