"""OCE, orthogonal concept erasure: each value map is followed by the rotation that fits best.

W' = R W with R orthogonal, so that W'ᵀW' = WᵀW: all values keep their norms and their angles. R maximises
tr(Rᵀ A) with

    A = −s_e G (I − G*) + s_c Σ (W k)(W k)ᵀ + s_g W C Wᵀ + λ W Wᵀ.

G projects on the values of the states to erase, G* on those of their guides, k are states to keep, and C is
the mean of k kᵀ over prompts to keep. With A = U Σ Vᵀ the maximiser is R = U Vᵀ. For one erased direction v
and a large s_e it is the reflection I − 2 v vᵀ: the concept's value is negated. A guide is a direction that
the reflection spares. R depends on W, so there is no one T.

Erased values that span all of a map's outputs leave nothing to spare: every value is negated. ``directions``
takes the leading directions of the erased values in place of their span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from trce_lightning.adapters import Stream
from trce_lightning.config.schema import Natural, NonNegative, OneOf, Positive
from trce_lightning.erasers.linear import ClosedForm, read_weights, write_weights
from trce_lightning.erasers.protocol import Erased, Job
from trce_lightning.erasers.texts import prompt_states


def span(columns: Tensor) -> Tensor:
    """Return the projection on the span of columns, ``[d, n]`` → ``[d, d]``. Repeated columns count once."""
    unit = columns / columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    return unit @ torch.linalg.pinv(unit, rtol=1e-9)


def leading(columns: Tensor, count: int) -> Tensor:
    """Return the projection on the ``count`` leading directions of unit columns, ``[d, n]`` → ``[d, d]``.

    These are the left singular vectors of the largest singular values. There are at most min(d, n).
    """
    unit = columns / columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
    chosen = torch.linalg.svd(unit, full_matrices=False)[0][:, :count]
    return chosen @ chosen.mT


def rotation(a: Tensor) -> Tensor:
    """Return the orthogonal R that maximises tr(Rᵀ A), ``[d, d]``. Its determinant may be −1."""
    left, _, right = torch.linalg.svd(a)
    return left @ right


@dataclass(kw_only=True)
class OCE(ClosedForm):
    """Rotate values.

    Args:
        keep: whether s_g counts for the mean over ``prompts`` to keep, or for ``none``.
        erase_scale: s_e.
        keep_scale: s_c, the weight of the concept's neighbours, which must survive.
        general_scale: s_g, the weight of the prompts to keep.
        ridge: λ, the weight that holds each map near W.
        directions: directions of the erased values that G projects on, the leading ones. 0 is all, as
            published.
    """

    keep: Annotated[str, OneOf(("none", "prompts"))] = "prompts"
    erase_scale: Positive = 1.0
    keep_scale: NonNegative = 0.3
    general_scale: NonNegative = 0.5
    ridge: Positive = 1.5
    directions: Natural = 0
    name: ClassVar[str] = "oce"
    title: ClassVar[str] = "OCE (orthogonal concept erasure)"

    def edit(self, job: Job, stream: Stream) -> Erased:
        """Solve for each map's R and apply it."""
        erased, guides = self.states(job, stream.segments)
        near = [name for concept in job.concepts for name in concept.neighbours]
        neighbours = erased[:0]
        if near and self.keep_scale:
            neighbours = prompt_states(job.adapter, stream.segments, near, "last")
        general = torch.zeros(erased.shape[1], erased.shape[1], dtype=torch.float64)
        if self.general_scale and self.keep == "prompts":
            states = prompt_states(job.adapter, stream.segments, job.keep_prompts(), "content")
            general = states.mT @ states / len(states)
        edited = {
            name: self.rotation_of(w, erased, guides, neighbours, general) @ w
            for name, w in read_weights(stream).items()
        }
        return write_weights(job.adapter, stream, edited)

    def rotation_of(
        self, w: Tensor, erased: Tensor, guides: Tensor, neighbours: Tensor, general: Tensor
    ) -> Tensor:
        """Return R of a map ``[d_out, d]``, for states ``[n, d]`` and C ``[d, d]``."""
        identity = torch.eye(len(w), dtype=w.dtype)
        values = w @ erased.mT
        projection = leading(values, self.directions) if self.directions else span(values)
        a = -self.erase_scale * projection @ (identity - span(w @ guides.mT))
        kept = w @ neighbours.mT
        a = a + self.keep_scale * kept @ kept.mT + self.general_scale * w @ general @ w.mT
        return rotation(a + self.ridge * w @ w.mT)
