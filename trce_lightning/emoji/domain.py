"""Define the embedded model's domain, which ``configs/model/emoji.yaml`` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from trce_lightning.concepts import Concept
from trce_lightning.config.schema import ModelConfig
from trce_lightning.emoji.groups import benign_subjects, concept_styles, concept_subjects, label_groups
from trce_lightning.emoji.judge import Judge, JudgeDetector, JudgeFeatures, judge_fid
from trce_lightning.emoji.package import load_clip_pair, load_judge, load_never_learnt, weights_folder
from trce_lightning.emoji.prompts import keep_captions, prompt_sets, scene_templates
from trce_lightning.emoji.scenes import SceneJudge, load_scene_judge
from trce_lightning.emoji.siblings import Family, build, opened_folder, part_file, siblings_folder
from trce_lightning.emoji.subjects import SUBJECTS, subject_index
from trce_lightning.errors import InputError
from trce_lightning.metrics.detectors import ClipZeroShotDetector, Detector
from trce_lightning.metrics.fidelity import Clip, load_real_statistics
from trce_lightning.prompts.own import Split
from trce_lightning.prompts.records import PromptSet

SIBLING_SHAPES: dict[Family, tuple[str, ...]] = {
    "xl": ("sample_size", "cross_attention_dim"),
    "sd3": ("sample_size", "joint_attention_dim"),
    "flux": ("in_channels", "joint_attention_dim"),
}
"""The entries of a denoiser's configuration that tell a sibling from other networks of its family."""
UNREAD = ("clip", "inception", "real_images")
"""The model options that have no effect here, because this domain has its own."""


class EmojiDomain:
    """The domain of the embedded model: its subjects and prompts, and the judge and CLIP pair of its weights.

    Raises:
        InputError: an option of the model is set that would have no effect.
    """

    source = weights_folder()

    def __init__(self, model: ModelConfig, concepts: Sequence[Concept]) -> None:
        self.concepts = list(concepts)
        for name in UNREAD:
            if value := getattr(model, name):
                raise InputError(
                    f"option 'model.{name}': expected none with model.domain={model.domain}, which has its "
                    f"own, got {value!r}"
                )
        if model.judge == "clip":
            raise InputError(
                f"option 'model.judge': expected null for the judge of model.domain={model.domain}, or the "
                "dotted name of a detector, got 'clip'"
            )

    def check(self, denoiser: ModelMixin) -> None:
        """Raise ``InputError`` unless the denoiser has the shape of the embedded one."""
        expected = UNet2DConditionModel.load_config(self.source / "unet")
        names = ("sample_size", "cross_attention_dim")
        if any(denoiser.config.get(name) != expected[name] for name in names):
            got = ", ".join(f"{name} {denoiser.config.get(name)}" for name in names)
            raise InputError(
                f"model=emoji: expected the embedded model or an edit of it, got a network of {got}; "
                "name its own family, such as model=sd15"
            )

    def prompt_sets(self, size: int, split: Split, names: Sequence[str]) -> list[PromptSet]:
        """Return prompts of the subjects and styles that show the concepts, and prompts of other subjects."""
        return prompt_sets(self.concepts, size=size, split=split, names=names)

    def keep_prompts(self, limit: int, seed: int) -> list[str]:
        """Return captions of the subjects to keep."""
        return keep_captions(self.concepts, limit, seed)

    def scene_templates(self, count: int, seed: int) -> list[str]:
        """Return no sentences: the model draws one subject."""
        if count:
            raise InputError(
                "option 'scene_templates': expected 0, since the embedded model draws one subject, got "
                f"{count}"
            )
        return []

    def concept_names(self) -> list[str]:
        """Return the names of the subjects that show the concepts."""
        return [name for concept in self.concepts for name in concept_subjects(concept)]

    def never_learnt(self) -> dict[str, Tensor] | None:
        """Return the shipped denoiser that never learnt the concepts' subjects, if there is one."""
        shown = {subject_index(name) for name in self.concept_names()}
        categories = {SUBJECTS[index].category for index in shown}
        styled = any(concept_styles(concept) for concept in self.concepts)
        return None if styled or len(categories) != 1 else load_never_learnt(categories.pop())

    def labels(self) -> Sequence[str]:
        """Return the names of all subjects."""
        return Judge.vocabulary["subject"]

    def label_groups(self) -> Mapping[str, frozenset[str]]:
        """Return groups of benign subjects by nearness to the concepts, and those that no prompt keeps."""
        return label_groups(self.concepts)

    def detector(self) -> Detector:
        """Return a detector of the concepts that uses the judge."""
        return JudgeDetector(self._judge, self.concepts)

    def second_detector(self) -> Detector:
        """Return zero-shot CLIP that compares the concepts' names and terms with benign subjects."""
        positive = [text for concept in self.concepts for text in (concept.name, *concept.terms)]
        negative = [f"a picture of {name}" for name in benign_subjects(self.concepts)]
        return ClipZeroShotDetector(load_clip_pair(weights_folder()), positive, negative)

    def judge(self) -> Judge:
        """Return the shipped judge."""
        return self._judge

    @cached_property
    def _judge(self) -> Judge:
        return load_judge(weights_folder())

    def clip(self) -> Clip:
        """Return the model's own CLIP pair."""
        return self._clip

    @cached_property
    def _clip(self) -> Clip:
        return load_clip_pair(weights_folder())

    def features(self) -> nn.Module:
        """Return the judge's features."""
        return JudgeFeatures(self._judge)

    def fid(self, cache: Path, device: torch.device) -> FrechetInceptionDistance:
        """Return FID on the judge's features, with the shipped statistics of real images."""
        fid = judge_fid(self._judge)
        load_real_statistics(fid, weights_folder() / "real_statistics.safetensors")
        return fid


