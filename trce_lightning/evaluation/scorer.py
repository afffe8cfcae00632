"""Score a model on prompt sets: generate the images, then judge them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.evaluation.scored import Detections, Scores, further_scores
from trce_lightning.generation.image_folder import image_batches
from trce_lightning.generation.loop import (
    generate,
    generate_to,
    guidance_meta,
    network_steps,
    planned_evaluations,
    shard,
)
from trce_lightning.generation.variation import Variation
from trce_lightning.metrics.collateral import Detection
from trce_lightning.metrics.scores import Evaluator
from trce_lightning.prompts.records import PromptRecord, PromptSet, seed_of
from trce_lightning.runtime.ranks import Rank, on_each_rank


@dataclass
class Sampling:
    """The settings with which images are generated for scoring."""

    guidance_scale: float
    num_steps: int
    batch_size: int
    autocast_dtype: torch.dtype | None
    variation: Variation = field(default_factory=Variation)

    def __str__(self) -> str:
        scheduler = self.variation.scheduler
        steps = f"{self.num_steps} steps{f' of {scheduler}' if scheduler else ''}"
        spacing = self.variation.timestep_spacing
        rule = self.variation.guidance
        by = f" by {type(rule).__name__}" if rule is not None else ""
        return f"{steps}{f' ({spacing})' if spacing else ''}, guidance scale {self.guidance_scale:g}{by}"

    def options(self) -> dict[str, Any]:
        """Return keyword arguments of the generation loop."""
        options = {
            "guidance_scale": self.guidance_scale,
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "autocast_dtype": self.autocast_dtype,
        }
        # These options enter the fingerprint of scores. Without a variation, the fingerprint stays as it was.
        return options if self.variation == Variation() else options | {"variation": self.variation}

    def of_set(self, name: str) -> Sampling:
        """Return the same settings for one prompt set, whose pictures the variation may start from."""
        return replace(self, variation=self.variation.of_set(name))


@dataclass
class Scorer:
    """A scorer generates the images of prompt sets and judges them.

    The model may change between calls, and the noise stays the same. Every rank calls the scorer and
    generates its share of the images. The scores are those of all images.
    """

    adapter: Adapter
    sets: Sequence[PromptSet]
    sampling: Sampling
    make_evaluator: Callable[[Sequence[str]], Evaluator]
    label_groups: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The labels whose accuracy is reported separately, by the group's name."""
    concept_names: Sequence[str] = ()
    """Words by which the prompts may name the concepts, besides the concepts' own."""
    draws: bool = True
    """True if the scorer generates images. Otherwise it judges those in the folder."""
    detections: Detections = field(default_factory=dict)
    """The detections of the last call."""
    network_evaluations: int = 0
    """The number of network evaluations in all calls, on this rank."""

    @property
    def planned_evaluations(self) -> int:
        """Return the number of network evaluations of one call, over all ranks."""
        if not self.draws:
            return 0
        num_steps = network_steps(self.adapter, self.sampling.num_steps, self.sampling.variation)
        options = (num_steps, self.sampling.guidance_scale, self.sampling.variation.rule)
        return sum(planned_evaluations(prompts.records, *options) for prompts in self.sets)

    def records(self, name: str) -> tuple[PromptRecord, ...]:
        """Return the prompts of a set."""
        return next(prompts.records for prompts in self.sets if prompts.name == name)

    def fingerprint(self) -> str:
        """Return a hash of what decides a call's images: generator, prompts, noise and sampling."""
        parts = [self.adapter.fingerprint(), repr(self.sampling.options()), *map(repr, self.sets)]
        records = [record for prompts in self.sets for record in prompts.records]
        parts += guidance_meta(records, self.sampling.guidance_scale).values()
        if self.sampling.variation.guidance is not None:
            parts.append(repr(self.sampling.variation.guidance))
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def __call__(
        self, title: str, rank: int = 0, world_size: int = 1, folder: Path | None = None
    ) -> tuple[Scores, dict[str, Tensor]]:
        """Return scores over all ranks. Without ``folder``, also return this rank's images by set.

        With ``folder``, images are files in it, and few are in memory at once. An image that exists is not
        generated again.
        """
        counted = self.adapter.network_evaluations
        evaluator = self.make_evaluator([prompts.name for prompts in self.sets]).to(self.adapter.device)
        images = {}
        for prompts in self.sets:
            share = shard(prompts.records, rank, world_size)
            part = f", 1 of {world_size} processes" if world_size > 1 else ""
            description = f"{title}: {prompts.name} images{part}" if rank == 0 else None
            options = self.sampling.of_set(prompts.name).options() | {"description": description}
            if folder is None:
                images[prompts.name] = generate(self.adapter, share, **options)
                evaluator.update(prompts.name, images[prompts.name], share)
                continue
            if self.draws:
                options |= {"rank": rank, "world_size": world_size}
                generate_to(folder / prompts.name, self.adapter, prompts.records, **options)
            judged = f"{title}: judging {prompts.name}{part}" if rank == 0 else None
            for rows, batch in image_batches(folder / prompts.name, share, judged):
                evaluator.update(prompts.name, batch, rows)
        self.network_evaluations += self.adapter.network_evaluations - counted
        self.detections = {prompts.name: self._detections(evaluator, prompts) for prompts in self.sets}
        scores = evaluator.compute()
        return scores | further_scores(scores, self.sets, self.detections, self.label_groups), images

    @staticmethod
    def _detections(evaluator: Evaluator, prompts: PromptSet) -> dict[str, Detection]:
        seen = evaluator.detections(prompts.name)
        return {record.id: seen[seed_of(record.id, 0)] for record in prompts.records}


def score_on_all_ranks(trainer: pl.Trainer, scorer: Scorer, folder: Path, title: str) -> Scores:
    """Return the scores of all ranks' images, the same on every rank. Images are files in ``folder``.

    ``title`` is shown in the progress bar.
    """

    def score(rank: Rank) -> Scores:
        scorer.adapter.to(rank.device)
        with scorer.adapter.unchanged():
            scores, _ = scorer(title, rank.index, rank.world_size, folder)
        return scores

    return on_each_rank(trainer, score)
