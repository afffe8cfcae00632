"""SPEED (arXiv 2503.07392): an edit of values within the null space of what is kept.

    min_Δ mean Σ ‖(W + ΔP) t − W a‖² + ρ ‖ΔP‖²   subject to   ΔP K₂ = 0

t are states to erase and a their anchors. The sum is over the states of a text, and the mean over texts. P
projects on the null space of the kept states: the directions in which their second moment has singular values
below a threshold. K₂ are states of the empty prompt that must not move at all. The minimiser is Δ = W D for
every W, so one matrix T = I + D serves all maps:

    D = (C_a − C_t) P (I − M K₂ (K₂ᵀ P M K₂ + λ I)⁻¹ K₂ᵀ P) M,   M = (C_t P + ρ I)⁻¹,
    C_t = mean Σ t tᵀ,   C_a = mean Σ a tᵀ

λ > 0 gives a penalty 1/λ in place of the constraint. The method refines what is kept: it keeps those states
that a plain edit would move most, and copies of them along the direction that the maps read least. Where the
method does this for each map, one T pools over the maps: a state k moves by kᵀ D₀ᵀ G D₀ k, with G = Σ_l
W_lᵀW_l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from trce_lightning.adapters import Stream
from trce_lightning.config.schema import Natural, NonNegative, OneOf, Positive
from trce_lightning.erasers.linear import ClosedForm, Moments, apply_transform, gram, moments
from trce_lightning.erasers.protocol import Erased, Job
from trce_lightning.erasers.texts import AFTER_START, erased_pairs, prompt_states
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import seeded

CENTRES = 3
"""The number of centres of the empty prompt's states after the first."""


def null_space(mean_square: Tensor, threshold: float) -> Tensor:
    """Return P, ``[d, d]``: the directions in which kept states have a mean square below the threshold.

    ``mean_square`` is the mean of k kᵀ, ``[d, d]``.
    """
    values, vectors = torch.linalg.eigh(mean_square)
    free = vectors[:, values < threshold]
    return free @ free.mT


def speed_transform(
    sums: Moments, projector: Tensor, invariant: Tensor, *, ridge: float, slack: float
) -> Tensor:
    """Return T, ``[d, d]``. ``sums`` are C_a and C_t, and ``invariant`` is K₂ᵀ, ``[m, d]``.

    ``ridge`` is ρ and ``slack`` λ. An invariant state in the kept span doesn't move anyway.
    """
    c_a, c_t = sums
    identity = torch.eye(len(c_t), dtype=torch.float64)
    m = torch.linalg.inv(c_t @ projector + ridge * identity)
    k = invariant.mT
    inner = k.mT @ projector @ m @ k + slack * torch.eye(k.shape[1], dtype=torch.float64)
    inverse = torch.linalg.pinv((inner + inner.mT) / 2, rtol=1e-10, hermitian=True)
    return identity + (c_a - c_t) @ projector @ (identity - m @ k @ inverse @ k.mT @ projector) @ m


def invariant_states(empty: Tensor) -> Tensor:
    """Return K₂ᵀ, ``[4, d]``: the first state of the empty prompt and centres of the others ``[L, d]``."""
    others = empty[1:].numpy()
    first = others[np.linspace(0, len(others) - 1, min(CENTRES, len(others))).astype(int)]
    centres, _ = kmeans2(others, first, minit="matrix")
    return torch.cat([empty[:1], torch.from_numpy(centres)])


@dataclass(kw_only=True)
class SPEED(ClosedForm):
    """Edit within the null space of what is kept.

    Args:
        positions: the states of these texts: the ``last`` content token, all positions ``from_last`` on, or
            all ``after_start``. Those of a text are summed.
        keep: the states that are kept: those of the ``empty`` prompt, or of ``prompts`` too, at their last
            content token or, unless ``positions`` is that, at all positions.
        threshold: directions whose mean square over the kept states is lower than this are free.
        ridge: ρ, the weight that holds the edit near W.
        slack: λ. 0 lets the empty prompt's states not move at all, and a larger value lets them move more.
        refined: keep only the states that a plain edit would move more than the mean.
        copies: copies of each kept state, moved along the direction that the maps read least.
    """

    positions: Annotated[str, OneOf(("last", "from_last", AFTER_START))] = "last"
    keep: Annotated[str, OneOf(("empty", "prompts"))] = "empty"
    threshold: Positive = 0.1
    ridge: Positive = 1.0
    slack: NonNegative = 0.0
    refined: bool = True
    copies: Natural = 10
    name: ClassVar[str] = "speed"
    title: ClassVar[str] = "SPEED (arXiv 2503.07392)"

    @property
    def reads_seed(self) -> bool:
        """Return whether there are copies of kept states, which are moved at random."""
        return self.copies > 0

    def edit(self, job: Job, stream: Stream) -> Erased:
        """Solve for T and apply it."""
        erased, anchors = self.states(job, stream.segments)
        texts = len(erased_pairs(job.concepts, self.prompts, self.guide)) * len(stream.segments)
        sums = moments(erased, anchors, 1 / texts)
        empty = prompt_states(job.adapter, stream.segments, [""], "all")
        kept = empty
        if self.keep == "prompts":
            # As many as stand for the erased texts: states that could move must be among those that may not.
            where = "last" if self.positions == "last" else "all"
            kept = torch.cat([empty, prompt_states(job.adapter, stream.segments, job.keep_prompts(), where)])
        second_moment, count = self.retained(kept, sums, gram(stream), job.seed)
        projector = null_space(second_moment / count, self.threshold)
        free = round(float(projector.trace()))
        if free == 0:
            raise InputError(
                f"method.threshold: expected one above the kept states' smallest mean square, got "
                f"{self.threshold}, which leaves no direction to erase in"
            )
        transform = speed_transform(
            sums, projector, invariant_states(empty), ridge=self.ridge, slack=self.slack
        )
        changed = apply_transform(job.adapter, stream, transform).changed
        return Erased(changed, {"free directions": free, "kept states": count})

    def retained(self, kept: Tensor, sums: Moments, gram_matrix: Tensor, seed: int) -> tuple[Tensor, int]:
        """Return Σ k kᵀ over the kept states that count and over their copies, and how many these are.

        ``sums`` are C_a and C_t. One copy of all states is in memory at a time.
        """
        c_a, c_t = sums
        plain = (c_a - c_t) @ torch.linalg.inv(torch.eye(len(c_t), dtype=torch.float64) + c_t)

        def influence(states: Tensor) -> Tensor:
            moved = states @ plain.mT
            return ((moved @ gram_matrix) * moved).sum(1).clamp_min(0).sqrt()

        def moved_most(states: Tensor, least: Tensor | float) -> Tensor:
            return states[influence(states) >= least]

        kept = moved_most(kept, influence(kept).mean() if self.refined else 0.0)
        direction = torch.linalg.eigh(gram_matrix).eigenvectors[:, 0]

        def copied(number: int) -> Tensor:
            generator = seeded(seed_of(f"copy {number} of kept states", seed))
            return kept + torch.randn(len(kept), 1, generator=generator, dtype=torch.float64) * direction

        total, count, copies = kept.mT @ kept, len(kept), range(self.copies)
        influences = [float(influence(copied(number)).mean()) for number in copies if self.refined]
        for number in copies:
            states = moved_most(copied(number), sum(influences) / self.copies)
            total, count = total + states.mT @ states, count + len(states)
        return total, count
