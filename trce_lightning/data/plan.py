"""Which trajectories are sampled, which of their steps train in which epoch, and what that costs.

Everything is drawn before anything is sampled: a malicious trajectory stops at its last drawn step, the safe
prompt is evaluated at drawn steps only, and the number of network evaluations is known exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from trce_lightning.concepts import PromptPair
from trce_lightning.config.schema import TrajectoryConfig
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import is_guided


@dataclass(frozen=True)
class Trajectory:
    """One trajectory of the original network and the steps of it that are kept."""

    index: int
    seed: int
    """Of its noise."""
    step_indices: tuple[int, ...]
    """Steps drawn for training, one for each (epoch, draw), repeats included."""
    pair: PromptPair | None
    """None: unconditional."""

    @property
    def num_steps(self) -> int:
        """Steps sampled: up to the last one drawn, which needs its predictions too."""
        return max(self.step_indices) + 1

    def network_evaluations(self, *, guided: bool) -> int:
        """Return evaluations of ∅ and c_m at every step and of c_s at distinct drawn steps.

        An unconditional one needs ∅ alone. Without guidance c_m decides each step, and ∅ is needed at drawn
        steps only.
        """
        if self.pair is None:
            return self.num_steps
        drawn = len(set(self.step_indices))
        return 2 * self.num_steps + drawn if guided else self.num_steps + 2 * drawn


@dataclass(frozen=True)
class TrajectoryPlan:
    """All trajectories of a run."""

    malicious: tuple[Trajectory, ...]
    unconditional: tuple[Trajectory, ...]
    num_steps: int
    """Of a full sampling run: fixes the timesteps."""
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Whether sampling is guided; else it follows the malicious prompt's own prediction."""
        return is_guided(self.guidance_scale)

    @property
    def network_evaluations(self) -> int:
        """Exactly what sampling all of it costs."""
        return self.evaluations_of((*self.malicious, *self.unconditional))

    def evaluations_of(self, rows: Iterable[Trajectory]) -> int:
        """Return what sampling some of its trajectories costs."""
        return sum(row.network_evaluations(guided=self.guided) for row in rows)

    def training_evaluations(self, config: TrajectoryConfig) -> int:
        """Forward passes of all epochs: (z_t, c_m), (z_t, ∅) later with the ∅ hinge on, and (z_u, ∅)."""
        items = len(self.malicious) * config.draws_per_epoch
        served = config.epochs * -(-items // config.batch_size) * config.batch_size
        later = sum(step_index > 0 for row in self.malicious for step_index in row.step_indices)
        preserve = config.unconditional_per_malicious if config.preserve_weight else 0
        return served * (1 + preserve) + (later if config.uncond_hinge_weight else 0)

    def stored_bytes(self, latent_numbers: int) -> int:
        """Size on disk of the latents and predictions, in float32, of ``latent_numbers`` numbers each."""
        malicious = sum(len(row.step_indices) for row in self.malicious)
        unconditional = sum(len(row.step_indices) for row in self.unconditional)
        return 4 * latent_numbers * (4 * malicious + 2 * unconditional)

    def fingerprint(self, generator: str) -> str:
        """Identifies the cache that sampling this plan with this generator gives."""
        # All scales up to 1 give the same rows, which are those that scale 1 has always given.
        facts = asdict(self) | {"guidance_scale": max(self.guidance_scale, 1.0)}
        text = json.dumps([generator, facts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def draw_plan(pairs: Sequence[PromptPair], config: TrajectoryConfig, seed: int) -> TrajectoryPlan:
    """Draw trajectories and steps: malicious prompts round robin, steps uniform over the allowed ones.

    Malicious steps come from the first ``early_steps``; unconditional ones from all. ``InputError`` when
    ``early_steps`` exceeds ``num_steps``.
    """
    if config.early_steps > config.num_steps:
        raise InputError(
            f"trajectory.early_steps: expected at most trajectory.num_steps = {config.num_steps}, "
            f"got {config.early_steps}"
        )
    generator = torch.Generator().manual_seed(seed)
    draws = config.epochs * config.draws_per_epoch
    order = torch.randperm(len(pairs), generator=generator).tolist()
    malicious = [
        Trajectory(
            i,
            seed_of(f"malicious-{seed}", i),
            _draw(config.early_steps, draws, generator),
            pairs[order[i % len(order)]],
        )
        for i in range(config.num_trajectories)
    ]
    wanted = config.num_trajectories * draws * config.unconditional_per_malicious
    each = -(-wanted // config.num_unconditional)
    unconditional = [
        Trajectory(i, seed_of(f"unconditional-{seed}", i), _draw(config.num_steps, each, generator), None)
        for i in range(config.num_unconditional if wanted else 0)
    ]
    return TrajectoryPlan(tuple(malicious), tuple(unconditional), config.num_steps, config.guidance_scale)


def _draw(num_steps: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """``count`` step indices, each pass over the steps without repeats."""
    passes = [torch.randperm(num_steps, generator=generator) for _ in range(-(-count // num_steps))]
    return tuple(torch.cat(passes)[:count].tolist())
