"""SLD, safe latent diffusion (arXiv 2211.05105): guidance that also leads away from a text of unsafe content.

Each step evaluates ∅, the prompt p and the safety text S, and changes no weights:

    μ = min(s |ε_p − ε_S|, 1) where ε_p − ε_S < λ, else 0
    γ = μ (ε_S − ε_∅) + m ν,   ν ← β ν + (1 − β) γ
    ε = ε_∅ + w (ε_p − ε_∅ − γ)   from step δ n of n on, and ε_∅ + w (ε_p − ε_∅) before

The momentum ν begins at 0 and grows in the steps before too. All is element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import Finite, NonNegative
from trce_lightning.errors import InputError
from trce_lightning.generation.guidance import Inputs, phrases_of
from trce_lightning.losses import per_image
from trce_lightning.sampling import is_guided
from trce_lightning.tokens import Text


@dataclass(frozen=True, kw_only=True)
class SafeLatentDiffusion:
    """The rule with its numbers. Its repr identifies stored scores.

    Args:
        warmup: δ, the share of the steps that are not led away. Published as steps of 50.
        scale: s. 0 is classifier-free guidance.
        threshold: λ.
        momentum_scale: m.
        momentum: β.
        concept: S, phrases with commas between them. As many count as the model reads in one prompt. Runs
            give the terms of the erased concepts if it is empty.
    """

    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.2
    scale: NonNegative = 1000.0
    threshold: Finite = 0.01
    momentum_scale: NonNegative = 0.3
    momentum: Annotated[float, Interval(ge=0, le=1)] = 0.4
    concept: str = ""

    def evaluations(self, guidance_scale: float) -> int:
        """Return 3 if guidance has an effect, else 1."""
        return 3 if is_guided(guidance_scale) else 1

    def guide(
        self, adapter: Adapter, prompts: Sequence[str], guidance_scales: Sequence[float], num_steps: int
    ) -> _Guide:
        """Return the guide of a batch. It evaluates all texts in one forward pass."""
        if not phrases_of(self.concept):
            raise InputError("guidance.concept: expected a text to lead away from, got none")
        if not adapter.guided:
            raise InputError(
                f"guidance: expected cfg with '{adapter.name}', which samples without ∅, got sld, which "
                "leads away from it"
            )
        return _Guide(self, adapter, prompts, torch.tensor(guidance_scales), num_steps)


class _Guide:
    """The guidance of one batch. Images whose scale has no effect follow their prompt alone."""

    def __init__(
        self,
        rule: SafeLatentDiffusion,
        adapter: Adapter,
        prompts: Sequence[str],
        scales: Tensor,
        num_steps: int,
    ) -> None:
        guided = [i for i, w in enumerate(scales.tolist()) if is_guided(w)]
        self.rule, self.guided, self.num_steps = rule, torch.tensor(guided, dtype=torch.int64), num_steps
        self.scales, self.velocity = scales[self.guided], torch.zeros(())
        count = len(guided)
        texts = [
            adapter.empty().expand(count),
            adapter.encode([_fitting(adapter, rule.concept)]).expand(count),
        ]
        text = Text.cat([*texts, adapter.encode(prompts)])
        self._inputs = Inputs(torch.cat([self.guided, self.guided, torch.arange(len(prompts))]), text)

    def inputs(self, step_index: int) -> Inputs:
        return self._inputs

    def combine(self, outputs: Tensor, step_index: int) -> Tensor:
        count, rule = len(self.guided), self.rule
        empty, unsafe, prompt = outputs.split([count, count, len(outputs) - 2 * count])
        chosen = self.guided.to(outputs.device)
        own = prompt[chosen]
        strength = (rule.scale * (own - unsafe).abs()).clamp_max(1.0)
        strength = torch.where(own - unsafe >= rule.threshold, 0.0, strength)
        velocity = self.velocity.to(outputs.device)
        away = strength * (unsafe - empty) + rule.momentum_scale * velocity
        self.velocity = rule.momentum * velocity + (1 - rule.momentum) * away
        direction = own - empty - (away if step_index / self.num_steps >= rule.warmup else 0.0)
        return prompt.index_copy(0, chosen, empty + per_image(self.scales, empty) * direction)


def _fitting(adapter: Adapter, phrases: str) -> str:
    """Return the phrases that the model reads in one prompt: the first one, and those that fit behind it."""
    text, *others = phrases_of(phrases)
    for phrase in others:
        longer = f"{text}, {phrase}"
        text = longer if adapter.fits(longer) else text
    return text
