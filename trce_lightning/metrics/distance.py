"""How far a model's benign images have moved from another model's, on the same prompts and noise."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

SUBSETS, SUBSET_SIZE = 100, 100
LEAST_IMAGES = 4


def distances(
    features: nn.Module, first: Iterable[Tensor], second: Iterable[Tensor], count: int
) -> dict[str, float]:
    """FID and KID between two models' images, uint8 ``[B, 3, H, W]`` batches.

    KID is the unbiased squared maximum mean discrepancy with the kernel (xᵀy/d + 1)³ on the d features, over
    100 random subsets of 100 images (half of them where there are fewer than 200) from a fixed seed. On
    images from different noise its expectation is 0 for equal models, at any number of images, while FID's is
    not; on the same noise equal models have FID 0 and KID a little below.

    Args:
        features: uint8 images → features ``[B, d]``, with ``num_features`` = d. It works where it lies.
        first: images of the model to measure from.
        second: those of the other.
        count: images of each.

    Returns:
        ``fid``, ``kid`` and ``kid_std`` over the subsets.

    Raises:
        ValueError: fewer than four images.
    """
    if count < LEAST_IMAGES:
        raise ValueError(f"distance between models: expected at least four images of each, got {count}")
    fid = FrechetInceptionDistance(feature=features, sync_on_compute=False)
    with warnings.catch_warnings():  # that it keeps features in memory: few, of our size
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`")
        kid = KernelInceptionDistance(
            feature=features, subsets=SUBSETS, subset_size=min(SUBSET_SIZE, count // 2), sync_on_compute=False
        )
    device = _device(features)
    fid.to(device)
    kid.to(device)
    for side, real in ((first, True), (second, False)):
        for batch in side:
            images = batch.to(device)
            fid.update(images, real=real)
            kid.update(images, real=real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = kid.compute()
    return {"fid": float(fid.compute()), "kid": float(mean), "kid_std": float(deviation)}


def _device(network: nn.Module) -> torch.device:
    tensor = next(chain(network.parameters(), network.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
