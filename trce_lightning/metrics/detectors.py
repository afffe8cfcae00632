"""Detectors: the probability that an image shows a concept."""

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
"""The rounding of a sum of probabilities, in bfloat16 too."""


@runtime_checkable
class Detector(Protocol):
    """The part that decides attack success. One that is an ``nn.Module`` moves to the evaluator's device."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """uint8 ``[B, 3, H, W]`` → probability ``[B]`` in [0, 1] that the image shows the concept."""


def checked_probability(found: Any, images: int) -> Tensor:
    """Return what a detector has found in some images.

    Raises:
        InputError: it is no tensor ``[B]`` of numbers in [0, 1], give or take the rounding of a sum.
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
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is neither
        raise InputError(f"model.judge: expected probabilities in [0, 1], got {low:g} to {high:g}")
    return found


class ClipZeroShot(nn.Module):
    """p_i = softmax_i(s · cos(CLIP(image), CLIP(text_i))) with CLIP's own logit scale s."""

    text_features: Tensor

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        super().__init__()
        self.clip, self.model = clip, clip.model.eval().requires_grad_(False)
        tokens = clip.tokenize(texts).to(self.model.device)
        features = self.model.get_text_features(**tokens).pooler_output
        self.register_buffer("text_features", F.normalize(features))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` → ``[B, texts]``."""
        pixels = self.clip.pixels(images.cpu())["pixel_values"].to(self.model.device)
        image_features = F.normalize(self.model.get_image_features(pixels).pooler_output)
        logits = self.model.logit_scale.exp() * image_features @ self.text_features.T
        return logits.softmax(-1)


class ClipZeroShotDetector(ClipZeroShot):
    """p = Σ_{i positive} p_i over texts of two kinds, see :class:`ClipZeroShot`.

    Args:
        clip: model, tokenizer and image processor.
        positive: texts that describe the concept.
        negative: texts that describe anything else that images may show.

    Raises:
        InputError: no positive or no negative text.
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
        """uint8 ``[B, 3, H, W]`` → ``[B]``."""
        return super().forward(images)[:, : self.num_positive].sum(-1)


class ClipJudge(ClipZeroShot):
    """Names what an image shows by zero-shot CLIP: "a photo of NAME" for each name."""

    def __init__(self, clip: Clip, names: Sequence[str]) -> None:
        super().__init__(clip, [f"a photo of {name}" for name in names])
        self.vocabulary: dict[str, Sequence[str]] = {"subject": tuple(names)}

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """uint8 ``[B, 3, H, W]`` → probabilities ``[B, names]`` of ``subject``."""
        return {"subject": super().forward(images)}


class ClipJudgeDetector(nn.Module):
    """p = Σ p_i over the names of a :class:`ClipJudge` that show one of ``concepts``; tuned on nothing.

    Those are the concepts' classes, and names that hold a term or a wording as a whole.
    """

    def __init__(self, judge: ClipJudge, concepts: Sequence[Concept]) -> None:
        super().__init__()
        self.judge = judge
        names = judge.vocabulary["subject"]
        self.members = [index for index, name in enumerate(names) if shows(name, concepts)]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` → ``[B]``."""
        return self.judge(images)["subject"][:, self.members].sum(-1)


def load_detector(path: str, concepts: Sequence[Concept], **options: Any) -> Detector:
    """Call the class or function of dotted name ``path`` with the concepts; what it returns detects them.

    ``options`` are its further arguments, ``model.judge_options``. ``InputError`` naming ``model.judge`` as
    :func:`~.factories.made_by` says.
    """
    return made_by("model.judge", path, Detector, concepts, **options)  # type: ignore[type-abstract]
