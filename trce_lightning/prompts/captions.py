"""Captions of real pictures from a text file, a CSV or COCO's own JSON.

The file lies on disk or in a data set on the Hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trce_lightning.errors import InputError
from trce_lightning.prompts.files import decoded, load_csv
from trce_lightning.prompts.hub import HUB_FILE, dataset_file

__all__ = ["read_captions"]

COLUMNS = ("caption", "prompt", "text", "captions")
"""The possible names of a CSV's caption column. The first that the file has is read."""


def read_captions(source: str) -> list[str]:
    """Return the captions in the order of a file, repeated ones included.

    Args:
        source: a path, or ``hub:OWNER/NAME/FILE``, optionally with ``@REVISION``. The Hub needs a network
            once. ``.json`` is COCO's format (``captions_val2014.json``): ``{"annotations": [{"caption": …},
            …]}``. ``.csv`` has one of :data:`COLUMNS`. Any other file is UTF-8 with one caption per line.

    Raises:
        FileNotFoundError: the Hub doesn't provide the file.
        InputError: the file doesn't have its format, or it holds no caption.
    """
    path = _path(source)
    readers: dict[str, Callable[[Path], list[str]]] = {".json": _read_coco, ".csv": _read_csv}
    try:
        captions = readers.get(path.suffix.lower(), _read_lines)(path)
    except (OSError, InputError, json.JSONDecodeError) as error:
        raise InputError(
            f"textual.keep_prompts: expected a readable caption file, got {path}: {error}"
        ) from error
    if not captions:
        raise InputError(f"textual.keep_prompts: expected one caption at least, got none in {path}")
    return captions


def _path(source: str) -> Path:
    hub = re.fullmatch(HUB_FILE, source)
    if hub is None:
        return Path(source)
    try:
        return dataset_file(hub["hub_id"], hub["file"], hub["revision"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"option 'textual.keep_prompts': expected a caption file, got none: {error}"
        ) from error


def _read_lines(path: Path) -> list[str]:
    lines = decoded(path, path.read_bytes()).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_csv(path: Path) -> list[str]:
    return [record.prompt for record in load_csv(path, columns={"prompt": COLUMNS}).records]


def _read_coco(path: Path) -> list[str]:
    content: Any = json.loads(decoded(path, path.read_bytes()))
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("caption"), str) for row in rows
    ):
        raise InputError('expected {"annotations": [{"caption": "…"}, …]}')
    # Some of COCO's captions end in a line break.
    return [caption for row in rows if (caption := " ".join(row["caption"].split()))]
