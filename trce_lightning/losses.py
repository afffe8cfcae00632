"""The losses of stage 2 of TRCE, denoising trajectory steering (TRCE, arXiv 2503.07389).

Predictions are [B, C, H, W] in the network's output space (ε or v). ‖·‖² is the mean over C, H, W. All losses
are computed and returned in float32, whatever the precision of the forward pass. β is the guidance scale in
ε_∅ + β (ε_c − ε_∅).
"""

import torch
from torch import Tensor


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖a − b‖², the mean over C, H, W: [B, C, H, W] twice → [B] float32.

    If the shapes differ, raise ValueError.
    """
    _check_same_shape(a=a, b=b)
    return (a.float() - b.float()).square().flatten(1).mean(1)


def guided_prediction(eps_uncond: Tensor, eps_cond: Tensor, beta: float | Tensor) -> Tensor:
    """Return ε_∅ + β (ε_c − ε_∅) in float32.

    β = 0 gives the unconditional prediction, 1 the conditional one, and values above 1 guidance. `beta` is a
    number, or a tensor as in `per_image`. If the shapes differ, raise ValueError.
    """
    _check_same_shape(eps_uncond=eps_uncond, eps_cond=eps_cond)
    uncond = eps_uncond.float()
    return uncond + per_image(beta, uncond) * (eps_cond.float() - uncond)


def per_image(value: float | Tensor, like: Tensor) -> Tensor:
    """Return `value` as a float32 tensor that broadcasts over `like` [B, C, H, W], on its device.

    `value` is a number, a scalar tensor, [B] or four-dimensional. [B] becomes [B, 1, 1, 1], because it would
    broadcast over W otherwise.
    """
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value


def steering_hinge(prediction: Tensor, safe: Tensor, unsafe: Tensor, margin: float | Tensor) -> Tensor:
    """Return the hinge max(‖ε̂ − f_safe‖² − ‖ε̂ − f_unsafe‖² + margin, 0) → [B].

    If the hinge is above 0, it is linear in ε̂. With f_safe and f_unsafe guided by β, its gradient is
    −2β(ε_cs − ε_cm)/CHW for every ε̂. `margin` is in squared units of the prediction, per element. It is a
    number, or one for each row [B]. If the shapes differ, raise ValueError.

    At ε̂ = ε_cm + s (ε_cs − ε_cm), the hinge is zero from

        s = 1/2 + (β − 1) (‖ε_cs − ε_∅‖² − ‖ε_cm − ε_∅‖²) / (2 D²) + margin / (2 β D²),   D² = ‖ε_cs − ε_cm‖².

    So the hinge asks for more than ε_cs if the margin is above β D², or if β is large and the safe prompt's
    guidance is larger than the malicious one's.
    """
    _check_same_shape(prediction=prediction, safe=safe, unsafe=unsafe)
    safe, unsafe = safe.float(), unsafe.float()
    # The difference of squares is factored, so that it is exactly linear in ε̂ and free of cancellation.
    difference = (unsafe - safe) * (2 * prediction.float() - safe - unsafe)
    return (difference.flatten(1).mean(1) + margin).clamp_min(0)


def relative_hinge(prediction: Tensor, safe: Tensor, unsafe: Tensor, margin: float) -> Tensor:
    """Return the hinge in units of the squared distance of its targets → [B].

        max((‖ε̂ − f_safe‖² − ‖ε̂ − f_unsafe‖²) / ‖f_safe − f_unsafe‖² + margin, 0)

    At β = 1 and ε̂ = ε_cm + s (ε_cs − ε_cm), it is max(1 − 2s + margin, 0). Margin 0 asks for half of the way
    to ε_cs, margin 1 for all of it. All steps and prompts have equal weight, however far their targets are
    apart. If f_safe = f_unsafe, it is 0. This form is not in the paper. If the shapes differ, raise
    ValueError.
    """
    unit = squared_distance(safe, unsafe)
    hinge = steering_hinge(prediction, safe, unsafe, margin * unit)
    return hinge / unit.clamp_min(torch.finfo(torch.float32).tiny)


def hinge_active_fraction(hinge: Tensor) -> Tensor:
    """Return the fraction of `hinge` [B] that is above zero and so has a gradient: a scalar in [0, 1]."""
    return (hinge > 0).float().mean()


def needed_displacement(prediction: Tensor, safe: Tensor, unsafe: Tensor, margin: float | Tensor) -> Tensor:
    """Return the smallest displacement of ε̂ that brings the hinge to zero, as RMS over C, H, W → [B].

    The loss is zero in a half-space with normal f_safe − f_unsafe. A displacement δ changes the hinge by
    −2 mean(δ (f_safe − f_unsafe)). So the shortest displacement lies along that normal and has

        RMS(δ) = hinge / (2 RMS(f_safe − f_unsafe)).

    If the hinge is zero, the result is 0. If f_safe = f_unsafe, the result is also 0: the hinge is then the
    margin, and no displacement lowers it. If the shapes differ, raise ValueError.
    """
    hinge = steering_hinge(prediction, safe, unsafe, margin)
    normal_rms = squared_distance(safe, unsafe).sqrt()
    return torch.where(normal_rms > 0, hinge / (2 * normal_rms), 0.0)


def preserve_loss(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return ‖ε̂(z_u, ∅) − ε(z_u, ∅)‖² on unconditional trajectories → [B].

    `reference` is the original network's prediction. On the trajectories of prompts to keep, c_k replaces ∅.
    """
    return squared_distance(prediction, reference)


def pull_loss(prediction: Tensor, safe_eps: Tensor) -> Tensor:
    """Return ‖ε̂(z, c_m) − ε(z, c_s)‖² → [B].

    This loss pulls to the unguided safe prediction. It is not in the paper.
    """
    return squared_distance(prediction, safe_eps)


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: [*tensor.shape] for name, tensor in tensors.items()}
    if len({tensor.shape for tensor in tensors.values()}) != 1:
        raise ValueError(f"expected tensors of one shape, got {shapes}")
