"""The networks of a pipeline folder: the choice of their files, and the check that no tensor is missing.

Pickled weights (``.bin``) are read as tensors only. diffusers and transformers load them with torch's
``weights_only``, which runs no code.
"""

from __future__ import annotations

import importlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import write_json

log = logging.getLogger(__name__)
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "(?:pytorch_)?model"}
PREFERRED = (None, "fp16", "bf16")
"""The preferred variants of weights, the most exact first. Other variants follow by name."""


class Form(NamedTuple):
    """The form in which a network's weights are stored."""

    variant: str | None
    """The variant in the files' names, such as ``fp16``, or None."""
    suffix: str
    """The file format, ``safetensors`` or ``bin``."""


def open_networks(
    folder: Path, index: Mapping[str, Any], names: Sequence[str], dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Return the named networks of a folder by their names in its index.

    If the weights of a network are missing, can't be read or don't fit the network, raise ``InputError``.
    """
    return {name: _open_network(folder / name, index[name], dtype) for name in names}


def lacks_weights(folder: Path, index: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Return whether the folder of any of the named networks has no weights in any form."""
    return any(not forms(folder / name, index[name][0]) for name in names)


def forms(folder: Path, library: str) -> list[Form]:
    """Return the forms in which weights lie in a network's folder, the preferred form first.

    A file is one form, and so is an index of shards. Full precision comes before half precision, and
    safetensors before bin.
    """
    stem, name = STEMS[library], r"[^.-]+"
    patterns = (
        rf"{stem}(?:\.(?P<variant>{name}))?\.(?P<suffix>safetensors|bin)",
        rf"{stem}\.(?P<suffix>safetensors|bin)\.index(?:\.(?P<variant>{name}))?\.json",
        rf"{stem}\.(?P<suffix>safetensors|bin)\.(?P<variant>{name})\.index\.json",
    )
    files = folder.iterdir() if folder.is_dir() else ()
    matches = [re.fullmatch(pattern, file.name) for file in files for pattern in patterns]
    found = {Form(match["variant"], match["suffix"]) for match in matches if match}
    return sorted(found, key=_rank)


def describe_network(folder: Path, entry: Sequence[str]) -> nn.Module:
    """Return a network of diffusers as its configuration describes it, without weights (meta device)."""
    refuse_other_settings(folder)
    kind: Any = _network_class(folder.name, entry)
    with torch.device("meta"):
        network: nn.Module = kind.from_config(kind.load_config(folder))
    return network


def copy_network(source: Path, target: Path, library: str, form: Form | None = None) -> None:
    """Copy a network's configuration and its weights in one form, the preferred one if none is given.

    The copy's files have the names without a variant, so a pipeline opens them without being told of one.
    """
    form = form or forms(source, library)[0]
    variant = f".{form.variant}" if form.variant else ""
    own = rf"{STEMS[library]}(?:{re.escape(variant)}(?:-\d+-of-\d+)?\.{form.suffix}|{_index_end(form)})"
    target.mkdir(parents=True)
    for file in source.iterdir():
        is_index = re.fullmatch(r".*\.index(?:\.[^.-]+)?\.json", file.name)
        name = file.name.replace(variant, "", 1) if variant else file.name
        if re.fullmatch(own, file.name) and is_index:
            index = json.loads(file.read_bytes())
            files = {key: shard.replace(variant, "", 1) for key, shard in index["weight_map"].items()}
            write_json(target / name, index | {"weight_map": files})
        elif re.fullmatch(own, file.name) or (file.suffix == ".json" and not is_index):
            shutil.copyfile(file, target / name)


def index_file(folder: Path, library: str, form: Form) -> Path | None:
    """Return the index of a form's shards, or None if its weights lie in one file."""
    pattern = rf"{STEMS[library]}{_index_end(form)}"
    return next((file for file in folder.iterdir() if re.fullmatch(pattern, file.name)), None)


def _index_end(form: Form) -> str:
    """Return a pattern of what follows the stem in the name of an index."""
    variant = re.escape(f".{form.variant}") if form.variant else ""
    return rf"(?:\.{form.suffix}\.index{variant}|{variant}\.{form.suffix}\.index)\.json"


def _rank(form: Form) -> tuple[int, str, bool]:
    preferred = PREFERRED.index(form.variant) if form.variant in PREFERRED else len(PREFERRED)
    return preferred, form.variant or "", form.suffix == "bin"


def _open_network(folder: Path, entry: Sequence[str], dtype: torch.dtype) -> nn.Module:
    library = entry[0]
    found = forms(folder, library)
    if not found:
        raise InputError(
            f"model.path: expected weights of {folder.name} in '{folder}', as .safetensors or .bin, got none"
        )
    refuse_other_settings(folder)
    form = found[0]
    if form.variant is not None:
        log.info("%s: read in its stored form %s", folder.name, form.variant)
    options = {"variant": form.variant, "use_safetensors": form.suffix == "safetensors", "dtype": dtype}
    if library == "transformers":
        options["ignore_mismatched_sizes"] = True  # _refuse_incomplete names them
    network_class = _network_class(folder.name, entry)
    try:
        network, report = network_class.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True, **options
        )
    except (OSError, SafetensorError, pickle.UnpicklingError) as error:
        raise damaged_weights(folder, error) from error
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"model.path: expected weights of {folder.name} that fit '{folder / 'config.json'}', got others: "
            f"{_first_line(error)}"
        ) from error
    _refuse_incomplete(folder, report)
    return network


