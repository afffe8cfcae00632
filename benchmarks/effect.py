"""Test whether the plan's savings change the result: `python -m benchmarks.effect [OPTION …]`.

The options are those of `train.py`. Two savings are exact: a trajectory stops at its last drawn step, and the
safe prompt is evaluated at drawn steps only. The benchmark compares our rows with rows of a plan that stores
every step.

The third saving takes several points from one unconditional trajectory. This is a choice. The benchmark
trains the embedded model with it, with one trajectory for each point, and with the latter's plan from another
seed, which shows the noise. All three start from the same stage 1 and are scored.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.fitting import CPU, compose
from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.config.schema import TrainConfig
from trce_lightning.data.plan import Trajectory, TrajectoryPlan, draw_plan
from trce_lightning.data.trajectories import load_rows, sample_missing
from trce_lightning.emoji.package import weights_folder
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.train import TrainingRun
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.report.tables import one_line

log = logging.getLogger(__name__)
COMPARED = 8
"""The number of trajectories whose rows are compared."""


def whole(row: Trajectory, num_steps: int) -> Trajectory:
    """Return the same trajectory with every step stored."""
    return dataclasses.replace(row, step_indices=tuple(range(num_steps)))


def rows_of(adapter: StableDiffusionAdapter, plan: TrajectoryPlan, kind: str) -> dict[str, Tensor]:
    """Return the sampled rows by trajectory and then by draw."""
    with tempfile.TemporaryDirectory() as folder:
        sample_missing(make_trainer(CPU, Path(folder)), adapter, plan, Path(folder), COMPARED)
        return load_rows(plan, Path(folder), COMPARED, kind)


def largest_difference(config: TrainConfig) -> float:
    """Return the largest difference between our plan and one that stores every step.

    It compares latents and predictions at the drawn steps.
    """
    pairs = [pair for concept in concepts_of(config) for pair in concept.pairs()]
    drawn = draw_plan(pairs, config.trajectory, config.seed)
    ours = dataclasses.replace(drawn, malicious=drawn.malicious[:COMPARED], unconditional=())
    every = tuple(whole(row, ours.num_steps) for row in ours.malicious)
    adapter = cast(StableDiffusionAdapter, load_adapter(weights_folder(), channels_last=True))
    found = rows_of(adapter, ours, "malicious")
    expected = rows_of(adapter, dataclasses.replace(ours, malicious=every), "malicious")
    at = found["trajectory"] * ours.num_steps + found["step_index"]
    assert torch.equal(expected["step_index"][at], found["step_index"])
    kinds = ("z_t", "uncond", "malicious", "safe")
    return max((found[kind] - expected[kind][at]).abs().max().item() for kind in kinds)


def scores(config: TrainConfig, folder: Path) -> str:
    """Run `train.py` without its files. Return one line with its scores and its trajectories' evaluations."""
    config.runs, config.cache = str(folder / "runs"), str(folder)
    run = TrainingRun(config, concepts_of(config))
    run.open()
    run.erase_and_score()
    assert run.erased is not None and run.plan is not None
    return f"{run.plan.network_evaluations} evaluations: {one_line(run.erased.scores)}"


def main() -> None:
    """Log both comparisons to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = ("concept=violence", *sys.argv[1:])
    config = compose(*options)
    log.info("largest difference to every step stored: %.2g", largest_difference(config))
    trajectory = config.trajectory
    draws = trajectory.num_trajectories * trajectory.draws_per_epoch * trajectory.epochs
    points = draws * trajectory.unconditional_per_malicious
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.txt"  # the kept captions depend on the seed
        kept.write_text("\n".join(Session(config, concepts_of(config)).keep_prompts()))
        for title, count, seed in (
            ("ours", trajectory.num_unconditional, config.seed),
            ("a trajectory for each point", points, config.seed),
            ("another seed's", points, config.seed + 1),
        ):
            changed = (
                f"trajectory.num_unconditional={count}",
                f"seed={seed}",
                f"textual.keep_prompts={kept}",
            )
            result = scores(compose(*options, *changed), Path(folder))
            log.info("%s: %s", title, result)


if __name__ == "__main__":
    main()
