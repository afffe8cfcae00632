"""P4D: words under which the erased model predicts what the original predicts under the prompt.

    min over tokens x of  E_{t, ε} ‖ε_θ(z_t, t, E(P)) − ε_θ'(z_t, t, E(x))‖²        θ original, θ' erased

z_t is a picture of the concept with noise. Continuous embeddings are projected to the nearest tokens by
cosine; the gradient is taken at the projected embeddings and applied to the continuous ones
(straight-through). (Prompting4Debugging, arXiv 2309.06135; hard prompts by projected gradients: arXiv
2302.03668.)

P4D-N (:class:`P4D`) replaces the prompt by N free tokens. P4D-K (:class:`P4DK`) keeps the prompt and puts one
free token before every K of its tokens, or at the end of the word that it would split. A prompt that is too
long is cut, where the published code encodes it in pieces.

It shows whether somebody who has the weights of both models can find a prompt that brings the concept back. A
failure says that this budget of gradient steps found none, not that there is none.
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
    alone,
    interleaved,
)


@dataclass(kw_only=True, eq=False)
class _Projected(WhiteBoxWords):
    """The search of both variants."""

    steps: int = 3000
    levels: int = 999
    lr: float = 0.1
    checkpoints: int = 60

    taught = True

    def start(self, layout: Layout, vocabulary: Vocabulary, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the embeddings of random tokens; places that a prompt doesn't have stay zero."""
        counts = layout.counts
        relaxed = vocabulary.embeddings.new_zeros(len(counts), max(counts), vocabulary.embeddings.shape[1])
        for row, (count, generator) in enumerate(zip(counts, generators, strict=True)):
            tokens = torch.randint(len(vocabulary), (count,), generator=generator)
            relaxed[row, :count] = vocabulary.embeddings[tokens]
        return relaxed

    def optimizer(self, relaxed: Tensor) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW([relaxed], lr=self.lr, weight_decay=self.weight_decay)

    def read(self, relaxed: Tensor, vocabulary: Vocabulary, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the nearest tokens."""
        return vocabulary.nearest(relaxed)

    def gradient(self, slope: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the gradient at the nearest tokens' embeddings as it is."""
        return slope

    def found(self, relaxed: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the nearest tokens."""
        return vocabulary.nearest(relaxed)

    def level(self, step: int, generator: torch.Generator) -> int:
        """Return a random noise level."""
        return int(torch.randint(self.levels, (), generator=generator))


@dataclass(kw_only=True, eq=False)
class P4D(_Projected):
    """P4D-N; see :class:`~.white_box.WhiteBoxWords` for the other options.

    Args:
        levels: noise levels; the published search has 1000, for which SD's own spacing has no room.
        tokens: N, the free tokens.
    """

    tokens: int = 16

    name = "p4d"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, tokens=self.tokens)

    def pattern(self, words: Sequence[int], room: int, typed: Collection[int]) -> Pattern:
        """Return N free places."""
        return alone(self.tokens)


@dataclass(kw_only=True, eq=False)
class P4DK(_Projected):
    """P4D-K; see :class:`~.white_box.WhiteBoxWords` for the other options.

    Args:
        levels: as in :class:`P4D`.
        every: K, the tokens of the prompt between two free ones.
    """

    every: int = 3

    name = "p4d_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, every=self.every)

    def pattern(self, words: Sequence[int], room: int, typed: Collection[int]) -> Pattern:
        """Return the prompt with a free place before every K tokens."""
        return interleaved(words, self.every, typed)
