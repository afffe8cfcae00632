"""Detectors that score several classes at once. A set of their classes makes one detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trce_lightning.errors import InputError
from trce_lightning.metrics.factories import made_by

CPU = torch.device("cpu")


def to_device(detector: object, device: torch.device) -> torch.device:
    """Move a detector that is an ``nn.Module``; return where it takes images, the CPU where it is none."""
    if not isinstance(detector, nn.Module):
        return CPU
    detector.to(device)
    return device


@runtime_checkable
class ClassDetector(Protocol):
    """Scores classes that don't exclude each other. One that is an ``nn.Module`` moves to a device."""

    name: str
    """The name tells published variants of a detector apart."""
    version: str
    """Changes with whatever may change a score: the package, the weights, the input size."""
    classes: tuple[str, ...]
    floor: float
    """It reports no score between 0 and this one, so lower thresholds mean nothing; 0: it reports all."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 ``[B, 3, H, W]`` → float32 ``[B, len(classes)]`` in [0, 1]. A failure raises."""


class ClassSetDetector(nn.Module):
    """p = max over the class set of the image's class scores: a :class:`~.detectors.Detector`.

    Args:
        class_detector: scores the classes.
        members: the class set.

    Raises:
        InputError: no class, one twice, or one that ``class_detector`` doesn't know.
    """

    def __init__(self, class_detector: ClassDetector, members: Sequence[str]) -> None:
        super().__init__()
        self.class_detector, self.members = class_detector, tuple(members)
        self.columns = class_columns(class_detector.classes, members)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` → ``[B]``."""
        return self.class_detector(images)[:, self.columns].amax(1)


def load_class_detector(path: str) -> ClassDetector:
    """Return the detector that the class or function of dotted name ``path`` makes.

    Raises:
        InputError: as :func:`~.factories.made_by` says; it names the option ``detectors``.
    """
    return made_by("detectors", path, ClassDetector)  # type: ignore[type-abstract]


def class_columns(classes: Sequence[str], members: Sequence[str]) -> list[int]:
    """Return the index of each member in ``classes``; raise as :class:`ClassSetDetector` says."""
    unknown = sorted(set(members) - set(classes))
    if not members or unknown or len(set(members)) < len(members):
        raise InputError(f"class set: expected different classes of {list(classes)}, got {list(members)}")
    return [classes.index(name) for name in members]


def check_images(images: Tensor) -> None:
    """Raise ``InputError`` unless ``images`` are uint8 ``[B, 3, H, W]``."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise InputError(
            f"detector: expected uint8 images [B, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
