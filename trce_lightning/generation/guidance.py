"""Guidance: rules that combine a model's predictions for several texts into one for a sampling step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError
from trce_lightning.sampling import classifier_free_guidance, is_guided
from trce_lightning.tokens import Text


def phrases_of(concept: str) -> list[str]:
    """Return the phrases of ``guidance.concept``, which has commas between them."""
    return [phrase.strip() for phrase in concept.split(",") if phrase.strip()]


class Inputs(NamedTuple):
    """The evaluations of one step: row i is latent ``latents[i]`` under prompt i of ``text``."""

    latents: Tensor
    """The indices into the batch of images, int64 ``[N]``."""
    text: Text
    """The N prompts."""


class Guide(Protocol):
    """The guidance of one batch of B images. It may keep a state from step to step."""

    def inputs(self, step_index: int) -> Inputs:
        """Return the latents and prompts that the network evaluates at a step."""

    def combine(self, outputs: Tensor, step_index: int) -> Tensor:
        """Return the step's prediction, ``[B, C, H, W]``, from the network's outputs ``[N, C, H, W]``."""


@runtime_checkable
class ChangesNetwork(Protocol):
    """A guide that changes the network while it evaluates a step's inputs."""

    def network_changed(self) -> AbstractContextManager[None]:
        """Change the network within, for the inputs given last."""


@runtime_checkable
class Guidance(Protocol):
    """A rule of guidance. Each rule has its own file in this folder. Its repr identifies stored scores."""

    def evaluations(self, guidance_scale: float) -> int:
        """Return the number of network evaluations of one image at one step."""

    def guide(
        self, adapter: Adapter, prompts: Sequence[str], guidance_scales: Sequence[float], num_steps: int
    ) -> Guide:
        """Return the guide of a batch with one prompt and one scale for each image, in so many steps."""


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance (arXiv 2207.12598): ε = ε_n + w (ε_c − ε_n), with n the negative prompt.

    For w ≤ 1, ε is ε_c alone, as in diffusers.
    """

    negative_prompt: str = ""
    """The text that guidance leads away from. If it is empty, guidance uses the model's ∅."""

    def evaluations(self, guidance_scale: float) -> int:
        """Return 2 if guidance has an effect, else 1."""
        return 1 + is_guided(guidance_scale)

    def guide(
        self, adapter: Adapter, prompts: Sequence[str], guidance_scales: Sequence[float], num_steps: int
    ) -> Guide:
        """Return the guide of a batch. It evaluates both texts in one forward pass, alike in all steps.

        If no scale has an effect, no negative prompt is encoded.
        """
        scales, negative = torch.tensor(guidance_scales), None
        if bool((scales > 1).any()):
            negative = adapter.encode([self.negative_prompt]) if self.negative_prompt else adapter.empty()
        return _ClassifierFreeGuide(negative, adapter.encode(prompts), scales)


def check_scales(adapter: Adapter, guidance_scales: Sequence[float]) -> None:
    """Raise ``InputError`` if a scale would evaluate ∅ with a model that samples without it."""
    if not adapter.guided and (guided := [scale for scale in guidance_scales if is_guided(scale)]):
        raise InputError(
            f"guidance_scale: expected at most 1 with '{adapter.name}', which samples without ∅, got "
            f"{guided[0]:g}; the denoiser reads model.guidance_scale, if it reads a scale"
        )


class _ClassifierFreeGuide:
    def __init__(self, negative: Text | None, conditional: Text, scales: Tensor) -> None:
        self.guided = torch.tensor(
            [i for i, w in enumerate(scales.tolist()) if is_guided(w)], dtype=torch.int64
        )
        self.scales = scales[self.guided]
        latents = torch.cat([self.guided, torch.arange(len(conditional))])
        texts = [] if negative is None else [negative.expand(len(self.guided))]
        self._inputs = Inputs(latents, Text.cat([*texts, conditional]))

    def inputs(self, step_index: int) -> Inputs:
        return self._inputs

    def combine(self, outputs: Tensor, step_index: int) -> Tensor:
        count = len(self.guided)
        negative, conditional = outputs[:count], outputs[count:]
        guided = self.guided.to(outputs.device)
        led = classifier_free_guidance(negative, conditional[guided], self.scales)
        return conditional.index_copy(0, guided, led)
