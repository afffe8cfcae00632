"""Define a model's domain: which pictures it generates, prompts that ask for them, and who judges them.

To use a model of one kind of picture, such as faces, write a :class:`Domain` and name it in ``model.domain``.
:class:`OpenDomain` is the default, for a model that generates any picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from trce_lightning.concepts import Concept
from trce_lightning.config.schema import ModelConfig
from trce_lightning.errors import InputError
from trce_lightning.metrics.detectors import ClipJudge, ClipJudgeDetector, Detector
from trce_lightning.metrics.factories import made_by
from trce_lightning.metrics.fidelity import Clip, inception_fid, load_clip
from trce_lightning.metrics.real_images import load_real
from trce_lightning.metrics.scores import ImageJudge
from trce_lightning.prompts.keep import class_names, keep_prompts, scene_templates
from trce_lightning.prompts.own import Split, concept_prompt_sets, open_streams
from trce_lightning.prompts.records import PromptSet


@runtime_checkable
class Domain(Protocol):
    """The interface to what a run asks about the pictures of its model.

    ``model.domain`` names a class. It is called with the model's options and the concepts. It may derive from
    :class:`OpenDomain` and change what differs. Each part is loaded when it is first asked for.
    """

    @property
    def source(self) -> Path | None:
        """Return the folder of the model if neither ``model.path`` nor ``model.hub_id`` names one."""

    def check(self, denoiser: ModelMixin) -> None:
        """Raise ``InputError`` if the model generates other pictures than this domain's."""

    def prompt_sets(self, size: int, split: Split, names: Sequence[str]) -> list[PromptSet]:
        """Return the concepts' own prompt sets of these names. A set without prompts is left out."""

    def keep_prompts(self, limit: int, seed: int) -> list[str]:
        """Return up to ``limit`` prompts to keep in stage 1. They are used if no caption file is given."""

    def scene_templates(self, count: int, seed: int) -> list[str]:
        """Return up to ``count`` sentences with ``{}`` for a concept's name beside another thing."""

    def concept_names(self) -> list[str]:
        """Return more words by which prompts name the concepts, besides the concepts' own."""

    def never_learnt(self) -> Mapping[str, Tensor] | None:
        """Return the weights of a denoiser that was trained without the concepts, if there is one."""

    def labels(self) -> Sequence[str] | None:
        """Return all labels that a prompt may have, or None if no judge names what an image shows."""

    def label_groups(self) -> Mapping[str, frozenset[str]]:
        """Return groups of labels by name. Their accuracy is reported separately."""

    def detector(self) -> Detector | None:
        """Return the detector of the concepts, if there is one.

        It is used if ``model.judge`` names no other.
        """

    def second_detector(self) -> Detector | None:
        """Return a detector that nothing was tuned on, if any, for ``zero_shot_clip`` of ``metrics.json``."""

    def judge(self) -> ImageJudge | None:
        """Return the judge that names what an image shows, if there is one."""

    def clip(self) -> Clip | None:
        """Return the CLIP of the CLIP score, if there is one."""

    def features(self) -> nn.Module | None:
        """Return FID's feature network, if there is one."""

    def fid(self, cache: Path, device: torch.device) -> FrechetInceptionDistance | None:
        """Return FID with the statistics of the real images, if there are real images.

        If the real images are a folder, the statistics are computed on ``device`` once and kept in ``cache``.
        """


class OpenDomain:
    """The domain of a model that generates any picture.

    The model's options ``judge``, ``clip``, ``inception`` and ``real_images`` choose what judges it.
    """

    source: Path | None = None

    def __init__(self, model: ModelConfig, concepts: Sequence[Concept]) -> None:
        self.model, self.concepts = model, list(concepts)

    def check(self, denoiser: ModelMixin) -> None:
        """Accept every denoiser."""

    def prompt_sets(self, size: int, split: Split, names: Sequence[str]) -> list[PromptSet]:
        """Return prompts of the concepts' terms and neighbours, and of class names of ImageNet and COCO."""
        return concept_prompt_sets(self.concepts, open_streams, size=size, split=split, names=names)

    def keep_prompts(self, limit: int, seed: int) -> list[str]:
        """Return prompts of class names."""
        return keep_prompts(self.concepts, limit=limit)

    def scene_templates(self, count: int, seed: int) -> list[str]:
        """Return sentences of class names, about 1,000 at most. The seed has no effect."""
        return scene_templates(self.concepts, limit=count)

    def concept_names(self) -> list[str]:
        """Return no more words, because these prompts use the concepts' own."""
        return []

    def never_learnt(self) -> Mapping[str, Tensor] | None:
        """Return None: nobody has trained such a model."""
        return None

    def labels(self) -> Sequence[str] | None:
        """Return the answers of zero-shot CLIP: class names, the concepts' neighbours and terms."""
        if self.model.clip is None:
            return None
        names = [name for concept in self.concepts for name in (*concept.neighbours, *concept.terms)]
        return list(dict.fromkeys([*class_names(), *names]))

    def label_groups(self) -> Mapping[str, frozenset[str]]:
        """Return no groups."""
        return {}

    def detector(self) -> Detector | None:
        """Return zero-shot CLIP if ``model.judge=clip``, otherwise None."""
        judge = self.judge() if self.model.judge == "clip" else None
        return None if judge is None else ClipJudgeDetector(judge, self.concepts)

    def second_detector(self) -> Detector | None:
        """Return zero-shot CLIP where a detector of the user's is the first, else None."""
        judge = self.judge() if self.model.judge not in (None, "clip") else None
        return None if judge is None else ClipJudgeDetector(judge, self.concepts)

    def judge(self) -> ClipJudge | None:
        """Return zero-shot CLIP if ``model.clip`` names a CLIP."""
        return self._judge

    @cached_property
    def _judge(self) -> ClipJudge | None:
        names, source = self.labels(), self.model.clip
        return None if names is None or source is None else ClipJudge(load_clip(source), names)

    def clip(self) -> Clip | None:
        """Return the CLIP that ``model.clip`` names."""
        judge = self.judge()
        return None if judge is None else judge.clip

    def features(self) -> nn.Module | None:
        """Return Inception if ``model.inception`` names its weights."""
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
    """Return the domain that ``model.domain`` names, or :class:`OpenDomain` if it names none.

    For ``InputError`` see :func:`~trce_lightning.metrics.factories.made_by`.
    """
    if model.domain is None:
        return OpenDomain(model, concepts)
    return made_by("model.domain", model.domain, Domain, model, concepts)  # type: ignore[type-abstract]
