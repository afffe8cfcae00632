"""Open the model, the domain, the concepts and the judges of a configuration, for training and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from trce_lightning.adapters import Adapter, load_adapter
from trce_lightning.adapters.cut import warn_of_cut
from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import without_article
from trce_lightning.config.checks import check_values
from trce_lightning.config.schema import CONCEPT_SETS, OWN_SETS, EvalConfig, ModelConfig, TrainConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.domain import Domain, domain_of
from trce_lightning.evaluation.scorer import Sampling, Scorer
from trce_lightning.generation.guidance import Guidance
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.runs import cache_folder
from trce_lightning.jobs.trainers import AUTOCAST, choose_precision
from trce_lightning.metrics.collateral import check_labels
from trce_lightning.metrics.detectors import Detector, load_detector
from trce_lightning.metrics.factories import made_by
from trce_lightning.metrics.scores import Evaluator
from trce_lightning.prompts.keep import keep_prompts
from trce_lightning.prompts.own import Split
from trce_lightning.prompts.published import load_file, prompt_files
from trce_lightning.prompts.records import PromptSet
from trce_lightning.runtime.network import check_hub

log = logging.getLogger(__name__)
KEEP_LIMIT = 2000
"""The largest number of prompts to keep."""


class Session:
    """The parts that a configuration names. Each is opened when it is first asked for.

    An ``adapter`` that is already in memory replaces the configured model.
    """

    def __init__(
        self,
        config: TrainConfig | EvalConfig,
        concepts: Sequence[Concept],
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.concepts = config, list(concepts)
        if adapter is not None:
            self.adapter = self._fitting(adapter)

    @cached_property
    def domain(self) -> Domain:
        """The domain of the model: its prompts and its judges."""
        return domain_of(self.config.model, self.concepts)

    @cached_property
    def adapter(self) -> Adapter:
        """The model. It is on the CPU until a trainer moves it."""
        model, source = self.config.model, self.source()
        if not Path(source).exists():
            check_hub()
        adapter = load_adapter(
            source,
            dtype=getattr(torch, model.dtype),
            revision=model.revision,
            resolution=model.resolution,
            config=model.config or model.hub_id,
            channels_last=model.channels_last,
            max_sequence_length=model.max_sequence_length,
            guidance_scale=model.guidance_scale,
        )
        adapter.name = base_name(model)
        return self._fitting(adapter)

    def source(self) -> str | Path:
        """Return the pipeline's source: ``path``, else ``hub_id``, else the domain's own."""
        model = self.config.model
        if model.path is not None:
            return Path(model.path)
        source = model.hub_id or self.domain.source
        if source is None:
            raise InputError(
                f"model {model.name!r} has neither model.path nor model.hub_id, and model.domain="
                f"{model.domain} ships no model"
            )
        return source

    def _fitting(self, adapter: Adapter) -> Adapter:
        """Return the adapter. ``InputError`` if it generates other pictures than those of the domain."""
        self.domain.check(adapter.denoiser)
        return adapter

    def keep_prompts(self) -> list[str]:
        """Return the prompts to keep: those of the caption file if one is given, otherwise the domain's."""
        assert isinstance(self.config, TrainConfig)
        path = self.config.textual.keep_prompts
        if path is not None:
            return keep_prompts(self.concepts, path=path, limit=KEEP_LIMIT)
        return self.domain.keep_prompts(KEEP_LIMIT, self.config.seed)

    @cached_property
    def trained_concepts(self) -> list[Concept]:
        """The concepts as they are erased: with the sentences that ``scene_templates`` asks for.

        A style has none, since it fills the whole picture.
        """
        assert isinstance(self.config, TrainConfig)
        wanted = self.config.scene_templates
        scenes = self.domain.scene_templates(wanted, self.config.seed)
        if len(scenes) < wanted:
            log.warning("scene_templates: %d sentences of the %d that were asked for", len(scenes), wanted)
        return [
            concept
            if concept.kind == "style"
            else replace(concept, templates=tuple(dict.fromkeys((*concept.templates, *scenes))))
            for concept in self.concepts
        ]

    def sets(self, split: Split, size: int) -> list[PromptSet]:
        """Return the concepts' own prompt sets, and the prompt files of an evaluation.

        ``InputError`` if two sets have one name.
        """
        if not isinstance(self.config, EvalConfig):
            return self.domain.prompt_sets(size, split, CONCEPT_SETS)
        sets = self.domain.prompt_sets(size, split, self.config.sets)
        for name, file in prompt_files(self.config.prompts, self.config.published):
            if name in OWN_SETS:
                raise InputError(f"option 'prompts': {name!r} is the concept's own set, rename the file")
            sets.append(self._without_scales(load_file(name, file)))
        return sets

    def _without_scales(self, prompts: PromptSet) -> PromptSet:
        """Return the prompts without guidance scales of their own if the model samples without ∅."""
        own = [record for record in prompts.records if record.guidance_scale is not None]
        if self.adapter.guided or not own:
            return prompts
        log.warning(
            "%s: the guidance scales of %d prompts are not used, since %s samples without ∅",
            prompts.name,
            len(own),
            self.adapter.name,
        )
        records = tuple(replace(record, guidance_scale=None) for record in prompts.records)
        return replace(prompts, records=records)

    def sampling(self) -> Sampling:
        """Return how the model generates images for scoring."""
        model, trainer = self.config.model, self.config.trainer
        dtype = AUTOCAST[choose_precision(trainer.precision, trainer.accelerator)]
        return Sampling(
            model.guidance_scale if self.adapter.guided else 1.0,
            model.num_inference_steps,
            self.config.metrics.batch_size,
            dtype,
            Variation(
                scheduler=model.sampler,
                timestep_spacing=model.timestep_spacing,
                guidance=self.guidance(),
            ),
        )

    def guidance(self) -> Guidance | None:
        """Return the rule of guidance that ``guidance`` describes, or None for classifier-free guidance.

        Without a text of its own, the rule leads away from the concepts' terms.
        """
        if not isinstance(self.config, EvalConfig) or "_target_" not in self.config.guidance:
            return None
        options = {key: value for key, value in self.config.guidance.items() if key != "name"}
        terms = [without_article(term) for concept in self.concepts for term in concept.terms]
        options["concept"] = options.get("concept") or ", ".join(terms)
        rule = made_by("guidance", options.pop("_target_"), Guidance, **options)  # type: ignore[type-abstract]
        if is_dataclass(rule):
            check_values(rule, "guidance")
        return rule

    def scorer(self, split: Split, size: int) -> Scorer:
        """Return the scorer of this session's model."""
        sets = self.sets(split, size)
        if not sets:
            raise InputError("option 'sets': expected one set at least, or a file in prompts, got none")
        for prompts in sets:
            warn_of_cut(self.adapter, prompts.texts, prompts.name)
        sets = [prompts.sampled(self.config.metrics.samples_per_prompt) for prompts in sets]
        if (labels := self.domain.labels()) is not None:
            check_labels(sets, labels)
        return Scorer(
            self.adapter,
            sets,
            self.sampling(),
            self.evaluator_factory(),
            self.domain.label_groups(),
            self.domain.concept_names(),
        )

    def evaluator_factory(self) -> Callable[[Sequence[str]], Evaluator]:
        """Return a function that makes an evaluator of prompt sets.

        The evaluator has this session's detector, and its other parts are the domain's. ``InputError`` if
        there is no detector of the concepts.
        """
        detector = self.detector()
        if detector is None:
            raise InputError(
                "option 'model.judge': expected the dotted name of a detector, since model.domain="
                f"{self.config.model.domain} has none, got {self.config.model.judge}"
            )
        domain, cache = self.domain, cache_folder(self.config) / "real"

        def make(names: Sequence[str]) -> Evaluator:
            fid = domain.fid(cache, self.adapter.device)
            return Evaluator(detector, names, judge=domain.judge(), fid=fid, clip=domain.clip())

        return make

    def features(self) -> nn.Module | None:
        """Return FID's feature network, or None if there is none."""
        return self.domain.features()

    def detector(self) -> Detector | None:
        """Return the detector that ``model.judge`` names, otherwise the domain's, if it has one."""
        model = self.config.model
        if model.judge is None or model.judge == "clip":
            return self.domain.detector()
        return load_detector(model.judge, self.concepts, **model.judge_options)

    def second_detector(self) -> Detector | None:
        """Return a detector that nothing was tuned on, if there is one."""
        return self.domain.second_detector()


def base_name(model: ModelConfig) -> str:
    """Return the model's name in records: ``path``, else ``hub_id``, else its name."""
    return model.path or model.hub_id or model.name


def concepts_of(config: TrainConfig | EvalConfig) -> list[Concept]:
    """Return the configured concepts, validated."""
    return [Concept.from_mapping(asdict(concept), source="options") for concept in config.concept.values()]
