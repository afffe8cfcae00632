"""From noise, or a noised picture, to an image: this project's DDIM, or one of diffusers' schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from trce_lightning.adapters.schedule import check_placed, has_schedule
from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter
from trce_lightning.errors import InputError
from trce_lightning.sampling import add_noise


class Sampler(Protocol):
    """Takes a batch of latents through ``timesteps``; ``step_index`` counts these."""

    timesteps: Tensor
    """Of the network's evaluations, descending; some samplers evaluate twice a step."""

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Latents of the first timestep, of noise ``[B, C, H, W]`` alone or of ``clean`` latents with it."""

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        """What the denoiser sees of a latent."""

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The latents after a step; noise that it needs is of each image's own generator."""


def make_sampler(
    adapter: StableDiffusionAdapter,
    num_steps: int,
    *,
    scheduler: str | None = None,
    timestep_spacing: str | None = None,
    strength: float = 1.0,
) -> Sampler:
    """DDIM, or the scheduler of diffusers with that class name, on the model's own noise schedule.

    ``timestep_spacing`` of the scheduler, None for the model's own, is ``leading``, ``linspace`` or
    ``trailing`` (arXiv 2305.08891, table 2); ``leading`` begins below pure noise, more so in few steps.
    ``strength``, of image-to-image, is the share of the steps that is taken: the last
    ⌊``num_steps`` · ``strength``⌋. ``InputError`` when that is none, the model has fewer timesteps than
    ``num_steps``, or its scheduler can't be replaced by that one.
    """
    available = len(adapter.alphas_cumprod)
    if not 1 <= num_steps <= available:
        raise InputError(f"num_inference_steps: expected from 1 to {available} steps, got {num_steps}")
    skipped = num_steps - min(int(num_steps * strength), num_steps)
    if skipped == num_steps:
        raise InputError(
            f"robustness.strengths: expected at least one of {num_steps} steps, got {strength} of them"
        )
    if scheduler is None:
        return _Ddim(adapter, num_steps, skipped)
    return _Scheduler(adapter, scheduler, timestep_spacing, num_steps, skipped)


class _Ddim:
    def __init__(self, adapter: StableDiffusionAdapter, num_steps: int, skipped: int) -> None:
        self.adapter, self.all, self.skipped = adapter, adapter.timesteps(num_steps), skipped
        self.timesteps = self.all[skipped:]

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        if clean is None:
            return noise
        return add_noise(clean, noise, self.adapter.alphas_cumprod[self.timesteps[0]])

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        return z_t

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return self.adapter.step(prediction, z_t, self.all, self.skipped + step_index)


class _Scheduler:
    def __init__(
        self,
        adapter: StableDiffusionAdapter,
        name: str,
        timestep_spacing: str | None,
        num_steps: int,
        skipped: int,
    ) -> None:
        compatible = {kind.__name__ for kind in adapter.scheduler.compatibles}
        if name not in compatible:
            raise InputError(f"sampler: expected one of {', '.join(sorted(compatible))}, got {name}")
        spacing = {} if timestep_spacing is None else {"timestep_spacing": timestep_spacing}
        self.scheduler: Any = getattr(diffusers, name).from_config(adapter.scheduler.config, **spacing)
        if not has_schedule(self.scheduler, adapter.alphas_cumprod):
            raise InputError(
                f"sampler: expected one that draws by the model's noise schedule, got {name}, which has no "
                "rescale_betas_zero_snr"
            )
        self.num_steps, self.skipped = num_steps, skipped * self.scheduler.order
        self.takes_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        self._reset(torch.device("cpu"))

    def _reset(self, device: torch.device) -> None:
        try:
            self.scheduler.set_timesteps(self.num_steps, device=device)
        except ValueError as error:  # PNDM's first steps take four
            name = type(self.scheduler).__name__
            raise InputError(
                f"num_inference_steps: expected a number that {name} can take, got {self.num_steps}: {error}"
            ) from error
        available = self.scheduler.config.num_train_timesteps
        self.timesteps = check_placed(self.scheduler.timesteps, available, self.num_steps)[self.skipped :]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self.skipped)

    def start(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        self._reset(noise.device)  # what it remembers of earlier steps is of another batch
        if clean is None:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(clean, noise, self.timesteps[:1])

    def network_input(self, z_t: Tensor, step_index: int) -> Tensor:
        return self.scheduler.scale_model_input(z_t, self.timesteps[step_index])

    def step(
        self, prediction: Tensor, z_t: Tensor, step_index: int, generators: Sequence[torch.Generator]
    ) -> Tensor:
        options = {"generator": list(generators)} if self.takes_noise else {}
        return self.scheduler.step(prediction, self.timesteps[step_index], z_t, **options).prev_sample
