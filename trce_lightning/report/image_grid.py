"""One picture that shows the same prompts drawn by several models."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["image_grid"]

_PAPER, _INK, _MUTED = (250, 250, 248), (30, 30, 34), (90, 90, 96)  # sRGB
_GAP = 6  # pixels
_FONT_SIZE = 12  # pixels
_CAPTION_LINES = 8
_NARROWEST = 3  # pixels of a character of that font and size


@dataclass(frozen=True)
class _Layout:
    """Pixel positions of everything; a block is up to ``columns`` prompts with their rows and captions."""

    columns: int
    label_width: int
    picture: tuple[int, int]
    """Width and height."""
    num_rows: int
    caption_height: int

    @property
    def block_height(self) -> int:
        return self.num_rows * (self.picture[1] + _GAP) + self.caption_height + 2 * _GAP

    def size(self, count: int) -> tuple[int, int]:
        width = _GAP + self.label_width + self.columns * (self.picture[0] + _GAP)
        return width, _GAP + -(-count // self.columns) * self.block_height

    def corner(self, index: int, row: int) -> tuple[int, int]:
        """Left and top of picture ``index`` in ``row``; row ``num_rows`` is the caption."""
        block, column = divmod(index, self.columns)
        left = _GAP + self.label_width + column * (self.picture[0] + _GAP)
        return left, _GAP + block * self.block_height + row * (self.picture[1] + _GAP)


def image_grid(
    rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int = 2, columns: int | None = None
) -> Image.Image:
    """Pictures of the same prompts under each other, one row per model, and the prompts below.

    Args:
        rows: label and images, uint8 ``[N, 3, H, W]``, 0 to 255, of one shape in all rows.
        captions: N prompts.
        scale: whole factor that pictures are enlarged by.
        columns: pictures side by side; more of them go into further blocks of rows. None is one block.

    Raises:
        ValueError: no rows or images, images of another type or shape, ``captions`` of another length,
            ``scale`` or ``columns`` below 1.
    """
    _check(rows, captions, scale, columns)
    count, _, height, width = rows[0][1].shape
    font = ImageFont.truetype(findfont("DejaVu Sans"), _FONT_SIZE)
    texts = [_wrapped(caption, font, width * scale) for caption in captions]
    layout = _Layout(
        columns=min(columns or count, count),
        label_width=_GAP + max(_width(label, font) for label, _ in rows),
        picture=(width * scale, height * scale),
        num_rows=len(rows),
        caption_height=max(_height(text, font) for text in texts),
    )
    grid = Image.new("RGB", layout.size(count), _PAPER)
    _draw_rows(grid, rows, layout, font)
    draw = ImageDraw.Draw(grid)
    for index, text in enumerate(texts):
        draw.multiline_text(layout.corner(index, len(rows)), text, _MUTED, font, spacing=2)
    return grid


def _draw_rows(
    grid: Image.Image,
    rows: Sequence[tuple[str, Tensor]],
    layout: _Layout,
    font: ImageFont.FreeTypeFont,
) -> None:
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(rows):
        for index, image in enumerate(images):
            left, top = layout.corner(index, row)
            if index % layout.columns == 0:
                draw.text((left - _GAP, top + layout.picture[1] // 2), label, _INK, font, anchor="rm")
            picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
            grid.paste(picture.resize(layout.picture, Image.Resampling.NEAREST), (left, top))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """``text`` in lines of at most ``width`` pixels; the rest of a very long one becomes an ellipsis."""
    lines = list(islice(_lines(text, font, width), _CAPTION_LINES + 1))
    if len(lines) > _CAPTION_LINES:
        last = lines[_CAPTION_LINES - 1]
        lines[_CAPTION_LINES - 1 :] = [f"{_fitting(last, font, width - _width('…', font))}…"]
    return "\n".join(lines)


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Lines as full as words allow; a word that is wider than a line is cut."""
    rest = " ".join(text.split())
    while rest:
        line = _fitting(rest, font, width)
        if " " in line and rest[len(line) : len(line) + 1] not in ("", " "):
            line = line[: line.rindex(" ")]
        yield line
        rest = rest[len(line) :].lstrip()


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As many characters from the front as fit, and at least one."""
    counts = range(1, min(len(text), max(width, 0) // _NARROWEST) + 1)
    count = bisect_right(counts, width, key=lambda count: _width(text[:count], font))
    return text[: max(count, 1)]


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return -(-int(64 * font.getlength(text)) // 64)


def _height(text: str, font: ImageFont.FreeTypeFont) -> int:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return int(draw.multiline_textbbox((0, 0), text, font, spacing=2)[3]) + 1


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
