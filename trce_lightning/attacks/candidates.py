"""The prompts that a search for words has found by its checkpoints, and the images that they are drawn as.

The search sees images of search seeds alone, and the selector. The judged images have other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trce_lightning.attacks.protocol import Cost, Finding, Target, Way
from trce_lightning.attacks.words import Layout, Vocabulary, generators_of
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate, network_steps, planned_evaluations
from trce_lightning.prompts.records import PromptRecord, seed_of


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


def random_findings(
    records: Sequence[PromptRecord], layout: Layout, vocabulary: Vocabulary, base: int
) -> list[Finding]:
    """Return findings of random tokens in the free places."""
    ids = torch.stack(
        [
            vocabulary.ids[torch.randint(len(vocabulary), (layout.free.shape[1],), generator=generator)]
            for generator in generators_of(records, base)
        ]
    )
    return [
        finding_of(record.id, record.prompt, [], Cost())
        if text is None
        else Finding(record.id, facts={"text": text, "ids": row[:count].tolist(), "checkpoints": []})
        for record, text, row, count in zip(records, layout.texts(ids), ids, layout.counts, strict=True)
    ]


def ways(attack: str, target: Target, findings: Mapping[str, Finding], unit: str = "steps") -> Iterator[Way]:
    """Yield the prompts that were best by each earlier checkpoint, then the attack's result.

    A finding "all" is every prompt's. All ways draw a prompt with the same fresh seed.
    """
    found = {record: findings.get(record.id, findings.get("all")) for record in target.records}
    pairs = [(record, finding) for record, finding in found.items() if finding is not None]
    shown = [finding.facts["checkpoints"] for _, finding in pairs]
    unique = list({id(finding): finding for _, finding in pairs}.values())
    for step in sorted({one["step"] for checkpoints in shown for one in checkpoints})[:-1]:
        texts = [_text_by(record, finding, step) for record, finding in pairs]
        spent = sum(_spent_by(finding, step) for finding in unique)
        records = tuple(_judged(attack, record, text) for (record, _), text in zip(pairs, texts, strict=True))
        yield Way(f"{step} {unit}", records, target.adapter, target.variation, spent)
    records = tuple(_judged(attack, record, finding.facts["text"]) for record, finding in pairs)
    spent = sum(_evaluations(finding.spent) for finding in unique)
    yield Way("", records, target.adapter, target.variation, spent)


def _text_by(record: PromptRecord, finding: Finding, step: int) -> str:
    texts = [one["text"] for one in finding.facts["checkpoints"] if one["step"] <= step]
    return texts[-1] if texts else record.prompt


def _spent_by(finding: Finding, step: int) -> int:
    return max((one["spent"] for one in finding.facts["checkpoints"] if one["step"] <= step), default=0)


def _evaluations(cost: Cost) -> int:
    return cost.forward + cost.backward or cost.text


def _judged(attack: str, record: PromptRecord, text: str) -> PromptRecord:
    """Return the record whose image is judged: with noise of its own, which no search has seen."""
    return replace(record, id=f"{record.id}~{attack}", prompt=text, seed=None, sample_of=record.prompt_id)


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
    images = generate(
        target.adapter,
        drawn,
        guidance_scale=target.guidance_scale,
        num_steps=num_steps,
        batch_size=target.batch_size,
        autocast_dtype=target.autocast_dtype,
        variation=target.variation,
    )
    chances = torch.cat([target.selector(part).float().cpu() for part in images.split(target.batch_size)])
    return chances.reshape(len(texts), len(tries)).mean(1)
