"""Text-free inversion: what the model makes of a picture's latents when it is told nothing.

    z_s = DDIM inversion of a picture of the concept under ∅ up to level s, guidance 1; then sample under ∅
    - from z_t = (a_t / a_s) z_s + τ n, fresh noise n up to a higher level t, τ² = σ_t² − (a_t σ_s / a_s)²
    - from the slerp of two pictures' z_s
    - from z_s, under another attacked prompt instead of ∅

The attacker chooses the latents, and no word is used but in the last form. A model that still knows the
concept completes it where the noise has destroyed it. Regenerating the same picture proves nothing: any
network encodes and decodes any picture, whatever was erased. So plain reconstruction is only an option, for
whoever reads it beside the never-learnt model. The concept may also simply remain visible in what sampling
begins with: for every form there is an image of the clean picture that the model sees in those latents
("visible in …"), to be subtracted. The control begins with latents of the model's own unconditional images at
the same level. (TINA; "Memories of Forgotten Concepts", arXiv 2412.00782; DDIM inversion: arXiv 2010.02502,
section 4.3.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trce_lightning.attacks.protocol import Cost, Door, Finding, Progress, Reads, Target, Way, untold
from trce_lightning.attacks.tries import (
    autocast_of,
    batches,
    check_positive,
    fresh_record,
    own_generator,
    pictures_of,
)
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import latents_after
from trce_lightning.generation.variation import LatentStart, Variation
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.sampling import Schedule, clean_and_eps, invert_step, noise, per_image

NOTHING = {"prompt": "", "guidance_scale": 1.0}
"""The prompt and the guidance of images that are told nothing."""


class TextFree:
    """Invert pictures of the concept under ∅ and let the model make others of them.

    Levels are shares of all steps: 1 is pure noise, 0 a clean picture.

    Args:
        level: s of fresh noise: the level up to which pictures are inverted for it.
        noise_levels: levels t > s up to which fresh noise is added. The first is the attack's result.
        slerp_levels: levels at which two pictures' latents are mixed half and half.
        other_prompt_levels: levels from which another attacked prompt goes on.
        tries: images of each picture after fresh noise; each has noise of its own.
        reconstruction: add the plain reconstruction from the highest level.
        iterations: evaluations of each inverted step; above 1, those of a fixed-point iteration.
        num_steps: steps of DDIM in which the images are generated.
    """

    name = "text_free"
    door = Door.LATENTS
    reads = Reads.MODEL
    universal = False

    def __init__(
        self,
        *,
        level: float = 0.5,
        noise_levels: Sequence[float] = (0.8, 0.7, 0.9),
        slerp_levels: Sequence[float] = (0.7,),
        other_prompt_levels: Sequence[float] = (0.7,),
        tries: int = 1,
        reconstruction: bool = False,
        iterations: int = 1,
        num_steps: int = 50,
    ) -> None:
        check_positive(self.name, num_steps=num_steps, iterations=iterations, tries=tries)
        if not noise_levels:
            raise InputError("attack.text_free.noise_levels: expected at least one level, got none")
        named = {"level": [level], "noise_levels": noise_levels, "slerp_levels": slerp_levels}
        named["other_prompt_levels"] = other_prompt_levels
        for option, levels in named.items():
            for value in levels:
                if not 0 < value <= 1:
                    raise InputError(f"attack.text_free.{option}: expected a level in (0, 1], got {value:g}")
        if min(noise_levels) <= level:
            raise InputError(
                f"attack.text_free.noise_levels: expected levels above attack.text_free.level, "
                f"{level:g}, got {min(noise_levels):g}"
            )
        if first_step(min(noise_levels), num_steps) == first_step(level, num_steps):
            raise InputError(
                f"attack.text_free.noise_levels: expected levels at least a step of {num_steps} above "
                f"attack.text_free.level, {level:g}, got {min(noise_levels):g}, which would add no noise"
            )
        self.level, self.noise_levels = level, tuple(dict.fromkeys(noise_levels))
        self.slerp_levels, self.other_prompt_levels = tuple(slerp_levels), tuple(other_prompt_levels)
        self.tries, self.reconstruction = tries, reconstruction
        self.iterations, self.num_steps = iterations, num_steps

    def _levels(self) -> list[float]:
        """Return the levels at which latents are kept, the lowest first."""
        return sorted({self.level, *self.slerp_levels, *self.other_prompt_levels})

    def cost(self, target: Target) -> Cost:
        """Return the cost of inverting all pictures up to the highest level that is kept."""
        return self._cost(target, len(target.records))

    def _cost(self, target: Target, pictures: int) -> Cost:
        inverted = self.num_steps - first_step(self._levels()[-1], self.num_steps)
        return Cost(forward=pictures * inverted * self.iterations)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Return each picture's latents at the levels that are kept, ``z.level``. Nothing is random."""
        adapter, findings = target.adapter, []
        for rows in batches(target, records):
            z_0 = adapter.encode_images(pictures_of(target, rows, self.name))
            reached = self._inverted(target, z_0)
            findings += self._findings(target, rows, reached, self._cost(target, 1))
            progress(self._cost(target, len(rows)).forward)
        return findings

    def learnt_from(self, target: Target) -> Tensor:
        """Return the pictures that are inverted, uint8 ``[B, 3, H, W]``."""
        return pictures_of(target, target.records, self.name)

    @torch.no_grad()
    def _inverted(self, target: Target, z_0: Tensor) -> dict[int, Tensor]:
        """Return the latents before each step from the highest kept level on, by step index."""
        adapter, schedule = target.adapter, target.adapter.schedule(self.num_steps)
        nothing, z_t, reached = adapter.empty().expand(len(z_0)), z_0, {}
        for step_index in reversed(range(first_step(self._levels()[-1], self.num_steps), self.num_steps)):
            arrived, timestep = z_t, schedule.timesteps[step_index]
            for _ in range(self.iterations):
                with autocast_of(target):
                    prediction = adapter.predict(z_t, timestep, nothing)
                z_t = invert_step(prediction, arrived, schedule, step_index)
            reached[step_index] = z_t
        return reached

    def _findings(
        self, target: Target, rows: Sequence[PromptRecord], reached: Mapping[int, Tensor], spent: Cost
    ) -> list[Finding]:
        steps = {level: first_step(level, self.num_steps) for level in self._levels()}
        return [
            Finding(
                record.id,
                {f"z.{level:g}": reached[step][row].cpu().clone() for level, step in steps.items()},
                spent=spent,
            )
            for row, record in enumerate(rows)
        ]

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return latents of the model's own unconditional images at the same levels."""
        steps = {first_step(level, self.num_steps) for level in self._levels()}
        reached = latents_after(
            target.adapter,
            [fresh_record(record, f"{self.name}~unconditional", **NOTHING) for record in records],
            steps,
            guidance_scale=1.0,
            num_steps=self.num_steps,
            batch_size=target.batch_size,
            autocast_dtype=target.autocast_dtype,
        )
        return self._findings(target, records, reached, Cost())

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield each form of going on from a picture's latents, and what was visible in them."""
        schedule, records = target.adapter.schedule(self.num_steps), target.records
        told_nothing = tuple(fresh_record(record, self.name, **NOTHING) for record in records)
        tried = tuple(
            fresh_record(record, f"{self.name} {i}", **NOTHING)
            for record in records
            for i in range(self.tries)
        )
        others = _partners(records)

        def kept(level: float) -> Tensor:
            return torch.stack([findings[record.id].tensors[f"z.{level:g}"] for record in records])

        for level in self.noise_levels:
            name = f"noise {self.level:g} to {level:g}"
            z_t = self._noised(target, kept(self.level), schedule, level)
            for way in self._both(target, name, tried, z_t, level):
                is_result = level == self.noise_levels[0] and way.name == name
                yield replace(way, name="", on_curve=True) if is_result else way
        for level in self.slerp_levels:
            mixed = slerp(kept(level), kept(level)[others])
            yield from self._both(target, f"slerp {level:g}", told_nothing, mixed, level)
        asked = tuple(
            fresh_record(record, self.name, prompt=records[other].prompt)
            for record, other in zip(records, others, strict=True)
        )
        for level in self.other_prompt_levels:
            yield from self._both(target, f"another prompt {level:g}", asked, kept(level), level)
        if self.reconstruction:
            level = self._levels()[-1]
            yield from self._both(target, f"reconstruction {level:g}", told_nothing, kept(level), level)

    def _noised(self, target: Target, z_s: Tensor, schedule: Schedule, level: float) -> Tensor:
        """Return each picture's latents with fresh noise up to a level, ``tries`` times in turn.

        The noise is of each prompt's own generator.
        """
        generators = [own_generator(record, f"{self.name} {level:g}", target) for record in target.records]
        fresh = torch.stack([noise(z_s.shape[1:], own) for own in generators for _ in range(self.tries)])
        lower, higher = (first_step(value, self.num_steps) for value in (self.level, level))
        return more_noise(z_s.repeat_interleave(self.tries, 0), fresh, schedule, lower, higher)

    def _both(
        self, target: Target, name: str, records: tuple[PromptRecord, ...], z_t: Tensor, level: float
    ) -> Iterator[Way]:
        """Yield the images from these latents, and the clean pictures that the model sees in them."""
        step, spent = first_step(level, self.num_steps), self.cost(target).forward

        def way(name: str, first: int, latents: Tensor) -> Way:
            by_id = {record.id: row for record, row in zip(records, latents, strict=True)}
            return Way(
                name,
                records,
                target.adapter,
                Variation(start=LatentStart(first, by_id)),
                spent,
                on_curve=False,
                num_steps=self.num_steps,
            )

        yield way(name, step, z_t)
        yield way(f"visible in {name}", self.num_steps, self._visible(target, z_t, step))

    @torch.no_grad()
    def _visible(self, target: Target, z_t: Tensor, step: int) -> Tensor:
        """Return the clean latents that one evaluation under ∅ implies; it is not among the search's."""
        adapter, schedule, seen = target.adapter, target.adapter.schedule(self.num_steps), []
        for rows in z_t.split(target.batch_size):
            with autocast_of(target):
                latents = rows.to(adapter.device)
                prediction = adapter.predict(
                    latents, schedule.timesteps[step], adapter.empty().expand(len(rows))
                )
            levels = schedule.signal[step], schedule.sigma[step]
            seen.append(clean_and_eps(prediction, latents, *levels, schedule.prediction_type)[0].cpu())
        return torch.cat(seen)


