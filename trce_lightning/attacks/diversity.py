"""A check that generated images are new pictures, and not copies of those that an attack has learnt from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Diversity(NamedTuple):
    """Distances of images, as shares of the mean distance between two of the pictures.

    A vector that has stored one picture gives ``nearest`` and ``between`` near 0.
    """

    nearest: float
    """The mean distance of an image to its nearest picture."""
    between: float
    """The mean distance between two images."""
    copies: float
    """The share of images that are nearer to a picture than any two pictures are to each other."""


def diversity(images: Tensor, pictures: Tensor, features: nn.Module | None = None) -> Diversity:
    """Return how far images are from the pictures of the search, and from each other.

    Args:
        images: uint8 ``[N ≥ 2, 3, H, W]``.
        pictures: uint8 ``[M ≥ 2, 3, H, W]``, those that the attack has learnt from.
        features: a network of images, such as FID's; None compares pixels.
    """
    assert len(images) > 1 and len(pictures) > 1
    seen, learnt = (_features(batch, features) for batch in (images, pictures))
    apart = _pairs(learnt)
    nearest = torch.cdist(seen, learnt).min(1).values
    unit = float(apart.mean())
    return Diversity(
        float(nearest.mean()) / unit,
        float(_pairs(seen).mean()) / unit,
        float((nearest < apart.min()).float().mean()),
    )


@torch.no_grad()
def _features(images: Tensor, features: nn.Module | None) -> Tensor:
    return (images if features is None else features(images)).float().flatten(1)


def _pairs(rows: Tensor) -> Tensor:
    return torch.pdist(rows)
