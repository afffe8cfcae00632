"""Stage 1 of TRCE, textual semantic erasure, as one matrix (TRCE, arXiv 2503.07389).

Every key and value projection W that reads the raw text states without bias is replaced by

    W' = W T,   T = A B⁻¹,   A = S + η K + λ I,   B = M + η K + λ I,
    S = mean e_s e_mᵀ,   M = mean e_m e_mᵀ,   K = mean e_k e_kᵀ,

the minimiser over W' of

    mean ‖W' e_m − W e_s‖² + η mean ‖W' e_k − W e_k‖² + λ ‖W' − W‖²

e_m and e_s are the paired text states of malicious and safe prompts, and e_k are the states to keep. T does
not depend on W, so it is solved once: W' e = W (T e) for every state e. Edits do not compose. To erase a
further concept, solve again from the original weights, with `merge_pairs` over all concepts.

All statistics are float64 on the CPU, whatever the states' dtype and device.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class SingularError(ValueError):
    """An error: B is not positive definite to float64's precision, so T is not determined."""


@dataclass(frozen=True, eq=False)
class PairStatistics:
    """The second moments of (malicious, safe) state pairs. For several concepts, they are sums of means.

    `s` and `m` are S and M, [d, d] float64. `safe_energy` is mean ‖e_s‖². `count` is the number of pairs.
    """

    s: Tensor
    m: Tensor
    safe_energy: float
    count: int


@dataclass(frozen=True, eq=False)
class KeepStatistics:
    """The weighted mean `k` = K of e_k e_kᵀ, [d, d] float64, and its total `weight`."""

    k: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class Edit:
    """The solved edit and its residuals.

    `transform` is T, [d, d] float64. `condition_number` is ‖B‖₁ ‖B⁻¹‖₁ (≥ 1).
    `erase_residual` is mean ‖T e_m − e_s‖² / mean ‖e_s‖². It is 0 if T maps each malicious state to its safe
    one. `keep_residual` is mean ‖T e_k − e_k‖² / mean ‖e_k‖². It is 0 if the kept states do not move.
    """

    transform: Tensor
    condition_number: float
    erase_residual: float
    keep_residual: float


def pair_statistics(malicious: Tensor, safe: Tensor) -> PairStatistics:
    """Return S, M and mean ‖e_s‖² of one concept's n pairs.

    `malicious` and `safe` are [n, d], and row i pairs with row i. If the shapes differ or are not [n ≥ 1, d],
    or states are not finite, raise ValueError.
    """
    if malicious.shape != safe.shape:
        shapes = f"{[*malicious.shape]} and {[*safe.shape]}"
        raise ValueError(f"malicious and safe must have one shape, got {shapes}")
    e_m, e_s = _as_states(malicious, "malicious"), _as_states(safe, "safe")
    count = e_m.shape[0]
    s, m = e_s.mT @ e_m / count, e_m.mT @ e_m / count
    return PairStatistics(s=s, m=m, safe_energy=e_s.square().sum().item() / count, count=count)


def merge_pairs(parts: Sequence[PairStatistics]) -> PairStatistics:
    """Return the statistics of several concepts: S, M, safe energy and count are sums over the concepts.

    S, M and safe energy are means of each concept, so all concepts have equal weight, whatever their number
    of pairs. If `parts` is empty or mixes state sizes d, raise ValueError.
    """
    _check_mergeable([part.m for part in parts])
    return PairStatistics(
        s=torch.stack([part.s for part in parts]).sum(0),
        m=torch.stack([part.m for part in parts]).sum(0),
        safe_energy=math.fsum(part.safe_energy for part in parts),
        count=sum(part.count for part in parts),
    )


def keep_statistics(states: Tensor, weights: Tensor | None = None) -> KeepStatistics:
    """Return K = Σ w e eᵀ / Σ w over `states` [n, d] with `weights` [n] ≥ 0. If None, each weight is 1.

    If shapes are others, states are not finite, or weights are negative, not finite or all zero, raise
    ValueError.
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
    """Return the weighted mean of means. Merged batches equal one batch of all their states.

    If `parts` is empty or mixes state sizes d, raise ValueError.
    """
    _check_mergeable([part.k for part in parts])
    weight = math.fsum(part.weight for part in parts)
    k = torch.stack([part.k * (part.weight / weight) for part in parts]).sum(0)
    return KeepStatistics(k=k, weight=weight)


def solve_edit(pairs: PairStatistics, keep: KeepStatistics, *, eta: float, ridge: float) -> Edit:
    """Return the edit T = A B⁻¹, by Cholesky factorisation of B, with `eta` = η ≥ 0 and `ridge` = λ ≥ 0.

    η is the weight of the kept states' mean, and λ pulls T to I. Both are relative to the pairs' mean. The
    scale s in the authors' released code cannot be used as η. There, the pairs' term is a mean as well, but
    the kept term is a sum over the N states of a downloaded cache. It is multiplied by s twice and divided by
    30,000, so that η = N s² / 30,000. N was not published.

    Raises:
        ValueError: `eta` or `ridge` is negative or not finite, or the state sizes differ.
        SingularError: B is not positive definite. There are too few kept states, so give a larger `ridge`.
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
    """Yield W' = W T for each W [d_out, d] of `weights`, in its dtype and on its device.

    W' is computed as W + W (T − I) in float32, or in float64 if the weight is float64. So rounding errors are
    relative to the change.

    If a weight is not [d_out, d] for `transform` [d, d], raise ValueError.
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
    # mean ‖T e_m − e_s‖² = tr(T M Tᵀ) − 2 tr(T Sᵀ) + mean ‖e_s‖². Rounding may make it negative.
    squared = ((t @ pairs.m) * t).sum() - 2 * (t * pairs.s).sum() + pairs.safe_energy
    return max(squared.item(), 0.0) / pairs.safe_energy if pairs.safe_energy > 0 else 0.0


def _keep_residual(t: Tensor, keep: KeepStatistics) -> float:
    shift = t - torch.eye(t.shape[0], dtype=t.dtype)
    energy = keep.k.trace().item()
    return max(((shift @ keep.k) * shift).sum().item(), 0.0) / energy if energy > 0 else 0.0


def _as_states(states: Tensor, name: str) -> Tensor:
    if states.ndim != 2 or 0 in states.shape:
        raise ValueError(f"{name} must be [n, d] with n and d at least 1, got {[*states.shape]}")
    # The states go to the CPU first, because not every device has float64.
    states = states.detach().cpu().double()
    if not states.isfinite().all():
        bad_rows = int((~states.isfinite()).any(1).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad_rows} of {len(states)} rows")
    return states


def _check_mergeable(moments: Sequence[Tensor]) -> None:
    sizes = sorted({moment.shape[0] for moment in moments})
    if len(sizes) != 1:
        raise ValueError(f"statistics must be one or more, all of one state size d, got sizes {sizes}")
