"""The judge: an image classifier of subject, style and background that shares no weights with the model.

It decides whether an image shows a concept (ASR), recognises benign subjects, and gives FID its features.
"""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.errors import InputError

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
    """What the read-outs' indices mean."""

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
        """Probabilities ``[B, n]`` of subject, style and background for uint8 images."""
        features = self.features(images)
        return {name: head(features).softmax(-1) for name, head in self.heads.items()}


def category_probability(subject_probability: Tensor, category: str) -> Tensor:
    """Summed probability ``[B]`` of a category's subjects; the image shows it when this is ≥ 0.5."""
    members = [index for index, subject in enumerate(SUBJECTS) if subject.category == category]
    if not members:
        raise InputError(
            f"judge category: expected one of {sorted({s.category for s in SUBJECTS})}, got '{category}'"
        )
    return subject_probability[:, members].sum(-1)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0-255 → float -1..1."""
    return images.float() / 127.5 - 1
