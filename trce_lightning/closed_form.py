"""Stage 1 of TRCE, textual semantic erasure, as one matrix (TRCE, arXiv 2503.07389).

Every key and value projection W that reads the raw text states without bias is replaced by

    W' = W T,   T = A B⁻¹,   A = S + η K + λ I,   B = M + η K + λ I,
    S = mean e_s e_mᵀ,   M = mean e_m e_mᵀ,   K = mean e_k e_kᵀ,

the minimiser over W' of

    mean ‖W' e_m − W e_s‖² + η mean ‖W' e_k − W e_k‖² + λ ‖W' − W‖²

with e_m, e_s the paired text states of malicious and safe prompts and e_k the states to keep. T does not
depend on W, so it is solved once; W' e = W (T e) for every state e. Edits do not compose: a further concept
is solved again from the original weights, with `merge_pairs` over all concepts.

All statistics are float64 on the CPU, whatever the states' dtype and device.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class SingularError(ValueError):
    """B is not positive definite to float64's precision, so T is not determined."""


@dataclass(frozen=True, eq=False)
class PairStatistics:
    """Second moments of (malicious, safe) state pairs; over several concepts, the sum of the concepts' means.

    `s` and `m` are S and M, [d, d] float64; `safe_energy` is mean ‖e_s‖²; `count` is the number of pairs.
    """

    s: Tensor
    m: Tensor
    safe_energy: float
    count: int


@dataclass(frozen=True, eq=False)
class KeepStatistics:
    """Weighted mean `k` = K of e_k e_kᵀ, [d, d] float64, and the total `weight` behind it."""

    k: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Edit:
    """The solved edit and how well it does.

    `transform` is T, [d, d] float64. `condition_number` is ‖B‖₁ ‖B⁻¹‖₁ (≥ 1).
    `erase_residual` = mean ‖T e_m − e_s‖² / mean ‖e_s‖², 0 when each malicious state lands on its safe one.
    `keep_residual` = mean ‖T e_k − e_k‖² / mean ‖e_k‖², 0 when the kept states do not move.
    """

    transform: Tensor
    condition_number: float
    erase_residual: float
    keep_residual: float


def pair_statistics(malicious: Tensor, safe: Tensor) -> PairStatistics:
    """S, M and mean ‖e_s‖² of one concept's n pairs; `malicious` and `safe` are [n, d], row i with row i.

    Raises ValueError on shapes that differ or are not [n ≥ 1, d], and on states that are not finite.
    """
    if malicious.shape != safe.shape:
        shapes = f"{[*malicious.shape]} and {[*safe.shape]}"
        raise ValueError(f"malicious and safe must have one shape, got {shapes}")
    e_m, e_s = _as_states(malicious, "malicious"), _as_states(safe, "safe")
    count = e_m.shape[0]
    s, m = e_s.mT @ e_m / count, e_m.mT @ e_m / count
    return PairStatistics(s=s, m=m, safe_energy=e_s.square().sum().item() / count, count=count)


def merge_pairs(parts: Sequence[PairStatistics]) -> PairStatistics:
    """The union of concepts: S, M and safe energy are Σ over concepts of their means; counts add up.

    Each concept so weighs the same, however many pairs describe it. Raises ValueError when `parts` is empty
    or mixes state sizes d.
    """
    _check_mergeable([part.m for part in parts])
    return PairStatistics(
        s=torch.stack([part.s for part in parts]).sum(0),
        m=torch.stack([part.m for part in parts]).sum(0),
        safe_energy=math.fsum(part.safe_energy for part in parts),
        count=sum(part.count for part in parts),
    )


def keep_statistics(states: Tensor, weights: Tensor | None = None) -> KeepStatistics:
    """K = Σ w e eᵀ / Σ w over `states` [n, d] with `weights` [n] ≥ 0 (None: 1 each).

    Raises ValueError on shapes other than these, non-finite states, or weights that are negative, non-finite
    or all zero.
    """
    e_k = _as_states(states, "states")
    if weights is None:
        return KeepStatistics(k=e_k.mT @ e_k / e_k.shape[0], weight=float(e_k.shape[0]))
    w = weights.detach().cpu().double()
    if w.shape != e_k.shape[:1]:
        raise ValueError(f"weights must be [{e_k.shape[0]}], one per state, got {[*w.shape]}")
    total = w.sum().item()
    if not (w.min() >= 0 and 0 < total < math.inf):
        raise ValueError(f"weights must be finite, not negative and not all zero, got {w.min()} … {w.max()}")
    return KeepStatistics(k=(e_k * w[:, None]).mT @ e_k / total, weight=total)


