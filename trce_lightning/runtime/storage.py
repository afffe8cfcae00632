"""Writers whose files and folders appear whole or not at all, and errors about files that can't be read."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from csv import Error as CSVError
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from uuid import uuid4

from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from yaml import YAMLError

from trce_lightning.errors import InputError
from trce_lightning.runtime.resources import explain_machine

MADE_AGAIN = "delete it, and the same command makes it again"
_DAMAGE = (
    ValueError,  # JSON, text that isn't UTF-8, numbers
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    RuntimeError,  # torch's archive reader
    CSVError,
    OmegaConfBaseException,
    SafetensorError,
    UnpicklingError,
    YAMLError,
)
"""The errors that readers raise on a file that was cut off, emptied or overwritten."""
_ASIDE = re.compile(r"\.[0-9a-f]{32}\..+")
_OLD = ".old."


@contextmanager
def reading(file: str | Path, expected: str, remedy: str = MADE_AGAIN) -> Iterator[None]:
    """Raise ``InputError`` that names the file and the remedy if the code within can't read the file.

    The code within should read and convert the file, and do nothing else.

    Args:
        file: a file that this project has written.
        expected: the content that the file should hold.
        remedy: what the user should do.

    Raises:
        InputError: the file can't be read back.
    """
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        if explain_machine(error):
            raise
        first = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
        raise InputError(f"{file}: expected {expected}, got a damaged file ({reason}); {remedy}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path beside ``path`` with the same suffix. If no error occurs, its file replaces ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        mode = _new_mode(aside)
        yield aside
        _set_mode(aside, mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder``. If no error occurs, it replaces ``folder``.

    If the process is killed, the old folder or the new one is left, at worst under another name.
    :func:`clean_up` then renames it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(folder), folder.with_name(f"{_OLD}{folder.name}")
    recover(folder.parent)
    try:
        aside.mkdir()
        yield aside
        files = [file for file in aside.rglob("*") if file.is_file()]
        mode = _new_mode(aside / ".new")
        (aside / ".new").unlink()
        for file in files:
            _set_mode(file, mode)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        recover(folder.parent)


def clean_up(folder: Path) -> None:
    """Finish or delete what killed processes have left half done, anywhere in ``folder``.

    Call it only if no other process writes there.
    """
    for parent in (folder, *(file for file in folder.rglob("*") if file.is_dir())):
        if not _ASIDE.fullmatch(parent.name):
            recover(parent)
            _remove_asides(parent)


def recover(parent: Path) -> None:
    """Finish the replacement of folders in ``parent`` that a killed process has begun."""
    for old in parent.glob(f"{_OLD}*"):
        folder = parent / old.name.removeprefix(_OLD)
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def _remove_asides(parent: Path) -> None:
    for aside in parent.glob(".*"):
        if _ASIDE.fullmatch(aside.name):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def write_safetensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name, with texts as metadata."""
    with replacing(file) as aside:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, aside, dict(metadata or {})
        )


def read_safetensors(file: Path, expected: str, remedy: str = MADE_AGAIN) -> dict[str, Tensor]:
    """Return tensors by name. If the file is damaged, raise ``InputError`` that names it."""
    with reading(file, expected, remedy):
        return load_file(file)


def write_text(file: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8."""
    with replacing(file) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented strict JSON.

    If a number is not finite, raise ``InputError``: JSON has no such numbers.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{path}: expected finite numbers, got {content}") from error
    write_text(path, f"{text}\n")


def _aside(path: Path) -> Path:
    return path.with_name(f".{uuid4().hex}.{path.name}")  # process ids may be equal on two machines


def _new_mode(file: Path) -> int:
    """Create a file and return the mode that the umask gives it. safetensors makes its own files private."""
    file.touch()
    return stat.S_IMODE(file.stat().st_mode)


def _set_mode(file: Path, mode: int) -> None:
    # The mode is set only if it differs: some file systems have one mode and refuse to set any.
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)
