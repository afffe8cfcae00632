"""Train the judge and measure its accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from trce_lightning.emoji.judge import Judge, category_probability
from trce_lightning.emoji.subjects import SUBJECTS
from trce_lightning.emoji.training.part import Part


class JudgePart(Part):
    """Train with cross-entropy, under augmentations that imitate a generator's faults.

    The augmentations are blur, noise, shifts and colour.
    """

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
        """Return the loss. ``batch`` has uint8 images and the three label columns."""
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
    """Return each attribute's accuracy, and accuracy and false-alarm rate of "shows ``category``"."""
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