class SiblingDomain(EmojiDomain):
    """The domain of a sibling of the embedded model. Its judge also sees scenes of two subjects."""

    family: ClassVar[Family]

    @property
    def source(self) -> Path:  # type: ignore[override]
        """Return the folder of the sibling's pipeline."""
        return opened_folder(self.family)

    def check(self, denoiser: ModelMixin) -> None:
        """Raise ``InputError`` unless the denoiser has the shape of the sibling's."""
        expected: Any = build(self.family).config
        names = SIBLING_SHAPES[self.family]
        if any(denoiser.config.get(name) != expected[name] for name in names):
            got = ", ".join(f"{name} {denoiser.config.get(name)}" for name in names)
            raise InputError(
                f"model=emoji_{self.family}: expected that sibling or an edit of it, got a network of {got}"
            )

    def keep_prompts(self, limit: int, seed: int) -> list[str]:
        """Return captions of the subjects to keep, half of them of scenes of two."""
        return keep_captions(self.concepts, limit, seed, scenes=True)

    def scene_templates(self, count: int, seed: int) -> list[str]:
        """Return sentences that name a kept subject beside the concept."""
        return scene_templates(self.concepts, count, seed)

    def never_learnt(self) -> dict[str, Tensor] | None:
        """Return None: no sibling was trained without a concept."""
        return None

    def judge(self) -> SceneJudge:  # type: ignore[override]
        """Return the shipped judge, which looks at each half of a scene."""
        return self._scene_judge

    @cached_property
    def _scene_judge(self) -> SceneJudge:
        return load_scene_judge(self._judge, part_file(siblings_folder(), "scene"))

    def detector(self) -> Detector:
        """Return a detector of the concepts in either half of a scene."""
        return JudgeDetector(self._scene_judge, self.concepts)


class EmojiXLDomain(SiblingDomain):
    """The domain of ``model=emoji_xl``."""

    family = "xl"


class EmojiSD3Domain(SiblingDomain):
    """The domain of ``model=emoji_sd3``."""

    family = "sd3"


class EmojiFluxDomain(SiblingDomain):
    """The domain of ``model=emoji_flux``."""

    family = "flux"
