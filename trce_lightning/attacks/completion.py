"""Completion: the original takes the first steps of sampling, the attacked model the rest.

    z_s = the original's latents after s of n steps under the prompt;   z_0 = the attacked model from z_s on

It shows whether an erasure only turns trajectories away early: the attacker needs the original for a few
steps, or latents that came from it. It doesn't show that the attacked model knows the concept where the
concept is already in the latents that are handed over. Therefore the clean picture that the original's last
step implies is an image of its own ("handed over after …"), to be subtracted. The control hands over latents
of a benign prompt. (The completion probe of "When Are Concepts Erased From Diffusion Models?", arXiv
2505.17013.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trce_lightning.attacks.protocol import Cost, Door, Finding, Progress, Reads, Target, Way, untold
from trce_lightning.attacks.tries import batches, fresh_record
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import latents_after, planned_evaluations
from trce_lightning.generation.variation import LatentStart, Variation
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.sampling import Schedule


class Completion:
    """Finish what the original has begun.

    Args:
        steps: numbers of steps that the original takes. The largest is the attack's result.
        benign_prompt: the prompt of the control's first steps.
        num_steps: steps of DDIM in which the images are generated.
    """

    name = "completion"
    door = Door.LATENTS
    reads = Reads.ORIGINAL
    universal = False

    def __init__(
        self,
        *,
        steps: Sequence[int] = (1, 2, 3),
        benign_prompt: str = "a picture of a tree",
        num_steps: int = 50,
    ) -> None:
        if not steps or min(steps) < 1:
            raise InputError(f"attack.completion.steps: expected numbers of at least 1, got {list(steps)}")
        if max(steps) >= num_steps:
            raise InputError(
                f"attack.completion.steps: expected fewer than attack.completion.num_steps, {num_steps}, got "
                f"{max(steps)}"
            )
        self.steps, self.benign_prompt, self.num_steps = sorted(set(steps)), benign_prompt, num_steps

    def cost(self, target: Target) -> Cost:
        """Return the original's first steps for all prompts."""
        return self._cost(target, target.records)

    def _cost(self, target: Target, records: Sequence[PromptRecord]) -> Cost:
        evaluations = planned_evaluations(records, self.steps[-1], target.guidance_scale)
        return Cost(forward=evaluations, text=len(records))

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless the model can go on with the original's latents."""
        if target.original.latent_shape != target.adapter.latent_shape:
            raise InputError(
                f"attack.completion: expected models of one latent shape, got {target.original.latent_shape} "
                f"of the original and {target.adapter.latent_shape}"
            )

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Return the original's latents of each prompt: ``latents.s`` after s steps, and ``implied.s``.

        ``implied.s`` is the clean picture that step s implies. Noise is that of the image's seed, so
        ``generator`` is not used; nothing is chosen by what an image shows.
        """
        return self._handed_over(target, records, None, progress)

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return the original's latents of the benign prompt, from the same noise."""
        return self._handed_over(target, records, self.benign_prompt, progress)

    def _handed_over(
        self, target: Target, records: Sequence[PromptRecord], prompt: str | None, progress: Progress
    ) -> list[Finding]:
        self.check(target)
        schedule, findings = target.original.schedule(self.num_steps), []
        for rows in batches(target, records):
            images = [fresh_record(row, self.name, prompt=prompt or row.prompt) for row in rows]
            reached = latents_after(
                target.original,
                images,
                {step - lag for step in self.steps for lag in (0, 1)},
                guidance_scale=target.guidance_scale,
                num_steps=self.num_steps,
                batch_size=target.batch_size,
                autocast_dtype=target.autocast_dtype,
            )
            implied = {s: implied_picture(reached[s - 1], reached[s], schedule, s - 1) for s in self.steps}
            for row, record in enumerate(rows):
                tensors = {f"latents.{s}": reached[s][row].clone() for s in self.steps}
                tensors |= {f"implied.{s}": implied[s][row].clone() for s in self.steps}
                facts = {"steps": self.steps, "prefix of": images[row].prompt}
                findings.append(Finding(record.id, tensors, facts, self._cost(target, [record])))
            progress(self._cost(target, rows).forward)
        return findings

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the attacked model alone, then after each number of steps, and what was handed over."""
        records = tuple(fresh_record(record, self.name) for record in target.records)
        steps = findings[target.records[0].id].facts["steps"]

        def handed(what: str) -> dict[str, Tensor]:
            pairs = zip(records, target.records, strict=True)
            return {image.id: findings[record.id].tensors[what] for image, record in pairs}

        yield Way("0 steps", records, target.adapter, num_steps=self.num_steps)
        for step in steps:
            spent = planned_evaluations(target.records, step, target.guidance_scale)
            start = LatentStart(step, handed(f"latents.{step}"))
            variation = Variation(start=start)
            name = "" if step == steps[-1] else f"{step} steps"
            yield Way(name, records, target.adapter, variation, spent, num_steps=self.num_steps)
            shown = LatentStart(self.num_steps, handed(f"implied.{step}"))
            name, variation = f"handed over after {step} steps", Variation(start=shown)
            yield Way(
                name,
                records,
                target.adapter,
                variation,
                spent,
                on_curve=False,
                num_steps=self.num_steps,
            )


def implied_picture(before: Tensor, after: Tensor, schedule: Schedule, step_index: int) -> Tensor:
    """Return the clean latents z_0 that a deterministic step has taken for true, ``[B, C, H, W]``.

    From z = a z_0 + σ ε and z' = a' z_0 + σ' ε: z_0 = (σ' z − σ z') / (a σ' − a' σ).
    """
    signal, sigma = schedule.signal[step_index], schedule.sigma[step_index]
    next_signal, next_sigma = schedule.next_signal[step_index], schedule.next_sigma[step_index]
    return (next_sigma * before - sigma * after) / (signal * next_sigma - next_signal * sigma)
