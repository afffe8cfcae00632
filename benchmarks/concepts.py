"""Stage 1's algebra for 100 concepts at once at Stable Diffusion 1.4's size, beside SPEED's and OCE's.

Text states are random, and encoding is left out. The rows are CPU seconds of one thread, so that other load
on the machine doesn't count. Two cores take less wall-clock time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.report import Row
from trce_lightning.closed_form import (
    Edit,
    KeepStatistics,
    apply_edits,
    keep_statistics,
    solve_edit,
    solve_null_space,
    solve_projection,
    sum_statistics,
    with_concept,
)

D, TOKENS = 768, 77
OUTPUTS = (*2 * (320,), *2 * (640,), *6 * (1280,), *3 * (640,), *3 * (320,))
"""The outputs of each of the 16 cross-attention layers' K and V."""
CONCEPTS, PAIRS, KEPT = 100, 15, 4000
REPEATS = 3
Pairs = tuple[Tensor, Tensor]


def text_states(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Return states ``[count, d]`` as after a LayerNorm, most of whose energy is in few directions."""
    shared = torch.randn(d, generator=generator)
    scale = torch.logspace(0, -2, d)
    states = 3 * shared + 3 * torch.randn(count, d, generator=generator) * scale
    return torch.nn.functional.layer_norm(states, (d,))


@dataclass
class Stage1:
    """Matrices and states of a model. The states' sums over what is kept are at hand."""

    d: int = D
    outputs: tuple[int, ...] = OUTPUTS
    concepts: int = CONCEPTS
    kept: int = KEPT
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.values, self.keys = (
            [torch.randn(rows, self.d, generator=self.generator) / self.d**0.5 for rows in self.outputs]
            for _ in range(2)
        )
        self.pairs = [self._concept() for _ in range(self.concepts)]
        self.more = self._concept()
        self.kept_states = self._states(self.kept)
        self.empty = self._states(min(TOKENS, self.d // 4))
        self.keep: KeepStatistics = keep_statistics(torch.cat([self.kept_states, self.empty]))
        self.span = keep_statistics(torch.cat([malicious for malicious, _ in self.pairs])).k * self.concepts

    def _states(self, count: int) -> Tensor:
        return text_states(count, self.d, self.generator)

    def _concept(self) -> Pairs:
        return self._states(PAIRS), self._states(PAIRS)

    def ridge(self, *more: Pairs) -> Edit:
        """Return the paper's form, from states to T."""
        return solve_edit(sum_statistics([*self.pairs, *more]), self.keep, eta=1.0, ridge=1e-3)

    def null_space(self, *more: Pairs) -> Edit:
        """Return the null space, from states to T."""
        pairs = sum_statistics([*self.pairs, *more])
        return solve_null_space(pairs, self.keep, self.empty, share=0.01, ridge=0.01)

    def projection(self, *more: Pairs) -> Edit:
        """Return the projection, from states to T."""
        pairs = sum_statistics([*self.pairs, *more])
        options = {"eta": 1.0, "ridge": 1e-3, "share": 0.3, "span_ridge": 0.01}
        return solve_projection(pairs, self.keep, self.span, **options)

    def edited(self, edit: Edit) -> list[Tensor]:
        """Return W T for every K and V."""
        return list(apply_edits([*self.keys, *self.values], edit.transform))

    def speed(self) -> list[Tensor]:
        """Return SPEED's V: one state a concept, its 100-concept settings."""
        targets, anchors = (torch.stack([states[index][0] for states in self.pairs]) for index in (0, 1))
        retain, invariant = self.kept_states[:100], plain.centres(self.empty, self.generator)
        return [
            plain.speed(weight, targets, anchors, retain, invariant, self.generator) for weight in self.values
        ]

    def oce(self) -> list[Tensor]:
        """Return OCE's V: six states a concept, its 100-concept settings."""
        erased = torch.cat([malicious[:6] for malicious, _ in self.pairs])
        return [
            plain.oce(weight, erased, self.kept_states[:6], self.kept_states[6:106], self.keep.k.float())
            for weight in self.values
        ]


def cpu_in_turns(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each function on one thread, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in times.items()}


def check(stage1: Stage1) -> None:
    """Check that a concept more equals solving all at once. ``AssertionError`` otherwise."""
    for form in (stage1.ridge, stage1.null_space):
        whole, known = form(stage1.more).transform, form()
        found = with_concept(known, *stage1.more).transform
        assert (found - whole).norm() < 1e-8 * (whole - known.transform).norm()


def run() -> list[Row]:
    """Return seconds of each form, of one concept more, and of the other procedures."""
    stage1 = Stage1()
    check(stage1)
    known = {"ridge": stage1.ridge(), "null space": stage1.null_space()}
    functions: dict[str, Callable[[], Any]] = {
        "ridge": lambda: stage1.edited(stage1.ridge()),
        "null space": lambda: stage1.edited(stage1.null_space()),
        "projection": lambda: stage1.edited(stage1.projection()),
        "products": lambda: stage1.edited(known["ridge"]),
        "again": lambda: stage1.ridge(stage1.more),
    }
    more = {f"{name}, more": partial(with_concept, edit, *stage1.more) for name, edit in known.items()}
    found = cpu_in_turns(functions | more, REPEATS)
    others = cpu_in_turns({"speed": stage1.speed, "oce": stage1.oce}, 1)
    one_more = "… one concept more, from states to T"
    return [
        Row("stage 1, 100 concepts at once, CPU time: ridge", found["ridge"], "s", most=1.0),
        Row("… of which the products W T", found["products"], "s"),
        Row("… null space, against SPEED's procedure", found["null space"], "s", others["speed"]),
        Row("… projection, against OCE's procedure", found["projection"], "s", others["oce"]),
        Row(f"{one_more}: ridge, against solving again", found["ridge, more"], "s", found["again"]),
        Row(f"{one_more}: ridge", found["ridge, more"], "s", most=0.01),
        Row(f"{one_more}: null space", found["null space, more"], "s", most=0.01),
    ]
