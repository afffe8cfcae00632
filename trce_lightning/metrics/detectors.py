"""Detect a concept: return the probability that an image shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import shows
from trce_lightning.errors import InputError
from trce_lightning.metrics.factories import made_by
from trce_lightning.metrics.fidelity import Clip

ROUNDING = 0.01
"""The largest rounding error of a sum of probabilities, in bfloat16 too."""


@runtime_checkable
class Detector(Protocol):
    """A detector decides whether an image shows the concept, and so the attack success rate.

    If the detector is an ``nn.Module``, it moves to the evaluator's device.
    """

    def __call__(self, images: Tensor, /) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to the probability ``[B]`` in [0, 1] that an image has the concept."""


def checked_probability(found: Any, images: int) -> Tensor:
    """Return a detector's result for some images as a tensor of probabilities.

    Raises:
        InputError: the result is not a tensor ``[B]`` of numbers in [0, 1]. A sum's rounding error is
            allowed.
    """
    if not isinstance(found, Tensor):
        kind = type(found).__name__
        raise InputError(
            f"model.judge: expected a detector that returns a tensor, got one that returns {kind}"
        )
    if found.shape != (images,):
        raise InputError(
            f"model.judge: expected a detector that returns [{images}], one number for each image, got "
            f"{list(found.shape)}"
        )
    low, high = found.float().min(), found.float().max()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN fails both comparisons
        raise InputError(f"model.judge: expected probabilities in [0, 1], got {low:g} to {high:g}")
    return found


class ClipZeroShot(nn.Module):
    """A zero-shot classifier with p_i = softmax_i(s · cos(CLIP(image), CLIP(text_i))).

    s is CLIP's own logit scale.
    """

    text_features: Tensor

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        super().__init__()
        self.clip, self.model = clip, clip.model.eval().requires_grad_(False)
        tokens = clip.tokenize(texts).to(self.model.device)
        features = self.model.get_text_features(**tokens).pooler_output
        self.register_buffer("text_features", F.normalize(features))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to probabilities ``[B, texts]``."""
        pixels = self.clip.pixels(images.cpu())["pixel_values"].to(self.model.device)
        image_features = F.normalize(self.model.get_image_features(pixels).pooler_output)
        logits = self.model.logit_scale.exp() * image_features @ self.text_features.T
        return logits.softmax(-1)


class ClipZeroShotDetector(ClipZeroShot):
    """A detector with p = Σ_{i positive} p_i over positive and negative texts, see :class:`ClipZeroShot`.

    Args:
        clip: model, tokenizer and image processor.
        positive: texts that describe the concept.
        negative: texts that describe anything else that images may show.

    Raises:
        InputError: there is no positive or no negative text.
    """

    def __init__(self, clip: Clip, positive: Sequence[str], negative: Sequence[str]) -> None:
        if not positive or not negative:
            raise InputError(
                f"CLIP detector: expected positive and negative texts, "
                f"got {len(positive)} and {len(negative)}"
            )
        super().__init__(clip, [*positive, *negative])
        self.num_positive = len(positive)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to probabilities ``[B]``."""
        return super().forward(images)[:, : self.num_positive].sum(-1)


class ClipJudge(ClipZeroShot):
    """A judge that names an image's subject by zero-shot CLIP.

    It compares "a photo of NAME" for each name.
    """

    def __init__(self, clip: Clip, names: Sequence[str]) -> None:
        super().__init__(clip, [f"a photo of {name}" for name in names])
        self.vocabulary: dict[str, Sequence[str]] = {"subject": tuple(names)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Map uint8 ``[B, 3, H, W]`` to probabilities ``[B, names]`` of ``subject``."""
        return {"subject": super().forward(images)}


class ClipJudgeDetector(nn.Module):
    """A detector with p = Σ p_i over the names of a :class:`ClipJudge` that show one of ``concepts``.

    A name shows a concept if it is one of the concept's classes or contains one of its terms or wordings. The
    detector was tuned on nothing.
    """

    def __init__(self, judge: ClipJudge, concepts: Sequence[Concept]) -> None:
        super().__init__()
        self.judge = judge
        names = judge.vocabulary["subject"]
        self.members = [index for index, name in enumerate(names) if shows(name, concepts)]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to probabilities ``[B]``."""
        return self.judge(images)["subject"][:, self.members].sum(-1)


def load_detector(path: str, concepts: Sequence[Concept], **options: Any) -> Detector:
    """Call the class or function with the dotted name ``path`` and return the detector of ``concepts``.

    ``options`` are its further arguments, from ``model.judge_options``. For ``InputError`` see
    :func:`~.factories.made_by`; the message names ``model.judge``.
    """
    return made_by("model.judge", path, Detector, concepts, **options)  # type: ignore[type-abstract]
