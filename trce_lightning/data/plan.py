"""The plan of stage 2: the trajectories to sample, the steps that train in each epoch, and the cost.

All steps are drawn before anything is sampled. So a malicious trajectory can stop at its last drawn step, and
the safe prompt is evaluated at drawn steps only. The number of network evaluations is known exactly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trce_lightning.concepts import PromptPair
from trce_lightning.config.schema import TrajectoryConfig
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import is_guided


@dataclass(frozen=True)
class Trajectory:
    """One trajectory of the original network, and its steps that are kept."""

    index: int
    seed: int
    """The seed of the trajectory's noise."""
    step_indices: tuple[int, ...]
    """The steps that were drawn for training: one for each (epoch, draw), repeats included."""
    pair: PromptPair | None
    """The prompts of a malicious trajectory, or None for the others."""
    prompt: str | None = None
    """The prompt of a kept trajectory, or None for the others."""

    @property
    def num_steps(self) -> int:
        """Return the number of sampled steps. The last one is the last drawn step."""
        return max(self.step_indices) + 1

    def network_evaluations(self, *, guided: bool) -> int:
        """Return the number of network evaluations that sampling takes.

        With guidance, a malicious trajectory needs ∅ and c_m at every step, and c_s at the different drawn
        steps. Without guidance, it needs c_m at every step, and ∅ and c_s at the drawn steps. A kept
        trajectory needs its prompt at every step, and with guidance also ∅. An unconditional trajectory needs
        ∅ at every step.
        """
        if self.pair is None:
            return 2 * self.num_steps if guided and self.prompt is not None else self.num_steps
        drawn = len(set(self.step_indices))
        return 2 * self.num_steps + drawn if guided else self.num_steps + 2 * drawn


