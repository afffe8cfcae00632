"""The parts that all searches for words share: what is found by each checkpoint, the control, and the images.

The search sees images of search seeds alone, and the selector. The judged images have other seeds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from trce_lightning.attacks.protocol import (
    UNIVERSAL,
    Cost,
    Door,
    Finding,
    Progress,
    Reads,
    Target,
    Way,
    untold,
)
from trce_lightning.attacks.tries import chances, fresh_record, own_generator
from trce_lightning.attacks.words import Layout, Vocabulary
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate, network_steps, planned_evaluations
from trce_lightning.prompts.records import PromptRecord, seed_of

DRAWS = 1000
"""The most draws of random tokens for a prompt that can be typed."""


@dataclass(frozen=True)
class Candidate:
    """The best prompt of a search by one of its checkpoints."""

    step: int
    """Steps of the search that led to the checkpoint."""
    spent: int
    """Evaluations that the search had made by then, counted as :attr:`~.protocol.Way.spent` is."""
    text: str
    ids: list[int]
    """Token ids in the free places."""
    score: float
    """A number that the search has compared by: higher is better."""


def checkpoint_steps(steps: int, checkpoints: int) -> list[int]:
    """Return the numbers of steps after which a search looks: evenly spread, the last of them ``steps``."""
    return [round(steps * (i + 1) / checkpoints) for i in range(checkpoints)]


def check_checkpoints(attack: str, steps: int, checkpoints: int) -> None:
    """Raise ``InputError`` unless there is a step for each checkpoint, and one at least."""
    if not 1 <= checkpoints <= steps:
        raise InputError(
            f"attack.{attack}.checkpoints: expected from 1 to the {steps} steps of the search, got "
            f"{checkpoints}"
        )


def finding_of(record_id: str, prompt: str, best: Sequence[Candidate], spent: Cost, **facts: Any) -> Finding:
    """Return what a search has found: ``best`` is what was best by each checkpoint.

    Without a candidate, the prompt itself is the result.
    """
    text, ids = (best[-1].text, best[-1].ids) if best else (prompt, [])
    facts = {"text": text, "ids": ids, "checkpoints": [asdict(candidate) for candidate in best], **facts}
    return Finding(record_id, facts=facts, spent=spent)


@dataclass(kw_only=True, eq=False)
class WordSearch(ABC):
    """A search for words in the free places of prompts: its control, and the ways to generate its images.

    Args:
        checkpoints: looks at the best so far, evenly spread over the search.
        blocked: no token may name the concept.
    """

    checkpoints: int
    blocked: bool = False
    _vocabularies: dict[object, Vocabulary] = field(default_factory=dict, init=False, repr=False)

    name = ""
    door = Door.WORDS
    reads = Reads.MODEL
    universal = False
    unit = "steps"
    """The word for what the search counts, in the names of its ways."""

    @abstractmethod
    def layout(self, target: Target, vocabulary: Vocabulary, records: Sequence[PromptRecord]) -> Layout:
        """Return the prompts with their free places."""

    def vocabulary(self, target: Target) -> Vocabulary:
        """Return the tokens that the attack may use. They are looked up once for each text encoder."""
        blocked = target.concepts if self.blocked else ()
        facts = target.adapter.text_fingerprint(), target.adapter.device, repr(blocked)
        if facts not in self._vocabularies:
            self._vocabularies[facts] = Vocabulary.of(target.adapter, self.name, blocked)
        return self._vocabularies[facts]

    def units(self, records: Sequence[PromptRecord]) -> Sequence[PromptRecord]:
        """Return the prompts that each have a finding: the records, or one for all of them."""
        return [PromptRecord(UNIVERSAL, "")] if self.universal else records

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless the model has a vocabulary and room for the free places."""
        self.layout(target, self.vocabulary(target), self.units(target.records))

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return random tokens in the free places. Tokens that can't be typed are drawn again.

        ``InputError`` if a prompt has none that can be typed in many draws.
        """
        vocabulary, units = self.vocabulary(target), self.units(records)
        layout = self.layout(target, vocabulary, units)
        size = (layout.free.shape[1],)
        generators = [own_generator(unit, f"{self.name} at random", target) for unit in units]

        def drawn(row: int) -> Tensor:
            return vocabulary.ids[torch.randint(len(vocabulary), size, generator=generators[row])]

        ids = torch.stack([drawn(row) for row in range(len(units))])
        texts = layout.texts(ids)
        for _ in range(DRAWS):
            if None not in texts:
                break
            for row in (row for row, text in enumerate(texts) if text is None):
                ids[row] = drawn(row)
            texts = layout.texts(ids)
        else:
            raise InputError(
                f"attack.{self.name}: expected random tokens that can be typed, got none in {DRAWS} draws of "
                f"{layout.counts[texts.index(None)]} tokens"
            )
        return [
            Finding(unit.id, facts={"text": text, "ids": row[:count].tolist(), "checkpoints": []})
            for unit, text, row, count in zip(units, texts, ids, layout.counts, strict=True)
        ]

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the prompts that were best by each earlier checkpoint, then the attack's result.

        A universal finding serves every prompt. All ways generate from a prompt with the same fresh seed.
        """
        found = {record: findings.get(record.id, findings.get(UNIVERSAL)) for record in target.records}
        pairs = [(record, finding) for record, finding in found.items() if finding is not None]
        unique = list({id(finding): finding for _, finding in pairs}.values())
        shown = {one["step"] for finding in unique for one in finding.facts["checkpoints"]}
        for step in [*sorted(shown)[:-1], None]:
            records = tuple(
                fresh_record(record, self.name, prompt=_text_by(record, finding, step))
                for record, finding in pairs
            )
            spent = sum(_spent_by(finding, step) for finding in unique)
            name = "" if step is None else f"{step} {self.unit}"
            yield Way(name, records, target.adapter, target.variation, spent)


def _text_by(record: PromptRecord, finding: Finding, step: int | None) -> str:
    if step is None:
        return str(finding.facts["text"])
    texts = [one["text"] for one in finding.facts["checkpoints"] if one["step"] <= step]
    return texts[-1] if texts else record.prompt


def _spent_by(finding: Finding, step: int | None) -> int:
    if step is None:
        return finding.spent.forward + finding.spent.backward or finding.spent.text
    return max((one["spent"] for one in finding.facts["checkpoints"] if one["step"] <= step), default=0)


def drawn_evaluations(target: Target, guidance_scale: float | None, num_steps: int, images: int) -> int:
    """Return the network evaluations of images that a search draws of one prompt."""
    record = PromptRecord("", "", guidance_scale=guidance_scale)
    steps = network_steps(target.adapter, num_steps, target.variation)
    return images * planned_evaluations([record], steps, target.guidance_scale)


def selected(
    attack: str,
    target: Target,
    records: Sequence[PromptRecord],
    texts: Sequence[str],
    num_steps: int,
    tries: range,
) -> Tensor:
    """Return how sure the selector is that a text in a record's place shows the concept: ``[len(texts)]``.

    It is a mean over images of search seeds, one for each of ``tries``. All texts of a record see the same.
    """
    drawn = [
        PromptRecord(
            f"{record.id} {index} {i}",
            text,
            seed=seed_of(f"{record.id} searched by {attack}", i),
            guidance_scale=record.guidance_scale,
        )
        for index, (record, text) in enumerate(zip(records, texts, strict=True))
        for i in tries
    ]
    images = generate(target.adapter, drawn, **target.options() | {"num_steps": num_steps})
    return chances(target, images).reshape(len(texts), len(tries)).mean(1)
