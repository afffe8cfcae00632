"""Sampling with more noise than the sampler needs: a grid of η and noise scale.

    z' = a' z_0 + √|σ'² − s²| ε + k s n,   s = η (σ' / σ) √(1 − (a / a')²),   n ~ N(0, I)

It shows how far the concept is from the trajectories that the sampler usually takes; the attacker only
chooses the sampler. Each prompt gets one image for each point of the grid, on noise of its own. The rate over
images is the mean over the grid, the rate over prompts its best point. No detector chooses a point, and the
control has as many plain seeds, so that best-of-n is compared with best-of-n. It shows nothing about what a
search could find. (The noise-based probe of "When Are Concepts Erased From Diffusion Models?", arXiv
2505.17013; DDIM: arXiv 2010.02502.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import torch

from trce_lightning.attacks.protocol import Cost, Door, Finding, Progress, Reads, Target, Way, untold
from trce_lightning.attacks.tries import check_at_least, check_positive, fresh_record
from trce_lightning.errors import InputError
from trce_lightning.generation.variation import NoisyDdim, Variation
from trce_lightning.prompts.records import PromptRecord


class Noise:
    """Generate at every point of a grid.

    Args:
        etas: values of η.
        scales: values of the noise's scale k.
        num_steps: steps of DDIM in which the images are generated.
    """

    name = "noise"
    door = Door.LATENTS
    reads = Reads.MODEL
    universal = False

    def __init__(
        self,
        *,
        etas: Sequence[float] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85),
        scales: Sequence[float] = (1.0, 1.02, 1.03, 1.04),
        num_steps: int = 50,
    ) -> None:
        check_positive(self.name, num_steps=num_steps)
        self.num_steps = num_steps
        for option, values in (("etas", etas), ("scales", scales)):
            if not values:
                raise InputError(f"attack.noise.{option}: expected at least one value, got none")
            for value in values:
                check_at_least(f"noise.{option}", value, 0)
        self.grid = [[float(eta), float(scale)] for eta, scale in product(etas, scales)]

    def cost(self, target: Target) -> Cost:
        """Return nothing: nothing is searched for."""
        return Cost()

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Return the grid for each prompt."""
        return [Finding(record.id, facts={"settings": self.grid}) for record in records]

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return as many points without noise: as many plain seeds."""
        plain = [[0.0, 1.0]] * len(self.grid)
        return [Finding(record.id, facts={"settings": plain}) for record in records]

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield an image for each prompt and point, all together."""
        records: list[PromptRecord] = []
        settings: dict[str, tuple[float, float]] = {}
        for record in target.records:
            for point, (eta, scale) in enumerate(findings[record.id].facts["settings"]):
                image = fresh_record(record, f"{self.name}{point}")
                records.append(image)
                settings[image.id] = (eta, scale)
        noisy = Variation(NoisyDdim(settings))
        yield Way("", tuple(records), target.adapter, noisy, num_steps=self.num_steps)
