"""RECE, reliable and efficient concept erasure (arXiv 2407.12383): UCE, then rounds against its own attack.

Each round derives for every erased state e the state that brings its keys and values back through the edited
maps W T of all layers,

    e' = argmin Σ_l ‖W_l T e' − W_l e‖² + λ_r ‖e'‖² = (TᵀGT + λ_r I)⁻¹ TᵀG e,   G = Σ_l W_lᵀW_l,

and erases e' as well. With ``from_original``, each round solves UCE's problem again, from the original W and
with UCE's scales, over all states so far. So no error accumulates. Without it, each round edits the maps of
the last one with scales of its own, as the released code does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trce_lightning.adapters import Stream
from trce_lightning.config.schema import Natural, Positive
from trce_lightning.erasers.linear import apply_transform, gram
from trce_lightning.erasers.protocol import Ahead, Erased, Job
from trce_lightning.erasers.uce import UCE, uce_transform
from trce_lightning.errors import InputError


def adversarial_states(states: Tensor, transform: Tensor, gram_matrix: Tensor, penalty: float) -> Tensor:
    """Return the states that act under T like ``states`` ``[n, d]`` do without it, ``[n, d]``."""
    right = transform.mT @ gram_matrix
    identity = torch.eye(len(gram_matrix), dtype=gram_matrix.dtype)
    return torch.linalg.solve(right @ transform + penalty * identity, right @ states.mT).mT


@dataclass(kw_only=True)
class RECE(UCE):
    """Edit keys and values, and then what attacks the edit, in rounds.

    Args:
        rounds: number of rounds after UCE.
        penalty: λ_r, the weight of the attacking state's norm.
        round_ridge: λ of the rounds without ``from_original``.
        round_keep_scale: s_k of the rounds without ``from_original``.
        from_original: each round solves from the original maps over all states so far, with UCE's scales.
    """

    rounds: Natural = 3
    penalty: Positive = 0.1
    round_ridge: Positive = 0.1
    round_keep_scale: Positive = 0.1
    from_original: bool = True
    name: ClassVar[str] = "rece"
    title: ClassVar[str] = "RECE (arXiv 2407.12383)"

    def ahead(self, job: Job) -> Ahead:
        """Return the work ahead. If scales of rounds are given that no round reads, raise ``InputError``."""
        for name in ("round_ridge", "round_keep_scale"):
            given = getattr(self, name)
            if self.from_original and given != getattr(type(self), name):
                raise InputError(
                    f"method.{name}: expected none with method.from_original=true, whose rounds read "
                    f"method.{name.removeprefix('round_')}, got {given}"
                )
        return super().ahead(job)

    def edit(self, job: Job, stream: Stream) -> Erased:
        """Solve for T in rounds and apply it."""
        erased, guides = self.states(job, stream.segments)
        kept, gram_matrix = self.kept(job, stream.segments), gram(stream)
        transform = self.transform(erased, guides, kept)
        attacks = [erased]
        for _ in range(self.rounds):
            attacks.append(adversarial_states(erased, transform, gram_matrix, self.penalty))
            if self.from_original:
                transform = self.transform(torch.cat(attacks), guides.repeat(len(attacks), 1), kept)
                continue
            transform = transform @ uce_transform(
                attacks[-1],
                guides,
                kept,
                erase_scale=self.erase_scale,
                keep_scale=self.round_keep_scale,
                ridge=self.round_ridge,
            )
        result = apply_transform(job.adapter, stream, transform)
        norms = attacks[-1].norm(dim=1).mean() / erased.norm(dim=1).mean()
        return Erased(result.changed, {"attack norm / state norm": float(norms)})
