"""Deterministic DDIM (η = 0, no clipping) for networks that predict ε or v, and seeded noise.

z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε and v = √ᾱ_t ε − √(1 − ᾱ_t) z_0. A `timestep` is in [0, num_train_timesteps); a
`step_index` counts sampling steps from pure noise at 0. ᾱ arguments are a number, a scalar tensor, [B] or
[B, 1, 1, 1]. Latents are computed and returned in float32. (DDIM: arXiv 2010.02502; v: arXiv 2202.00512.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trce_lightning.losses import guided_prediction, per_image

PREDICTION_TYPES = ("epsilon", "v_prediction")


def previous_alpha_bar(
    alphas_cumprod: Tensor, timesteps: Tensor, step_index: int, set_alpha_to_one: bool
) -> Tensor:
    """ᾱ of the latent that step `step_index` arrives at, a scalar tensor: T // n timesteps further down.

    T is the number of training timesteps, n that of `timesteps`, the whole descending list. As in diffusers,
    that is the next of them where they are equally far apart, and next to it where they are rounded. Below 0
    it is 1 with `set_alpha_to_one`, else `alphas_cumprod[0]`. ValueError when `step_index` is out of range.
    """
    if not 0 <= step_index < len(timesteps):
        raise ValueError(f"step_index must be in [0, {len(timesteps)}), got {step_index}")
    previous = int(timesteps[step_index]) - len(alphas_cumprod) // len(timesteps)
    if previous >= 0:
        return alphas_cumprod[previous]
    return torch.ones_like(alphas_cumprod[0]) if set_alpha_to_one else alphas_cumprod[0]


def ddim_step(
    prediction: Tensor,
    z_t: Tensor,
    alpha_bar_t: float | Tensor,
    alpha_bar_prev: float | Tensor,
    prediction_type: str,
) -> Tensor:
    """z_prev = √ᾱ_prev z_0 + √(1 − ᾱ_prev) ε, with z_0 and ε as the prediction implies: [B, C, H, W] float32.

    ValueError on an unknown prediction type.
    """
    clean, eps = _clean_and_eps(prediction, z_t, alpha_bar_t, prediction_type)
    return add_noise(clean, eps, alpha_bar_prev)


def add_noise(z_0: Tensor, eps: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε, [B, C, H, W] float32."""
    signal, sigma = _signal_and_sigma(alpha_bar_t, z_0)
    return signal * z_0.float() + sigma * eps.float()


def classifier_free_guidance(uncond: Tensor, cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """`guided_prediction` under sampling's name for β: ε_∅ + w (ε_c − ε_∅), float32."""
    return guided_prediction(uncond, cond, guidance_scale)


def is_guided(guidance_scale: float) -> bool:
    """Return True for w > 1, where guidance has an effect. Else ε_c alone is drawn, as diffusers does."""
    return guidance_scale > 1


def noise(shape: Sequence[int], seed: int | torch.Generator) -> Tensor:
    """Standard normal noise of one image, float32 on the CPU, a function of `shape` and `seed` alone.

    Of a CPU generator in a seed's place it is what comes next.
    """
    generator = seed if isinstance(seed, torch.Generator) else seeded(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator; it reads the low 32 bits of `seed`."""
    return torch.Generator("cpu").manual_seed(seed)


def _clean_and_eps(
    prediction: Tensor, z_t: Tensor, alpha_bar_t: float | Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    signal, sigma = _signal_and_sigma(alpha_bar_t, z_t)
    prediction, z_t = prediction.float(), z_t.float()
    if prediction_type == "epsilon":
        return (z_t - sigma * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * z_t - sigma * prediction, signal * prediction + sigma * z_t
    raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}")


def _signal_and_sigma(alpha_bar: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = per_image(alpha_bar, like)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
