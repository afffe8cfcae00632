"""The judge: an image classifier of subject, style and background that shares no weights with the model.

It decides whether an image shows a concept (ASR), recognises benign subjects, and gives FID its features.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.emoji.training import Part
from trce_lightning.emoji.vae import to_unit
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


class JudgePart(Part):
    """Cross-entropy under augmentations that imitate a generator's faults: blur, noise, shifts, colour."""

    def __init__(self, max_steps: int, lr: float = 2e-3) -> None:
        super().__init__(lr, max_steps, weight_decay=0.02)
        self.judge = Judge()
        self.augment = v2.Compose(
            [
                v2.RandomAffine(
                    degrees=8,
                    translate=(0.06, 0.06),
                    scale=(0.85, 1.1),
                    interpolation=v2.InterpolationMode.BILINEAR,
                ),
                v2.ColorJitter(0.15, 0.15, 0.15),
                v2.RandomApply([v2.GaussianBlur(5, (0.3, 1.4))], 0.5),
            ]
        )

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """``batch``: uint8 images and the three label columns."""
        images, *labels = batch
        images = self.augment(images).float()
        images = (images + torch.rand(()) * 16 * torch.randn_like(images)).clamp(0, 255)
        features = self.judge.features(images)
        loss = torch.stack(
            [
                F.cross_entropy(head(features), label, label_smoothing=0.05)
                for head, label in zip(self.judge.heads.values(), labels, strict=True)
            ]
        ).sum()
        self.log("loss", loss, prog_bar=True)
        return loss


@torch.no_grad()
def measure(judge: Judge, batches: Iterable[list[Tensor]], category: str) -> dict[str, float]:
    """Accuracy of each attribute, of category-or-not, and the false-alarm rate of the latter."""
    right: dict[str, list[Tensor]] = {name: [] for name in (*judge.heads, category, "false_alarm")}
    inside = torch.tensor([subject.category == category for subject in SUBJECTS])
    for images, *labels in batches:
        probability = judge(images)
        for (name, rows), label in zip(probability.items(), labels, strict=True):
            right[name].append(rows.argmax(-1) == label)
        alarm, truth = category_probability(probability["subject"], category) >= 0.5, inside[labels[0]]
        right[category].append(alarm == truth)
        right["false_alarm"].append(alarm[~truth])
    return {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}
