"""Small jobs for erasers on the tiny pipeline, as ``train.py`` would give them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tiny_runs import KEEP_PROMPTS, WEAPONS, cpu_trainer
from torch import Tensor

from trce_lightning import cli
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.erasers.protocol import Job
from trce_lightning.erasers.tuning import Batch, Points, TunedEraser

TUNED: dict[str, Any] = {
    "iterations": 3,
    "batch_size": 2,
    "draws": 2,
    "num_steps": 4,
    "guidance_scale": 2.0,
    "lr": 1e-2,
}
"""A tuned method's options for a second's work."""

HARDENED: dict[str, Any] = {
    key: TUNED[key] for key in ("iterations", "draws", "num_steps", "guidance_scale", "lr")
} | {
    "edit": "before",
    "strength": 1.0,
    "learnt": 2,
    "moved": 2,
    "keyed": 1,
    "other": 1,
    "keep": 2,
    "unconditional": 2,
    "pool": 3,
    "visited": 1,
    "learnt_steps": 1,
    "moved_steps": 1,
    "anew_every": 2,
    "anew_share": 0.5,
    "concept_runs": 3,
    "keep_runs": 2,
    "unconditional_runs": 1,
    "early_steps": 3,
    "other_from": 1,
}
"""Those of the hardened method."""

STEREO_SMALL: dict[str, Any] = {
    "rounds": 2,
    "round_iterations": 2,
    "round_lr": 1e-2,
    "inversion_steps": 3,
    "inversion_lr": 0.05,
    "inversion_batch_size": 2,
    "initial": "cat",
    "levels": 4,
    "pictures": 2,
    "picture_guidance_scale": 2.0,
}
"""STEREO's, beside :data:`TUNED`."""

MACE_SMALL: dict[str, Any] = {key: own for key, own in TUNED.items() if key != "draws"} | {
    "pictures": 2,
    "levels": 4,
    "ridge": 0.1,
}
"""MACE's."""


def published(name: str) -> dict[str, Any]:
    """Return the options of a method's file, which are the published ones where there are some."""
    options = yaml.safe_load((cli.config_folder() / "method" / f"{name}.yaml").read_text())
    return {key: value for key, value in options.items() if key not in ("name", "_target_")}


def quick(names: Iterable[str], *chosen: str) -> list[Any]:
    """Return parameters of a test of which all but the chosen are slow."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in names]


D = 12
"""The width of states in tests of the algebra alone."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Return the same normal numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Alone:
    """A trainer of one process, for a data module outside a fit."""

    accumulate_grad_batches = 1

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.global_rank, self.world_size = rank, world_size


def batch_of(eraser: TunedEraser, harness: "Harness", step: int = 0) -> Batch:
    """Sample the teacher's predictions, and return a step's batch."""
    sources = eraser.sources(harness.job)
    teachers = eraser.teachers(harness.job, sources)
    for each in teachers.values():
        each.sample(harness.job.trainer, harness.adapter, eraser.encoder(harness.adapter))
    data = Points({kind: (teachers[kind], source.per_step) for kind, source in sources.items()}, 3, 0)
    data.trainer = Alone()  # type: ignore[assignment]
    data.setup("fit")
    return data.collate(step)


class Harness:
    """A stand-in for the run: it fits on one CPU, and counts each part's network evaluations."""

    def __init__(
        self, adapter: StableDiffusionAdapter, folder: Path, concepts: Sequence[Concept] = (WEAPONS,)
    ) -> None:
        self.adapter, self.folder, self.counted = adapter, folder, dict[str, int]()
        self.modules: list[pl.LightningModule] = []
        self.job = Job(
            adapter,
            concepts,
            concepts,
            cpu_trainer(folder),
            folder / "cache",
            adapter.fingerprint(),
            0,
            lambda: list(KEEP_PROMPTS),
            self.fit,
            self.part,
        )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self.adapter.network_evaluations
        yield
        self.counted[name] = self.adapter.network_evaluations - before

    def fit(self, module: pl.LightningModule, data: pl.LightningDataModule, part: str) -> None:
        self.modules.append(module)
        with self.part(part):
            cpu_trainer(self.folder).fit(module, data)
