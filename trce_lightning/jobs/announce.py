"""Log the first lines of a run: the model, the device, and the cost of each part."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trce_lightning.data.trajectories import missing_shards
from trce_lightning.runtime.resources import is_out_of_memory
from trce_lightning.tokens import Text

if TYPE_CHECKING:
    from trce_lightning.jobs.train import TrainingRun

log = logging.getLogger(__name__)
TRAINING = "training"
TRAINING_COST = 2.1
"""The cost of a forward and backward pass in forward passes: 1.71 / 0.803 TFLOP at 512 px."""


MOST_LATENTS = 16
"""The largest number of latents in a timed evaluation."""
QUICK, LONG = 0.1, 0.5
"""Limits in seconds.

Above ``QUICK``, no larger batch is timed. Above ``LONG``, a CPU's evaluation isn't repeated.
"""


def training(run: TrainingRun) -> None:
    """Log model, device and precision.

    Then log the run's network evaluations, time, disk space and memory.
    """
    config, adapter = run.config, run.adapter
    device = run.trainer.strategy.root_device
    parameters = sum(parameter.numel() for parameter in adapter.denoiser.parameters())
    log.info(
        "erasing %s from %s: denoiser of %.1f M parameters%s, on %d × %s in %s",
        " + ".join(concept.name for concept in run.session.concepts),
        config.model.name,
        parameters / 1e6,
        f" ({run.trainable_numbers() / 1e6:.2f} M train)" if run.trains else "",
        run.trainer.world_size,
        device.type,
        run.trainer.precision,
    )
    if run.scorers:
        log.info("images that are scored: %s", run.scorers["final"].sampling)
    seconds = seconds_per_evaluation(run)
    if seconds is None:
        log.warning(
            "out of memory: one latent of %d px has no room on %s beside the model, so no time is estimated; "
            "see model.resolution, trainer.precision, trainer.accelerator=cpu",
            adapter.side,
            device.type,
        )
    parts = ahead(run)
    durations = expected_seconds(parts, (seconds or math.nan) / run.trainer.world_size)
    for part, evaluations in parts.items():
        log.info("ahead: %-36s %8d network evaluations, about %s", part, evaluations, _time(durations[part]))
    disk = run.stored_bytes()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in adapter.denoiser.parameters())
    training = f", with gradients and optimizer states of {run.training_bytes() / 1e6:.0f} MB"
    log.info(
        "ahead: %s in all, by estimate; trajectories of %.0f MB on disk; one network of %.0f MB in memory%s",
        _time(sum(durations.values())),
        disk / 1e6,
        weights / 1e6,
        training if run.trains else "",
    )


def seconds_per_evaluation(run: TrainingRun) -> float | None:
    """Estimate the seconds per latent of one network evaluation, on pure noise in the run's precision.

    One latent is timed first. While an evaluation takes at most ``QUICK`` and memory suffices, twice as many
    latents are timed, because a fast device needs a large batch to be fast. If memory doesn't suffice for one
    latent, the result is None.
    """
    adapter, device = run.adapter, run.trainer.strategy.root_device
    counted, seconds, count = adapter.network_evaluations, None, 1
    try:
        adapter.to(device)
        empty = adapter.empty()
        while count <= min(MOST_LATENTS, run.config.metrics.batch_size):
            taken = _seconds(run, torch.randn(count, *adapter.latent_shape, device=device), empty)
            seconds, count = taken / count, 2 * count
            if taken > QUICK:
                break
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    adapter.network_evaluations = counted
    return seconds


def _seconds(run: TrainingRun, z_t: Tensor, empty: Text) -> float:
    """Return the seconds of one evaluation of all of ``z_t``."""
    adapter, text = run.adapter, empty.expand(len(z_t))
    timestep = adapter.schedule(10).timesteps[0]

    def evaluate() -> float:
        start = time.monotonic()
        # Taking the mean to the CPU waits for the device.
        float(adapter.predict(z_t, timestep, text).mean())
        return time.monotonic() - start

    with torch.no_grad(), run.trainer.precision_plugin.forward_context():
        first = evaluate()
        # The first call also loads kernels, so the second one counts. On a slow CPU, loading takes a small
        # share.
        return first if z_t.device.type == "cpu" and first > LONG else evaluate()


def expected_seconds(parts: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Return the seconds of each part of :func:`ahead`, if a forward pass takes ``seconds``."""
    return {
        part: evaluations * seconds * (TRAINING_COST if part.startswith(TRAINING) else 1)
        for part, evaluations in parts.items()
    }


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "an unknown time"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def ahead(run: TrainingRun) -> dict[str, int]:
    """Return the number of network evaluations of each part. It equals what the run counts later.

    Cached evaluations are left out. Training is counted in forward passes. With the backward pass, one takes
    :data:`TRAINING_COST` times as long.
    """
    parts = {part: cost.forward + cost.backward for part, cost in run.method_parts().items()}
    if run.plan is not None:
        parts["trajectories"] = missing_evaluations(run)
        parts[TRAINING] = run.plan.training_evaluations(run.config.trajectory, run.config.seed)
    for title, scorer in run.scorers.items():
        if not run.is_scored(scorer):
            parts[f"original model, {title}"] = scorer.planned_evaluations
        passes = 1 if title == "final" else run.tuning_passes
        parts[f"erased model, {title}"] = passes * scorer.planned_evaluations
    return parts


def missing_evaluations(run: TrainingRun) -> int:
    """Return the number of network evaluations of the trajectories that are not cached."""
    assert run.plan is not None
    missing = missing_shards(run.plan, run.trajectory_folder, run.config.trajectory.shard_size, run.generator)
    return sum(run.plan.evaluations_of(rows) for _, rows in missing)
