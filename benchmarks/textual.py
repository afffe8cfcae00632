"""Stage 1 at Stable Diffusion 1.4's size: 300 pairs, 32 matrices, sums of kept prompts at hand."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import networks, plain
from benchmarks.fitting import CPU
from benchmarks.report import Row
from benchmarks.timing import in_turns
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.cli import config_folder
from trce_lightning.closed_form import (
    Edit,
    KeepStatistics,
    apply_edits,
    merge_keep,
    pair_statistics,
    solve_edit,
)
from trce_lightning.concepts import Concept, load_concept, prompt_pairs
from trce_lightning.config.schema import TextualConfig
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.prompts.keep import keep_prompts
from trce_lightning.textual import (
    CONTEXT,
    TextualStatistics,
    apply_edit_,
    cached_kept,
    pair_states,
    textual_statistics,
)

log = logging.getLogger(__name__)
REPEATS = 3
ONE_SLOT = (1.0,)
CHECKED_PAIRS = 8
KEPT_PROMPTS = 64
SINGLE_TOLERANCE = 1e-2
"""Relative difference to the plain implementation in float32, which inverts B explicitly."""
DOUBLE_TOLERANCE = 1e-5
"""The same in float64, rounded to float32 like ours."""


@dataclass
class Stage1:
    """Both implementations on one model; the kept states' K is that of ours in both."""

    adapter: StableDiffusionAdapter
    cache: Path
    concept: Concept
    kept_prompts: Sequence[str]
    config: TextualConfig = field(default_factory=TextualConfig)

    def __post_init__(self) -> None:
        self.pairs = prompt_pairs([self.concept])[self.concept.name]
        self.stream = self.adapter.streams()[CONTEXT]
        self.projections = [entry.module for entry in self.stream.entries.values()]
        self.original = [layer.weight.data.clone() for layer in self.projections]
        self.trainer = make_trainer(CPU, self.cache)
        self.keep = self.statistics().keep
        self.states = pair_states(self.adapter, self.stream, self.pairs, self.config.positions)
        k = self.keep.k.float()
        self.sums = plain.KeptSums([weight @ k for weight in self.original], k)

    def ours(self) -> None:
        """Encode, solve, edit in place."""
        apply_edit_(self.adapter, self.statistics().solve(self.config))
        self.restore()

    def statistics(self) -> TextualStatistics:
        """Return the statistics of pairs and of kept prompts; these are encoded the first time."""
        kept = cached_kept(self.trainer, self.adapter, self.kept_prompts, self.cache)
        return textual_statistics(self.adapter, [self.concept], kept, self.config)

    def restore(self) -> None:
        """Undo an edit in place."""
        for layer, weight in zip(self.projections, self.original, strict=True):
            layer.weight.data.copy_(weight)

    def solve(self) -> Edit:
        """The algebra up to T: the pairs' sums, their part of K as a stand-in for merging, and the solve."""
        pairs = pair_statistics(*self.states)
        keep = merge_keep([KeepStatistics(self.keep.k, self.keep.weight)])
        return solve_edit(pairs, keep, eta=self.config.eta, ridge=self.config.ridge)

    def algebra(self) -> list[Tensor]:
        """Go from states to edited weights."""
        transform = self.solve().transform
        return list(apply_edits(self.original, transform))

    def plain_states(self, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Prompts encoded one at a time: those of the first ``count`` pairs, or of all."""
        tokenizer, encoder = self.adapter.tokenizer, self.adapter.text_encoder
        return [
            (
                plain.end_of_text_state(tokenizer, encoder, pair.malicious),
                plain.end_of_text_state(tokenizer, encoder, pair.safe),
            )
            for pair in self.pairs[:count]
        ]

    def plain_algebra(self, copies: bool = True, weights: Sequence[float] = plain.SLOTS) -> list[Tensor]:
        """Go from states to edited weights."""
        states = list(zip(*self.states, strict=True))
        return plain.edit_projections(
            self.projections, states, self.sums, self.config.eta, self.config.ridge, copies, weights
        )

    def double(self, count: int) -> list[Tensor]:
        """The plain implementation's first ``count`` layers in float64."""
        layers = [copy.deepcopy(layer).double() for layer in self.projections[:count]]
        sums = plain.KeptSums([layer.weight.data @ self.keep.k for layer in layers], self.keep.k)
        states = [(m.double(), s.double()) for m, s in zip(*self.states, strict=True)]
        return plain.edit_projections(
            layers, states, sums, self.config.eta, self.config.ridge, copies=False, weights=ONE_SLOT
        )


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative Frobenius norm of a difference between matrices."""
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item()
        for a, b in zip(found, expected, strict=False)
    )


def check(stage1: Stage1) -> None:
    """Both give the same weights. ``AssertionError`` otherwise."""
    ours, single, double = stage1.algebra(), stage1.plain_algebra(), stage1.double(4)
    found = {SINGLE_TOLERANCE: difference(ours, single), DOUBLE_TOLERANCE: difference(ours, double)}
    moved = difference(ours, stage1.original)
    log.info("stage 1: differences %s by tolerance, edit of %.3g", found, moved)
    assert all(value <= tolerance for tolerance, value in found.items()) and moved > 10 * SINGLE_TOLERANCE
    alone = zip(*stage1.plain_states(CHECKED_PAIRS), strict=True)
    for batched, one_by_one in zip(stage1.states, alone, strict=True):
        torch.testing.assert_close(batched[:CHECKED_PAIRS], torch.stack(one_by_one), atol=1e-3, rtol=1e-3)


def run() -> list[Row]:
    """Text encoding and algebra together, and the algebra alone."""
    with tempfile.TemporaryDirectory() as folder:
        concept = load_concept(config_folder() / "concept" / "sexual.yaml")
        kept_prompts = keep_prompts([concept], limit=KEPT_PROMPTS)
        stage1 = Stage1(StableDiffusionAdapter(networks.pipeline()), Path(folder), concept, kept_prompts)
        check(stage1)
        algebra = in_turns(
            {
                "plain": stage1.plain_algebra,
                "one slot": lambda: stage1.plain_algebra(weights=ONE_SLOT),
                "no copies": lambda: stage1.plain_algebra(copies=False, weights=ONE_SLOT),
                "ours": stage1.algebra,
                "solve": stage1.solve,
            },
            REPEATS,
        )
        whole = in_turns({"encoding": stage1.plain_states, "ours": stage1.ours}, REPEATS)
    encoded = whole["encoding"] + algebra["plain"]
    return [
        Row("stage 1 with text encoding", whole["ours"], "s", encoded, least_gain=8),
        Row("stage 1, algebra alone", algebra["ours"], "s", algebra["plain"], least_gain=50),
        Row("… against plain without its slots of weight 0", algebra["ours"], "s", algebra["one slot"]),
        Row("… and without its needless copies", algebra["ours"], "s", algebra["no copies"]),
        Row("… in seconds", algebra["ours"], "s", most=1.0),
        Row("… of which solving for T", algebra["solve"], "s"),
    ]
