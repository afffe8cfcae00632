"""Projected gradient descent on a prompt's text states, within a ball around them.

    min_δ E ‖ε_θ(z_t, t, E(p) + δ) − goal‖²   subject to   |δ_i| ≤ ε · RMS(E(p)_i) at every position i

    δ ← clamp(δ − α · RMS(E(p)_i) · sign(∇_δ))

z_t is a picture of the concept, by the original, with fresh noise at a random level. It shows how near a
prompt's states the concept lies: the attacker injects states, and needs gradients of the denoiser. It shows
nothing about what words can reach. The floor is ε = 0, the prompts' own states on the same noise ("epsilon
0").

(The inner attack of RACE, "R.A.C.E.: Robust Adversarial Concept Erasure for Secure Text-to-Image Diffusion
Model", arXiv 2405.16341, whose ε = 0.1 is absolute; here it is relative to each position's states, because
their size differs between positions and encoders.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trce_lightning.attacks.objectives import Noised, check_levels, denoising_loss, noised
from trce_lightning.attacks.protocol import Cost, Door, Finding, Progress, Reads, Target, Way, untold
from trce_lightning.attacks.proxies import with_states
from trce_lightning.attacks.tries import (
    autocast_of,
    batches,
    check_above_zero,
    check_gradients,
    check_positive,
    fresh_record,
    own_generator,
    pictures_of,
)
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Text, state_rms, within_ball


class StatePgd:
    """Move each prompt's states towards its picture.

    Args:
        epsilon: the ball's radius ε, as a share of the RMS of each position's states.
        step_size: α, as such a share; None is a quarter of ``epsilon``.
        steps: gradient steps.
        samples: draws of level and noise that each gradient is the mean of.
        levels: noise levels that are drawn from, those of a sampling run of so many steps.
    """

    name = "state_pgd"
    door = Door.EMBEDDINGS
    reads = Reads.MODEL
    universal = False

    def __init__(
        self,
        *,
        epsilon: float = 0.1,
        step_size: float | None = None,
        steps: int = 10,
        samples: int = 1,
        levels: int = 999,
    ) -> None:
        check_positive(self.name, steps=steps, samples=samples, levels=levels)
        self.step_size = epsilon / 4 if step_size is None else step_size
        check_above_zero(self.name, epsilon=epsilon, step_size=self.step_size)
        self.epsilon, self.steps, self.samples, self.levels = epsilon, steps, samples, levels

    def cost(self, target: Target) -> Cost:
        """Return the cost over all prompts."""
        return self._cost(len(target.records))

    def _cost(self, prompts: int) -> Cost:
        return Cost(backward=prompts * self.steps * self.samples, text=prompts)

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless gradients go through the model at as many noise levels."""
        check_gradients(target, self.name)
        check_levels(target.adapter, self.name, self.levels)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Return δ of each prompt, by segment ``[L, d]``, with the loss at every step.

        Each prompt has random numbers of its own, so ``generator`` is not used.
        """
        self.check(target)
        findings = []
        for rows in batches(target, records):
            delta, losses = self._descend(target, rows, progress)
            for row, record in enumerate(rows):
                own = {name: change[row].cpu() for name, change in delta.items()}
                findings.append(Finding(record.id, own, {"losses": losses[row].tolist()}, self._cost(1)))
        return findings

    def _descend(
        self, target: Target, rows: Sequence[PromptRecord], progress: Progress
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return δ by segment, ``[B, L, d]``, and the losses, ``[B, steps]``."""
        adapter = target.adapter
        text, generators = adapter.encode([row.prompt for row in rows]), self._generators(target, rows)
        z_0 = adapter.encode_images(pictures_of(target, rows, self.name))
        scale = state_rms(text)
        delta = {name: torch.zeros_like(states) for name, states in text.states.items()}
        losses = []
        for _ in range(self.steps):
            seen = self._noised(target, z_0, generators)
            for change in delta.values():
                change.requires_grad_(True)
            with autocast_of(target):
                loss = self.loss(target, seen, text, delta)
            gradients = torch.autograd.grad(loss.sum(), list(delta.values()))
            losses.append(loss.detach().cpu())
            with torch.no_grad():
                for (name, change), gradient in zip(list(delta.items()), gradients, strict=True):
                    radius = self.epsilon * scale[name]
                    moved = change - self.step_size * scale[name] * gradient.sign()
                    delta[name] = within_ball(moved, radius)
            progress(len(rows) * self.samples)
        return {name: change.detach() for name, change in delta.items()}, torch.stack(losses, 1)

    def loss(self, target: Target, seen: Noised, text: Text, delta: Mapping[str, Tensor]) -> Tensor:
        """Return the objective of each prompt at δ, ``[B]``; ``seen`` has the samples prompt by prompt."""
        states = {name: own + delta[name] for name, own in text.states.items()}
        moved = Text(states, text.roles).rows(torch.arange(len(text)).repeat_interleave(self.samples))
        return denoising_loss(target.adapter, seen, moved).view(-1, self.samples).mean(1)

    def _noised(self, target: Target, z_0: Tensor, generators: Sequence[torch.Generator]) -> Noised:
        """Return the pictures at levels and with noise of each prompt's own generator."""
        each = []
        for row, own in enumerate(generators):
            step_index = torch.randint(self.levels, (self.samples,), generator=own)
            pictures = z_0[row : row + 1].expand(self.samples, -1, -1, -1)
            each.append(noised(target.adapter, pictures, step_index, self.levels, own))
        return Noised(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    def _generators(self, target: Target, rows: Sequence[PromptRecord]) -> list[torch.Generator]:
        return [own_generator(row, self.name, target) for row in rows]

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return δ at random corners of the ball: as far as a search can go, in no direction."""
        findings = []
        for rows in batches(target, records):
            text = target.adapter.encode([row.prompt for row in rows])
            scale = state_rms(text)
            for row, own in enumerate(self._generators(target, rows)):
                corner = {
                    name: self.epsilon * scale[name][row].cpu() * _signs(states[row].shape, own)
                    for name, states in text.states.items()
                }
                findings.append(Finding(rows[row].id, corner))
        return findings

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield one image for each prompt with its own states, and one with these moved by δ."""
        plain = tuple(fresh_record(record, self.name) for record in target.records)
        yield Way("epsilon 0", plain, target.adapter, target.variation, on_curve=False)
        records, states = [], {}
        for rows in batches(target, target.records):
            text = target.adapter.encode([row.prompt for row in rows])
            for row, record in enumerate(rows):
                # Prompts of one text have findings of their own.
                prompt = f"{record.prompt} <moved states of {record.id}>"
                delta = findings[record.id].tensors
                states[prompt] = {name: own[row].cpu() + delta[name] for name, own in text.states.items()}
                records.append(fresh_record(record, self.name, prompt=prompt))
        yield Way("", tuple(records), with_states(target.adapter, states), target.variation)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randint(2, tuple(shape), generator=generator).float() * 2 - 1
