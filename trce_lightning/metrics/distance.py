"""Measure how far a model's benign images have moved from another model's, on the same prompts and noise."""

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
    """Return FID and KID between two models' images, given as uint8 ``[B, 3, H, W]`` batches.

    KID is the unbiased squared maximum mean discrepancy with the kernel (xᵀy/d + 1)³ on the d features. It is
    the mean over 100 random subsets of 100 images, drawn from a fixed seed. If there are fewer than 200
    images, a subset has half of them.

    If both models are equal and the noise differs, KID is 0 in expectation at any number of images. FID is
    above 0 then. If the noise is the same too, FID is 0 and KID is slightly below 0.

    Args:
        features: maps uint8 images to features ``[B, d]``, with ``num_features`` = d. It stays on its device.
        first: images of the reference model.
        second: images of the other model.
        count: the number of images of each model.

    Returns:
        ``fid``, ``kid``, and the standard deviation ``kid_std`` over the subsets.

    Raises:
        ValueError: there are fewer than four images.
    """
    if count < LEAST_IMAGES:
        raise ValueError(f"distance between models: expected at least four images of each, got {count}")
    fid = FrechetInceptionDistance(feature=features, sync_on_compute=False)
    with warnings.catch_warnings():  # It warns that it keeps all features in memory. Ours are few and small.
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
