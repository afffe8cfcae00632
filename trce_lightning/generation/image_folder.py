"""Folders of generated images: PNG files, a manifest of their prompts, and a record of their settings.

Files appear whole or not at all. Only ``manifest.jsonl`` pairs images with prompts. The names and the order
of the files don't.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm.auto import tqdm

from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord, image_seed
from trce_lightning.runtime.storage import MADE_AGAIN, reading, replacing, write_text

MANIFEST, META = "manifest.jsonl", "meta.json"
DRAW_AGAIN = "delete the folder or choose another"
Entry = dict[str, Any]
"""A line of the manifest: id, prompt, seed, guidance_scale and file."""


def load_images(folder: Path, records: Sequence[PromptRecord]) -> Tensor:
    """Return the images that the folder's manifest pairs with ``records``.

    ``records`` may be any part of the manifest, in any order.

    Returns:
        uint8 ``[N, 3, H, W]`` in the order of ``records``.

    Raises:
        FileNotFoundError: the manifest or an image is missing.
        InputError: an image is unreadable, or has another prompt, seed or guidance scale.
    """
    images = [_own_image(file) for file in image_files(folder, records)]
    return torch.stack(images) if images else torch.empty((0, 3, 0, 0), dtype=torch.uint8)


def image_batches(
    folder: Path, records: Sequence[PromptRecord], description: str | None = None, size: int = 64
) -> Iterator[tuple[Sequence[PromptRecord], Tensor]]:
    """Yield the images of :func:`load_images` with their records, ``size`` at a time.

    If ``description`` is given, show a progress bar.
    """
    files = image_files(folder, records)
    with tqdm(total=len(records), desc=description, unit="image", disable=description is None) as progress:
        for start in range(0, len(records), size):
            part = slice(start, start + size)
            images = [_own_image(file) for file in files[part]]
            yield records[part], torch.stack(images)
            progress.update(len(images))


def image_files(folder: Path, records: Sequence[PromptRecord]) -> list[Path]:
    """Return the image files of ``records``, in their order. Raise the errors of :func:`load_images`."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder}: expected a folder of images with {MANIFEST}, got none")
    with reading(folder / MANIFEST, "one JSON object a line", DRAW_AGAIN):
        lines = (folder / MANIFEST).read_text("utf-8").split("\n")
        entries = {entry["id"]: entry for entry in map(json.loads, filter(None, lines))}
        return [folder / _entry_of(record, entries, folder)["file"] for record in records]


def guidance_scales(records: Sequence[PromptRecord], guidance_scale: float) -> list[float]:
    """Return each record's guidance scale. If a record has none, it is ``guidance_scale``."""
    return [guidance_scale if r.guidance_scale is None else r.guidance_scale for r in records]


def manifest(records: Sequence[PromptRecord], guidance_scale: float) -> list[Entry]:
    """Return the manifest of a folder of these images. The files are named by position.

    If two records have one id, raise ``InputError``.
    """
    if len({record.id for record in records}) < len(records):
        raise InputError("prompts: expected a different id for each prompt, got one twice")
    scales = guidance_scales(records, guidance_scale)
    return [
        {
            "id": record.id,
            "prompt": record.prompt,
            "seed": image_seed(record),
            "guidance_scale": float(scale),
            "file": f"{index:05d}.png",
        }
        for index, (record, scale) in enumerate(zip(records, scales, strict=True))
    ]


def claim(folder: Path, entries: list[Entry], meta: dict[str, Any]) -> None:
    """Write the manifest and ``meta`` (the settings of the images) into a new folder, or compare both.

    If the folder has another manifest or meta, or images without them, raise ``InputError``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Images are looked for first. Another rank writes images after both files, so the files can't be missing.
    has_images = any(folder.glob("*.png"))
    lines = {
        MANIFEST: [json.dumps(entry, ensure_ascii=False) for entry in entries],
        META: json.dumps(meta, indent=0).splitlines(),
    }
    for name, expected in lines.items():
        file = folder / name
        if not file.is_file():
            if has_images:
                raise InputError(f"{folder}: expected an empty folder, or images with their {name}, got none")
            write_text(file, "\n".join([*expected, ""]))
        with reading(file, "what made the images", DRAW_AGAIN):
            found = file.read_text("utf-8").split("\n")[:-1]
        for line, other in zip_longest(expected, found):
            if line != other:
                raise InputError(f"{file}: expected {line}, got {other}; {DRAW_AGAIN}")


def _entry_of(record: PromptRecord, entries: dict[str, Entry], folder: Path) -> Entry:
    entry = entries.get(record.id)
    if entry is None:
        raise InputError(
            f"{folder / MANIFEST}: expected an image of prompt id '{record.id}', got none; {DRAW_AGAIN}"
        )
    scale = entry["guidance_scale"] if record.guidance_scale is None else record.guidance_scale
    expected = {"prompt": record.prompt, "seed": image_seed(record), "guidance_scale": scale}
    for key, value in expected.items():
        if entry[key] != value:
            raise InputError(
                f"{folder / MANIFEST}: expected {key} {value!r} for id '{record.id}', got {entry[key]!r}; "
                f"{DRAW_AGAIN}"
            )
    return entry


def _own_image(file: Path) -> Tensor:
    try:
        return read_image(file)
    except InputError as error:
        raise InputError(f"{error}; {MADE_AGAIN}") from error


def read_image(file: Path) -> Tensor:
    """Return an image as uint8 RGB ``[3, H, W]``.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the image can't be read.
    """
    with _opened(file) as image:
        return pil_to_tensor(image.convert("RGB"))


def image_size(file: Path) -> tuple[int, int]:
    """Return width and height in pixels from the file's header. Raise the errors of :func:`read_image`."""
    with _opened(file) as image:
        return image.size


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected an image, got none")
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # broken PNG chunks
        raise InputError(f"{file}: expected a readable image, got: {error}") from error


def write_png(file: Path, image: Tensor) -> None:
    """Write a uint8 ``[3, H, W]`` image."""
    with replacing(file) as aside:
        to_pil_image(image).save(aside)
