"""Two models on the same prompts and noise: how much they differ, image by image, and how sure that is."""

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
    """What changes from the first model to the second.

    Returns:
        ``detected`` by set: ``difference`` of the shares of images that show the concept (second − first)
        with its 95 % interval ``low``, ``high``; ``p_value`` of the exact McNemar test; ``p_value_holm``,
        adjusted for the number of sets. McNemar's test takes images as independent: with several images a
        prompt look at the interval, which does not.
        ``clip_score``: the difference alone, where both models have CLIP scores of every image of a set.
    """
    detected = {prompts.name: _detected(first, second, prompts) for prompts in sets}
    adjusted = holm({name: row["p_value"] for name, row in detected.items()})
    for name, row in detected.items():
        row["p_value_holm"] = adjusted[name]
    scores = {prompts.name: _clip_scores(first, second, prompts) for prompts in sets}
    return {"detected": detected, "clip_score": {name: row for name, row in scores.items() if row}}


def p_values(comparison: Comparison) -> dict[str, float]:
    """Those of the exact McNemar tests, by set."""
    return {name: row["p_value"] for name, row in comparison["detected"].items()}


def one_line(comparison: Comparison) -> str:
    """For a log: "direct -97.9 points [-99.0, -96.5], p (Holm) = 1e-150; …"."""
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
    """Add to the scores how far each model's benign images have moved from the first model's.

    The first gets :func:`same_model_floor`, the others :func:`distances_to_original`. Nothing is added
    without ``features``, FID's feature network, which works on ``device``, or without benign prompts.
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
    """How far images have moved: ``fid_to_original``, ``kid_to_original``, ``kid_to_original_std``.

    Of each prompt's first image, as :func:`~.metrics.distance.distances` says: where nothing changed FID is 0
    and KID a little below. Empty with fewer images than that needs.

    Args:
        features: FID's feature network.
        prompts: whose images lie in both folders.
        original: the original model's images of the set.
        folder: the other model's.
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
    """Distances between a model's first and second images of each prompt: what other noise alone does.

    ``fid_floor``, ``kid_floor``; empty with one image a prompt, or few.
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
