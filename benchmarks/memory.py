"""Peak resident memory of a training step at Stable Diffusion 1.4's size, in processes of its own (Linux)."""

from __future__ import annotations

import copy
import resource
import tempfile
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import networks, plain
from benchmarks.fitting import Fit, StepsInTurns, small
from benchmarks.processes import alone, available_gb, forget_peak, peak_gb
from benchmarks.report import Row
from benchmarks.step import evaluation
from trce_lightning.adapters import StableDiffusionAdapter

LIMIT_GB = 14.0
SMALL_SIDE, FULL_SIDE = 16, networks.LATENT_SIDE
SMALL_ROWS = 5


@dataclass(frozen=True)
class Peak:
    """Of one training step."""

    gb: float
    seconds: float
    shard_bytes: int
    """On disk, of all trajectories."""
    planned_bytes: int


def limit() -> None:
    """Fail with an error rather than take the machine's memory."""
    most = min(LIMIT_GB, available_gb() - 2)
    resource.setrlimit(resource.RLIMIT_DATA, (int(most * 1e9),) * 2)


def ours(side: int, rows: int, checkpointing: bool, epochs: int = 1) -> Peak:
    """Our module in its Trainer, the text encoder beside it."""
    limit()
    adapter = StableDiffusionAdapter(networks.pipeline(), resolution=8 * side)
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(adapter, small(rows, epochs, gradient_checkpointing=checkpointing), Path(folder))
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        forget_peak()
        steps = StepsInTurns(compare=False)
        fit.run(steps)
    return Peak(peak_gb(), min(steps.ours), stored, fit.plan.stored_bytes(4 * side**2))


def authors(side: int) -> float:
    """An iteration of the authors': three networks, self-attention and cross-attention's Q train."""
    limit()
    trained = networks.unet().requires_grad_(False)
    original, edited = copy.deepcopy(trained), copy.deepcopy(trained)
    parameters = plain.trained_parameters(trained)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    three = plain.Networks(*(evaluation(unet) for unet in (original, edited, trained)))
    states = {kind: torch.randn(1, networks.TOKENS, 768) for kind in ("uncond", "malicious", "safe")}
    points = [plain.Point(torch.randn(1, 4, side, side), torch.tensor(500)) for _ in range(SMALL_ROWS)]
    forget_peak()
    plain.training_loss(three, points[0], points[1:], states).backward()
    optimizer.step()
    return peak_gb()


def largest(checkpointing: bool) -> tuple[int, Peak] | None:
    """The most latents a batch, of five, two or one, whose step at full size stays within the limit."""
    for rows in (5, 2):
        try:
            return rows, alone(ours, FULL_SIDE, rows, checkpointing)
        except (RuntimeError, BrokenProcessPool):
            continue
    return None


def run() -> list[Row]:
    """At small latents next to the authors'; at full size alone."""
    plain_gb = alone(authors, SMALL_SIDE)
    kept, recomputed = (alone(ours, SMALL_SIDE, SMALL_ROWS, flag, 4) for flag in (False, True))
    what = f"peak memory of training, SD 1.4 at {SMALL_SIDE}×{SMALL_SIDE} latents, {SMALL_ROWS} in a batch"
    rows = [
        Row(what, kept.gb, "GB", plain_gb),
        Row("… with gradient checkpointing", recomputed.gb, "GB", plain_gb),
        Row(
            "seconds a step with gradient checkpointing, against without",
            recomputed.seconds,
            "s",
            kept.seconds,
        ),
    ]
    for flag in (False, True):
        found = largest(flag)
        if found is None:
            continue
        count, peak = found
        title = f"peak memory of training, SD 1.4 at {FULL_SIDE}×{FULL_SIDE} latents, {count} in a batch"
        rows.append(Row(f"{title}{', gradient checkpointing' if flag else ''}", peak.gb, "GB"))
        assert 1 <= peak.shard_bytes / peak.planned_bytes < 1.05, "the plan says what the disk holds"
    return rows