def merge_keep(parts: Sequence[KeepStatistics]) -> KeepStatistics:
    """The weighted mean of means: batches merged equal one batch of all their states.

    Raises ValueError when `parts` is empty or mixes state sizes d.
    """
    _check_mergeable([part.k for part in parts])
    weight = math.fsum(part.weight for part in parts)
    k = torch.stack([part.k * (part.weight / weight) for part in parts]).sum(0)
    return KeepStatistics(k=k, weight=weight)


def solve_edit(pairs: PairStatistics, keep: KeepStatistics, *, eta: float, ridge: float) -> Edit:
    """T = A B⁻¹ by Cholesky factorisation of B, with `eta` = η ≥ 0 and `ridge` = λ ≥ 0.

    η weighs the kept states' mean, λ pulls T to I; both are relative to the pairs' mean. In the authors'
    released code the pairs' term is a mean as well, but the kept term is a sum over the N states of a
    downloaded cache, multiplied by the configured scale s twice and divided by 30,000; so η = N s² / 30,000
    here, and N was not published: their s cannot be used as η.

    Raises ValueError when `eta` or `ridge` is negative or not finite, or when the state sizes differ;
    `SingularError` when B is not positive definite (too few kept states: give a larger `ridge`).
    """
    for name, value in (("eta", eta), ("ridge", ridge)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    _check_mergeable([pairs.m, keep.k])
    regulariser = eta * keep.k + ridge * torch.eye(keep.k.shape[0], dtype=torch.float64)
    a, b = pairs.s + regulariser, pairs.m + regulariser
    factor, failed = torch.linalg.cholesky_ex(b)
    condition_number = math.inf if failed else _condition_number(b, factor)
    # A singular matrix can survive factorisation by rounding.
    if not condition_number < 1 / (b.shape[0] * torch.finfo(b.dtype).eps):
        raise SingularError(
            f"M + eta K + ridge I is not positive definite with eta={eta} and ridge={ridge} (condition "
            f"number {condition_number:.3g}): give a larger ridge, or more kept states and eta > 0"
        )
    transform = torch.cholesky_solve(a.mT, factor).mT.contiguous()
    erase_residual, keep_residual = _erase_residual(transform, pairs), _keep_residual(transform, keep)
    return Edit(transform, condition_number, erase_residual, keep_residual)


def apply_edits(weights: Iterable[Tensor], transform: Tensor) -> Iterator[Tensor]:
    """W' = W T for each W [d_out, d] of `weights`, in its dtype and on its device.

    Computed as W + W (T − I) in float32, or in float64 for such a weight: the product rounds relative to the
    change.

    Raises ValueError when a weight is not [d_out, d] for `transform` [d, d].
    """
    d = transform.shape[0]
    shift = transform - torch.eye(d, dtype=transform.dtype)
    rounded = {dtype: shift.to(dtype) for dtype in (torch.float32, torch.float64)}
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != d:
            raise ValueError(f"weight must be [d_out, {d}] to fit the transform, got {[*weight.shape]}")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        w = weight.detach().to("cpu", dtype)
        yield torch.addmm(w, w, rounded[dtype]).to(weight)


def _condition_number(b: Tensor, factor: Tensor) -> float:
    norms = [torch.linalg.matrix_norm(matrix, 1) for matrix in (b, torch.cholesky_inverse(factor))]
    return (norms[0] * norms[1]).item()


def _erase_residual(t: Tensor, pairs: PairStatistics) -> float:
    # mean ‖T e_m − e_s‖² = tr(T M Tᵀ) − 2 tr(T Sᵀ) + mean ‖e_s‖²; rounding may leave it just below 0.
    squared = ((t @ pairs.m) * t).sum() - 2 * (t * pairs.s).sum() + pairs.safe_energy
    return max(squared.item(), 0.0) / pairs.safe_energy if pairs.safe_energy > 0 else 0.0


def _keep_residual(t: Tensor, keep: KeepStatistics) -> float:
    shift = t - torch.eye(t.shape[0], dtype=t.dtype)
    energy = keep.k.trace().item()
    return max(((shift @ keep.k) * shift).sum().item(), 0.0) / energy if energy > 0 else 0.0


def _as_states(states: Tensor, name: str) -> Tensor:
    if states.ndim != 2 or 0 in states.shape:
        raise ValueError(f"{name} must be [n, d] with n and d at least 1, got {[*states.shape]}")
    # First to the CPU: not every device has float64.
    states = states.detach().cpu().double()
    if not states.isfinite().all():
        bad_rows = int((~states.isfinite()).any(1).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad_rows} of {len(states)} rows")
    return states


def _check_mergeable(moments: Sequence[Tensor]) -> None:
    sizes = sorted({moment.shape[0] for moment in moments})
    if len(sizes) != 1:
        raise ValueError(f"statistics must be one or more, all of one state size d, got sizes {sizes}")
