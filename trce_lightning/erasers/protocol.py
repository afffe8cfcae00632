"""The protocol of a method that erases concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import lightning.pytorch as pl
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.concepts import Concept
from trce_lightning.generation.guidance import Guidance


@dataclass(frozen=True)
class Counts:
    """The cost of an erasure. One network evaluation is one latent × one prompt, however batched."""

    forward: int = 0
    """Network evaluations without gradients."""
    backward: int = 0
    """Network evaluations with a backward pass."""
    trainable: int = 0
    """Numbers that the method may change."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Erased:
    """The result of an erasure."""

    changed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Changed tensors by the pipeline's component, such as "unet" or "text_encoder", and by name."""
    guidance: Guidance | None = None
    """A rule of guidance for methods that change no weights, else None."""
    counts: Counts = Counts()


class Eraser(Protocol):
    """A method, made with its own options."""

    def erase(self, adapter: Adapter, concepts: Sequence[Concept], trainer: pl.Trainer) -> Erased:
        """Erase all concepts at once. Every rank calls it, and the result is the same on every rank.

        The adapter's model is the original. It may be changed in place; the harness takes what changed from
        the result.
        """
