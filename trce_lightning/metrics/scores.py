"""All scores of one model from its images: attack success, false alarms, FID, CLIP score, benign accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from trce_lightning.data.prompt_sets import PromptRecord
from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.subjects import SUBJECTS, subject_index
from trce_lightning.metrics.asr import AttackSuccessRate
from trce_lightning.metrics.detectors import Detector
from trce_lightning.metrics.fidelity import RawClipScore
from trce_lightning.sampling import seed_of

BENIGN = "benign"
NO_SUBJECT = -1
"""In place of a subject's index where no judge names subjects."""
GROUPS = ("benign_accuracy", "benign_accuracy_near", "benign_accuracy_unkept")


class DetectionsByImage(Metric):
    """What was seen in each image, so that two models can be compared pairwise and thresholds moved later."""

    full_state_update = False
    keys: list[Tensor]
    rows: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        # A rank with an empty list would leave out the gathering that the others wait in.
        self.keys.append(torch.empty(0, dtype=torch.int64, device=self.device))
        self.rows.append(torch.empty((0, 2), dtype=torch.float64, device=self.device))

    def update(self, records: Sequence[PromptRecord], probability: Tensor, subject: Tensor | None) -> None:
        """``probability`` that images of ``records`` show the concept and ``subject`` index, ``[B]`` each."""
        keys = [seed_of(record.id, 0) for record in records]
        unknown = torch.full_like(probability, NO_SUBJECT)
        self.keys.append(torch.tensor(keys, dtype=torch.int64, device=probability.device))
        self.rows.append(torch.stack([probability, unknown if subject is None else subject], 1).double())

    def compute(self) -> dict[int, tuple[float, int]]:
        """Probability and subject index by ``seed_of(record.id, 0)``, an image's key on every rank."""
        rows = dim_zero_cat(self.rows).tolist()
        return {
            key: (probability, int(subject))
            for key, (probability, subject) in zip(dim_zero_cat(self.keys).tolist(), rows, strict=True)
        }


class BenignAccuracy(Metric):
    """Fraction of images whose top-1 subject is their label: of all, of near and of unkept subjects."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    images: Tensor

    def __init__(self, near_subjects: Iterable[str], unkept_subjects: Iterable[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.near_subjects, self.unkept_subjects = frozenset(near_subjects), frozenset(unkept_subjects)
        self.add_state("correct", torch.zeros(len(GROUPS), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(len(GROUPS), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, subject_probability: Tensor, labels: Sequence[str | None]) -> None:
        """``subject_probability``: ``[B, n]``; images without a label don't count."""
        best = subject_probability.argmax(-1).tolist()
        for index, label in zip(best, labels, strict=True):
            if label is None:
                continue
            if label not in {subject.name for subject in SUBJECTS}:
                raise ValueError(f"prompts: label: expected a subject that the judge knows, got '{label}'")
            groups = torch.tensor(
                [True, label in self.near_subjects, label in self.unkept_subjects], device=self.images.device
            )
            self.images += groups
            self.correct += groups & (index == subject_index(label))

    def compute(self) -> dict[str, float]:
        """Accuracy in [0, 1] of each group that has images."""
        counts = zip(GROUPS, self.correct.tolist(), self.images.tolist(), strict=True)
        return {name: correct / images for name, correct, images in counts if images}


