"""Real fits, small ones: sampled trajectories, Lightning's loop, our module."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.timing import seconds
from trce_lightning import cli
from trce_lightning.adapters import Adapter
from trce_lightning.concepts import load_concept
from trce_lightning.config.schema import OptimizerConfig, TrainConfig, TrainerConfig, TrajectoryConfig
from trce_lightning.data.datamodule import Batch, TrajectoryDataModule
from trce_lightning.data.plan import TrajectoryPlan, draw_plan
from trce_lightning.data.trajectories import sample_missing
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.module import TRCE
from trce_lightning.tokens import Text

CPU = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)


def compose(*options: str) -> TrainConfig:
    """The configuration of `train.py` with these options."""
    with hydra.initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        config = OmegaConf.to_object(hydra.compose("train", cli.overrides("train", TrainConfig, options)))
    assert isinstance(config, TrainConfig)
    return config


def small(rows: int, epochs: int = 1, **options: Any) -> TrajectoryConfig:
    """One step an epoch, of one malicious and ``rows`` - 1 unconditional latents."""
    return TrajectoryConfig(
        num_trajectories=1,
        num_unconditional=1,
        num_steps=max((rows - 1) * epochs, epochs),
        early_steps=epochs,
        batch_size=1,
        unconditional_per_malicious=rows - 1,
        epochs=epochs,
        **options,
    )


class Fit:
    """Trajectories of one adapter, sampled into a folder, and fits on them."""

    def __init__(self, adapter: Adapter, config: TrajectoryConfig, folder: Path) -> None:
        pairs = load_concept(cli.config_folder() / "concept" / "violence.yaml").pairs()
        self.adapter, self.config, self.folder = adapter, config, folder
        self.plan: TrajectoryPlan = draw_plan(pairs, config, seed=0)
        sample_missing(make_trainer(CPU, folder), adapter, self.plan, folder, config.shard_size)

    def run(self, *callbacks: pl.Callback) -> None:
        """All epochs."""
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = make_trainer(CPU, self.folder, epochs=self.config.epochs, callbacks=callbacks)
        data = TrajectoryDataModule(self.adapter, self.plan, self.folder, self.config, seed=0)
        trainer.fit(TRCE(self.adapter, None, self.config, OptimizerConfig()), data)


class StepsInTurns(pl.Callback):
    """Times whole steps of the loop, and after each, the same network's forward and backward on its batch."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.plain: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step begins."""
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure from the end of the last measurement, so that data, logging and optimizer count."""
        self.ours.append(time.perf_counter() - self.since)
        assert isinstance(pl_module, TRCE)
        adapter = pl_module.adapter
        pl_module.zero_grad()
        self.plain.append(seconds(lambda: forward_backward(adapter, batch)))
        pl_module.zero_grad()
        self.since = time.perf_counter()

    def medians(self) -> tuple[float, float]:
        """Seconds a step, plain and ours, without the first, which warms up."""
        return statistics.median(self.plain[1:]), statistics.median(self.ours[1:])


def inputs(adapter: Adapter, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and text states of a batch, as the module puts them together."""
    z_t = torch.cat([batch["malicious_z_t"], batch["unconditional_z_t"]])
    timestep = torch.cat([batch["malicious_timestep"], batch["unconditional_timestep"]])
    empty = adapter.empty().expand(len(batch["unconditional_z_t"]))
    return z_t, timestep, Text.cat([batch["malicious_text"], empty]).states["clip"]


def forward_backward(adapter: Adapter, batch: Batch) -> None:
    """One forward pass on all latents of the batch and the backward pass of its mean square."""
    z_t, timestep, states = inputs(adapter, batch)
    adapter.denoiser(z_t, timestep, encoder_hidden_states=states).sample.square().mean().backward()


def fit_in_turns(adapter: Adapter, config: TrajectoryConfig) -> tuple[float, float]:
    """Median seconds of forward and backward alone, and of our step."""
    with tempfile.TemporaryDirectory() as folder:
        steps = StepsInTurns()
        Fit(adapter, config, Path(folder)).run(steps)
    return steps.medians()
