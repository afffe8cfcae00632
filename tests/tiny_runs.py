"""Small concepts, plans and trainers that the tests of the training half share."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import TextualConfig, TrainerConfig, TrajectoryConfig
from trce_lightning.data.plan import TrajectoryPlan, draw_plan
from trce_lightning.data.trajectories import sample_missing
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.textual import TextualStatistics, kept_statistics, textual_statistics

WEAPONS = Concept("weapons", {"a gun": "a kite", "an axe": "a hat"}, templates=("{}", "see {}", "{} at sea"))
KEEP_PROMPTS = ("a dog", "one red car", "the sea at night", "tea")


def trajectory_config(**options: Any) -> TrajectoryConfig:
    """Four malicious trajectories with two draws in each of two epochs."""
    small: dict[str, Any] = {
        "num_trajectories": 4,
        "num_unconditional": 3,
        "num_steps": 5,
        "early_steps": 3,
        "beta": 4.0,
        "margin": 1.0,
        "batch_size": 4,
        "unconditional_per_malicious": 2,
        "draws_per_epoch": 2,
        "epochs": 2,
        "shard_size": 2,
    }
    return TrajectoryConfig(**(small | options))


def plan_of(config: TrajectoryConfig, seed: int = 0) -> TrajectoryPlan:
    """The plan for the concept above, and for ``KEEP_PROMPTS`` where the config asks for them."""
    return draw_plan(WEAPONS.pairs(), config, seed, KEEP_PROMPTS)


def cpu_trainer(
    folder: Path, *, epochs: int = 1, callbacks: tuple[pl.Callback, ...] = (), **options: Any
) -> pl.Trainer:
    """A Trainer as ``train.py`` makes it, on one CPU process unless ``options`` say otherwise."""
    cpu = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False}
    return make_trainer(TrainerConfig(**(cpu | options)), folder, epochs=epochs, callbacks=callbacks)


def sample_plan(adapter: StableDiffusionAdapter, config: TrajectoryConfig, folder: Path) -> TrajectoryPlan:
    """Sample the config's trajectories into ``folder``; returns their plan."""
    plan = plan_of(config)
    sample_missing(cpu_trainer(folder), adapter, plan, folder, config.shard_size)
    return plan


def stage1_statistics(
    adapter: StableDiffusionAdapter, config: TextualConfig, concepts: Sequence[Concept] = (WEAPONS,)
) -> TextualStatistics:
    """Return what stage 1 is solved from when ``KEEP_PROMPTS`` are kept."""
    return textual_statistics(adapter, concepts, kept_statistics(adapter, KEEP_PROMPTS), config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Around a forking strategy: a forked process would wait for OpenMP threads that its parent alone has."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if variable is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = variable
