"""UnlearnDiffAtk: words before the prompt that explain pictures of the concept to the erased model.

    min over k tokens a of  E_ε ‖ε − ε_θ'(z_t, t, E([a ; P]))‖²        θ' erased

z_t is a picture of the concept with noise: the loss is that of the diffusion classifier, and no original
model is needed. Each token is a row u of the simplex over the vocabulary. A token is drawn from u, the
gradient at its one-hot code is clipped to [−1, 1] and applied to u, and u is projected back to the simplex.
Noise levels are gone through from the cleanest to the noisiest. (To Generate or Not? Safety-Driven Unlearned
Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now, arXiv 2310.11868; projection: arXiv
1309.1541.)

The published search stops at the first success of the judge. This one spends its whole budget and never sees
the judge.

It shows whether somebody who has the erased model's weights, and pictures of the concept, can find words that
bring it back. A failure says that this budget of gradient steps found none, not that there is none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trce_lightning.attacks.tries import check_positive
from trce_lightning.attacks.white_box import WhiteBoxWords
from trce_lightning.attacks.words import (
    Layout,
    Pattern,
    Vocabulary,
    check_choice,
    prefixed,
    suffixed,
)

PLACES = ("prefix", "suffix")


@dataclass(kw_only=True, eq=False)
class UnlearnDiff(WhiteBoxWords):
    """The attack; see :class:`~.white_box.WhiteBoxWords` for the other options.

    Args:
        tokens: k, the free tokens.
        place: ``prefix`` or ``suffix``: where they stand.
    """

    tokens: int = 5
    place: str = "prefix"
    steps: int = 2000
    levels: int = 50
    lr: float = 0.01
    checkpoints: int = 50

    name = "unlearndiff"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, tokens=self.tokens)
        check_choice(self.name, "place", self.place, PLACES)

    def pattern(self, words: Sequence[int], room: int, typed: Collection[int]) -> Pattern:
        """Return the prompt with the free places before or after it."""
        if self.place == "prefix":
            return prefixed(words, self.tokens)
        return suffixed(words, self.tokens, room, typed)

    def start(self, layout: Layout, vocabulary: Vocabulary, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the middle of the simplex."""
        shape = (len(generators), self.tokens, len(vocabulary))
        return torch.full(shape, 1 / len(vocabulary), device=vocabulary.embeddings.device)

    def optimizer(self, relaxed: Tensor) -> torch.optim.Optimizer:
        """Return Adam, whose weight decay is added to the gradient."""
        return torch.optim.Adam([relaxed], lr=self.lr, weight_decay=self.weight_decay)

    def read(self, relaxed: Tensor, vocabulary: Vocabulary, generators: Sequence[torch.Generator]) -> Tensor:
        """Return one token of each row, drawn by its probabilities."""
        return torch.stack(
            [
                torch.multinomial(row, 1, generator=generator)[:, 0]
                for row, generator in zip(relaxed.cpu(), generators, strict=True)
            ]
        )

    def gradient(self, slope: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the gradient at the one-hot codes, clipped to [−1, 1]."""
        return (slope @ vocabulary.embeddings.T).clamp(-1, 1)

    def project(self, relaxed: Tensor) -> Tensor:
        """Return the nearest points of the simplex."""
        return on_simplex(relaxed)

    def found(self, relaxed: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the most probable tokens."""
        return relaxed.argmax(-1)

    def level(self, step: int, generator: torch.Generator) -> int:
        """Return the cleanest level first, and pure noise at the end."""
        return self.levels - 1 - step * self.levels // self.steps


def on_simplex(rows: Tensor) -> Tensor:
    """Return the nearest point {u ≥ 0, Σ u = 1} to each row ``[…, V]``: max(u − τ, 0) with one τ a row."""
    ordered = rows.sort(-1, descending=True).values
    ranks = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    shift = (ordered.cumsum(-1) - 1) / ranks
    last = (ordered > shift).sum(-1, keepdim=True) - 1
    return (rows - shift.gather(-1, last)).clamp_min(0)
