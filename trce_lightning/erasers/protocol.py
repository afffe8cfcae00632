"""The protocol of a method that erases concepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import TextualConfig


@dataclass(frozen=True)
class Cost:
    """The cost of a part of an erasure. A network evaluation is one latent × one prompt, however batched."""

    forward: int = 0
    """Network evaluations without gradients."""
    backward: int = 0
    """Network evaluations with a backward pass. They are not among ``forward``."""


@dataclass(frozen=True)
class Ahead:
    """The work that lies ahead of an erasure, exactly."""

    parts: dict[str, Cost] = field(default_factory=dict)
    """The network evaluations by part, without those whose results are cached."""
    trainable: int = 0
    """Numbers that the method may change."""
    stored_bytes: int = 0
    """The bytes that the method caches on disk."""
    training_bytes: int = 0
    """The bytes of gradients, optimizer states and averages while weights train."""


@dataclass(frozen=True)
class Erased:
    """The result of an erasure."""

    changed: dict[str, dict[str, Tensor]]
    """Changed tensors by the pipeline's component, such as "unet" or "text_encoder", and by name."""
    facts: dict[str, float] = field(default_factory=dict)
    """Figures of the method's own, for ``metrics.json``."""
    files: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Further tensors that the run stores, such as a LoRA, by the file's name without ``.safetensors``."""


@dataclass(frozen=True)
class Job:
    """All that the harness gives a method. The model is the original until the method changes it."""

    adapter: Adapter
    concepts: Sequence[Concept]
    """The concepts with the sentences that ``scene_templates`` adds."""
    alone: Sequence[Concept]
    """The concepts without these sentences."""
    trainer: pl.Trainer
    """A Trainer that predicts."""
    cache: Path
    """The folder of caches, which runs share."""
    generator: str
    """A text that identifies the original model and the precision."""
    seed: int
    keep_prompts: Callable[[], list[str]]
    """A function that returns the prompts to keep."""
    fit: Callable[[pl.LightningModule, pl.LightningDataModule, str], None]
    """A function that fits a module, under the name of a part. It continues an interrupted fit of that name.

    The module has a method ``changed_tensors``, as :class:`~trce_lightning.callbacks.RanksAgree` wants.
    """
    part: Callable[[str], AbstractContextManager[None]]
    """A context that counts a part's seconds and network evaluations."""
    textual: TextualConfig = field(default_factory=TextualConfig)
    """The options of TRCE's stage 1, for methods that build on it."""


@runtime_checkable
class Eraser(Protocol):
    """A method, made with its own options."""

    name: str
    title: str
    """The method's name with its source, for model cards."""

    @property
    def reads_seed(self) -> bool:
        """Return whether the result depends on ``Job.seed``, for the same prompts to keep and scenes.

        If it doesn't, runs with other seeds would be copies of one run.
        """

    def ahead(self, job: Job) -> Ahead:
        """Return the work ahead, without changing anything.

        If the method can't erase these concepts from this model, raise ``InputError``.
        """

    def erase(self, job: Job) -> Erased:
        """Erase all concepts at once from the adapter's model, in place, and return what has changed.

        Every rank calls it, and the result is the same on every rank.
        """


def denoiser_name(adapter: Adapter) -> str:
    """Return the denoiser's name in the pipeline."""
    return next(name for name, network in adapter.networks().items() if network is adapter.denoiser)
