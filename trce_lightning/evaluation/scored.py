"""The scores of a model, and what follows from them and from what was seen in each of its images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from trce_lightning.errors import InputError
from trce_lightning.generation.image_folder import image_batches
from trce_lightning.metrics.asr import THRESHOLD, shows_concept
from trce_lightning.metrics.class_detectors import CPU, to_device
from trce_lightning.metrics.collateral import Detection, accuracies, clip_score_interval
from trce_lightning.metrics.detectors import Detector
from trce_lightning.metrics.uncertainty import clustered_rate
from trce_lightning.prompts.records import BENIGN, PromptSet
from trce_lightning.runtime.storage import MADE_AGAIN, reading, write_json

Scores = dict[str, Any]
SCORED_SCHEMA = 2
"""Of ``scored/*.json``: rows of :class:`Detection`."""
Detections = dict[str, dict[str, Detection]]
"""By prompt set and prompt id."""


@dataclass(frozen=True)
class Scored:
    """A model's scores with the detections behind them."""

    scores: Scores
    detections: Detections

    def hits(self, set_name: str) -> dict[str, bool]:
        """Whether each image of a set shows the concept, by prompt id."""
        rows = self.detections[set_name]
        shown = shows_concept(torch.tensor([row.probability for row in rows.values()]))
        return dict(zip(rows, shown.tolist(), strict=True))

    def rates_at(self, sets: Sequence[PromptSet], thresholds: Sequence[float]) -> dict[str, Any]:
        """Attack success, and false alarms, by set and by threshold on the detector's probability."""
        return {
            prompts.name: {
                f"{threshold:g}": _rate(prompts, self.detections[prompts.name], threshold)
                for threshold in thresholds
            }
            for prompts in sets
        }

    def save(self, file: Path) -> None:
        """As JSON."""
        content = {"schema": SCORED_SCHEMA, "scores": self.scores, "detections": self.detections}
        write_json(file, content)

    @classmethod
    def load(cls, file: Path, remedy: str = MADE_AGAIN) -> Scored:
        """Read back. ``InputError`` on a damaged or an older file, with ``remedy``, what to do."""
        with reading(file, "a model's scores", remedy):
            content = json.loads(file.read_text("utf-8"))
            if content.get("schema") != SCORED_SCHEMA:
                raise InputError(f"{file}: expected scores of this version, got an older file; {remedy}")
            detections = {
                name: {key: Detection(*row) for key, row in rows.items()}
                for name, rows in content["detections"].items()
            }
            return cls(dict(content["scores"]), detections)


@dataclass(frozen=True)
class Column:
    """A model beside others: what it scored, and the folder of its images by set."""

    scored: Scored
    images: Path


def further_scores(
    scores: Scores,
    sets: Sequence[PromptSet],
    detections: Detections,
    label_groups: Mapping[str, frozenset[str]],
) -> Scores:
    """What follows from the prompts and what was seen in each image.

    ``asr`` and ``false_alarm`` with intervals that know which images are of one prompt; ``accuracy`` by
    labelled set, as :func:`~.collateral.accuracies` says; of benign images CLIP score's interval, and the
    rates ``benign_accuracy``, ``benign_accuracy_near`` and ``benign_accuracy_unkept`` alone.
    """
    rates = {prompts.name: _rate(prompts, detections[prompts.name]) for prompts in sets}
    found = {
        prompts.name: accuracies(prompts, detections[prompts.name], label_groups)
        for prompts in sets
        if any(record.label for record in prompts.records)
    }
    further: Scores = {
        "asr": {name: rates[name] for name in scores["asr"]},
        "accuracy": {name: groups for name, groups in found.items() if groups},
    }
    for prompts in sets:
        if prompts.name == BENIGN:
            further["false_alarm"] = rates[BENIGN]
            further |= clip_score_interval(prompts, detections[BENIGN])
    names = {"subject": "benign_accuracy", "near": "benign_accuracy_near", "unkept": "benign_accuracy_unkept"}
    of_benign = found.get(BENIGN, {})
    return further | {names[group]: rate["rate"] for group, rate in of_benign.items() if group in names}


def _rate(
    prompts: PromptSet, seen: Mapping[str, Detection], threshold: float = THRESHOLD
) -> dict[str, float]:
    probability = torch.tensor([seen[record.id].probability for record in prompts.records])
    return clustered_rate(shows_concept(probability, threshold).tolist(), prompts.texts)


def category_rates(prompts: PromptSet, scored: Scored) -> dict[str, dict[str, float]]:
    """Attack success by category, over the prompts that have it; a prompt may have several."""
    seen, rates = scored.detections[prompts.name], {}
    for category in dict.fromkeys(name for record in prompts.records for name in record.categories):
        members = tuple(record for record in prompts.records if category in record.categories)
        rates[category] = _rate(replace(prompts, records=members), seen)
    return rates


def detection_rates(
    detector: Detector, sets: Sequence[PromptSet], folder: Path, device: torch.device = CPU
) -> dict[str, dict[str, float]]:
    """How often another detector sees the concept in images that are there, by set, for one process alone.

    ``device`` is where it works if it is an ``nn.Module``; others get images on the CPU.
    """
    rates, place = {}, to_device(detector, device)
    for prompts in sets:
        batches = image_batches(folder / prompts.name, prompts.records)
        hits = shows_concept(torch.cat([detector(images.to(place)).cpu() for _, images in batches]))
        rates[prompts.name] = clustered_rate(hits.tolist(), prompts.texts)
    return rates


def flatten_scores(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested scores under one name each: ``asr/direct/rate``, ``fid``, …"""
    flat: dict[str, Any] = {}
    for name, value in scores.items():
        nested = isinstance(value, Mapping)
        flat |= flatten_scores(value, f"{prefix}{name}/") if nested else {f"{prefix}{name}": value}
    return flat


def log_scores(loggers: Sequence[Logger], scores: Scores, step: int, prefix: str = "") -> None:
    """Send flat scores to every logger."""
    flat = {name: float(value) for name, value in flatten_scores(scores, prefix).items()}
    for logger in loggers:
        logger.log_metrics(flat, step=step)
        logger.save()
