"""The samplers, which lead from noise or a noised picture to an image.

They are this project's DDIM and diffusers' schedulers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError
from trce_lightning.sampling import Schedule, denoise_step, mix


class Sampler(Protocol):
    """A way to take a batch of latents through ``timesteps``. ``step_index`` is an index into them."""

    timesteps: Tensor
    """The timesteps of the network's evaluations, descending. Some samplers evaluate twice per step."""

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Return the latents at the first timestep, ``[B, C, H, W]``.

        If ``clean`` is None, they are noise alone. Otherwise they are ``clean`` with noise.
        """

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        """Return the latents in the scale that the denoiser expects."""

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the latents after a step. If it needs noise, each image's own generator gives it."""


def make_sampler(
    adapter: Adapter,
    num_steps: int,
    *,
    scheduler: str | None = None,
    timestep_spacing: str | None = None,
    strength: float = 1.0,
) -> Sampler:
    """Return the deterministic sampler, or diffusers' scheduler of the named class.

    Args:
        adapter: the model.
        num_steps: the number of steps of a whole sampling run.
        scheduler: the class name of a scheduler of diffusers. None means :func:`~.sampling.denoise_step`.
        timestep_spacing: the places of that scheduler's steps: ``leading``, ``linspace`` or ``trailing``
            (arXiv 2305.08891, table 2). None means the model's own. ``leading`` begins below pure noise, and
            further below with fewer steps.
        strength: the share of the steps that image-to-image takes. It takes the last
            ⌊``num_steps`` · ``strength``⌋.

    Raises:
        InputError: no step is taken, the model has fewer timesteps than ``num_steps``, or the scheduler is
            not one of ``SAMPLERS``.
    """
    schedule = adapter.schedule(num_steps)
    skipped = num_steps - min(int(num_steps * strength), num_steps)
    if skipped == num_steps:
        raise InputError(
            f"robustness.strengths: expected at least one of {num_steps} steps, got {strength} of them"
        )
    if scheduler is None:
        return _Deterministic(schedule, skipped)
    return _Scheduler(adapter, scheduler, timestep_spacing, num_steps, skipped)


class _Deterministic:
    def __init__(self, schedule: Schedule, skipped: int) -> None:
        self.schedule, self.skipped = schedule, skipped
        self.timesteps = schedule.timesteps[skipped:]

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        if clean is None:
            return noise
        return mix(clean, noise, self.schedule.signal[self.skipped], self.schedule.sigma[self.skipped])

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        return z_t

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return denoise_step(prediction, z_t, self.schedule, self.skipped + step_index)


class _Scheduler:
    def __init__(
        self, adapter: Adapter, name: str, timestep_spacing: str | None, num_steps: int, skipped: int
    ) -> None:
        self.adapter, self.options = adapter, (name, num_steps, timestep_spacing)
        self._reset(torch.device("cpu"), skipped)

    def _reset(self, device: torch.device, skipped: int) -> None:
        """Take a new scheduler. A used one remembers the steps of an earlier batch."""
        self.scheduler: Any = self.adapter.scheduler(*self.options, device)
        self.step_options = set(inspect.signature(self.scheduler.step).parameters)
        self.skipped = skipped
        first = skipped * self.scheduler.order
        self.timesteps = self.scheduler.timesteps[first:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        self._reset(noise.device, self.skipped)
        if clean is None:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(clean, noise, self.timesteps[:1])

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        return self.scheduler.scale_model_input(z_t, self.timesteps[step_index])

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        # diffusers' pipelines pass eta 0, which is not every scheduler's default.
        known = {"generator": list(generators), "eta": 0.0}
        options = {name: known[name] for name in known if name in self.step_options}
        return self.scheduler.step(prediction, self.timesteps[step_index], z_t, **options).prev_sample
