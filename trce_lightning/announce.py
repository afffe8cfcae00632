"""The first lines of a run: what it will do, and what lies ahead."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from trce_lightning.data.trajectories import missing_shards

if TYPE_CHECKING:
    from trce_lightning.training_run import TrainingRun

log = logging.getLogger(__name__)
TRAINING = "training"
TRAINING_COST = 2.1
"""Operations of a forward and a backward pass for one of the forward pass: 1.71 to 0.803 TFLOP at 512 px."""


def training(run: TrainingRun) -> None:
    """Log model, device, precision; then network evaluations, time, disk and memory of what lies ahead."""
    config, adapter = run.config, run.adapter
    device = run.trainer.strategy.root_device
    parameters = sum(parameter.numel() for parameter in adapter.unet.parameters())
    trainable = sum(
        parameter.numel() for parameter in adapter.trainable(config.trajectory.trainable).values()
    )
    log.info(
        "erasing %s from %s: denoiser of %.1f M parameters (%.2f M train), on %d × %s in %s",
        " + ".join(concept.name for concept in run.session.concepts),
        config.model.name,
        parameters / 1e6,
        trainable / 1e6,
        run.trainer.world_size,
        device.type,
        run.trainer.precision,
    )
    if run.scorers:
        log.info("images that are scored: %s", run.scorers["final"].sampling)
    seconds = seconds_per_evaluation(run) / run.trainer.world_size
    parts = ahead(run)
    durations = expected_seconds(parts, seconds)
    for part, evaluations in parts.items():
        log.info("ahead: %-36s %8d network evaluations, about %s", part, evaluations, _time(durations[part]))
    disk = run.plan.stored_bytes(math.prod(adapter.latent_shape)) if run.plan else 0
    weights = sum(tensor.numel() * tensor.element_size() for tensor in adapter.unet.parameters())
    log.info(
        "ahead: %s in all; trajectories of %.0f MB on disk; one network of %.0f MB in memory, with gradients "
        "and optimizer states of %.0f MB",
        _time(sum(durations.values())),
        disk / 1e6,
        weights / 1e6,
        12 * trainable / 1e6,
    )


def seconds_per_evaluation(run: TrainingRun) -> float:
    """Measured on one batch of pure noise, in the precision of the run."""
    adapter, device = run.adapter, run.trainer.strategy.root_device
    adapter.to(device)
    batch_size = min(16, run.config.metrics.batch_size)
    z_t = torch.randn(batch_size, *adapter.latent_shape, device=device)
    states = adapter.encode([""]).states.expand(batch_size, -1, -1)
    counted = adapter.network_evaluations

    def evaluate() -> float:
        return float(adapter.predict(z_t, adapter.timesteps(10)[0], states).mean())  # waits for the device

    with torch.no_grad(), run.trainer.precision_plugin.forward_context():
        evaluate()  # what comes once, such as loading kernels, is not timed
        start = time.monotonic()
        evaluate()
    adapter.network_evaluations = counted
    return (time.monotonic() - start) / batch_size


def expected_seconds(parts: Mapping[str, int], seconds: float) -> dict[str, float]:
    """How long each part of :func:`ahead` takes at ``seconds`` a forward pass."""
    return {
        part: evaluations * seconds * (TRAINING_COST if part == TRAINING else 1)
        for part, evaluations in parts.items()
    }


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def ahead(run: TrainingRun) -> dict[str, int]:
    """Network evaluations of each part, those that are cached aside; equal to what is counted when it runs.

    Training is counted in forward passes; one takes :data:`TRAINING_COST` times as long.
    """
    parts = {}
    if run.plan is not None:
        parts["trajectories"] = missing_evaluations(run)
        parts[TRAINING] = run.plan.training_evaluations(run.config.trajectory)
    for title, scorer in run.scorers.items():
        if not run.is_scored(scorer):
            parts[f"original model, {title}"] = scorer.planned_evaluations
        if title == "final" or run.plan is not None:
            after_stage_1 = "textual" in run.config.stages
            passes = 1 if title == "final" else after_stage_1 + run.config.trajectory.epochs
            parts[f"erased model, {title}"] = passes * scorer.planned_evaluations
    return parts


def missing_evaluations(run: TrainingRun) -> int:
    """Of trajectories that are not cached."""
    assert run.plan is not None
    missing = missing_shards(run.plan, run.trajectory_folder, run.config.trajectory.shard_size, run.generator)
    return sum(run.plan.evaluations_of(rows) for _, rows in missing)
