"""Hashes that identify the weights of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def fingerprint(network: nn.Module) -> str:
    """Return a hash of a network's weights and their names, as 16 hexadecimal digits."""
    return tensors_fingerprint(network.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors and their names, as 16 hexadecimal digits."""
    return digest_of(sorted(tensors.items()))


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names and tensors in their order, as 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
