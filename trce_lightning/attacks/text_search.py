"""A search for words in the text encoder alone. The attacks that read no denoiser share it.

A denoiser need not draw what is near in the text encoder. So the attacked model may draw the nearest prompts,
and the selector chooses among them.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trce_lightning.attacks.candidates import (
    Candidate,
    WordSearch,
    check_checkpoints,
    checkpoint_steps,
    drawn_evaluations,
    finding_of,
    selected,
)
from trce_lightning.attacks.protocol import Cost, Finding, Progress, Reads, Target, total, untold
from trce_lightning.attacks.tries import check_at_least, check_positive, own_generator, parts
from trce_lightning.attacks.words import UNTYPED, Layout, Vocabulary, alone, check_room
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.runtime.storage import reading, write_json
from trce_lightning.tokens import Text


class Step(NamedTuple):
    """The best token ids of one step of a search, for each prompt."""

    losses: Tensor
    """``[B]`` on the CPU; infinity where no text can be typed."""
    tokens: Tensor
    """int64 ``[B, n]``, ranks in the vocabulary."""


class Near(NamedTuple):
    """A prompt that was the nearest of a step."""

    text: str
    ids: list[int]
    loss: float


Stage = list[list[Near]]
"""For each record, the nearest prompts since the checkpoint before, the nearest first. None comes twice."""


class Trace(NamedTuple):
    """The course of a search for some records. It is the same for all models of one text encoder."""

    stages: list[Stage]
    """The nearest prompts at each checkpoint."""
    losses: list[list[float]]
    """The loss of each step, for each record."""


@dataclass(kw_only=True, eq=False)
class TextSearch(WordSearch):
    """A search for prompts of free places alone whose text states are near a goal.

    Args:
        tokens: tokens of a prompt that is found.
        finalists: prompts that the attacked model draws at each checkpoint: the nearest since the one before.
            The selector chooses among all that were drawn. With 0, no image is made, and the nearest prompt
            is the result.
        tries: images of each finalist.
        batch_size: attacked prompts that are searched for together.
        texts_at_once: prompts that go through the text encoder together.
    """

    tokens: int
    finalists: int = 0
    tries: int = 1
    batch_size: int = 64
    texts_at_once: int = 512
    _traces: dict[object, Trace] = field(default_factory=dict, init=False, repr=False)
    """The searches that were made, so that models of one text encoder share them."""
    _folder: Path | None = field(default=None, init=False, repr=False)
    """The folder of these searches, None for none."""

    def __post_init__(self) -> None:
        check_positive(
            self.name,
            tokens=self.tokens,
            tries=self.tries,
            batch_size=self.batch_size,
            texts_at_once=self.texts_at_once,
        )
        check_at_least(f"{self.name}.finalists", self.finalists, 0)
        check_checkpoints(self.name, self.length, self.checkpoints)
        self.reads = Reads.MODEL if self.finalists else Reads.TEXT_ENCODER

    @property
    @abstractmethod
    def length(self) -> int:
        """Return the steps of the search."""

    @abstractmethod
    def texts_by(self, step: int) -> int:
        """Return the prompts that one prompt's search has sent through the text encoder by a step."""

    @abstractmethod
    def steps_of(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        layout: Layout,
        vocabulary: Vocabulary,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """Yield each step of the search for these records."""

    def shared_texts(self, target: Target) -> int:
        """Return the prompts that are encoded once for all. The first record's finding counts them."""
        return 0

    def prepare(self, target: Target) -> int:
        """Encode what all records share, unless it is known, and return the prompts that were encoded."""
        return 0

    def cost(self, target: Target) -> Cost:
        """Return the prompts through the text encoder, and the evaluations of the finalists' images."""
        return total(self._spent(target, record, self.length) for record in target.records)

    def _spent(self, target: Target, record: PromptRecord, step: int) -> Cost:
        """Return what one record has cost by a step, its checkpoint included."""
        looks = sum(look <= step for look in checkpoint_steps(self.length, self.checkpoints))
        images = looks * self.finalists * self.tries
        shared = self.shared_texts(target) if record == target.records[0] else 0
        return Cost(
            forward=drawn_evaluations(target, record.guidance_scale, target.num_steps, images),
            text=shared + self.texts_by(step) + images,
        )

    def layout(self, target: Target, vocabulary: Vocabulary, records: Sequence[PromptRecord]) -> Layout:
        """Return prompts of free places alone."""
        check_room(self.name, target.adapter, self.tokens)
        return Layout.of(target.adapter, vocabulary, [alone(self.tokens)] * len(records))

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Search for a prompt in each record's place.

        ``progress`` is told the evaluations of images, or the encoded prompts where no image is made.
        """
        self.check(target)
        vocabulary = self.vocabulary(target)
        findings: list[Finding] = []
        for rows in parts(records, self.batch_size):
            trace = self._trace(target, rows, vocabulary, progress)
            findings += self._chosen(target, rows, trace, progress)
        return findings

    def keep_in(self, folder: Path) -> None:
        """Store the searches in a folder, which belongs to this attack with these options."""
        self._folder = folder

    def _trace(
        self, target: Target, records: Sequence[PromptRecord], vocabulary: Vocabulary, progress: Progress
    ) -> Trace:
        """Search for these records, unless a model of the same text encoder has been searched."""
        read = target.adapter.text_fingerprint(), target.original.text_fingerprint()
        facts = *read, tuple(records), target.records, target.seed, repr(target.concepts)
        if facts in self._traces:
            return self._traces[facts]
        name = hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
        file = self._folder and self._folder / f"{name}.json"
        if file and file.exists():
            trace = _load(file)
        else:
            trace = self._search(target, records, vocabulary, untold if self.finalists else progress)
            if file:
                _save(file, trace)
        self._traces[facts] = trace
        return trace

    def _search(
        self, target: Target, records: Sequence[PromptRecord], vocabulary: Vocabulary, progress: Progress
    ) -> Trace:
        layout = self.layout(target, vocabulary, records)
        progress(self.prepare(target))
        generators = [own_generator(record, self.name, target) for record in records]
        looks = set(checkpoint_steps(self.length, self.checkpoints))
        nearest: list[dict[tuple[int, ...], float]] = [{} for _ in records]
        staged: list[set[tuple[int, ...]]] = [set() for _ in records]
        stages: list[Stage] = []
        losses = []
        for step, found in enumerate(self.steps_of(target, records, layout, vocabulary, generators), start=1):
            losses.append(found.losses)
            for row, (loss, tokens) in enumerate(
                zip(found.losses.tolist(), found.tokens.tolist(), strict=True)
            ):
                if loss < torch.inf:
                    nearest[row].setdefault(tuple(tokens), loss)
            if step in looks:
                stages.append([])
                for row, (losses_of, used) in enumerate(zip(nearest, staged, strict=True)):
                    new = sorted(losses_of.keys() - used, key=losses_of.__getitem__)[: self.finalists or 1]
                    used.update(new)
                    near = {tokens: losses_of[tokens] for tokens in new}
                    stages[-1].append(_near(layout.row(row), vocabulary, near))
                    losses_of.clear()
            progress(len(records) * (self.texts_by(step) - (self.texts_by(step - 1) if step > 1 else 0)))
        return Trace(stages, torch.stack(losses, 1).tolist())

    def _chosen(
        self, target: Target, records: Sequence[PromptRecord], trace: Trace, progress: Progress
    ) -> list[Finding]:
        """Return the best prompt of each record, and what was best by each checkpoint."""
        tried: list[list[tuple[Near, float]]] = [[] for _ in records]
        shown: list[list[Candidate]] = [[] for _ in records]
        for step, stage in zip(checkpoint_steps(self.length, self.checkpoints), trace.stages, strict=True):
            scores = self._scores(target, records, stage, progress)
            for row, record in enumerate(records):
                tried[row] += zip(stage[row], scores[row], strict=True)
                if tried[row]:
                    best, score = max(tried[row], key=lambda one: one[1])
                    cost = self._spent(target, record, step)
                    spent = cost.forward or cost.text
                    shown[row].append(Candidate(step, spent, best.text, best.ids, score))
        return [
            finding_of(
                record.id,
                record.prompt,
                shown[row],
                self._spent(target, record, self.length),
                losses=[loss if loss < torch.inf else None for loss in trace.losses[row]],
            )
            for row, record in enumerate(records)
        ]

    def _scores(
        self, target: Target, records: Sequence[PromptRecord], stage: Stage, progress: Progress
    ) -> list[list[float]]:
        """Return how good each prompt of a stage is: by its images, or by its loss where none are made."""
        if not self.finalists:
            return [[-one.loss for one in near] for near in stage]
        of = [record for record in records for _ in range(self.finalists)]
        texts = [
            text
            for near in stage
            for text in [*(one.text for one in near), *[UNTYPED] * (self.finalists - len(near))]
        ]
        scores = selected(self.name, target, of, texts, target.num_steps, range(self.tries))
        progress(
            sum(
                drawn_evaluations(target, record.guidance_scale, target.num_steps, self.tries)
                for record in of
            )
        )
        rows = scores.reshape(len(records), self.finalists).tolist()
        return [row[: len(near)] for row, near in zip(rows, stage, strict=True)]

    def encoded(self, layout: Layout, ids: Tensor) -> Iterator[tuple[Text, slice]]:
        """Yield what the model reads with these ids ``[B, n]`` in a layout's free places, with its rows."""
        for start in range(0, len(ids), self.texts_at_once):
            rows = slice(start, start + self.texts_at_once)
            yield layout.rows(rows).read(ids[rows]), rows


def _save(file: Path, trace: Trace) -> None:
    """Write a search. JSON has no infinity, so a loss without a text is null."""
    losses = [[loss if math.isfinite(loss) else None for loss in row] for row in trace.losses]
    write_json(file, {"stages": trace.stages, "losses": losses})


def _load(file: Path) -> Trace:
    """Return what :func:`_save` wrote."""
    with reading(file, "a search in the text encoder"):
        stored = json.loads(file.read_text("utf-8"))
        stages = [[[Near(*near) for near in row] for row in stage] for stage in stored["stages"]]
        losses = [[math.inf if loss is None else loss for loss in row] for row in stored["losses"]]
    return Trace(stages, losses)


def _near(layout: Layout, vocabulary: Vocabulary, losses: Mapping[tuple[int, ...], float]) -> list[Near]:
    """Return the prompts of these tokens, in their order."""
    if not losses:
        return []
    ids = vocabulary.ids[torch.tensor(list(losses))]
    texts = layout.repeated(len(ids)).texts(ids)
    near = []
    for text, row, loss in zip(texts, ids.tolist(), losses.values(), strict=True):
        assert text is not None, "a text that can't be typed has an infinite loss"
        near.append(Near(text, row, loss))
    return near
