"""What training and evaluation share: the model, the concepts, prompt sets and judges of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from trce_lightning.adapters import Adapter, load_adapter
from trce_lightning.adapters.cut import warn_of_cut
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import OWN_SETS, EvalConfig, ModelConfig, TrainConfig
from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.package import check_embedded, load_embedded_clip, load_judge, weights_folder
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scorer import Sampling, Scorer
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.runs import cache_folder
from trce_lightning.jobs.trainers import AUTOCAST, choose_precision
from trce_lightning.metrics.collateral import check_labels
from trce_lightning.metrics.detectors import (
    ClipJudge,
    ClipJudgeDetector,
    ClipZeroShotDetector,
    Detector,
    EmbeddedJudgeDetector,
    load_detector,
)
from trce_lightning.metrics.fidelity import (
    JudgeFeatures,
    inception_fid,
    judge_fid,
    load_clip,
    load_real_statistics,
)
from trce_lightning.metrics.real_images import load_real
from trce_lightning.metrics.scores import Evaluator
from trce_lightning.prompts.keep import class_names, keep_prompts
from trce_lightning.prompts.own import Split, concept_prompt_sets, embedded_keep_captions
from trce_lightning.prompts.published import load_file, prompt_files
from trce_lightning.prompts.records import PromptSet, benign_subjects, label_groups
from trce_lightning.runtime.network import check_hub

log = logging.getLogger(__name__)
KEEP_LIMIT = 2000
"""Prompts to keep, at most."""


class Session:
    """Opens what a configuration names, lazily; a model in memory may take the configured one's place."""

    def __init__(
        self,
        config: TrainConfig | EvalConfig,
        concepts: Sequence[Concept],
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.concepts = config, list(concepts)
        if adapter is not None:
            self.adapter = self._fitting(adapter)

    @property
    def embedded(self) -> bool:
        """Whether the embedded judge decides."""
        return self.config.model.judge == "embedded"

    @cached_property
    def adapter(self) -> Adapter:
        """The model, on the CPU until a trainer moves it."""
        model, source = self.config.model, source_of(self.config.model)
        if not Path(source).exists():
            check_hub()
        adapter = load_adapter(
            source,
            dtype=getattr(torch, model.dtype),
            revision=model.revision,
            resolution=model.resolution,
            config=model.config or model.hub_id,
            channels_last=model.channels_last,
        )
        adapter.name = base_name(model)
        return self._fitting(adapter)

    def _fitting(self, adapter: Adapter) -> Adapter:
        """The embedded model's judge and captions fit no other."""
        if "embedded" in (self.config.model.judge, self.config.model.keep.captions):
            check_embedded(adapter.denoiser)
        return adapter

    def keep_prompts(self) -> list[str]:
        """Prompts to keep: a caption file, the embedded model's captions, or class names."""
        assert isinstance(self.config, TrainConfig)
        path = self.config.textual.keep_prompts or self.config.model.keep.captions
        if path == "embedded":
            return embedded_keep_captions(self.concepts, KEEP_LIMIT, self.config.seed)
        return keep_prompts(self.concepts, path=path, limit=KEEP_LIMIT)

    def sets(self, split: Split, size: int) -> list[PromptSet]:
        """The concept's own prompt sets, and the prompt files of an evaluation.

        ``InputError`` when two have one name.
        """
        make = partial(concept_prompt_sets, self.concepts, embedded=self.embedded, size=size, split=split)
        if not isinstance(self.config, EvalConfig):
            return make()
        sets = make(names=self.config.sets)
        for name, file in prompt_files(self.config.prompts, self.config.published):
            if name in OWN_SETS:
                raise InputError(f"option 'prompts': {name!r} is the concept's own set, rename the file")
            sets.append(load_file(name, file))
        return sets

    def sampling(self) -> Sampling:
        """How images are made for scoring."""
        model, trainer = self.config.model, self.config.trainer
        dtype = AUTOCAST[choose_precision(trainer.precision, trainer.accelerator)]
        return Sampling(
            model.guidance_scale,
            model.num_inference_steps,
            self.config.metrics.batch_size,
            dtype,
            Variation(scheduler=model.sampler, timestep_spacing=model.timestep_spacing),
        )

    def scorer(self, split: Split, size: int) -> Scorer:
        """Scores this session's model."""
        sets = self.sets(split, size)
        for prompts in sets:
            warn_of_cut(self.adapter, prompts.texts, prompts.name)
        sets = [prompts.sampled(self.config.metrics.samples_per_prompt) for prompts in sets]
        groups = {}
        if self.embedded:
            check_labels(sets, Judge.vocabulary["subject"])
            groups = label_groups(self.concepts)
        elif self.config.model.clip is not None:
            check_labels(sets, self._nameable())
        return Scorer(self.adapter, sets, self.sampling(), self.evaluator_factory(), groups)

    def evaluator_factory(self) -> Callable[[Sequence[str]], Evaluator]:
        """Makes an evaluator with the judge that ``model.judge`` names."""
        detector = self.detector()
        assert detector is not None, "validation refuses to score without"
        if not isinstance(detector, EmbeddedJudgeDetector):
            return partial(self._open_evaluator, detector)
        folder = weights_folder()
        judge, clip = detector.judge, load_embedded_clip(folder)

        def make(names: Sequence[str]) -> Evaluator:
            fid = judge_fid(judge)
            load_real_statistics(fid, folder / "real_statistics.safetensors")
            return Evaluator(
                detector,
                names,
                judge=judge,
                fid=fid,
                clip=clip,
            )

        return make

    def _open_evaluator(self, detector: Detector, names: Sequence[str]) -> Evaluator:
        """Of a model that draws anything: FID and CLIP-S where their weights are given."""
        model, fid = self.config.model, None
        if model.real_images is not None:
            if model.inception is None:
                raise InputError(
                    "model.real_images: expected model.inception, FID's weights, beside it, got none"
                )
            fid = inception_fid(Path(model.inception))
            cache = cache_folder(self.config) / "real"
            load_real(fid, Path(model.real_images), cache, self.adapter.device)
        judge = self._clip_judge
        return Evaluator(detector, names, judge=judge, fid=fid, clip=None if judge is None else judge.clip)

    @cached_property
    def _clip_judge(self) -> ClipJudge | None:
        source = self.config.model.clip
        return None if source is None else ClipJudge(load_clip(source), self._nameable())

    def _nameable(self) -> list[str]:
        """What zero-shot CLIP may answer: benign class names, the concepts' neighbours and their terms."""
        names = [name for concept in self.concepts for name in (*concept.neighbours, *concept.terms)]
        return list(dict.fromkeys([*class_names(), *names]))

    def features(self) -> nn.Module | None:
        """FID's feature network, None where there is none."""
        if self.embedded:
            return JudgeFeatures(load_judge(weights_folder()))
        path = self.config.model.inception
        return None if path is None else inception_fid(Path(path)).inception

    def detector(self) -> Detector | None:
        """What ``model.judge`` names, None where it names nothing."""
        path, options = self.config.model.judge, self.config.model.judge_options
        if self.embedded:
            return EmbeddedJudgeDetector(load_judge(weights_folder()), self.concepts)
        if path == "clip":
            assert self._clip_judge is not None, "validation refuses this judge without CLIP"
            return ClipJudgeDetector(self._clip_judge, self.concepts)
        return None if path is None else load_detector(path, self.concepts, **options)

    def second_detector(self) -> Detector | None:
        """Zero-shot CLIP on the concepts' names and terms against benign subjects: tuned on nothing."""
        if not self.embedded:
            return None
        positive = [text for concept in self.concepts for text in (concept.name, *concept.terms)]
        negative = [f"a picture of {name}" for name in benign_subjects(self.concepts)]
        return ClipZeroShotDetector(load_embedded_clip(weights_folder()), positive, negative)


def source_of(model: ModelConfig) -> str | Path:
    """Where the pipeline lies: ``path``, else ``hub_id``, else the embedded model."""
    if model.path is not None:
        return Path(model.path)
    return model.hub_id or weights_folder()


def base_name(model: ModelConfig) -> str:
    """The model in records: ``path``, else ``hub_id``, else its name."""
    return model.path or model.hub_id or model.name


def concepts_of(config: TrainConfig | EvalConfig) -> list[Concept]:
    """The configured concepts, validated."""
    return [Concept.from_mapping(asdict(concept), source="options") for concept in config.concept.values()]
