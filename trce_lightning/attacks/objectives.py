"""Objectives that attacks share: how well a text explains pictures to a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError
from trce_lightning.losses import squared_distance
from trce_lightning.sampling import mix, noise, prediction_of
from trce_lightning.tokens import Text


class Noised(NamedTuple):
    """Latents of pictures with noise in them, and what a denoiser should say of them."""

    z_t: Tensor
    """``[B, C, H, W]``, on the adapter's device."""
    timestep: Tensor
    """``[B]``, as the network wants it."""
    goal: Tensor
    """The right prediction, ``[B, C, H, W]``, in the network's output space."""


def noised(
    adapter: Adapter,
    z_0: Tensor,
    step_index: Tensor,
    num_steps: int,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Noised:
    """Return latents ``z_0`` ``[B, C, H, W]`` at the noise levels of these steps of a sampling run.

    Args:
        step_index: int64 ``[B]`` in [0, ``num_steps``); 0 is pure noise.
        num_steps: steps of the run: the grid of noise levels.
        generator: gives the noise, on the CPU, so that all devices see the same. One for each row makes a
            row's noise independent of its neighbours.
    """
    schedule = adapter.schedule(num_steps)
    if isinstance(generator, torch.Generator):
        eps = torch.randn(z_0.shape, generator=generator)
    else:
        eps = torch.stack([noise(z_0.shape[1:], each) for each in generator])
    eps = eps.to(z_0.device)
    signal, sigma = schedule.signal[step_index].to(z_0.device), schedule.sigma[step_index].to(z_0.device)
    goal = prediction_of(z_0, eps, signal, sigma, schedule.prediction_type)
    timestep = schedule.timesteps[step_index].to(z_0.device)
    return Noised(mix(z_0, eps, signal, sigma), timestep, goal)


def check_levels(adapter: Adapter, attack: str, levels: int) -> None:
    """Raise ``InputError`` that names the attack's option unless the model has that many noise levels."""
    try:
        adapter.schedule(levels)
    except InputError as error:
        raise InputError(f"attack.{attack}.levels: expected steps of a sampling run; {error}") from error


def denoising_loss(adapter: Adapter, rows: Noised, text: Text) -> Tensor:
    """Return ‖ε_θ(z_t, t, text) − goal‖² of each row, the mean over C, H, W: ``[B]``, differentiable.

    The loss of textual inversion and of the diffusion classifier (UnlearnDiffAtk, arXiv 2310.11868). It is
    low where the text explains the picture to the network.
    """
    return squared_distance(adapter.predict(rows.z_t, rows.timestep, text), rows.goal)
