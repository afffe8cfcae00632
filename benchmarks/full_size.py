"""Measure the peak memory of a training step of Stable Diffusion 1.4's size at 512 px (Linux)."""

from __future__ import annotations

from benchmarks import networks
from benchmarks.memory import LIMIT_GB, Peak, ours
from benchmarks.processes import alone
from benchmarks.report import Row


def run() -> list[Row]:
    """Measure with and without gradient checkpointing.

    Check that the disk holds the bytes that the plan promises.
    """
    peaks: dict[bool, Peak] = {
        flag: alone(ours, networks.LATENT_SIDE, networks.LARGEST_BATCH, flag) for flag in (True, False)
    }
    for peak in peaks.values():
        assert 1 <= peak.shard_bytes / peak.planned_bytes < 1.05, f"{peak}: more on disk than planned"
    side = f"{networks.LATENT_SIDE}×{networks.LATENT_SIDE}"
    what = f"peak memory of training, SD 1.4 at {side} latents, {networks.LARGEST_BATCH} in a batch"
    return [
        Row(what, peaks[False].gb, "GB", most=LIMIT_GB),
        Row("… with gradient checkpointing", peaks[True].gb, "GB", peaks[False].gb),
    ]
