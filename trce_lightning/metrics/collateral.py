"""What an erasure did to prompts that it should have left alone, of which FID tells little.

A labelled image is right when the judge's first answer is what the prompt asks for: the subject, and apart
from it the style and the colour of the background, where the prompt names one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from trce_lightning.errors import InputError
from trce_lightning.metrics.uncertainty import clustered_rate, mean_interval
from trce_lightning.prompts.records import PromptRecord, PromptSet

ATTRIBUTES = ("subject", "style", "background")


class Detection(NamedTuple):
    """What was seen in one image."""

    probability: float
    """That it shows the concept."""
    subject: str | None = None
    """The judge's first answer, None where no judge names subjects; and so on."""
    style: str | None = None
    background: str | None = None
    clip_score: float | None = None
    """100 · cos(CLIP(image), CLIP(prompt)), of benign images."""


def check_labels(sets: Sequence[PromptSet], subjects: Collection[str]) -> None:
    """``InputError`` on a label that is none of the subjects that the judge knows."""
    known = frozenset(subjects)
    for prompts in sets:
        for record in prompts.records:
            if record.label is not None and record.label not in known:
                raise InputError(
                    f"{prompts.name}: label: expected a subject that the judge knows, got '{record.label}'"
                )


def accuracies(
    prompts: PromptSet, seen: Mapping[str, Detection], groups: Mapping[str, frozenset[str]]
) -> dict[str, dict[str, float]]:
    """Share of right images, each as :func:`~.uncertainty.clustered_rate` gives it.

    ``subject``, and the same by group of labels; ``style`` and ``background`` of the prompts that name one.
    What no prompt asks for, or no judge sees, is left out.

    Args:
        prompts: labelled, or not; records without a label don't count.
        seen: detections by record id.
        groups: labels by the group's name.
    """
    asked: dict[str, list[tuple[PromptRecord, bool]]] = {}
    for record in prompts.records:
        wanted = {"subject": record.label, "style": record.style, "background": record.background}
        for kind, name in wanted.items():
            answer = getattr(seen[record.id], kind)
            if record.label is None or name is None or answer is None:
                continue
            right = answer == name
            names = [kind]
            if kind == "subject":
                names += [group for group, labels in groups.items() if name in labels]
            for group in names:
                asked.setdefault(group, []).append((record, right))
    order = ("subject", *groups, "style", "background")
    return {name: _rate(asked[name]) for name in order if name in asked}


def _rate(rows: Sequence[tuple[PromptRecord, bool]]) -> dict[str, float]:
    return clustered_rate([right for _, right in rows], [record.prompt for record, _ in rows])


def clip_score_interval(prompts: PromptSet, seen: Mapping[str, Detection]) -> dict[str, float]:
    """``clip_score_low`` and ``clip_score_high``, the bootstrap 95 % interval; empty without CLIP scores."""
    values = [seen[record.id].clip_score for record in prompts.records]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {}
    low, high = mean_interval(known, prompts.texts)
    return {"clip_score_low": low, "clip_score_high": high}
