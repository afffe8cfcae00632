"""Real fits, small ones: sampled trajectories, Lightning's loop, our module."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.timing import seconds, synchronize
from trce_lightning import cli
from trce_lightning.adapters import Adapter
from trce_lightning.concepts import load_concept
from trce_lightning.config.schema import (
    EvalConfig,
    OptimizerConfig,
    TrainConfig,
    TrainerConfig,
    TrajectoryConfig,
)
from trce_lightning.data.datamodule import Batch, TrajectoryDataModule
from trce_lightning.data.plan import TrajectoryPlan, draw_plan
from trce_lightning.data.trajectories import sample_missing
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.module import TRCE
from trce_lightning.tokens import Text

CPU = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)


def compose(*options: str) -> TrainConfig:
    """The configuration of `train.py` with these options."""
    config = _composed("train", TrainConfig, options)
    assert isinstance(config, TrainConfig)
    return config


def compose_evaluation(*options: str) -> EvalConfig:
    """The configuration of `eval.py` with these options."""
    config = _composed("eval", EvalConfig, options)
    assert isinstance(config, EvalConfig)
    return config


def _composed(name: str, schema: type, options: Sequence[str]) -> Any:
    with hydra.initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        return OmegaConf.to_object(hydra.compose(name, cli.overrides(name, schema, options)))


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

    def __init__(
        self, adapter: Adapter, config: TrajectoryConfig, folder: Path, place: TrainerConfig = CPU
    ) -> None:
        pairs = load_concept(cli.config_folder() / "concept" / "violence.yaml").pairs()
        self.adapter, self.config, self.folder, self.place = adapter, config, folder, place
        self.plan: TrajectoryPlan = draw_plan(pairs, config, seed=0)
        sample_missing(make_trainer(place, folder), adapter, self.plan, folder, config.shard_size)

    def run(self, *callbacks: pl.Callback, config: TrajectoryConfig | None = None) -> None:
        """Fit all epochs; ``config`` is another one that takes its points from the same trajectories."""
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        chosen = config or self.config
        trainer = make_trainer(self.place, self.folder, epochs=chosen.epochs, callbacks=callbacks)
        data = TrajectoryDataModule(self.adapter, self.plan, self.folder, chosen, seed=0)
        trainer.fit(TRCE(self.adapter, None, chosen, OptimizerConfig()), data)


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
        synchronize(pl_module.device)
        self.ours.append(time.perf_counter() - self.since)
        assert isinstance(pl_module, TRCE)
        adapter, precision = pl_module.adapter, trainer.precision_plugin
        arguments = [part.to(pl_module.device) for part in inputs(adapter, batch)]

        def plain() -> None:
            with precision.forward_context():
                loss = mean_square(adapter, *arguments)
            loss.backward()
            synchronize(pl_module.device)

        pl_module.zero_grad()
        synchronize(pl_module.device)
        self.plain.append(seconds(plain))
        pl_module.zero_grad()
        self.since = time.perf_counter()

    def medians(self) -> tuple[float, float]:
        """Seconds a step, plain and ours, without the first, which warms up."""
        return statistics.median(self.plain[1:]), statistics.median(self.ours[1:])


def inputs(adapter: Adapter, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and text states of a batch, as the module puts them together."""
    z_t, timestep, text = (batch[f"malicious_{part}"] for part in ("z_t", "timestep", "text"))
    if "unconditional_z_t" in batch:
        z_t = torch.cat([z_t, batch["unconditional_z_t"]])
        timestep = torch.cat([timestep, batch["unconditional_timestep"]])
        empty = adapter.empty().to(z_t.device).expand(len(batch["unconditional_z_t"]))
        text = Text.cat([text, empty])
    return z_t, timestep, text.states["clip"]


def mean_square(adapter: Adapter, z_t: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
    """Return the simplest loss of one forward pass on all latents of a batch."""
    output: Tensor = adapter.denoiser(z_t, timestep, encoder_hidden_states=states).sample
    return output.square().mean()


def fit_in_turns(adapter: Adapter, config: TrajectoryConfig) -> tuple[float, float]:
    """Median seconds of forward and backward alone, and of our step."""
    with tempfile.TemporaryDirectory() as folder:
        steps = StepsInTurns()
        Fit(adapter, config, Path(folder)).run(steps)
    return steps.medians()
