"""Make scenes: pictures of two subjects, one on the left and one on the right, with captions that name both."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trce_lightning.emoji.scenes import CENTRES
from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.emoji.training.art import blank, paste, pixels

SIDE_PIXELS = (26, 29)
"""The smallest and the largest side of a subject in a scene."""
JITTER_PIXELS = 1.5
"""The largest distance of a subject's centre from the centre of its half, per axis."""
CHUNK = 500
"""The number of scenes that one seed makes. The scenes don't depend on the number of processes."""


@dataclass(frozen=True)
class Scenes:
    """Scenes with their labels. Row ``i`` of every tensor belongs to image ``i``."""

    images: Tensor
    """The images, ``[N, 3, 64, 64]`` uint8 RGB."""
    left: Tensor
    """The index into ``SUBJECTS`` of the subject on the left, ``[N]``."""
    right: Tensor
    """The index of the subject on the right, ``[N]``."""
    style: Tensor
    """The index into ``STYLES``, ``[N]``. Both subjects have it."""
    background: Tensor
    """The index into ``BACKGROUNDS``, ``[N]``."""


def is_held_out_pair(left: int, right: int) -> bool:
    """Return True for every 20th pair of subjects, in either order. They are left out of all training."""
    first, second = sorted((left, right))
    return (first * 7 + second * 3) % 20 == 0


def scenes(
    sprites: list[list[Image.Image]], count: int, *, held_out: bool, seed: int, workers: int = 1
) -> Scenes:
    """Return ``count`` scenes of random pairs on one side of the split, rendered by ``workers`` processes."""
    chunks = [(seed, index) for index in range(-(-count // CHUNK))]
    make = partial(_chunk, sprites, held_out)
    if workers == 1:
        parts = [make(chunk) for chunk in chunks]
    else:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(make, chunks))
    images, labels = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    stacked = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Scenes(stacked, *(column.clone() for column in torch.from_numpy(labels).T))


def _chunk(
    sprites: list[list[Image.Image]], held_out: bool, seed: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    rng, colours = np.random.default_rng(seed), list(BACKGROUNDS.values())
    images, labels = [], []
    while len(images) < CHUNK:
        left, right = (int(index) for index in rng.choice(len(SUBJECTS), 2, replace=False))
        style, background = int(rng.integers(len(STYLES))), int(rng.integers(len(BACKGROUNDS)))
        if is_held_out_pair(left, right) != held_out:
            continue
        canvas = blank(colours[background])
        for subject, centre in zip((left, right), CENTRES, strict=True):
            side = int(rng.integers(SIDE_PIXELS[0], SIDE_PIXELS[1] + 1))
            place = np.array(centre) + rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, size=2)
            paste(canvas, sprites[style][subject], side, place)
        images.append(pixels(canvas))
        labels.append((left, right, style, background))
    return np.stack(images), np.array(labels)
