"""The judge: an image classifier of subject, style and background that shares no weights with the model.

It decides whether an image shows a concept (ASR), recognises benign subjects, and gives FID its features.
:class:`JudgeDetector` and :func:`judge_fid` are those uses of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.ops import Conv2dNormActivation

from trce_lightning.concepts import Concept
from trce_lightning.emoji.groups import concept_styles, concept_subjects
from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS, subject_index
from trce_lightning.errors import InputError
from trce_lightning.metrics.fidelity import feature_fid

WIDTHS = (32, 64, 128, 256, 256)


class Judge(nn.Module):
    """Five strided convolutions, mean pooling and three linear read-outs."""

    num_features = WIDTHS[-1]
    vocabulary = MappingProxyType(
        {
            "subject": tuple(subject.name for subject in SUBJECTS),
            "style": tuple(STYLES),
            "background": tuple(BACKGROUNDS),
        }
    )
    """The meaning of the read-outs' indices."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(
                Conv2dNormActivation(c_in, c_out, 3, stride=2)
                for c_in, c_out in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)
            ),
            Conv2dNormActivation(WIDTHS[-1], WIDTHS[-1], 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(self.num_features, len(names)) for name, names in self.vocabulary.items()}
        )

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, 64, 64]`` → float32 ``[B, 256]``."""
        return self.trunk(to_unit(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return probabilities ``[B, n]`` of subject, style and background for uint8 images."""
        features = self.features(images)
        return {name: head(features).softmax(-1) for name, head in self.heads.items()}


def category_probability(subject_probability: Tensor, category: str) -> Tensor:
    """Return the summed probability ``[B]`` of a category's subjects; at 0.5 or above the image shows it."""
    members = [index for index, subject in enumerate(SUBJECTS) if subject.category == category]
    if not members:
        raise InputError(
            f"judge category: expected one of {sorted({s.category for s in SUBJECTS})}, got '{category}'"
        )
    return subject_probability[:, members].sum(-1)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0-255 → float -1..1."""
    return images.float() / 127.5 - 1


class JudgeDetector(nn.Module):
    """A detector of one or more concepts that reads off the judge's answers.

    Subjects exclude each other, so their probabilities add; so do those of styles. With both kinds an image
    shows the concepts if it shows either: the larger sum counts.
    """

    def __init__(self, judge: Judge, concepts: Sequence[Concept]) -> None:
        """Raise ``InputError`` for a concept of which the judge knows no subject and no style."""
        super().__init__()
        if not concepts:
            raise InputError("concept: expected at least one to detect, got none")
        for concept in concepts:
            if not (concept_subjects(concept) or concept_styles(concept)):
                raise InputError(f"concept: expected one that the judge can see, got '{concept.name}'")
        self.judge = judge.eval().requires_grad_(False)
        names = {name for concept in concepts for name in concept_subjects(concept)}
        self.members = sorted(subject_index(name) for name in names)
        styles = {style for concept in concepts for style in concept_styles(concept)}
        self.styles = sorted(STYLES.index(style) for style in styles)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, 64, 64]`` → ``[B]``."""
        probability = self.judge(images)
        subjects = probability["subject"][:, self.members].sum(-1)
        return torch.maximum(subjects, probability["style"][:, self.styles].sum(-1))


class JudgeFeatures(nn.Module):
    """The judge's pooled features as FID's feature network, in float32 whatever the surrounding precision."""

    num_features = Judge.num_features

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge.eval()

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, 64, 64]`` → float32 ``[B, 256]``."""
        with torch.autocast(images.device.type, enabled=False):
            return self.judge.features(images)


def judge_fid(judge: Judge) -> FrechetInceptionDistance:
    """Return FID on the judge's features, whose scale is their own."""
    return feature_fid(JudgeFeatures(judge))
