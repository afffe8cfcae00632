"""Score several classes at once, and turn a set of the classes into one detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from trce_lightning.errors import InputError
from trce_lightning.metrics.factories import made_by

CPU = torch.device("cpu")


def to_device(detector: object, device: torch.device) -> torch.device:
    """Move a detector to ``device`` if it is an ``nn.Module``. Return the device on which it takes images.

    A detector that is no ``nn.Module`` takes images on the CPU.
    """
    if not isinstance(detector, nn.Module):
        return CPU
    detector.to(device)
    return device


@runtime_checkable
class ClassDetector(Protocol):
    """A detector that scores several classes. An image may show more than one of them.

    If the detector is an ``nn.Module``, it moves to the evaluator's device.
    """

    name: str
    """The name of the detector. Two published variants have different names."""
    version: str
    """The version of everything that may change a score: the package, the weights, the input size."""
    classes: tuple[str, ...]
    floor: float
    """The lowest score that the detector reports besides 0. A lower threshold has no effect. 0: no limit."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to float32 ``[B, len(classes)]`` in [0, 1].

        A failure raises an error.
        """


class ClassSetDetector(nn.Module):
    """A :class:`~.detectors.Detector` with p = max of the image's class scores over a class set.

    Args:
        class_detector: scores the classes.
        members: the class set.

    Raises:
        InputError: ``members`` is empty, has a class twice, or has a class that ``class_detector`` doesn't
            know.
    """

    def __init__(self, class_detector: ClassDetector, members: Sequence[str]) -> None:
        super().__init__()
        self.class_detector, self.members = class_detector, tuple(members)
        self.columns = class_columns(class_detector.classes, members)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to probabilities ``[B]``."""
        return self.class_detector(images)[:, self.columns].amax(1)


def load_class_detector(path: str) -> ClassDetector:
    """Call the class or function with the dotted name ``path`` and return the detector that it makes.

    Raises:
        InputError: see :func:`~.factories.made_by`. The message names the option ``detectors``.
    """
    return made_by("detectors", path, ClassDetector)  # type: ignore[type-abstract]


def class_columns(classes: Sequence[str], members: Sequence[str]) -> list[int]:
    """Return the index of each member in ``classes``. Raise the errors of :class:`ClassSetDetector`."""
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