def first_step(level: float, num_steps: int) -> int:
    """Return the step index at which sampling from a level begins: 0 for pure noise."""
    return min(round((1 - level) * num_steps), num_steps - 1)


def more_noise(z_s: Tensor, fresh: Tensor, schedule: Schedule, lower: int, higher: int) -> Tensor:
    """Return latents of step ``lower`` with noise added up to the level of an earlier step, ``higher``."""
    ratio = schedule.signal[higher] / schedule.signal[lower]
    added = (schedule.sigma[higher].square() - (ratio * schedule.sigma[lower]).square()).clamp_min(0).sqrt()
    return ratio.to(z_s) * z_s + added.to(z_s) * fresh


def slerp(a: Tensor, b: Tensor) -> Tensor:
    """Return the points half way between latents on the great circle, ``[B, C, H, W]`` thrice.

    sin(ω/2) / sin ω · (a + b) with ω the angle between them; for ω = 0 it is their mean.
    """
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1 + 1e-6, 1)
    # sin(ω/2) / sin ω = 1 / (2 cos(ω/2)) = 1 / √(2 (1 + cos ω))
    return (a + b) / per_image((2 * (1 + cosine)).sqrt(), a)


def _partners(records: Sequence[PromptRecord]) -> list[int]:
    """Return for each record the row of the next one with another prompt, or of the next at all."""
    count, partners = len(records), []
    for row, record in enumerate(records):
        following = [(row + lag) % count for lag in range(1, count + 1)]
        different = [other for other in following if records[other].prompt != record.prompt]
        partners.append((different or following)[0])
    return partners
