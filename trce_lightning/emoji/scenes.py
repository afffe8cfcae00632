"""Judge scenes: pictures with one subject on the left and another one on the right."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

CENTRES = ((16, 32), (48, 32))
"""The centres (x, y) of the subjects on the left and on the right, in pixels of 64×64."""
WINDOW = 32
"""The side of the square around a centre that a subject fits in."""


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square around each centre, enlarged to the size of a picture, ``[B, 3, 64, 64]`` uint8 each."""
    reach = WINDOW // 2
    left, right = (
        F.interpolate(
            images[..., y - reach : y + reach, x - reach : x + reach].float(),
            scale_factor=images.shape[-1] / WINDOW,
            mode="bicubic",
        )
        for x, y in CENTRES
    )
    return left.round().clamp(0, 255).to(images.dtype), right.round().clamp(0, 255).to(images.dtype)
