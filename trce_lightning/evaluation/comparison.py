"""Compare two models on the same prompts and noise, image by image, with intervals and tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trce_lightning.evaluation.scored import Column, Scored
from trce_lightning.generation.image_folder import image_batches
from trce_lightning.metrics.asr import paired_test
from trce_lightning.metrics.class_detectors import CPU
from trce_lightning.metrics.distance import LEAST_IMAGES, distances
from trce_lightning.metrics.uncertainty import holm, paired_difference, paired_rate_difference
from trce_lightning.prompts.records import BENIGN, PromptRecord, PromptSet

Comparison = dict[str, Any]


def compare(first: Scored, second: Scored, sets: Sequence[PromptSet]) -> Comparison:
    """Return what changes from the first model to the second.

    ``detected`` has a row for each set. ``difference`` is the difference of the shares of images that show
    the concept (second − first). ``low`` and ``high`` are its 95 % interval. ``p_value`` is that of the exact
    McNemar test, and ``p_value_holm`` is adjusted for the number of sets. McNemar's test assumes independent
    images. If a prompt has several images, use the interval, which is clustered by prompt.

    ``clip_score`` has the difference for each set in which both models have CLIP scores of all images.
    """
    detected = {prompts.name: _detected(first, second, prompts) for prompts in sets}
    adjusted = holm({name: row["p_value"] for name, row in detected.items()})
    for name, row in detected.items():
        row["p_value_holm"] = adjusted[name]
    scores = {prompts.name: _clip_scores(first, second, prompts) for prompts in sets}
    return {"detected": detected, "clip_score": {name: row for name, row in scores.items() if row}}


def p_values(comparison: Comparison) -> dict[str, float]:
    """Return the p-values of the exact McNemar tests, by set."""
    return {name: row["p_value"] for name, row in comparison["detected"].items()}


def one_line(comparison: Comparison) -> str:
    """Return a line for a log: "direct -97.9 points [-99.0, -96.5], p (Holm) = 1e-150; …"."""
    return "; ".join(
        f"{name} {100 * row['difference']:+.1f} points [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}], "
        f"p (Holm) = {row['p_value_holm']:.2g}"
        for name, row in comparison["detected"].items()
    )


def measure_distances(
    features: nn.Module | None,
    sets: Sequence[PromptSet],
    columns: Mapping[str, Column],
    device: torch.device = CPU,
) -> None:
    """Add to each model's scores how far its benign images have moved from the first model's.

    The first model gets :func:`same_model_floor`, and the others get :func:`distances_to_original`.
    ``features`` is FID's feature network, which moves to ``device``. Without ``features`` or without benign
    prompts, nothing is added.
    """
    benign = next((prompts for prompts in sets if prompts.name == BENIGN), None)
    if features is None or benign is None:
        return
    features.to(device)
    (_, first), *others = columns.items()
    original = first.images / BENIGN
    first.scored.scores.update(same_model_floor(features, benign, original))
    for _, column in others:
        found = distances_to_original(features, benign, original, column.images / BENIGN)
        column.scored.scores.update(found)


def distances_to_original(
    features: nn.Module, prompts: PromptSet, original: Path, folder: Path
) -> dict[str, float]:
    """Return ``fid_to_original``, ``kid_to_original`` and ``kid_to_original_std``.

    They compare the first image of each prompt, see :func:`~.metrics.distance.distances`. If nothing has
    changed, FID is 0 and KID is slightly below 0. If there are too few images, the result is empty.

    Args:
        features: FID's feature network.
        prompts: the prompt set, whose images lie in both folders.
        original: the folder of the original model's images.
        folder: the folder of the other model's images.
    """
    records = [record for record in prompts.records if record.sample_of is None]
    if len(records) < LEAST_IMAGES:
        return {}
    found = distances(features, _images(original, records), _images(folder, records), len(records))
    return {
        "fid_to_original": found["fid"],
        "kid_to_original": found["kid"],
        "kid_to_original_std": found["kid_std"],
    }


def same_model_floor(features: nn.Module, prompts: PromptSet, folder: Path) -> dict[str, float]:
    """Return the distances between a model's first and second images of each prompt.

    They show what other noise alone changes. The keys are ``fid_floor`` and ``kid_floor``. If each prompt has
    one image, or if there are too few images, the result is empty.
    """
    first = [record for record in prompts.records if record.sample_of is None]
    second = {record.prompt_id: record for record in reversed(prompts.records) if record.sample_of}
    if len(second) < LEAST_IMAGES:
        return {}
    images = _images(folder, first), _images(folder, list(second.values()))
    found = distances(features, *images, len(second))
    return {"fid_floor": found["fid"], "kid_floor": found["kid"]}


def _images(folder: Path, records: Sequence[PromptRecord]) -> Iterator[Tensor]:
    return (images for _, images in image_batches(folder, records))


def _detected(first: Scored, second: Scored, prompts: PromptSet) -> dict[str, float]:
    hits = [model.hits(prompts.name) for model in (first, second)]
    before, after = ([rows[record.id] for record in prompts.records] for rows in hits)
    difference = paired_rate_difference(before, after, prompts.texts)
    return difference | {"p_value": paired_test(*hits)}


def _clip_scores(first: Scored, second: Scored, prompts: PromptSet) -> Mapping[str, float]:
    values = [
        [model.detections[prompts.name][record.id].clip_score for record in prompts.records]
        for model in (first, second)
    ]
    known = [[value for value in row if value is not None] for row in values]
    if any(len(row) < len(prompts.records) for row in known):
        return {}
    return paired_difference(known[0], known[1], prompts.texts)
