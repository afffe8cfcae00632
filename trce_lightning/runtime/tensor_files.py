"""Replace single tensors of safetensors files, and write such files tensor by tensor, in constant memory.

A file is the header's length (8 bytes, little-endian), the header (JSON: dtype, shape and place of each
tensor), and the tensors' bytes. Places count from the end of the header. See
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trce_lightning.runtime.storage import replacing

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The names of floating-point types in a header. Others are those of quantized weights."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8


class Place(NamedTuple):
    """A tensor's type by its name in the header, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def places(file: Path) -> dict[str, Place]:
    """Return the place of every tensor of a safetensors file. Only the header is read."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        header = json.loads(opened.read(length))
    first = _LENGTH_BYTES + length
    return {
        name: Place(entry["dtype"], tuple(entry["shape"]), first + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def replace_tensor(file: Path, place: Place, tensor: Tensor) -> None:
    """Overwrite the bytes of one tensor. Type and shape must be those that the file has."""
    assert (_NAMES[tensor.dtype], tuple(tensor.shape)) == (place.dtype, place.shape)
    with file.open("r+b") as opened:
        opened.seek(place.start)
        opened.write(_bytes_of(tensor))


def write_one_by_one(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors of one type that follow each other in the order of ``shapes``, each as it comes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": [*shape], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with replacing(file) as aside, aside.open("wb") as opened:
        opened.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for (name, tensor), expected in zip(tensors, shapes, strict=True):
            assert name == expected and tensor.shape == tuple(shapes[name])
            opened.write(_bytes_of(tensor.to(dtype)))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
