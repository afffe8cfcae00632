"""Files that appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor

from trce_lightning.errors import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside ``path``, with its suffix, whose file takes the place of ``path`` when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid4().hex}.{path.name}")  # process ids may be equal on two machines
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Tensors by name, with text as metadata."""
    with replacing(file) as aside:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, aside, dict(metadata or {})
        )


def write_text(file: str | Path, text: str) -> None:
    """UTF-8."""
    with replacing(file) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Indented strict JSON. ``InputError`` on a number that is not finite, which JSON cannot say."""
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{path}: expected finite numbers, got {content}") from error
    write_text(path, f"{text}\n")
