"""Peak resident memory of a training step at Stable Diffusion 1.4's size, in processes of its own (Linux)."""

from __future__ import annotations

import copy
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import networks, plain
from benchmarks.fitting import Fit, small
from benchmarks.processes import alone, available_gb, forget_peak, peak_gb
from benchmarks.report import Row
from benchmarks.step import evaluation
from trce_lightning.adapters import StableDiffusionAdapter

LIMIT_GB = 14.0
SIDE, ROWS = 16, 5


@dataclass(frozen=True)
class Peak:
    """The peak memory of one training step, and the size of what it trains on."""

    gb: float
    shard_bytes: int
    """The size on disk of all trajectories."""
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
        fit.run()
    return Peak(peak_gb(), stored, fit.plan.stored_bytes(4 * side**2))


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
    points = [plain.Point(torch.randn(1, 4, side, side), torch.tensor(500)) for _ in range(ROWS)]
    forget_peak()
    plain.training_loss(three, points[0], points[1:], states).backward()
    optimizer.step()
    return peak_gb()


def run() -> list[Row]:
    """Measure at small latents, next to the authors' iteration."""
    plain_gb = alone(authors, SIDE)
    kept, recomputed = (alone(ours, SIDE, ROWS, flag, 4) for flag in (False, True))
    what = f"peak memory of training, SD 1.4 at {SIDE}×{SIDE} latents, {ROWS} in a batch"
    return [
        Row(what, kept.gb, "GB", plain_gb),
        Row("… with gradient checkpointing", recomputed.gb, "GB", plain_gb),
    ]
