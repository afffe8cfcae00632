"""A deterministic denoising step for networks that predict ε, v or a flow, and seeded noise.

Every family of models mixes a clean latent z_0 with noise ε in its own proportions:

    z_t = a_t z_0 + σ_t ε          a: signal, σ: sigma

Diffusion has a = √ᾱ and σ = √(1 − ᾱ). Flow matching has a = 1 − σ. The network predicts ε, or the flow
ε − z_0, or v = a ε − σ z_0. A step recovers z_0 and ε from the prediction and mixes them again in the
proportions of the next level. For ε and v, this is DDIM with η = 0 and without clipping. For flows, it is
Euler's method.

A `timestep` is the network's input. A `step_index` counts sampling steps; step 0 begins at pure noise.
Latents are computed and returned in float32. (DDIM: arXiv 2010.02502; v: arXiv 2202.00512; flow matching:
arXiv 2210.02747.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trce_lightning.losses import guided_prediction, per_image

DIFFUSION_PREDICTIONS = ("epsilon", "v_prediction")
PREDICTION_TYPES = (*DIFFUSION_PREDICTIONS, "flow")


class Schedule(NamedTuple):
    """The noise levels of a sampling run of n steps.

    Step i leads from `signal[i]`, `sigma[i]` to `next_signal[i]`, `next_sigma[i]`. If steps are rounded, as
    in DDIM, step i doesn't end exactly where step i + 1 begins.
    """

    timesteps: Tensor
    """The network's timesteps, descending, [n] int64, or float32 for flow matching."""
    signal: Tensor
    """The a of the latent before each step, [n] float32."""
    sigma: Tensor
    """The σ of the latent before each step, [n] float32."""
    next_signal: Tensor
    """The a of the latent after each step, [n] float32."""
    next_sigma: Tensor
    """The σ of the latent after each step, [n] float32."""
    prediction_type: str
    """The type of the network's prediction, one of `PREDICTION_TYPES`."""


def ddim_schedule(
    alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str, *, set_alpha_to_one: bool
) -> Schedule:
    """Return the levels of DDIM at `timesteps`, a descending list of n out of T training timesteps.

    As in diffusers, each step goes down by T // n timesteps. If `timesteps` are equally far apart, it ends at
    the next one. If they are rounded, it ends near the next one. Below timestep 0, ᾱ is 1 with
    `set_alpha_to_one`, else `alphas_cumprod[0]`. `alphas_cumprod` is ᾱ of every training timestep, [T].
    """
    arrival = timesteps - len(alphas_cumprod) // len(timesteps)
    last = torch.ones_like(alphas_cumprod[0]) if set_alpha_to_one else alphas_cumprod[0]
    alpha_bar = alphas_cumprod[timesteps].float()
    next_alpha_bar = torch.where(arrival >= 0, alphas_cumprod[arrival.clamp_min(0)], last).float()
    levels = (alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), next_alpha_bar.sqrt(), (1 - next_alpha_bar).sqrt())
    return Schedule(timesteps, *levels, prediction_type)


def flow_schedule(sigmas: Tensor, timesteps: Tensor) -> Schedule:
    """Return the levels of flow matching: a = 1 − σ, and each step arrives where the next one begins.

    `sigmas` is [n + 1], descending to the level at which the last step arrives. `timesteps` is [n].
    """
    before, after = sigmas[:-1].float(), sigmas[1:].float()
    return Schedule(timesteps, 1 - before, before, 1 - after, after, "flow")


def denoise_step(prediction: Tensor, z_t: Tensor, schedule: Schedule, step_index: int) -> Tensor:
    """Return the latents after a step: z' = a' z_0 + σ' ε, with the z_0 and ε that the prediction implies.

    The shapes are [B, C, H, W] twice → [B, C, H, W] float32. If the prediction type is unknown, or
    `step_index` is not in [0, n), raise ValueError.
    """
    if not 0 <= step_index < len(schedule.timesteps):
        raise ValueError(f"step_index must be in [0, {len(schedule.timesteps)}), got {step_index}")
    signal, sigma = schedule.signal[step_index], schedule.sigma[step_index]
    z_0, eps = clean_and_eps(prediction, z_t, signal, sigma, schedule.prediction_type)
    return mix(z_0, eps, schedule.next_signal[step_index], schedule.next_sigma[step_index])


