"""Measure the peak memory of steps of Stable Diffusion 1.4's size at 512 px (Linux): training and attacks."""

from __future__ import annotations

from benchmarks import networks
from benchmarks.memory import LIMIT_GB, Peak, ours, white_box
from benchmarks.processes import alone
from benchmarks.report import Row

TOGETHER = 4
"""Prompts whose tokens are searched for together."""


def run() -> list[Row]:
    """Measure with and without gradient checkpointing, and searches with weights that want gradients or not.

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
        *searches(networks.LATENT_SIDE),
    ]


def searches(side: int) -> list[Row]:
    """Measure a gradient step of a search for words, of one prompt and of several together."""
    one, several = (alone(white_box, side, prompts) for prompts in (1, TOGETHER))
    tracked, recomputed = (alone(white_box, side, 1, kind) for kind in ("tracked", "recomputed"))
    what = f"peak memory of a gradient step to tokens, SD 1.4 at {side}×{side} latents, 1 prompt"
    return [
        Row(f"{what}, against weights that want gradients", one, "GB", tracked),
        Row("… with gradient checkpointing", recomputed, "GB", one),
        Row(f"… {TOGETHER} prompts together", several, "GB", most=LIMIT_GB),
    ]