@dataclass(frozen=True)
class TrajectoryPlan:
    """The malicious, unconditional and kept trajectories of a run."""

    malicious: tuple[Trajectory, ...]
    unconditional: tuple[Trajectory, ...]
    num_steps: int
    """The number of steps of a full sampling run. It determines the timesteps."""
    guidance_scale: float
    kept: tuple[Trajectory, ...] = ()

    @property
    def guided(self) -> bool:
        """Return whether sampling is guided. If not, it follows the malicious prompt's own prediction."""
        return is_guided(self.guidance_scale)

    @property
    def network_evaluations(self) -> int:
        """Return the exact number of network evaluations for all trajectories."""
        return self.evaluations_of((*self.malicious, *self.unconditional, *self.kept))

    def evaluations_of(self, rows: Iterable[Trajectory]) -> int:
        """Return the number of network evaluations for some of the trajectories."""
        return sum(row.network_evaluations(guided=self.guided) for row in rows)

    def training_evaluations(self, config: TrajectoryConfig, seed: int) -> int:
        """Return the network evaluations of all epochs: of (z_t, c_m), (z_t, ∅), (z_u, ∅) and (z_k, c_k).

        (z_t, ∅) is evaluated only with the ∅ hinge, and only after the first step. ``seed`` is the run's.
        """
        count, draws = len(self.malicious), config.draws_per_epoch
        steps = [
            self.malicious[item % count].step_indices[epoch * draws + item // count]
            for epoch in range(config.epochs)
            for item in epoch_order(count * draws, config.batch_size, seed, epoch).tolist()
        ]
        served, later = len(steps), sum(step_index > 0 for step_index in steps)
        preserve = config.unconditional_per_malicious if config.preserve_weight else 0
        keep = config.kept_per_malicious if config.keep_weight else 0
        return served * (1 + preserve + keep) + (later if config.uncond_hinge_weight else 0)

    def stored_bytes(self, latent_numbers: int) -> int:
        """Return the bytes on disk of latents and predictions, float32 of ``latent_numbers`` numbers each."""
        malicious = sum(len(row.step_indices) for row in self.malicious)
        preserved = sum(len(row.step_indices) for row in (*self.unconditional, *self.kept))
        return 4 * latent_numbers * (4 * malicious + 2 * preserved)

    def fingerprint(self, generator: str) -> str:
        """Return a hash that identifies the cache of this plan, sampled with ``generator``."""
        # All scales up to 1 give the same rows as scale 1.
        facts = asdict(self, dict_factory=_without_absent_kept) | {
            "guidance_scale": max(self.guidance_scale, 1.0)
        }
        text = json.dumps([generator, facts], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def epoch_order(items: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch serves its items. It depends on (seed, epoch) alone.

    The last batch is filled up from the front of the order, so that all batches have one size.
    """
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed * 1000003 + epoch))
    filled = -(-items // batch_size) * batch_size
    return order.repeat(-(-filled // items))[:filled]


def _without_absent_kept(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dictionary that has nothing of kept trajectories if there are none.

    So a plan without them has the fingerprint that it had before plans knew them.
    """
    return {name: value for name, value in items if name not in ("kept", "prompt") or value}


def without_empty(config: TrajectoryConfig) -> TrajectoryConfig:
    """Return the options of stage 2 for a model that is distilled from guided sampling and samples without ∅.

    Trajectories follow their prompt alone, and points of prompts to keep stand in the place of unconditional
    ones. If the ∅ hinge is asked for, raise ``InputError``.
    """
    if config.uncond_hinge_weight:
        raise InputError(
            "trajectory.uncond_hinge_weight: expected 0 with a model which samples without ∅, got "
            f"{config.uncond_hinge_weight}"
        )
    return replace(
        config,
        guidance_scale=1.0,
        unconditional_per_malicious=0,
        kept_per_malicious=config.kept_per_malicious + config.unconditional_per_malicious,
    )


def draw_plan(
    pairs: Sequence[PromptPair],
    config: TrajectoryConfig,
    seed: int,
    keep_prompts: Sequence[str] = (),
    *,
    concepts: int = 1,
) -> TrajectoryPlan:
    """Draw the trajectories and their steps. Prompts take turns, and steps are drawn uniformly.

    ``pairs`` are those of all ``concepts`` together. Each concept has ``num_trajectories`` malicious and
    ``num_kept`` kept trajectories. The steps of malicious trajectories come from the first
    ``early_steps``, those of the others from all steps. Kept trajectories are drawn last, so the others are
    the same without them. If ``early_steps`` exceeds ``num_steps``, or no prompt is there to keep though some
    are asked for, raise ``InputError``.
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
        for i in range(concepts * config.num_trajectories)
    ]
    wanted = len(malicious) * draws * config.unconditional_per_malicious
    each = -(-wanted // config.num_unconditional)
    unconditional = [
        Trajectory(i, seed_of(f"unconditional-{seed}", i), _draw(config.num_steps, each, generator), None)
        for i in range(config.num_unconditional if wanted else 0)
    ]
    kept: tuple[Trajectory, ...] = ()
    if config.kept_per_malicious:
        if not keep_prompts:
            raise InputError(
                "trajectory.kept_per_malicious: expected 0 where there are no prompts to keep, got "
                f"{config.kept_per_malicious}"
            )
        wanted = len(malicious) * draws * config.kept_per_malicious
        kept = _draw_kept(keep_prompts, concepts * config.num_kept, wanted, config.num_steps, seed, generator)
    return TrajectoryPlan(
        tuple(malicious), tuple(unconditional), config.num_steps, config.guidance_scale, kept
    )


def _draw_kept(
    prompts: Sequence[str], count: int, wanted: int, num_steps: int, seed: int, generator: torch.Generator
) -> tuple[Trajectory, ...]:
    """Draw ``count`` trajectories of prompts to keep, which together have ``wanted`` points or more."""
    order = torch.randperm(len(prompts), generator=generator).tolist()
    each = -(-wanted // count)
    return tuple(
        Trajectory(
            i,
            seed_of(f"kept-{seed}", i),
            _draw(num_steps, each, generator),
            None,
            prompts[order[i % len(order)]],
        )
        for i in range(count)
    )


def _draw(num_steps: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Return ``count`` step indices. No step repeats before all were drawn."""
    passes = [torch.randperm(num_steps, generator=generator) for _ in range(-(-count // num_steps))]
    return tuple(torch.cat(passes)[:count].tolist())
