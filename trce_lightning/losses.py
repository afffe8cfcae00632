"""Stage-2 losses of TRCE, denoising trajectory steering (TRCE, arXiv 2503.07389).

Predictions are [B, C, H, W] in the network's output space (ε or v). ‖·‖² is the mean over C, H, W. Everything
is computed and returned in float32, whatever the precision of the forward pass. β is the guidance scale in
ε_∅ + β (ε_c − ε_∅).
"""

import torch
from torch import Tensor


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖², the mean over C, H, W: [B, C, H, W] twice → [B] float32. ValueError if the shapes differ."""
    _check_same_shape(a=a, b=b)
    return (a.float() - b.float()).square().flatten(1).mean(1)


def guided_prediction(eps_uncond: Tensor, eps_cond: Tensor, beta: float | Tensor) -> Tensor:
    """ε_∅ + β (ε_c − ε_∅) in float32: β = 0 is unconditional, 1 conditional, above 1 guidance.

    `beta` is a number, or a tensor as `per_image` takes it. ValueError when the shapes differ.
    """
    _check_same_shape(eps_uncond=eps_uncond, eps_cond=eps_cond)
    uncond = eps_uncond.float()
    return uncond + per_image(beta, uncond) * (eps_cond.float() - uncond)


def per_image(value: float | Tensor, like: Tensor) -> Tensor:
    """`value` as a float32 tensor that broadcasts over `like` [B, C, H, W], on its device.

    A number, a scalar tensor, [B] (→ [B, 1, 1, 1]; it would meet W otherwise), or already four-dimensional.
    """
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value


def steering_hinge(prediction: Tensor, safe: Tensor, unsafe: Tensor, margin: float) -> Tensor:
    """max(‖ε̂ − f_safe‖² − ‖ε̂ − f_unsafe‖² + margin, 0) → [B].

    Linear in ε̂ where active: with f_safe, f_unsafe guided by β, its gradient is −2β(ε_cs − ε_cm)/CHW whatever
    ε̂ is. `margin` is in squared units of the prediction, per element. ValueError when the shapes differ.
    """
    _check_same_shape(prediction=prediction, safe=safe, unsafe=unsafe)
    safe, unsafe = safe.float(), unsafe.float()
    # The difference of squares, factored: exactly linear in ε̂, and free of cancellation.
    difference = (unsafe - safe) * (2 * prediction.float() - safe - unsafe)
    return (difference.flatten(1).mean(1) + margin).clamp_min(0)


def hinge_active_fraction(hinge: Tensor) -> Tensor:
    """The fraction of `hinge` [B] that is above zero, and so has a gradient: scalar in [0, 1]."""
    return (hinge > 0).float().mean()


def needed_displacement(prediction: Tensor, safe: Tensor, unsafe: Tensor, margin: float) -> Tensor:
    """The smallest displacement of ε̂, as root mean square over C, H, W, that brings the hinge to zero → [B].

    Zero loss is a half-space with normal f_safe − f_unsafe. A displacement δ changes the hinge by
    −2 mean(δ (f_safe − f_unsafe)), so the shortest lies along that normal and has

        RMS(δ) = hinge / (2 RMS(f_safe − f_unsafe)).

    0 where the hinge is inactive. Also 0 where f_safe = f_unsafe: the hinge then is the margin and has no
    gradient, no displacement lowers it. ValueError when the shapes differ.
    """
    hinge = steering_hinge(prediction, safe, unsafe, margin)
    normal_rms = squared_distance(safe, unsafe).sqrt()
    return torch.where(normal_rms > 0, hinge / (2 * normal_rms), 0.0)


def preserve_loss(prediction: Tensor, reference: Tensor) -> Tensor:
    """‖ε̂(z_u, ∅) − ε(z_u, ∅)‖² on unconditional trajectories, `reference` from the original network → [B]."""
    return squared_distance(prediction, reference)


def pull_loss(prediction: Tensor, safe_eps: Tensor) -> Tensor:
    """‖ε̂(z, c_m) − ε(z, c_s)‖² → [B]: an attraction to the unguided safe prediction; not in the paper."""
    return squared_distance(prediction, safe_eps)


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
    if len({tensor.shape for tensor in tensors.values()}) != 1:
        raise ValueError(f"expected tensors of one shape, got {shapes}")
