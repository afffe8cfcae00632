"""Stage 1 of TRCE, textual semantic erasure, as one matrix T in three closed forms (TRCE, arXiv 2503.07389).

Every key and value projection W that reads the raw text states without bias is replaced by W' = W T. T does
not depend on W, so it is solved once: W' e = W (T e) for every state e. With the second moments

    S = mean e_s e_mᵀ,   M = mean e_m e_mᵀ,   K = mean e_k e_kᵀ

of the paired states of malicious prompts (e_m) and safe prompts (e_s) and of the states to keep (e_k):

- *ridge* (the paper's) has T = A B⁻¹ with A = S + η K + λ I and B = M + η K + λ I. It is the minimiser of
  mean ‖T e_m − e_s‖² + η mean ‖T e_k − e_k‖² + λ ‖T − I‖², and W T is that of the same sum with W in front.
- *null space* (as in SPEED, without its filters that depend on W) minimises mean ‖T e_m − e_s‖² + ρ ‖T − I‖²
  and does not move the empty prompt's states and the span of what is kept at all:
  T = I + (S − M) N (Nᵀ M N + ρ I)⁻¹ Nᵀ, where N is an orthonormal basis of the other directions.
- *projection* has P T, where T is ridge's and P = I − K_ε W_k W_kᵀ takes away k directions (as LEACE, arXiv
  2306.03819, does for a linear concept). W_kᵀ P T e = 0 for every e, so P T has no inverse.

For several concepts, S and M are sums over the concepts. Edits do not compose. To erase a further concept,
solve again from the original weights, with the sums over all concepts, or use :func:`with_concept`.

All statistics are float64 on the CPU, whatever the states' dtype and device.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

MATRICES = ("key", "value")
"""The kinds of matrices that an edit can replace."""
ROUNDING = 1e-9
"""Singular values below this share of the largest count as 0."""


class SingularError(ValueError):
    """An error: the system is not positive definite to float64's precision, so T is not determined."""


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

    `transform` is T, [d, d] float64. `condition_number` is ‖B‖₁ ‖B⁻¹‖₁ (≥ 1) of the solved system B.
    `erase_residual` is mean ‖T e_m − e_s‖² / mean ‖e_s‖². It is 0 if T maps each malicious state to its safe
    one. `keep_residual` is mean ‖T e_k − e_k‖² / mean ‖e_k‖². It is 0 if the kept states do not move.
    """

    transform: Tensor
    condition_number: float
    erase_residual: float
    keep_residual: float
    gain: Tensor | None = None
    """H [d, d], with which :func:`with_concept` adds pairs. A projection has none."""
    directions: Tensor | None = None
    """Directions [d, k]: the null space N outside which T − I is 0, or the W_k with W_kᵀ T = 0."""
    matrices: tuple[str, ...] = MATRICES
    """The kinds of matrices that are edited."""
    keyless_distance: float | None = None
    """See :func:`keyless_distance`. It is None if it was not computed."""
    stream: str = "context"
    """The name of the states that T maps, where a model reads several kinds."""
    further: tuple["Edit", ...] = ()
    """The edits of the other kinds of states. Each is solved by itself."""


@dataclass(frozen=True, eq=False)
class Readers:
    """The second moments Σ WᵀW [d, d] of the matrices that read states: the edited ones and the others."""

    edited: Tensor
    others: Tensor


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


def sum_statistics(concepts: Sequence[tuple[Tensor, Tensor]]) -> PairStatistics:
    """Return :func:`merge_pairs` of every concept's (malicious, safe) states, up to rounding.

    Concepts with equally many pairs share one product, so many concepts take as long as one with all pairs.
    """
    by_size = groupby(sorted(concepts, key=lambda pairs: len(pairs[0])), key=lambda pairs: len(pairs[0]))
    parts = []
    for size, alike in by_size:
        malicious, safe = (torch.cat(states) for states in zip(*alike, strict=True))
        part, shared = pair_statistics(malicious, safe), len(malicious) // size
        if shared > 1:  # the part is a mean over all, and the sum of each concept's mean is wanted
            part = replace(part, s=part.s * shared, m=part.m * shared, safe_energy=part.safe_energy * shared)
        parts.append(part)
    return parts[0] if len(parts) == 1 else merge_pairs(parts)


def mean_pairs(parts: Sequence[PairStatistics]) -> PairStatistics:
    """Return the mean of statistics of the same concepts, such as the rounds of an adversary.

    If `parts` is empty or mixes state sizes d, raise ValueError.
    """
    total = merge_pairs(parts)
    n = len(parts)
    return PairStatistics(total.s / n, total.m / n, total.safe_energy / n, total.count)


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
    gain = None if failed else torch.cholesky_inverse(factor)
    condition_number = math.inf if gain is None else _condition_number(b, gain)
    # A singular matrix can survive factorisation by rounding.
    if not condition_number < 1 / (b.shape[0] * torch.finfo(b.dtype).eps):
        raise SingularError(
            f"M + eta K + ridge I is not positive definite with eta={eta} and ridge={ridge} (condition "
            f"number {condition_number:.3g}): give a larger ridge, or more kept states and eta > 0"
        )
    transform = torch.cholesky_solve(a.mT, factor).mT.contiguous()
    return _edit(transform, condition_number, pairs, keep, gain=gain)


def solve_null_space(
    pairs: PairStatistics, keep: KeepStatistics, empty: Tensor, *, share: float, ridge: float
) -> Edit:
    """Return T = I + (S − M) N (Nᵀ M N + ρ I)⁻¹ Nᵀ, with ρ = `ridge` · tr(K) / d.

    N is orthonormal, and orthogonal to every state of `empty` [n, d] and to the leading eigenvectors of K
    among the directions that are left. It has as many of the last eigenvectors as together hold at most the
    `share` τ of tr(K), which is mean ‖e_k‖². So whatever the width d and the scale of the states,

        mean ‖T e_k − e_k‖² / mean ‖e_k‖² ≤ τ ‖T − I‖²,

    and T e = e for all e in the other directions' span. Under this constraint, T is the minimiser of
    mean ‖T e_m − e_s‖² + ρ ‖T − I‖². For λ = 0 it equals SPEED's closed form with the projector N Nᵀ.

    Raises:
        ValueError: `share` is not in (0, 1], `ridge` is not above 0, the state sizes differ, or N is empty.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be finite and above 0, got {ridge}")
    states = _as_states(empty, "empty")
    _check_mergeable([pairs.m, keep.k, states.mT])
    energy = keep.k.trace()
    left, singular, _ = torch.linalg.svd(states.mT)
    rank = int((singular > torch.finfo(states.dtype).eps * max(states.shape) * singular[0]).sum())
    free = left[:, rank:]
    values, vectors = torch.linalg.eigh(free.mT @ keep.k @ free)
    count = int((values.clamp_min(0).cumsum(0) <= share * energy).sum())
    if count == 0:
        raise ValueError(
            f"no direction holds as little as {share} of the kept states' energy beside the {rank} of the "
            "empty prompt: give a larger share"
        )
    n = free @ vectors[:, :count]
    b = n.mT @ pairs.m @ n + ridge * energy / len(n) * torch.eye(count, dtype=n.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(b))
    gain = n @ inverse @ n.mT
    transform = torch.eye(len(n), dtype=n.dtype) + (pairs.s - pairs.m) @ gain
    return _edit(transform, _condition_number(b, inverse), pairs, keep, gain=gain, directions=n)


