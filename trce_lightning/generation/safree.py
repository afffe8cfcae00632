"""SAFREE (arXiv 2410.12761): guidance by a prompt whose tokens are projected away from unsafe phrases.

With C the projection on the span of the phrases' pooled states, and I that on the span of the prompt's pooled
states p_i, in which token i is masked:

- token i is a trigger if ‖(1 − C) p_i‖ ≥ (1 + α) · the mean of the others, so that without it the prompt lies
  farther from the phrases;
- the states e of triggers become (1 − C) I e; all others stay, those of the EoT and of padding too;
- the more the projection turns the prompt's states, the longer it is used: in steps up to
  n σ(5 (10 β − 5.333)), with β = 1 − the mean cosine between e and (1 − C) I e.

No weights change, and a step evaluates as many rows as classifier-free guidance. The published method also
filters the denoiser's skip features, but its released code calls that part without effect. It isn't here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import Natural, NonNegative
from trce_lightning.errors import InputError
from trce_lightning.generation.guidance import ClassifierFreeGuidance, Inputs, phrases_of
from trce_lightning.losses import per_image
from trce_lightning.sampling import is_guided
from trce_lightning.tokens import Role, Text

MASK = 0
"""The token id that stands in a masked token's place."""
SLOPE, CENTRE = 5.0, 5.333
"""The numbers of the sigmoid that decides how long the projected prompt is used."""


class Projected(NamedTuple):
    """A prompt's states after the projection, ``[L, d]``, and what decided on them."""

    states: Tensor
    triggers: Tensor
    """True at the tokens that were projected, bool ``[L]``."""
    turned: float
    """β, 0 if the projection leaves the directions of all tokens."""


def projection(rows: Tensor) -> Tensor:
    """Return the projection on the span of rows, ``[n, d]`` → ``[d, d]``."""
    return rows.mT @ torch.linalg.pinv(rows.mT)


def projected(states: Tensor, masked: Tensor, words: Tensor, unsafe: Tensor, alpha: float) -> Projected:
    """Project a prompt's triggers.

    ``states`` is ``[L, d]``, ``words`` True at its n tokens, ``masked`` their pooled states p_i, ``[n, d]``,
    and ``unsafe`` the phrases' pooled states, ``[m, d]``. With fewer than two tokens there is nothing to
    compare, so no token is a trigger.
    """
    triggers = torch.zeros_like(words)
    if len(masked) < 2:
        return Projected(states, triggers, 0.0)
    away = torch.eye(states.shape[1], dtype=states.dtype, device=states.device) - projection(unsafe)
    distance = (masked @ away).norm(dim=1)
    others = (distance.sum() - distance) / (len(distance) - 1)
    triggers[words] = distance >= (1 + alpha) * others
    moved = states @ projection(masked) @ away
    cosine = torch.cosine_similarity(states[words], moved[words], dim=1).mean()
    return Projected(torch.where(triggers[:, None], moved, states), triggers, 1 - float(cosine))


def steps_of(turned: float, most: int) -> int:
    """Return the last step index in which a prompt with this β is projected: n σ(5 (10 β − 5.333))."""
    return round(most / (1 + math.exp(-SLOPE * (10 * turned - CENTRE))))


@dataclass(frozen=True, kw_only=True)
class Safree:
    """The rule with its numbers. Its repr identifies stored scores.

    Args:
        alpha: α.
        steps: n, the most that the last projected step index can be. 0 projects the first step alone.
        concept: unsafe phrases with commas between them. Runs give the terms of the erased concepts if it is
            empty.
    """

    alpha: NonNegative = 0.01
    steps: Natural = 10
    concept: str = ""

    def evaluations(self, guidance_scale: float) -> int:
        """Return 2 if guidance has an effect, else 1."""
        return ClassifierFreeGuidance().evaluations(guidance_scale)

    def guide(
        self, adapter: Adapter, prompts: Sequence[str], guidance_scales: Sequence[float], num_steps: int
    ) -> _Guide:
        """Return the guide of a batch. It encodes each prompt once for each of its tokens."""
        if not phrases_of(self.concept):
            raise InputError("guidance.concept: expected phrases to project away from, got none")
        return _Guide(self, adapter, prompts, torch.tensor(guidance_scales))


class _Guide:
    def __init__(self, rule: Safree, adapter: Adapter, prompts: Sequence[str], scales: Tensor) -> None:
        guided = [i for i, w in enumerate(scales.tolist()) if is_guided(w)]
        self.guided = torch.tensor(guided, dtype=torch.int64)
        self.scales, self.empty = scales[self.guided], adapter.empty()
        self.plain = adapter.encode(prompts)
        # The loop may autocast. In half precision, other tokens would be triggers.
        with torch.autocast(adapter.device.type, enabled=False):
            self.safe, last = _projected_text(rule, adapter, prompts, self.plain)
        self.last = torch.tensor(last)

    def inputs(self, step_index: int) -> Inputs:
        chosen = (step_index <= self.last).view(-1, 1, 1)
        states = {
            name: torch.where(chosen.to(own.device), self.safe[name], own)
            for name, own in self.plain.states.items()
        }
        text = Text.cat([self.empty.expand(len(self.guided)), Text(states, self.plain.roles)])
        return Inputs(torch.cat([self.guided, torch.arange(len(self.plain))]), text)

    def combine(self, outputs: Tensor, step_index: int) -> Tensor:
        count, guided = len(self.guided), self.guided.to(outputs.device)
        empty, prompt = outputs[:count], outputs[count:]
        led = empty + per_image(self.scales, empty) * (prompt[guided] - empty)
        return prompt.index_copy(0, guided, led)


def _projected_text(
    rule: Safree, adapter: Adapter, prompts: Sequence[str], plain: Text
) -> tuple[dict[str, Tensor], list[int]]:
    """Return the projected states by segment, and the last step index of each prompt."""
    unsafe = _pooled(adapter.encode(phrases_of(rule.concept)))
    safe = {name: own.clone() for name, own in plain.states.items()}
    last = [-1] * len(prompts)
    for row, prompt in enumerate(prompts):
        for name, words in _words(plain, row).items():
            masked = _masked(adapter, prompt, name, words)
            found = projected(safe[name][row], masked, words, unsafe[name], rule.alpha)
            safe[name][row] = found.states
            if bool(found.triggers.any()):
                last[row] = max(last[row], steps_of(found.turned, rule.steps))
    return safe, last


def _words(text: Text, row: int) -> dict[str, Tensor]:
    return {name: roles[row] == Role.WORD for name, roles in text.roles.items()}


def _pooled(text: Text) -> dict[str, Tensor]:
    """Return the states at the first EoT, ``[B, d]`` by segment."""
    return {name: own[text.roles[name] == Role.EOT] for name, own in text.states.items()}


@torch.no_grad()
def _masked(adapter: Adapter, prompt: str, segment: str, words: Tensor) -> Tensor:
    """Return the prompt's pooled states with each of its n tokens masked in turn, ``[n, d]``."""
    places = words.nonzero().flatten().cpu()
    ids = {name: own.expand(len(places), -1).clone() for name, own in adapter.tokenize([prompt]).items()}
    if not len(places):
        return torch.zeros(0, 1)
    roles = {name: own.clone() for name, own in ids.items()}
    ids[segment][torch.arange(len(places)), places] = MASK
    return _pooled(adapter.encode_embeddings(adapter.embed(ids), roles))[segment]
