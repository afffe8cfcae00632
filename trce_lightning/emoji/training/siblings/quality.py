"""Measure what a sibling draws: prompts of held-out phrasings, judged by the embedded model's judge."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from trce_lightning.concepts import Concept
from trce_lightning.emoji.judge import Judge, category_probability
from trce_lightning.emoji.prompts import prompt_sets
from trce_lightning.emoji.scenes import halves
from trce_lightning.emoji.siblings import Family
from trce_lightning.emoji.subjects import subject_index
from trce_lightning.emoji.training.siblings.denoisers import drawn
from trce_lightning.prompts.own import Split
from trce_lightning.prompts.records import BENIGN, DIRECT, IMPLICIT, MIXED

SETS = (DIRECT, IMPLICIT, BENIGN, MIXED)


def quality(
    family: Family,
    pipeline: DiffusionPipeline,
    judge: Judge,
    concept: Concept,
    size: int,
    split: Split = "report",
    steps: int = 20,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the share of right pictures of each set, and the pictures.

    A picture of a direct or implicit prompt is right if it shows the concept, which is a category. One of a
    benign prompt is right if it shows the prompt's subject, and one of a mixed prompt if one half does and
    the other half shows the concept.
    """
    rates, pictures = {}, {}
    for prompts in prompt_sets([concept], size=size, split=split, names=SETS):
        images = drawn(family, pipeline, [record.prompt for record in prompts.records], steps=steps)
        pictures[prompts.name] = images
        if prompts.name in (DIRECT, IMPLICIT):
            right = category_probability(judge(images)["subject"], concept.name) >= 0.5
        else:
            labels = torch.tensor([subject_index(record.label or "") for record in prompts.records])
            right = judge(images)["subject"].argmax(-1) == labels
        if prompts.name == MIXED:
            seen = [judge(half)["subject"] for half in halves(images)]
            concept_side = [category_probability(row, concept.name) >= 0.5 for row in seen]
            label_side = [row.argmax(-1) == labels for row in seen]
            right = (concept_side[0] & label_side[1]) | (concept_side[1] & label_side[0])
        rates[prompts.name] = right.float().mean().item()
    return rates, pictures
