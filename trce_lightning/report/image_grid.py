"""Make one picture that shows the images of several models for the same prompts."""

import textwrap
from collections.abc import Sequence
from math import ceil

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

__all__ = ["image_grid"]

_PAPER, _INK, _MUTED = 250, (30, 30, 34), (90, 90, 96)  # sRGB
_GAP = 6  # pixels
_FONT, _FONT_SIZE, _LINE = "DejaVu Sans Mono", 11, 15  # pixels; all characters have the same width
_CAPTION_LINES = 8


def image_grid(
    rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int = 2, columns: int | None = None
) -> Image.Image:
    """Return a picture with one row of images per model and the prompts below.

    Args:
        rows: label and images, uint8 ``[N, 3, H, W]``, 0 to 255. All rows have one shape.
        captions: the N prompts.
        scale: the whole factor by which images are enlarged.
        columns: images side by side. More images go into further blocks of rows. None means one block.

    Raises:
        ValueError: there are no rows or images, the images differ in type or shape, ``captions`` has another
            length, or ``scale`` or ``columns`` is below 1.
    """
    _check(rows, captions, scale, columns)
    count, _, height, width = rows[0][1].shape
    columns = min(columns or count, count)
    font = ImageFont.truetype(findfont(_FONT), _FONT_SIZE)
    characters = max(int(width * scale / font.getlength("x")), 1)
    texts = [
        textwrap.wrap(caption, characters, max_lines=_CAPTION_LINES, placeholder="…") for caption in captions
    ]
    left = ceil(max(font.getlength(label) for label, _ in rows)) + _GAP
    below = max(len(lines) for lines in texts) * _LINE + _GAP
    blocks = [
        F.pad(block, (left, 0, 0, below), value=_PAPER)
        for block in _blocks([row for _, row in rows], scale, columns)
    ]
    grid = to_pil_image(torch.cat(blocks, dim=1))
    draw = ImageDraw.Draw(grid)
    across, down = width * scale + _GAP, height * scale + _GAP
    for index, lines in enumerate(texts):
        block, column = divmod(index, columns)
        top = block * blocks[0].shape[1] + _GAP
        draw.multiline_text(
            (left + _GAP + column * across, top + len(rows) * down), "\n".join(lines), _MUTED, font, spacing=2
        )
        for row, (label, _) in enumerate(rows if column == 0 else ()):
            draw.text((left, top + row * down + height * scale // 2), label, _INK, font, anchor="rm")
    return grid


def _blocks(rows: Sequence[Tensor], scale: int, columns: int) -> list[Tensor]:
    """Return ``[3, H, W]`` for every ``columns`` prompts.

    The last block is filled up with the paper's colour.
    """
    pictures = torch.stack([row.cpu() for row in rows])
    pictures = F.pad(pictures, (0, 0) * 3 + (0, -pictures.shape[1] % columns), value=_PAPER)
    large = pictures.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    return [
        make_grid(block.flatten(0, 1), nrow=columns, padding=_GAP, pad_value=_PAPER)
        for block in large.split(columns, dim=1)
    ]


def _check(
    rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int, columns: int | None
) -> None:
    shapes = [tuple(images.shape) for _, images in rows]
    if not rows or len(set(shapes)) > 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or not shapes[0][0]:
        raise ValueError(f"image_grid: expected rows of images [N, 3, H, W] of one shape, got {shapes}")
    for label, images in rows:
        if images.dtype != torch.uint8:
            raise ValueError(f"image_grid: expected uint8 images, got {images.dtype} in row {label!r}")
    if len(captions) != shapes[0][0]:
        raise ValueError(f"image_grid: expected {shapes[0][0]} captions, got {len(captions)}")
    for name, value in (("scale", scale), ("columns", columns)):
        if value is not None and value < 1:
            raise ValueError(f"image_grid: expected {name} of 1 or more, got {value}")