def _network_class(name: str, entry: Sequence[str]) -> Any:
    library, class_name = entry
    network_class = getattr(importlib.import_module(library), class_name, None)
    if network_class is None:
        raise InputError(f"model.path: expected a {name} that {library} knows, got {class_name}")
    return network_class


def _refuse_incomplete(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse files that lack tensors. The library has filled the missing tensors with random numbers."""
    if missing := sorted(report["missing_keys"]):
        raise missing_tensors(folder, missing)
    if mismatched := sorted(report["mismatched_keys"]):
        raise other_shapes(folder, mismatched)


def damaged_weights(folder: Path, error: Exception) -> InputError:
    """Return the error for files that can't be read."""
    return InputError(
        f"model.path: expected weights of {folder.name} that can be read, got damaged ones in "
        f"'{folder}': {_first_line(error)}; get them anew{_pointers(folder)}"
    )


def missing_tensors(folder: Path, names: Sequence[str]) -> InputError:
    """Return the error for files without these tensors."""
    return InputError(
        f"model.path: expected all tensors of {folder.name}, got '{folder}' without {len(names)} of "
        f"them, such as {names[0]}; get the folder anew"
    )


def other_shapes(folder: Path, tensors: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> InputError:
    """Return the error for tensors of other shapes: their names, stored shapes and expected shapes."""
    name, stored, expected = tensors[0]
    return InputError(
        f"model.path: expected weights of {folder.name} that fit '{folder / 'config.json'}', got "
        f"{len(tensors)} of other shapes, such as {name}: {[*stored]} for {[*expected]}"
    )


def refuse_other_settings(folder: Path) -> None:
    """Raise ``InputError`` if a network's configuration is missing, damaged, or that of quantized weights."""
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(
            f"model.path: expected '{file}', which says how {folder.name} is built, got no such file"
        )
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"model.path: expected '{file}' as JSON, got: {error}; get it anew") from error
    if "quantization_config" in settings:
        raise InputError(
            f"model.path: expected plain weights of {folder.name}, got quantized ones in '{folder}', which "
            "can't be edited; take the model that they were made from"
        )


def _pointers(folder: Path) -> str:
    """Return a hint if a file is only git-lfs's pointer, else an empty text."""
    for file in (file for file in folder.iterdir() if file.is_file() and file.stat().st_size < 1024):
        if file.read_bytes().startswith(b"version https://git-lfs"):
            return f" ('{file.name}' is git-lfs's pointer: run git lfs pull)"
    return ""


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