def solve_projection(
    pairs: PairStatistics,
    keep: KeepStatistics,
    span: Tensor,
    *,
    eta: float,
    ridge: float,
    share: float,
    span_ridge: float,
) -> Edit:
    """Return P T, where T is :func:`solve_edit`'s and P is :func:`projection` on :func:`concept_directions`.

    `span` [d, d] is the second moment of malicious states at all positions after the SoT.

    Raises:
        ValueError: as in :func:`solve_edit` and :func:`concept_directions`.
        SingularError: T is not determined.
    """
    edit = solve_edit(pairs, keep, eta=eta, ridge=ridge)
    directions, metric = concept_directions(span, keep, share=share, ridge=span_ridge)
    transform = projection(directions, metric) @ edit.transform
    return _edit(transform, edit.condition_number, pairs, keep, directions=directions)


def concept_directions(
    span: Tensor, keep: KeepStatistics, *, share: float, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return W_k [d, k] and K_ε = K + ε I, with ε = `ridge` · tr(K) / d.

    W_k are the leading generalised eigenvectors of (`span`, K_ε): the directions w in which malicious states
    have the most energy wᵀ M w for the energy wᵀ K_ε w that kept states have. W_kᵀ K_ε W_k = I. k is the
    least number whose eigenvalues sum to the `share` of all. It does not depend on the states' scale.

    If `share` is not in (0, 1), `ridge` is not above 0, or the state sizes differ, raise ValueError.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be finite and above 0, got {ridge}")
    _check_mergeable([span, keep.k])
    d = len(span)
    metric = keep.k + ridge * keep.k.trace() / d * torch.eye(d, dtype=torch.float64)
    factor = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(factor, span, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    reached = values.flip(0).clamp_min(0).cumsum(0)
    count = int((reached < share * reached[-1]).sum()) + 1
    return torch.linalg.solve_triangular(factor.mT, vectors[:, -count:], upper=True), metric


def projection(directions: Tensor, metric: Tensor) -> Tensor:
    """Return P = I − K W (Wᵀ K W)⁻¹ Wᵀ for directions W [d, k] and a metric K [d, d].

    Wᵀ P = 0. Of all matrices with P K W = 0, where kept states keep no correlation with Wᵀ e, it is the one
    that moves them least: it minimises tr((P − I) K (P − I)ᵀ), which is mean ‖P e_k − e_k‖².
    """
    moved = metric @ directions
    inverse = torch.linalg.solve(directions.mT @ moved, directions.mT)
    return torch.eye(len(metric), dtype=metric.dtype) - moved @ inverse


def with_concept(edit: Edit, malicious: Tensor, safe: Tensor) -> Edit:
    """Return the edit of one concept more, from T and H alone, in O(n d²) for n pairs.

        T + (V − T U) (I + Uᵀ H U)⁻¹ (H U)ᵀ,   U = e_m / √n and V = e_s / √n as columns

    This is what solving again with the sums of all concepts and the same K gives. H is B⁻¹ (ridge) or
    N (Nᵀ M N + ρ I)⁻¹ Nᵀ (null space). `malicious` and `safe` are [n, d]. Residuals and condition number are
    NaN, because the earlier states are not known here.

    If the edit has no H, or the shapes don't fit, raise ValueError.
    """
    if edit.gain is None:
        raise ValueError("the edit must be a ridge or a null space, a projection is solved again")
    if malicious.shape != safe.shape or malicious.shape[1:] != edit.gain.shape[1:]:
        shapes = f"{[*malicious.shape]} and {[*safe.shape]}"
        raise ValueError(f"malicious and safe must be [n, {len(edit.gain)}], got {shapes}")
    scale = math.sqrt(len(malicious))
    u, v = _as_states(malicious, "malicious").mT / scale, _as_states(safe, "safe").mT / scale
    reached = edit.gain @ u
    inner = u.mT @ reached
    inner.diagonal().add_(1)
    answer = torch.cholesky_solve(reached.mT, torch.linalg.cholesky(inner))
    return Edit(
        transform=torch.addmm(edit.transform, v - edit.transform @ u, answer),
        condition_number=math.nan,
        erase_residual=math.nan,
        keep_residual=math.nan,
        gain=torch.addmm(edit.gain, reached, answer, alpha=-1),
        directions=edit.directions,
        matrices=edit.matrices,
    )


def readers(edited: Iterable[Tensor], others: Iterable[Tensor], d: int) -> Readers:
    """Return Σ WᵀW over the `edited` matrices [d_out, d] and over the `others` that read the same states."""

    def moment(weights: Iterable[Tensor]) -> Tensor:
        total = torch.zeros(d, d, dtype=torch.float64)
        for weight in weights:
            w = weight.detach().cpu().double()
            total.addmm_(w.mT, w)
        return total

    return Readers(moment(edited), moment(others))


def adversarial_answer(transform: Tensor, by: Readers, *, ridge: float) -> Tensor:
    """Return R [d, d], which maps e_m to the state that acts under T like e_m without T.

        R e_m = argmin_e Σ ‖W T e − W e_m‖² + Σ' ‖W e − W e_m‖² + λ ‖e‖²
              = (Tᵀ G T + G' + λ I)⁻¹ (Tᵀ G + G') e_m

    The first sum is over the edited matrices (G), the second over the others (G'), and λ is `ridge` times
    tr(G + G') / d.
    """
    d = len(transform)
    whole = by.edited + by.others
    pulled = transform.mT @ by.edited
    system = pulled @ transform + by.others + ridge * whole.trace() / d * torch.eye(d, dtype=whole.dtype)
    return torch.linalg.solve(system, pulled + by.others)


def answered_pairs(pairs: PairStatistics, answer: Tensor) -> PairStatistics:
    """Return the statistics of pairs whose malicious states e_m became R e_m."""
    return replace(pairs, s=pairs.s @ answer.mT, m=answer @ pairs.m @ answer.mT)


def keyless_distance(transform: Tensor, by: Readers, m: Tensor) -> float:
    """Return the share of the edit's effect on malicious states that no state undoes.

        mean min_e (Σ ‖W T e − W e_m‖² + Σ' ‖W e − W e_m‖²) / mean Σ ‖W T e_m − W e_m‖²

    It is 0 if T has a key, and 1 if e = e_m is the attacker's best state. The minimum is over every state e,
    for each malicious state. `m` [d, d] is their second moment. The sum Σ is over the edited matrices, and Σ'
    is over those that still read e itself. If T changes nothing, the distance is 0.
    """
    roots, states = [_root(by.edited), _root(by.others)], _root(m)
    reach = torch.cat([roots[0] @ transform, roots[1]])
    wanted = torch.cat(roots) @ states
    left, singular, _ = torch.linalg.svd(reach, full_matrices=False)
    basis = left[:, singular > ROUNDING * singular[0]]
    missed = (wanted - basis @ (basis.mT @ wanted)).square().sum()
    changed = (roots[0] @ (transform @ states - states)).square().sum()
    return float((missed / changed).clamp(max=1)) if changed > 0 else 0.0


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


def _edit(
    transform: Tensor,
    condition_number: float,
    pairs: PairStatistics,
    keep: KeepStatistics,
    *,
    gain: Tensor | None = None,
    directions: Tensor | None = None,
) -> Edit:
    erase_residual, keep_residual = _erase_residual(transform, pairs), _keep_residual(transform, keep)
    return Edit(transform, condition_number, erase_residual, keep_residual, gain, directions)


def _condition_number(b: Tensor, inverse: Tensor) -> float:
    return (torch.linalg.matrix_norm(b, 1) * torch.linalg.matrix_norm(inverse, 1)).item()


def _root(moment: Tensor) -> Tensor:
    """Return the symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


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