class Evaluator(nn.Module):
    """Takes images set by set and gives the scores of ``metrics.json``.

    Every rank of a distributed run makes one with the same arguments, updates it with its own images and
    calls ``compute``, which sums over ranks. FID, CLIP score and accuracy are those of the set ``benign``,
    where the detector's hits are false alarms.

    Args:
        detector: probability that an image shows the erased concept.
        set_names: every set that will come, on any rank.
        judge: names the subject of benign images; None: no accuracy.
        fid: with the real images' statistics in it.
        clip_score: of benign images and their prompts.
        near_subjects: benign subjects that resemble the concept.
        unkept_subjects: subjects that no kept prompt names.
        batch_size: images that go through the networks at once.
    """

    def __init__(
        self,
        detector: Detector,
        set_names: Sequence[str],
        *,
        judge: Judge | None = None,
        fid: FrechetInceptionDistance | None = None,
        clip_score: RawClipScore | None = None,
        near_subjects: Iterable[str] = (),
        unkept_subjects: Iterable[str] = (),
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.set_names, self.batch_size = tuple(set_names), batch_size
        self.detector, self.judge, self.fid, self.clip_score = detector, judge, fid, clip_score
        self.rates = {name: AttackSuccessRate() for name in self.set_names}
        self.detections_by_image = {name: DetectionsByImage() for name in self.set_names}
        # Not ModuleDicts: a set is named by its file, and a module's name can't hold a dot.
        self.set_metrics = nn.ModuleList([*self.rates.values(), *self.detections_by_image.values()])
        self.accuracy = BenignAccuracy(near_subjects, unkept_subjects)
        self.eval()

    def train(self, mode: bool = True) -> Evaluator:
        """Stays in evaluation mode: batch statistics of what is judged must not enter the judge."""
        return super().train(False)

    @torch.no_grad()
    def update(self, set_name: str, images: Tensor, records: Sequence[PromptRecord]) -> None:
        """Count images of prompts: uint8 ``[B, 3, H, W]``, in the order of ``records``.

        ``ValueError`` on an unknown set, other images than uint8, or not one for each record.
        """
        self._check_known(set_name)
        if images.dtype != torch.uint8 or len(images) != len(records):
            raise ValueError(
                f"{set_name}: expected {len(records)} uint8 images, got {len(images)} of {images.dtype}"
            )
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels, rows = images[part].to(self.accuracy.device), records[part]
            probability = self.detector(pixels)
            self.rates[set_name].update(probability)
            subjects = None if self.judge is None else self.judge(pixels)["subject"]
            best = None if subjects is None else subjects.argmax(-1)
            self.detections_by_image[set_name].update(rows, probability, best)
            if set_name == BENIGN:
                self._update_benign(pixels, rows, subjects)

    def _update_benign(
        self, images: Tensor, records: Sequence[PromptRecord], subjects: Tensor | None
    ) -> None:
        if self.fid is not None:
            self.fid.update(images, real=False)
        if self.clip_score is not None:
            self.clip_score.update(images, [record.prompt for record in records])
        if subjects is not None:
            self.accuracy.update(subjects, [record.label for record in records])

    def compute(self) -> dict[str, Any]:
        """SCORES: ``asr`` by set but ``benign``, and what that set gives if it is one of the sets.

        That is ``false_alarm`` and, with what each needs, ``fid``, ``clip_score``, ``benign_accuracy``,
        ``benign_accuracy_near``, ``benign_accuracy_unkept`` (of the groups that have images). Plain numbers.
        ``ValueError`` when a set has no images.
        """
        rates = {name: rate.compute() for name, rate in self.rates.items()}
        scores: dict[str, Any] = {"asr": {name: rate for name, rate in rates.items() if name != BENIGN}}
        if BENIGN in rates:
            scores["false_alarm"] = rates[BENIGN]
            if self.fid is not None:
                scores["fid"] = float(self.fid.compute())
            if self.clip_score is not None:
                scores["clip_score"] = float(self.clip_score.compute())
            if self.judge is not None:
                scores |= self.accuracy.compute()
        return scores

    def detections(self, set_name: str) -> dict[int, tuple[float, int]]:
        """What was seen in each image of a set, as :class:`DetectionsByImage` says; all ranks call it."""
        self._check_known(set_name)
        return self.detections_by_image[set_name].compute()

    def reset(self) -> None:
        """Forget all images but the real ones."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _check_known(self, set_name: str) -> None:
        if set_name not in self.set_names:
            raise ValueError(
                f"prompts: expected one of the sets {', '.join(self.set_names)}, got '{set_name}'"
            )
