"""Judge images: a classifier of subject, style and background that shares no weights with the model.

:class:`JudgeDetector` uses it to decide whether an image shows a concept (ASR). :func:`judge_fid` uses its
features for FID. It also recognises benign subjects.
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
from trce_lightning.metrics.collateral import BESIDE
from trce_lightning.metrics.fidelity import feature_fid

WIDTHS = (32, 64, 128, 256, 256)


class Judge(nn.Module):
    """A classifier of five strided convolutions, mean pooling and three linear read-outs."""

    num_features = WIDTHS[-1]
    vocabulary = MappingProxyType(
        {
            "subject": tuple(subject.name for subject in SUBJECTS),
            "style": tuple(STYLES),
            "background": tuple(BACKGROUNDS),
        }
    )
    """The names of the read-outs' indices."""

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
        """Map uint8 ``[B, 3, 64, 64]`` to float32 features ``[B, 256]``."""
        return self.trunk(to_unit(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return probabilities ``[B, n]`` of subject, style and background for uint8 images."""
        features = self.features(images)
        return {name: head(features).softmax(-1) for name, head in self.heads.items()}


def category_probability(subject_probability: Tensor, category: str) -> Tensor:
    """Return the summed probability ``[B]`` of a category's subjects.

    An image shows the category from 0.5 on.
    """
    members = [index for index, subject in enumerate(SUBJECTS) if subject.category == category]
    if not members:
        raise InputError(
            f"judge category: expected one of {sorted({s.category for s in SUBJECTS})}, got '{category}'"
        )
    return subject_probability[:, members].sum(-1)


def to_unit(images: Tensor) -> Tensor:
    """Map uint8 0 to 255 to float −1 to 1."""
    return images.float() / 127.5 - 1


class JudgeDetector(nn.Module):
    """A detector of one or more concepts that uses the judge's probabilities.

    The subjects exclude each other, so their probabilities add up. The same holds for styles. If the concepts
    have both, an image shows them if it shows either, so the larger sum counts.
    """

    def __init__(self, judge: nn.Module, concepts: Sequence[Concept]) -> None:
        """Take a :class:`Judge`, or one that also names a subject beside the first one.

        Raises:
            InputError: the judge knows no subject and no style of a concept.
        """
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
        """Map uint8 ``[B, 3, 64, 64]`` to probabilities ``[B]``."""
        probability = self.judge(images)
        subjects = probability["subject"][:, self.members].sum(-1)
        if BESIDE in probability:
            subjects = torch.maximum(subjects, probability[BESIDE][:, self.members].sum(-1))
        return torch.maximum(subjects, probability["style"][:, self.styles].sum(-1))


class JudgeFeatures(nn.Module):
    """The judge's pooled features as FID's feature network. It computes in float32 also under autocast."""

    num_features = Judge.num_features

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 3, 64, 64]`` to float32 features ``[B, 256]``."""
        with torch.autocast(images.device.type, enabled=False):
            return self.judge.features(images)


def judge_fid(judge: Judge) -> FrechetInceptionDistance:
    """Return FID on the judge's features. Its scale differs from that of Inception's FID."""
    return feature_fid(JudgeFeatures(judge))
