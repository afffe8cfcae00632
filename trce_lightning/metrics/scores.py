"""Score a model's images: attack success, false alarms, FID, CLIP score, and each image's detection."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from trce_lightning.errors import InputError
from trce_lightning.metrics.asr import AttackSuccessRate
from trce_lightning.metrics.collateral import ATTRIBUTES, Detection
from trce_lightning.metrics.detectors import Detector, checked_probability
from trce_lightning.metrics.fidelity import Clip
from trce_lightning.prompts.records import BENIGN, NEIGHBOURS, SCENES, UNERASED, PromptRecord, seed_of

NO_ATTACKS = (BENIGN, SCENES, UNERASED, NEIGHBOURS)
"""The sets that should never show the concept."""
_UNSEEN = -1

Vocabulary = Mapping[str, Sequence[str]]
"""The names that a judge may answer, by attribute, such as "subject"."""


class ImageJudge(Protocol):
    """A classifier that names an image's subject, style or background.

    If the judge is an ``nn.Module``, it moves to the evaluator's device.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the names by attribute."""

    def __call__(self, images: Tensor, /) -> Mapping[str, Tensor]:
        """Map uint8 ``[B, 3, H, W]`` to probabilities ``[B, n]`` for each attribute of the vocabulary."""


class DetectionsByImage(Metric):
    """The detection of every image.

    With these, two models can be compared image by image, and other thresholds can be applied later.
    """

    full_state_update = False
    keys: list[Tensor]
    rows: list[Tensor]

    def __init__(self, vocabulary: Vocabulary, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocabulary = vocabulary
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        # A rank with an empty list would skip the gathering, and the other ranks would wait for it.
        self.keys.append(torch.empty(0, dtype=torch.int64, device=self.device))
        self.rows.append(torch.empty((0, len(Detection._fields)), device=self.device))

    def update(
        self,
        records: Sequence[PromptRecord],
        probability: Tensor,
        seen: Mapping[str, Tensor],
        clip_score: Tensor | None,
    ) -> None:
        """Add the columns of :class:`Detection`, ``[B]`` each. ``seen`` holds indices into the vocabulary."""
        keys = [seed_of(record.id, 0) for record in records]
        unseen, unscored = torch.full_like(probability, _UNSEEN), torch.full_like(probability, math.nan)
        columns = [probability, *(seen.get(name, unseen) for name in ATTRIBUTES)]
        columns.append(unscored if clip_score is None else clip_score.to(probability.device))
        self.keys.append(torch.tensor(keys, dtype=torch.int64, device=probability.device))
        self.rows.append(torch.stack([column.float() for column in columns], 1))

    def compute(self) -> dict[int, Detection]:
        """Return detections by ``seed_of(record.id, 0)``, which identifies an image on every rank."""
        keys, rows = dim_zero_cat(self.keys).tolist(), dim_zero_cat(self.rows).tolist()
        return {key: self._detection(row) for key, row in zip(keys, rows, strict=True)}

    def _detection(self, row: Sequence[float]) -> Detection:
        probability, *indices, score = row
        answers = {
            attribute: self.vocabulary[attribute][int(index)]
            for attribute, index in zip(ATTRIBUTES, indices, strict=True)
            if index != _UNSEEN
        }
        return Detection(probability, **answers, clip_score=None if math.isnan(score) else score)


class Evaluator(nn.Module):
    """Score images set by set. The result is the scores of ``metrics.json``.

    In a distributed run, every rank makes an evaluator with the same arguments and updates it with its own
    images. ``compute`` then sums over the ranks. FID and CLIP score use the set ``benign``. The detector's
    hits in that set are false alarms.

    Args:
        detector: returns the probability that an image shows the erased concept.
        set_names: the names of all sets, on any rank.
        judge: names each image's subject, style and background, or None.
        fid: FID with the real images' statistics.
        clip: scores benign images against their prompts.
        batch_size: images that go through the networks at once.
    """

    def __init__(
        self,
        detector: Detector,
        set_names: Sequence[str],
        *,
        judge: ImageJudge | None = None,
        fid: FrechetInceptionDistance | None = None,
        clip: Clip | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.set_names, self.batch_size = tuple(set_names), batch_size
        self.detector, self.judge, self.fid, self.clip = detector, judge, fid, clip
        self.clip_model = None if clip is None else clip.model  # as a submodule, it moves with the rest
        self.rates = {name: AttackSuccessRate() for name in self.set_names}
        vocabulary = {} if judge is None else judge.vocabulary
        self.detections_by_image = {name: DetectionsByImage(vocabulary) for name in self.set_names}
        # ModuleDict doesn't fit: a set is named after its file, and a module's name can't hold a dot.
        self.set_metrics = nn.ModuleList([*self.rates.values(), *self.detections_by_image.values()])
        self.clip_score = MeanMetric()
        self.eval()

    def train(self, mode: bool = True) -> Evaluator:
        """Stay in evaluation mode, so that the judged images don't change the judge's batch statistics."""
        return super().train(False)

    @torch.no_grad()
    def update(self, set_name: str, images: Tensor, records: Sequence[PromptRecord]) -> None:
        """Count images of prompts: uint8 ``[B, 3, H, W]``, in the order of ``records``.

        ``InputError`` if the set is unknown, the images are not uint8, or their number differs from the
        records'.
        """
        self._check_known(set_name)
        if images.dtype != torch.uint8 or len(images) != len(records):
            raise InputError(
                f"{set_name}: expected {len(records)} uint8 images, got {len(images)} of {images.dtype}"
            )
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels, rows = images[part].to(self.clip_score.device), records[part]
            probability = checked_probability(self.detector(pixels), len(pixels)).to(pixels.device)
            self.rates[set_name].update(probability)
            seen = {} if self.judge is None else self.judge(pixels)
            best = {name: probabilities.argmax(-1) for name, probabilities in seen.items()}
            score = self._update_benign(pixels, rows) if set_name == BENIGN else None
            self.detections_by_image[set_name].update(rows, probability, best, score)

    def _update_benign(self, images: Tensor, records: Sequence[PromptRecord]) -> Tensor | None:
        if self.fid is not None:
            self.fid.update(images, real=False)
        if self.clip is None:
            return None
        score = self.clip.scores(images, [record.prompt for record in records])
        self.clip_score.update(score)
        return score

    def compute(self) -> dict[str, Any]:
        """Return the scores, as plain numbers.

        ``asr`` has a rate for each attack set. If ``benign`` is one of the sets, ``false_alarm`` is its rate,
        and ``fid`` and ``clip_score`` follow if the evaluator has them. ``InputError`` if a set has no
        images.
        """
        rates = {name: rate.compute() for name, rate in self.rates.items()}
        attacks = {name: rate for name, rate in rates.items() if name not in NO_ATTACKS}
        scores: dict[str, Any] = {"asr": attacks}
        if BENIGN in rates:
            scores["false_alarm"] = rates[BENIGN]
            if self.fid is not None:
                scores["fid"] = float(self.fid.compute())
            if self.clip is not None:
                scores["clip_score"] = float(self.clip_score.compute())
        return scores

    def detections(self, set_name: str) -> dict[int, Detection]:
        """Return the detections of a set in the form of :meth:`DetectionsByImage.compute`.

        All ranks must call this.
        """
        self._check_known(set_name)
        return self.detections_by_image[set_name].compute()

    def reset(self) -> None:
        """Forget all generated images. The real images' statistics stay."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _check_known(self, set_name: str) -> None:
        if set_name not in self.set_names:
            raise InputError(
                f"prompts: expected one of the sets {', '.join(self.set_names)}, got '{set_name}'"
            )
