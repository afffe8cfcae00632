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
from trce_lightning.losses import per_image
from trce_lightning.sampling import DIFFUSION_PREDICTIONS, Schedule, clean_and_eps, denoise_step, mix, noise


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
    first_step: int = 0,
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
        first_step: where the deterministic sampler begins; at ``num_steps`` it takes no step.

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
    if not 0 <= first_step <= num_steps:
        raise InputError(f"variation.start: expected a first step from 0 to {num_steps}, got {first_step}")
    if scheduler is None:
        return Deterministic(schedule, max(skipped, first_step))
    if first_step:
        raise InputError(
            f"variation.scheduler: expected none where sampling begins with given latents, got {scheduler}"
        )
    return _Scheduler(adapter, scheduler, timestep_spacing, num_steps, skipped)


class Deterministic:
    """This project's DDIM, or Euler's method for flows; ``skipped`` steps are left out at the beginning."""

    def __init__(self, schedule: Schedule, skipped: int) -> None:
        self.schedule, self.skipped = schedule, skipped
        self.timesteps = schedule.timesteps[skipped:]

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Return the first step's latents."""
        if clean is None:
            return noise
        return mix(clean, noise, self.schedule.signal[self.skipped], self.schedule.sigma[self.skipped])

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        """Return the latents as they are."""
        return z_t

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the latents after a step, which needs no noise."""
        return denoise_step(prediction, z_t, self.schedule, self.skipped + step_index)

    def reached(self, clean: Tensor, noise: Tensor, step_index: int) -> Tensor:
        """Return clean latents with noise at the level that a step leads to; the last leads to none."""
        following = self.skipped + step_index + 1
        if following == len(self.schedule.timesteps):
            return clean
        return mix(clean, noise, self.schedule.signal[following], self.schedule.sigma[following])


class Noisy(Deterministic):
    """DDIM whose every step adds noise of the image's own generator.

    z' = a' z_0 + √|σ'² − s²| ε + k s n with s = η (σ' / σ) √(1 − (a / a')²), n ~ N(0, I) and k the scale.
    (DDIM: arXiv 2010.02502, equations 12 and 16. Above η = 1 the root's content may be negative; its size is
    taken, as published probes do.)
    """

    def __init__(self, schedule: Schedule, skipped: int, eta: Tensor, scale: Tensor) -> None:
        """Take η and scale of each image of a batch, ``[B]``. ``InputError`` for a model of flows."""
        super().__init__(schedule, skipped)
        if schedule.prediction_type not in DIFFUSION_PREDICTIONS:
            raise InputError(
                "variation.scheduler: expected a model that predicts ε or v for DDIM with noise, got one of "
                f"{schedule.prediction_type}"
            )
        self.eta, self.scale = eta, scale

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return the latents after a step."""
        at, schedule = self.skipped + step_index, self.schedule
        signal, sigma = schedule.signal[at], schedule.sigma[at]
        next_signal, next_sigma = schedule.next_signal[at], schedule.next_sigma[at]
        z_0, eps = clean_and_eps(prediction, z_t, signal, sigma, schedule.prediction_type)
        spread = self.eta * next_sigma / sigma * (1 - (signal / next_signal).square()).clamp_min(0).sqrt()
        direction = (next_sigma.square() - spread.square()).abs().sqrt()
        fresh = torch.stack([noise(z_t.shape[1:], generator) for generator in generators]).to(z_t.device)
        return mix(z_0, eps, next_signal, direction) + per_image(self.scale * spread, z_t) * fresh


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
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            return self.scheduler.scale_noise(clean, self.timesteps[:1], noise)
        return self.scheduler.add_noise(clean, noise, self.timesteps[:1])

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return z_t
        return self.scheduler.scale_model_input(z_t, self.timesteps[step_index])

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        # diffusers' pipelines pass eta 0, which is not every scheduler's default.
        known = {"generator": list(generators), "eta": 0.0}
        options = {name: known[name] for name in known if name in self.step_options}
        return self.scheduler.step(prediction, self.timesteps[step_index], z_t, **options).prev_sample
