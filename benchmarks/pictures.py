"""The pictures of docs, as small files."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

COLOURS = 48


def publish(picture: Figure | Path, file: Path) -> None:
    """Write a figure, or the picture in a file, as a PNG with a palette of ``COLOURS`` colours.

    It takes about a third of the bytes, so that the pictures of docs may be drawn anew without the
    repository growing.
    """
    source: io.BytesIO | Path
    if isinstance(picture, Figure):
        source = io.BytesIO()
        picture.savefig(source, dpi=110)
        source.seek(0)
    else:
        source = picture
    with Image.open(source) as image:
        few = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(file, "png", optimize=True)
