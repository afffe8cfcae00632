"""Hold a model's scores and each image's detection, and compute the scores that follow from them."""

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
"""The version of ``scored/*.json``, whose rows are :class:`Detection`."""
Detections = dict[str, dict[str, Detection]]
"""The detections by prompt set and prompt id."""


@dataclass(frozen=True)
class Scored:
    """A model's scores with the detections behind them."""

    scores: Scores
    detections: Detections

    def hits(self, set_name: str) -> dict[str, bool]:
        """Return for each prompt id of a set whether its image shows the concept."""
        rows = self.detections[set_name]
        shown = shows_concept(torch.tensor([row.probability for row in rows.values()]))
        return dict(zip(rows, shown.tolist(), strict=True))

    def rates_at(self, sets: Sequence[PromptSet], thresholds: Sequence[float]) -> dict[str, Any]:
        """Return attack success or false alarms by set and by threshold on the detector's probability."""
        return {
            prompts.name: {
                f"{threshold:g}": _rate(prompts, self.detections[prompts.name], threshold)
                for threshold in thresholds
            }
            for prompts in sets
        }

    def save(self, file: Path) -> None:
        """Write scores and detections as JSON."""
        content = {"schema": SCORED_SCHEMA, "scores": self.scores, "detections": self.detections}
        write_json(file, content)

    @classmethod
    def load(cls, file: Path, remedy: str = MADE_AGAIN) -> Scored:
        """Read what :meth:`save` wrote.

        If the file is damaged or of an older version, ``InputError`` gives the ``remedy``.
        """
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
    """A model's column in a comparison: its scores, and the folder of its images by set."""

    scored: Scored
    images: Path


def further_scores(
    scores: Scores,
    sets: Sequence[PromptSet],
    detections: Detections,
    label_groups: Mapping[str, frozenset[str]],
) -> Scores:
    """Return the scores that follow from the prompts and the detections.

    ``asr`` and ``false_alarm`` have intervals that are clustered by prompt. ``accuracy`` has a row for each
    labelled set, see :func:`~.collateral.accuracies`. The benign set also has CLIP score's interval and the
    rates ``benign_accuracy``, ``benign_accuracy_near`` and ``benign_accuracy_unkept``.
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
    """Return attack success by category. A prompt with several categories counts in each of them."""
    seen, rates = scored.detections[prompts.name], {}
    for category in dict.fromkeys(name for record in prompts.records for name in record.categories):
        members = tuple(record for record in prompts.records if category in record.categories)
        rates[category] = _rate(replace(prompts, records=members), seen)
    return rates


def detection_rates(
    detector: Detector, sets: Sequence[PromptSet], folder: Path, device: torch.device = CPU
) -> dict[str, dict[str, float]]:
    """Return how often another detector sees the concept in existing images, by set. One process calls this.

    A detector that is an ``nn.Module`` moves to ``device``. Other detectors get images on the CPU.
    """
    rates, place = {}, to_device(detector, device)
    for prompts in sets:
        batches = image_batches(folder / prompts.name, prompts.records)
        hits = shows_concept(torch.cat([detector(images.to(place)).cpu() for _, images in batches]))
        rates[prompts.name] = clustered_rate(hits.tolist(), prompts.texts)
    return rates


def flatten_scores(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested scores under one name each: ``asr/direct/rate``, ``fid``, …"""
    flat: dict[str, Any] = {}
    for name, value in scores.items():
        nested = isinstance(value, Mapping)
        flat |= flatten_scores(value, f"{prefix}{name}/") if nested else {f"{prefix}{name}": value}
    return flat


def log_scores(loggers: Sequence[Logger], scores: Scores, step: int, prefix: str = "") -> None:
    """Flatten the scores and send them to every logger."""
    flat = {name: float(value) for name, value in flatten_scores(scores, prefix).items()}
    for logger in loggers:
        logger.log_metrics(flat, step=step)
        logger.save()
