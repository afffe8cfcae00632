"""Store weights in 8 bits: enough for a model that others are compared with, in half the space of float16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LARGEST = 127
SCALE = ".scale"
"""The end of the name of a matrix's scales."""


def packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of two dimensions or more as int8 with a scale for each output, and others in float16.

    w ≈ s · round(w / s) with s = max |w| / 127 over all inputs of an output, so that the error is s / 2 at
    most.
    """
    stored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim < 2:
            stored[name] = weight.half()
            continue
        rows = weight.float().flatten(1)
        scale = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(weight.shape)
        stored[name + SCALE] = scale
    return stored


def unpacked(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what :func:`packed` has stored, in float32."""
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        scale = stored.get(name + SCALE)
        rows = tensor.float() if scale is None else tensor.float().flatten(1) * scale[:, None]
        weights[name] = rows.reshape(tensor.shape)
    return weights
