"""UCE, unified concept editing (arXiv 2308.14761): keys and values of a concept become those of its guide.

    min_W' s_e Σ ‖W' e − W g‖² + s_k Σ ‖W' k − W k‖² + λ ‖W' − W‖²

e are states of the texts to erase, g those of their guides, and k states to keep. The minimiser is W T with
one T for all maps (:mod:`.linear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trce_lightning.adapters import Stream
from trce_lightning.config.schema import NonNegative, Positive
from trce_lightning.erasers.linear import ClosedForm, Moments, apply_transform, moments, solved
from trce_lightning.erasers.protocol import Erased, Job


def uce_transform(
    erased: Tensor, guides: Tensor, kept: Tensor, *, erase_scale: float, keep_scale: float, ridge: float
) -> Tensor:
    """Return UCE's T. ``erased`` and ``guides`` are ``[n, d]``, and ``kept`` is Σ k kᵀ, ``[d, d]``."""
    every = moments(erased, guides, erase_scale).plus(Moments(keep_scale * kept, keep_scale * kept))
    return solved(every, ridge)


@dataclass(kw_only=True)
class UCE(ClosedForm):
    """Edit keys and values once.

    Args:
        erase_scale: s_e.
        keep_scale: s_k.
        ridge: λ, the weight that holds the edit near W.
    """

    erase_scale: Positive = 1.0
    keep_scale: NonNegative = 1.0
    ridge: Positive = 0.5
    name: ClassVar[str] = "uce"
    title: ClassVar[str] = "UCE (arXiv 2308.14761)"

    def edit(self, job: Job, stream: Stream) -> Erased:
        """Solve for T and apply it."""
        erased, guides = self.states(job, stream.segments)
        return apply_transform(
            job.adapter, stream, self.transform(erased, guides, self.kept(job, stream.segments))
        )

    def transform(self, erased: Tensor, guides: Tensor, kept: Tensor) -> Tensor:
        """Return T with this method's scales."""
        return uce_transform(
            erased,
            guides,
            kept,
            erase_scale=self.erase_scale,
            keep_scale=self.keep_scale,
            ridge=self.ridge,
        )
