"""Render pictures by their labels: of one subject, or scenes of one on the left and one on the right."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from trce_lightning.emoji.captions import is_held_out_pair
from trce_lightning.emoji.scenes import CENTRES
from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.emoji.training.art import blank, compose, is_held_out, paste, pixels

NOTHING = len(SUBJECTS)
"""The label of the right side of a picture of one subject."""
SIDE_PIXELS = (26, 29)
"""The smallest and the largest side of a subject in a scene."""
JITTER_PIXELS = 1.5
"""The largest distance of a subject's centre from the centre of its half, per axis."""
CHUNK = 500
"""The number of pictures that one seed makes. They don't depend on the number of processes."""


def random_labels(singles: int, scenes: int, *, held_out: bool, seed: int) -> np.ndarray:
    """Return labels of pictures on one side of the split, those of one subject first: int64 ``[N, 4]``.

    They are the subject (on the left), the subject on the right or ``NOTHING``, the style and the background.
    """
    rng = np.random.default_rng(seed)
    rows = [*_labels(rng, singles, held_out, two=False), *_labels(rng, scenes, held_out, two=True)]
    return np.array(rows, np.int64)


def _labels(
    rng: np.random.Generator, count: int, held_out: bool, *, two: bool
) -> Iterator[tuple[int, int, int, int]]:
    while count:
        left, right = (int(index) for index in rng.choice(len(SUBJECTS), 2, replace=False))
        style, background = int(rng.integers(len(STYLES))), int(rng.integers(len(BACKGROUNDS)))
        out = is_held_out_pair(left, right) if two else is_held_out(left, style, background)
        if out == held_out:
            yield left, right if two else NOTHING, style, background
            count -= 1


def render(
    sprites: list[list[Image.Image]], labels: np.ndarray, *, seed: int, workers: int = 1
) -> np.ndarray:
    """Return the pictures of labels, ``[N, 3, 64, 64]`` uint8, made by ``workers`` processes."""
    starts = range(0, len(labels), CHUNK)
    make, parts = partial(_chunk, sprites, seed), [labels[start : start + CHUNK] for start in starts]
    if workers == 1:
        return np.concatenate(list(map(make, starts, parts)))
    with ProcessPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(make, starts, parts)))


def _chunk(sprites: list[list[Image.Image]], seed: int, start: int, labels: np.ndarray) -> np.ndarray:
    rng, colours = np.random.default_rng((seed, start)), list(BACKGROUNDS.values())
    images: list[np.ndarray] = []
    for left, right, style, background in labels.tolist():
        if right == NOTHING:
            images.append(compose(sprites[style][left], colours[background], rng))
            continue
        canvas = blank(colours[background])
        for subject, centre in zip((left, right), CENTRES, strict=True):
            side = int(rng.integers(SIDE_PIXELS[0], SIDE_PIXELS[1] + 1))
            place = np.array(centre) + rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, size=2)
            paste(canvas, sprites[style][subject], side, place)
        images.append(pixels(canvas))
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
