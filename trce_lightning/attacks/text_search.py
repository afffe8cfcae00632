"""A search for words in the text encoder alone. The attacks that read no denoiser share it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trce_lightning.attacks.candidates import (
    Candidate,
    WordSearch,
    check_checkpoints,
    checkpoint_steps,
    finding_of,
)
from trce_lightning.attacks.protocol import Cost, Finding, Progress, Reads, Target
from trce_lightning.attacks.tries import check_positive, own_generator, parts
from trce_lightning.attacks.words import UNTYPED, Layout, Vocabulary, alone, check_room
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Text


class Step(NamedTuple):
    """The best token ids of one step of a search, for each prompt."""

    losses: Tensor
    """``[B]`` on the CPU; infinity where no text can be typed."""
    tokens: Tensor
    """int64 ``[B, n]``, ranks in the vocabulary."""


@dataclass(kw_only=True, eq=False)
class TextSearch(WordSearch):
    """A search for prompts of free places alone whose text states are near a goal.

    Args:
        tokens: tokens of a prompt that is found.
        batch_size: attacked prompts that are searched for together.
        texts_at_once: prompts that go through the text encoder together.
    """

    tokens: int
    batch_size: int = 64
    texts_at_once: int = 512

    reads = Reads.TEXT_ENCODER

    def __post_init__(self) -> None:
        check_positive(
            self.name, tokens=self.tokens, batch_size=self.batch_size, texts_at_once=self.texts_at_once
        )
        check_checkpoints(self.name, self.length, self.checkpoints)

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

    def _spent(self, target: Target, record: PromptRecord, step: int) -> int:
        shared = self.shared_texts(target) if record == target.records[0] else 0
        return shared + self.texts_by(step)

    def cost(self, target: Target) -> Cost:
        """Return the prompts through the text encoder. No network evaluations are made."""
        return Cost(text=sum(self._spent(target, record, self.length) for record in target.records))

    def layout(self, target: Target, vocabulary: Vocabulary, records: Sequence[PromptRecord]) -> Layout:
        """Return prompts of free places alone."""
        check_room(self.name, target.adapter, self.tokens)
        return Layout.of(target.adapter, vocabulary, [alone(self.tokens)] * len(records))

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Search for a prompt in each record's place, and tell ``progress`` the encoded prompts."""
        vocabulary = self.vocabulary(target)
        findings: list[Finding] = []
        for rows in parts(records, self.batch_size):
            layout = self.layout(target, vocabulary, rows)
            progress(self.prepare(target))
            findings += self._search(target, rows, layout, vocabulary, progress)
        return findings

    def _search(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        layout: Layout,
        vocabulary: Vocabulary,
        progress: Progress,
    ) -> list[Finding]:
        generators = [own_generator(record, self.name, target) for record in records]
        looks = set(checkpoint_steps(self.length, self.checkpoints))
        lowest = torch.full((len(records),), torch.inf)
        best = torch.zeros(len(records), self.tokens, dtype=torch.int64)
        shown: list[list[Candidate]] = [[] for _ in records]
        losses = []
        for step, found in enumerate(self.steps_of(target, records, layout, vocabulary, generators), start=1):
            losses.append(found.losses)
            better = found.losses < lowest
            lowest = torch.where(better, found.losses, lowest)
            best = torch.where(better[:, None], found.tokens, best)
            if step in looks:
                ids = vocabulary.ids[best]
                for row, (record, text) in enumerate(zip(records, layout.texts(ids), strict=True)):
                    if text is not None and lowest[row].isfinite():
                        spent, score = self._spent(target, record, step), -float(lowest[row])
                        shown[row].append(Candidate(step, spent, text, ids[row].tolist(), score))
            progress(len(records) * (self.texts_by(step) - (self.texts_by(step - 1) if step > 1 else 0)))
        curves = torch.stack(losses, 1).tolist()
        return [
            finding_of(
                record.id,
                record.prompt,
                shown[row],
                Cost(text=self._spent(target, record, self.length)),
                losses=[loss if loss < torch.inf else None for loss in curves[row]],
            )
            for row, record in enumerate(records)
        ]

    def encoded(
        self, target: Target, texts: Sequence[str | None], *, trimmed: bool = False
    ) -> Iterator[tuple[Text, slice]]:
        """Yield the states of texts, with their places. Another text is encoded where there is none."""
        for start in range(0, len(texts), self.texts_at_once):
            rows = slice(start, start + self.texts_at_once)
            yield target.adapter.encode([text or UNTYPED for text in texts[rows]], trimmed=trimmed), rows
