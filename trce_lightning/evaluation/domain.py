"""Knowledge of the pictures that a model generates: prompts that ask for them, and who judges them.

:class:`Domain` is the seam for a model that draws one kind of picture, such as faces: a configuration names
a class of it in ``model.domain``. :class:`OpenDomain` is the default, for a model that draws anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from diffusers import ModelMixin
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from trce_lightning.concepts import Concept
from trce_lightning.config.schema import ModelConfig
from trce_lightning.errors import InputError
from trce_lightning.metrics.detectors import ClipJudge, ClipJudgeDetector, Detector
from trce_lightning.metrics.factories import made_by
from trce_lightning.metrics.fidelity import Clip, inception_fid, load_clip
from trce_lightning.metrics.real_images import load_real
from trce_lightning.metrics.scores import ImageJudge
from trce_lightning.prompts.keep import class_names, keep_prompts
from trce_lightning.prompts.own import Split, concept_prompt_sets, open_streams
from trce_lightning.prompts.records import PromptSet


@runtime_checkable
class Domain(Protocol):
    """All that a run asks about the pictures of its model.

    The class that ``model.domain`` names is called with the model's options and the concepts. It may derive
    from :class:`OpenDomain` and change what differs. Nothing is loaded before it is asked for.
    """

    @property
    def source(self) -> Path | None:
        """The folder of the model where neither ``model.path`` nor ``model.hub_id`` names one."""

    def check(self, denoiser: ModelMixin) -> None:
        """Raise ``InputError`` if the model draws other pictures than these."""

    def prompt_sets(self, size: int, split: Split, names: Sequence[str]) -> list[PromptSet]:
        """Return the concepts' own prompt sets of these names, those without prompts left out."""

    def keep_prompts(self, limit: int, seed: int) -> list[str]:
        """Return up to ``limit`` prompts that stage 1 keeps where no caption file is given."""

    def concept_names(self) -> list[str]:
        """Return further words by which prompts name the concepts, beside the concepts' own."""

    def labels(self) -> Sequence[str] | None:
        """Return what a prompt's label may be, or None if nothing names what an image shows."""

    def label_groups(self) -> Mapping[str, frozenset[str]]:
        """Return groups of labels whose accuracy is reported separately, by name."""

    def detector(self) -> Detector | None:
        """Return the detector of the concepts where ``model.judge`` names none of the user's, if any."""

    def second_detector(self) -> Detector | None:
        """Return a detector that nothing was tuned on, if any: ``zero_shot_clip`` of ``metrics.json``."""

    def judge(self) -> ImageJudge | None:
        """Return what names what an image shows, if anything does."""

    def clip(self) -> Clip | None:
        """Return the CLIP of the CLIP score, if any."""

    def features(self) -> nn.Module | None:
        """Return FID's feature network, if any."""

    def fid(self, cache: Path, device: torch.device) -> FrechetInceptionDistance | None:
        """Return FID with the statistics of the real images in it, if there are any.

        Statistics of a folder of images are computed on ``device`` once and kept in ``cache``.
        """


class OpenDomain:
    """The domain of a model that draws anything.

    The options ``judge``, ``clip``, ``inception`` and ``real_images`` of the model say what judges it.
    """

    source: Path | None = None

    def __init__(self, model: ModelConfig, concepts: Sequence[Concept]) -> None:
        self.model, self.concepts = model, list(concepts)

    def check(self, denoiser: ModelMixin) -> None:
        """Accept every denoiser."""

    def prompt_sets(self, size: int, split: Split, names: Sequence[str]) -> list[PromptSet]:
        """Return prompts of terms, related phrases, neighbours, and class names of ImageNet and COCO."""
        return concept_prompt_sets(self.concepts, open_streams, size=size, split=split, names=names)

    def keep_prompts(self, limit: int, seed: int) -> list[str]:
        """Return prompts of class names."""
        return keep_prompts(self.concepts, limit=limit)

    def concept_names(self) -> list[str]:
        """Return no further words: these prompts use the concepts' own."""
        return []

    def labels(self) -> Sequence[str] | None:
        """Return what zero-shot CLIP may answer: class names, the concepts' neighbours and their terms."""
        if self.model.clip is None:
            return None
        names = [name for concept in self.concepts for name in (*concept.neighbours, *concept.terms)]
        return list(dict.fromkeys([*class_names(), *names]))

    def label_groups(self) -> Mapping[str, frozenset[str]]:
        """Return no groups."""
        return {}

    def detector(self) -> Detector | None:
        """Return zero-shot CLIP for ``model.judge=clip``, else None."""
        judge = self.judge() if self.model.judge == "clip" else None
        return None if judge is None else ClipJudgeDetector(judge, self.concepts)

    def second_detector(self) -> Detector | None:
        """Return None."""
        return None

    def judge(self) -> ClipJudge | None:
        """Return zero-shot CLIP where ``model.clip`` names one."""
        return self._judge

    @cached_property
    def _judge(self) -> ClipJudge | None:
        names, source = self.labels(), self.model.clip
        return None if names is None or source is None else ClipJudge(load_clip(source), names)

    def clip(self) -> Clip | None:
        """Return what ``model.clip`` names."""
        judge = self.judge()
        return None if judge is None else judge.clip

    def features(self) -> nn.Module | None:
        """Return Inception where ``model.inception`` names its weights."""
        path = self.model.inception
        return None if path is None else inception_fid(Path(path)).inception

    def fid(self, cache: Path, device: torch.device) -> FrechetInceptionDistance | None:
        """Return FID against ``model.real_images``. ``InputError`` without Inception's weights."""
        model = self.model
        if model.real_images is None:
            return None
        if model.inception is None:
            raise InputError(
                "model.real_images: expected model.inception, FID's weights, beside it, got none"
            )
        fid = inception_fid(Path(model.inception))
        load_real(fid, Path(model.real_images), cache, device)
        return fid


def domain_of(model: ModelConfig, concepts: Sequence[Concept]) -> Domain:
    """Return what ``model.domain`` names, :class:`OpenDomain` where it names nothing.

    ``InputError`` as :func:`~trce_lightning.metrics.factories.made_by` says.
    """
    if model.domain is None:
        return OpenDomain(model, concepts)
    return made_by("model.domain", model.domain, Domain, model, concepts)  # type: ignore[type-abstract]
