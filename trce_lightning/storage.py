"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Written aside, then moved into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata or {}))
    partial.replace(file)


def write_text(file: Path, text: str) -> None:
    """UTF-8, written aside, then moved into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON; ``ValueError`` on numbers that JSON doesn't have."""
    write_text(file, json.dumps(content, indent=2, allow_nan=False) + "\n")
