"""The protocol of an attack: what the attacker has, what it finds, and how that is turned into images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.concepts import Concept
from trce_lightning.generation.variation import Variation
from trce_lightning.metrics.detectors import Detector
from trce_lightning.prompts.records import PromptRecord

UNIVERSAL = "all"
"""The prompt id of a finding that serves all prompts."""
Progress = Callable[[int], None]
"""A function that is told how many network evaluations have been made since it was last called."""


def untold(evaluations: int) -> None:
    """Ignore progress."""


class Door(StrEnum):
    """The access that an attacker needs."""

    WORDS = "words"
    """Prompts alone: whoever uses the model."""
    EMBEDDINGS = "embeddings"
    """Text states or token embeddings: whoever runs it."""
    LATENTS = "latents"
    """The latents that sampling starts from."""
    WEIGHTS = "weights"
    """The weights: whoever may train it."""


class Reads(StrEnum):
    """The part of the attacked model that a search reads.

    Models that are alike in this part have the same findings, so one search serves them.
    """

    MODEL = "model"
    TEXT_ENCODER = "text encoder"
    ORIGINAL = "original"
    """Nothing of the attacked model: the search reads the original alone."""


@dataclass(frozen=True)
class Cost:
    """Exact network evaluations, of one latent × one prompt each, of a search."""

    forward: int = 0
    backward: int = 0
    """Evaluations with a backward pass; they are not among ``forward``."""
    text: int = 0
    """Prompts through the text encoder, forward or backward."""


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    summed = Cost()
    for cost in costs:
        summed = Cost(summed.forward + cost.forward, summed.backward + cost.backward, summed.text + cost.text)
    return summed


@dataclass(frozen=True)
class Target:
    """All that an attacker has."""

    adapter: Adapter
    """The model under attack."""
    original: Adapter
    """The model before erasure: the attacker generates pictures of the concept with it."""
    records: tuple[PromptRecord, ...]
    """The prompts that are attacked. All of them are attacked at once where memory allows."""
    concepts: Sequence[Concept]
    pictures: Tensor
    """Pictures of the concept by the original, uint8 ``[len(records), 3, H, W]``: one for each record."""
    selector: Detector
    """A detector that chooses among candidates. It is never the one that judges."""
    guidance_scale: float
    num_steps: int
    """Sampling steps of the images that are judged."""
    batch_size: int
    autocast_dtype: torch.dtype | None
    seed: int = 0
    variation: Variation = field(default_factory=Variation)
    """The sampler and whatever else makes the images that are judged."""
    benign: tuple[PromptRecord, ...] = ()
    """Prompts without the concept: as many as ``records``, more if an attack :class:`NeedsBenign`."""
    examples: tuple[PromptRecord, ...] = ()
    """Other prompts of the concept, none of which is attacked, for attacks that teach pictures."""
    example_pictures: Tensor | None = None
    """Pictures of the examples by the original, as ``pictures``, if an attack :class:`TeachesExamples`."""

    def options(self) -> dict[str, Any]:
        """Return the settings of the judged images, as keyword arguments of the generation loop."""
        return {
            "guidance_scale": self.guidance_scale,
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "autocast_dtype": self.autocast_dtype,
            "variation": self.variation,
        }


@dataclass(frozen=True)
class Finding:
    """The result of a search for one prompt, or for all prompts under the id :data:`UNIVERSAL`."""

    prompt_id: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings, latents or changed weights, stored as safetensors."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Text, token ids, losses by step: whatever JSON holds."""
    spent: Cost = Cost()
    """Network evaluations of the search for this prompt."""


@dataclass(frozen=True)
class Way:
    """One way to generate the attacked images.

    Each record gives one image, under its own seed. ``sample_of`` names the attacked prompt, so that a prompt
    counts as broken if one of its images shows the concept.
    """

    name: str
    """The share of the budget or the setting, such as "100 steps"; "" is the attack's result."""
    records: tuple[PromptRecord, ...]
    adapter: Adapter
    variation: Variation = field(default_factory=Variation)
    spent: int = 0
    """Network evaluations that the search had made by then, for all of its prompts.

    A search in the text encoder alone counts prompts through it instead.
    """
    entered: Callable[[], AbstractContextManager[None]] | None = None
    """A context to generate in, such as one with other weights; None is no context."""
    on_curve: bool = True
    """The way is a point of the result's success by budget, and no other setting."""
    num_steps: int | None = None
    """Sampling steps of these images; None is the target's. The variation is meant for that many."""
    judged: Callable[[Sequence[PromptRecord], Tensor], Tensor] | None = None
    """The part of these records' images that the judge sees, uint8 ``[B, 3, H, W]`` both; None is all."""
    benign: tuple[PromptRecord, ...] = ()
    """Benign prompts, to generate in the same context. They show how much of the model is left."""


@runtime_checkable
class Attack(Protocol):
    """An attack, made with its own options."""

    name: str
    door: Door
    universal: bool
    """The search has one finding for all prompts, and not one for each."""
    reads: Reads

    def cost(self, target: Target) -> Cost:
        """Return the exact cost of :meth:`search` over all records, before it starts."""

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Search for what makes the model show the concept, for these of the target's records together.

        The result depends on the target, the records and the generator alone. A universal attack returns one
        finding, with the id :data:`UNIVERSAL`, whatever the records.
        """

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return findings of the same form without a search: the control of as many tries."""

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the ways to generate the attacked images, by findings of all prompts, by prompt id.

        Images use fresh seeds: none that the search has seen.
        """


@runtime_checkable
class ChecksTarget(Protocol):
    """An attack that can't be made on every model."""

    def check(self, target: Target) -> None:
        """Raise ``InputError`` if the search can't be made on this model. It costs no network evaluation."""


@runtime_checkable
class SearchesInParts(Protocol):
    """A universal attack whose search falls into parts that know nothing of each other. Ranks share them."""

    def parts(self, target: Target) -> int:
        """Return the number of parts."""

    def cost_of_part(self, target: Target, part: int) -> Cost:
        """Return the exact cost of a part. Their sum is :meth:`Attack.cost`."""

    def search_part(
        self, target: Target, part: int, generator: torch.Generator, progress: Progress
    ) -> Finding:
        """Search for one part of what :meth:`Attack.search` finds. All parts get equal generators."""

    def joined(self, findings: Sequence[Finding]) -> Finding:
        """Return what :meth:`Attack.search` finds, from all parts in their order."""


@runtime_checkable
class KeepsSearches(Protocol):
    """An attack that searches in the text encoder, and then tries the results on each model."""

    def keep_in(self, folder: Path) -> None:
        """Store those searches in a folder, for other models of the same text encoder."""


@runtime_checkable
class LearnsFromPictures(Protocol):
    """An attack that learns from pictures, of which its images may be copies."""

    def learnt_from(self, target: Target) -> Tensor:
        """Return the pictures that the search learns from, uint8 ``[M, 3, H, W]``."""


@runtime_checkable
class NeedsBenign(Protocol):
    """An attack that needs benign prompts."""

    benign_prompts: int
    """The most that it uses."""


@runtime_checkable
class ReadsFile(Protocol):
    """An attack whose findings depend on what is in a file."""

    def file_digest(self) -> str:
        """Return a hash of the file's content."""


@runtime_checkable
class TeachesExamples(Protocol):
    """An attack that teaches pictures of the target's examples."""

    teaches_examples: bool


@runtime_checkable
class ControlTeaches(Protocol):
    """An attack whose control teaches the concept as well, so that it is a setting and no floor."""

    control: str
    """The name of that setting."""
