"""Define conditions of use. Each changes one thing in how a model generates images, on the same noise."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trce_lightning.concepts import Concept
from trce_lightning.config.schema import RobustnessConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scorer import Sampling, Scorer
from trce_lightning.generation.lora import Lora
from trce_lightning.generation.variation import Start
from trce_lightning.prompts.records import PromptSet
from trce_lightning.prompts.variants import lengthened, misspelt, with_safe_counterparts
from trce_lightning.sampling import is_guided

log = logging.getLogger(__name__)
USUAL = "usual"
"""The name of the condition without a change."""
Fits = Callable[[str], bool]


@dataclass(frozen=True)
class Condition:
    """A way to use a model: prompts, and how the model generates their images."""

    name: str
    sets: tuple[PromptSet, ...]
    sampling: Sampling
    is_drawn: bool = False
    """True if the scorer's images already include those of this condition."""

    @property
    def folder(self) -> str:
        """Return the name of the condition's folder.

        If the condition's name has letters that a folder's name can't have, they are replaced and a checksum
        is added.
        """
        plain = re.sub(r"[^\w.=-]+", "_", self.name)
        if plain == self.name:
            return plain
        return f"{plain[:40]}-{hashlib.blake2b(self.name.encode(), digest_size=4).hexdigest()}"

    def scorer(self, scorer: Scorer) -> Scorer:
        """Return a scorer of this condition. If ``is_drawn``, it judges the images that exist."""
        return replace(
            scorer,
            sets=self.sets,
            sampling=self.sampling,
            draws=not self.is_drawn,
            detections={},
            network_evaluations=0,
        )


def asked(options: RobustnessConfig) -> bool:
    """Return True if the options ask for a condition besides the usual one."""
    lists = (options.samplers, options.guidance_scales, options.steps, options.negative_prompts)
    return any((*lists, options.strengths, options.lora, options.long_prompts, options.misspellings))


def conditions(
    options: RobustnessConfig, scorer: Scorer, concepts: Sequence[Concept], pictures: Path
) -> list[Condition]:
    """Return the usual condition and those of the options, on the first prompts of the scorer's sets.

    All take ``num_inference_steps`` of the options, unless they vary the steps. ``InputError`` if the concept
    has none of the sets, or if the model can't be used under a condition.
    """
    sets = tuple(
        prompts.first(options.images_per_set) for prompts in scorer.sets if prompts.name in options.sets
    )
    if not sets:
        raise InputError(f"robustness.sets: expected one of the concept's sets, got {options.sets}")
    fits = scorer.adapter.fits
    usual = replace(scorer.sampling, num_steps=options.num_inference_steps)
    samplings = dict(_samplings(options, usual, concepts, fits, pictures))
    prompts = dict(_prompts(options, sets, concepts, scorer.concept_names, fits))
    return [
        Condition(USUAL, sets, usual, is_drawn=usual == scorer.sampling),
        *(Condition(name, sets, sampling) for name, sampling in samplings.items()),
        *(Condition(name, varied, usual) for name, varied in prompts.items()),
    ]


def _samplings(
    options: RobustnessConfig, usual: Sampling, concepts: Sequence[Concept], fits: Fits, pictures: Path
) -> Iterator[tuple[str, Sampling]]:
    for scheduler in options.samplers:
        # The spacing is that of the usual sampler. Each has its own.
        yield f"sampler={scheduler}", _varied(usual, scheduler=scheduler, timestep_spacing=None)
    for scale in options.guidance_scales:
        yield f"guidance_scale={scale:g}", replace(usual, guidance_scale=scale)
    for steps in options.steps:
        yield f"steps={steps}", replace(usual, num_steps=steps)
    if options.negative_prompts and not is_guided(usual.guidance_scale):
        raise InputError(
            "robustness.negative_prompts: expected model.guidance_scale above 1, since at 1 and below no "
            f"negative prompt has an effect, got {usual.guidance_scale:g}"
        )
    for text in options.negative_prompts:
        negative = with_safe_counterparts(text, concepts, fits)
        if not fits(negative):
            log.warning("negative_prompt=%s is longer than what the model reads; it is cut", text)
        yield f"negative_prompt={text}", _varied(usual, negative_prompt=negative)
    for strength in options.strengths:
        yield f"strength={strength:g}", _varied(usual, start=Start(pictures, strength))
    for path in options.lora:
        lora = Lora(path, options.lora_scale)
        yield f"lora={Path(path).stem}", _varied(usual, lora=lora)


def _varied(usual: Sampling, **changes: Any) -> Sampling:
    return replace(usual, variation=replace(usual.variation, **changes))


def _prompts(
    options: RobustnessConfig,
    sets: Sequence[PromptSet],
    concepts: Sequence[Concept],
    names: Sequence[str],
    fits: Fits,
) -> Iterator[tuple[str, tuple[PromptSet, ...]]]:
    for place in options.long_prompts:
        yield (
            f"long_prompt={place}",
            tuple(
                PromptSet(s.name, tuple(lengthened(r, place, options.filler, fits) for r in s.records))
                for s in sets
            ),
        )
    direct = [record for prompts in sets if prompts.name == "direct" for record in prompts.records]
    for kind in options.misspellings:
        found = tuple(varied for record in direct if (varied := misspelt(record, kind, concepts, names)))
        if len(found) < len(direct):
            log.warning("misspelling=%s: no word to misspell in %d prompts", kind, len(direct) - len(found))
        if found:
            yield f"misspelling={kind}", (PromptSet("direct", found),)