def invert_step(prediction: Tensor, z_next: Tensor, schedule: Schedule, step_index: int) -> Tensor:
    """Return the latents from which a step with this prediction arrives at `z_next`: z with z' = z_next.

    A step is linear, z' = p z + q prediction, so z = (z' − q prediction) / p. The prediction is that for the
    latents before the step, which DDIM inversion takes to be that for `z_next` (arXiv 2010.02502, section
    4.3). [B, C, H, W] twice → [B, C, H, W] float32. ValueError as `denoise_step` says.
    """
    pushed = denoise_step(prediction, torch.zeros_like(z_next), schedule, step_index)
    one = torch.ones(1, 1, 1, 1, device=z_next.device)
    return (z_next.float() - pushed) / denoise_step(torch.zeros_like(one), one, schedule, step_index)


def mix(z_0: Tensor, eps: Tensor, signal: float | Tensor, sigma: float | Tensor) -> Tensor:
    """Return a z_0 + σ ε, [B, C, H, W] float32. `signal` and `sigma` are values as in `per_image`."""
    return per_image(signal, z_0) * z_0.float() + per_image(sigma, z_0) * eps.float()


def clean_and_eps(
    prediction: Tensor, z_t: Tensor, signal: float | Tensor, sigma: float | Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Return z_0 and ε, [B, C, H, W] float32 each, that a prediction for `z_t` implies.

    They follow from z = a z_0 + σ ε. A prediction of ε gives z_0 = (z − σ ε) / a. A prediction of v gives
    z_0 = a z − σ v and ε = a v + σ z, since a² + σ² = 1. The flow u = ε − z_0 gives z_0 = z − σ u and
    ε = z + a u, since a + σ = 1. If the type is unknown, raise ValueError.
    """
    signal, sigma = per_image(signal, z_t), per_image(sigma, z_t)
    prediction, z_t = prediction.float(), z_t.float()
    if prediction_type == "epsilon":
        return (z_t - sigma * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * z_t - sigma * prediction, signal * prediction + sigma * z_t
    if prediction_type == "flow":
        return z_t - sigma * prediction, z_t + signal * prediction
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")


def prediction_of(
    z_0: Tensor, eps: Tensor, signal: float | Tensor, sigma: float | Tensor, prediction_type: str
) -> Tensor:
    """Return the prediction that is right for z_0 and ε, the inverse of `clean_and_eps`: [B, C, H, W].

    ε, v = a ε − σ z_0, or the flow ε − z_0. ValueError on an unknown type.
    """
    if prediction_type == "epsilon":
        return eps.float()
    if prediction_type == "v_prediction":
        return mix(eps, z_0, signal, -per_image(sigma, z_0))
    if prediction_type == "flow":
        return eps.float() - z_0.float()
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")


def classifier_free_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Return ε_∅ + w (ε_c − ε_∅), float32. This is `guided_prediction` with β called w."""
    return guided_prediction(uncond, cond, guidance_scale)


def is_guided(guidance_scale: float) -> bool:
    """Return whether guidance has an effect, w > 1. If not, sampling follows ε_c alone, as in diffusers."""
    return guidance_scale > 1


def noise(shape: Sequence[int], seed: int | torch.Generator) -> Tensor:
    """Return standard normal noise of one image, float32 on the CPU.

    It depends on `shape` and `seed` alone. If `seed` is a CPU generator, return its next values.
    """
    generator = seed if isinstance(seed, torch.Generator) else seeded(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator with this seed. It uses the low 32 bits of `seed`."""
    return torch.Generator("cpu").manual_seed(seed)
