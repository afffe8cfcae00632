"""The adversary's embeddings, which stay converged while the network that they attack is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

DECAYS = (0.9, 0.99)
"""The decay rates of Adam."""
EPSILON = 1e-8


class Pool(nn.Module):
    """Entries of n embeddings each, ``[P, n, e]`` by segment, with Adam's moments as buffers.

    Args:
        begin: embeddings that a vector may begin as, ``[V, e]`` by segment, such as those of all words.
        size: the number P of entries.
        vectors: the number n of embeddings of an entry.
        generator: draws the beginnings, on the CPU.
    """

    def __init__(
        self, begin: Mapping[str, Tensor], size: int, vectors: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.begin = {name: rows.detach().float().cpu() for name, rows in begin.items()}
        self.vectors = vectors
        for name in self.begin:
            value = self._fresh(name, size, generator)
            for part, tensor in (("value", value), *((m, torch.zeros_like(value)) for m in ("m", "v"))):
                self.register_buffer(f"{name}_{part}", tensor)
        self.register_buffer("age", torch.zeros(size))

    def _fresh(self, name: str, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.begin[name]), (count, self.vectors), generator=generator)
        return self.begin[name][rows]

    def values(self, entries: Tensor) -> dict[str, Tensor]:
        """Return the embeddings of entries, ``[E]`` → ``[E, n, e]`` by segment, as copies."""
        return {name: self.get_buffer(f"{name}_value")[entries] for name in self.begin}

    def begin_anew(self, entries: Tensor, generator: torch.Generator) -> None:
        """Replace entries by new beginnings, and forget their moments."""
        for name in self.begin:
            value = self.get_buffer(f"{name}_value")
            value[entries] = self._fresh(name, len(entries), generator).to(value.device)
            for moment in ("m", "v"):
                self.get_buffer(f"{name}_{moment}")[entries] = 0.0
        self.get_buffer("age")[entries] = 0.0

    @torch.no_grad()
    def descend(self, entries: Tensor, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Take a step of Adam (arXiv 1412.6980) down ``gradients`` ``[E, n, e]`` with the learning rate."""
        age = self.get_buffer("age")
        age[entries] += 1
        unbiased_m, unbiased_v = (1 / (1 - decay ** age[entries])[:, None, None] for decay in DECAYS)
        for name, gradient in gradients.items():
            value, m, v = (self.get_buffer(f"{name}_{part}") for part in ("value", "m", "v"))
            m[entries] = DECAYS[0] * m[entries] + (1 - DECAYS[0]) * gradient
            v[entries] = DECAYS[1] * v[entries] + (1 - DECAYS[1]) * gradient.square()
            value[entries] -= lr * unbiased_m * m[entries] / ((unbiased_v * v[entries]).sqrt() + EPSILON)
