"""A denoiser that stays on the disk: tensors of its files are read, and replaced in a copy, one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trce_lightning.adapters.folder import (
    STEMS,
    copy_network,
    damaged_weights,
    forms,
    index_file,
    missing_tensors,
    other_shapes,
    refuse_other_settings,
)
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import write_json
from trce_lightning.runtime.tensor_files import DTYPES, Place, places, replace_tensor

LIBRARY = "diffusers"
SUFFIX = "safetensors"
INDEX = "model_index.json"


class StoredNetwork:
    """A network of a pipeline folder in its safetensors files. No tensor is kept in memory."""

    def __init__(self, folder: Path) -> None:
        """Find the files. If there are none whose tensors can be replaced, raise ``InputError``."""
        self.folder = folder
        refuse_other_settings(folder)
        found = forms(folder, LIBRARY)
        readable = [form for form in found if form.suffix == SUFFIX]
        if not readable:
            got = "pickled ones alone, whose tensors can't be replaced one by one" if found else "none"
            raise InputError(
                f"model.path: expected weights of {folder.name} in '{folder}' as .{SUFFIX}, got {got}"
            )
        self.form = readable[0]
        self._tensors = self._files()

    def _files(self) -> dict[str, Path]:
        """Return the file of each tensor."""
        index = index_file(self.folder, LIBRARY, self.form)
        if index is not None:
            weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        variant = f".{self.form.variant}" if self.form.variant else ""
        file = self.folder / f"{STEMS[LIBRARY]}{variant}.{SUFFIX}"
        return dict.fromkeys(self._header(file), file)

    @property
    def files(self) -> list[Path]:
        """Return the files of the weights."""
        return sorted(set(self._tensors.values()))

    @cached_property
    def _places(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for file in self.files:
            found |= {name: place for name, place in self._header(file).items() if name in self._tensors}
        return found

    def _header(self, file: Path) -> dict[str, Place]:
        if not file.is_file():
            raise InputError(
                f"model.path: expected all weights of {self.folder.name}, got '{self.folder}' without "
                f"'{file.name}', which its index names; get the folder anew"
            )
        try:
            with safe_open(file, "pt"):  # this compares the header with the file's length
                return places(file)
        except SafetensorError as error:
            raise damaged_weights(self.folder, error) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type. If it is that of quantized weights, raise ``InputError``."""
        stored = self._place(name).dtype
        if stored not in DTYPES:
            raise InputError(
                f"model.path: expected {name} of {self.folder.name} as {', '.join(DTYPES)}, got {stored} in "
                f"'{self.folder}'; quantized weights can't be edited: edit the model that they were made "
                "from, and quantize it then"
            )
        return DTYPES[stored]

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise missing_tensors(self.folder, [name])
        return self._places[name]

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in its stored type."""
        self.dtype(name)
        with safe_open(self._tensors[name], "pt") as opened:
            return opened.get_tensor(name)

    def check(self, network: nn.Module) -> None:
        """Raise ``InputError`` unless the files hold all tensors of ``network`` in their shapes."""
        expected = network.state_dict()
        if missing := sorted(expected.keys() - self._places.keys()):
            raise missing_tensors(self.folder, missing)
        wrong = [
            (name, self._places[name].shape, tuple(tensor.shape))
            for name, tensor in expected.items()
            if self._places[name].shape != tuple(tensor.shape)
        ]
        if wrong:
            raise other_shapes(self.folder, wrong)

    def copied(self, folder: Path) -> StoredNetwork:
        """Copy configuration and weights into ``folder``, under the names without a variant."""
        copy_network(self.folder, folder, LIBRARY, self.form)
        return StoredNetwork(folder)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor in its file, rounded to its stored type."""
        replace_tensor(self._tensors[name], self._place(name), tensor.to(self.dtype(name)))


@dataclass(frozen=True)
class StoredPipeline:
    """A pipeline's folder, whose denoiser is not loaded."""

    folder: Path
    index: Mapping[str, Any]
    """The content of its ``model_index.json``. Parts that are None are not copied."""
    denoiser: StoredNetwork

    def copied(self, folder: Path) -> StoredNetwork:
        """Copy the pipeline into an empty folder, and return the copy's denoiser."""
        write_json(folder / INDEX, self.index)
        parts = {name: entry for name, entry in self.index.items() if isinstance(entry, list) and entry[0]}
        for name, (library, _) in parts.items():
            source = self.folder / name
            if source == self.denoiser.folder:
                continue
            if library in STEMS and forms(source, library):
                copy_network(source, folder / name, library)
            else:
                shutil.copytree(source, folder / name)
        return self.denoiser.copied(folder / self.denoiser.folder.name)


class FromFile(nn.Module):
    """A parametrization whose tensor is read from its file each time, and freed after use."""

    def __init__(self, stored: StoredNetwork, name: str) -> None:
        super().__init__()
        self.stored, self.name = stored, name

    def forward(self, described: Tensor) -> Tensor:
        """Return the stored tensor in the place of the one on the meta device."""
        return self.stored.read(self.name)


def read_from_files(module: nn.Module, name: str, stored: StoredNetwork) -> None:
    """Let ``module.weight`` of a described network be the tensor ``name.weight`` of its files.

    If the tensor is quantized, raise ``InputError``.
    """
    stored.dtype(f"{name}.weight")
    parametrize.register_parametrization(module, "weight", FromFile(stored, f"{name}.weight"), unsafe=True)
