"""Null space and projection against their own objectives and constraints; adversaries; many concepts."""

import pytest
import torch
from torch import Tensor

from trce_lightning.closed_form import (
    Edit,
    KeepStatistics,
    PairStatistics,
    adversarial_answer,
    answered_pairs,
    concept_directions,
    keep_statistics,
    keyless_distance,
    mean_pairs,
    merge_pairs,
    pair_statistics,
    projection,
    readers,
    solve_edit,
    solve_null_space,
    solve_projection,
    sum_statistics,
    with_concept,
)

D, N = 12, 9
ETA, RIDGE = 0.3, 0.02


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MALICIOUS, SAFE = randn(1, N, D), randn(2, N, D)
PAIRS = pair_statistics(MALICIOUS, SAFE)
KEPT = randn(3, 40, 4) @ randn(4, 4, D)
"""Kept states in 4 of the 12 dimensions."""
KEEP = keep_statistics(KEPT)
EMPTY = randn(5, 3, D)
WEIGHTS = [randn(6, 5, D), randn(7, 8, D)]
BOTH = readers(WEIGHTS, [], D)


def null_space(share: float = 1e-9, ridge: float = 0.1) -> Edit:
    return solve_null_space(PAIRS, KEEP, EMPTY, share=share, ridge=ridge)


def removed(share: float = 0.4) -> tuple[Edit, Tensor]:
    span = keep_statistics(randn(8, 30, D)).k
    keep = keep_statistics(randn(9, 50, D))
    edit = solve_projection(PAIRS, keep, span, eta=ETA, ridge=RIDGE, share=share, span_ridge=0.01)
    assert edit.directions is not None
    return edit, edit.directions


def test_the_null_space_moves_neither_the_empty_prompt_nor_what_is_kept() -> None:
    edit = null_space()
    for states in (EMPTY, KEPT, KEPT[:3] + EMPTY):
        assert (states @ edit.transform.mT - states).abs().max() < 1e-12 * states.abs().max()
    assert (MALICIOUS @ edit.transform.mT - MALICIOUS).abs().max() > 0.1
    assert edit.directions is not None and edit.directions.shape == (D, D - 3 - 4)
    # The check can fail: the ridge form moves all of them, and so does a larger share.
    ridge = solve_edit(PAIRS, KEEP, eta=ETA, ridge=RIDGE).transform
    assert (EMPTY @ ridge.mT - EMPTY).abs().max() > 1e-3
    larger = null_space(share=0.5)
    assert (KEPT @ larger.transform.mT - KEPT).abs().max() > 1e-3
    assert (EMPTY @ larger.transform.mT - EMPTY).abs().max() < 1e-12


def test_the_null_space_is_stationary_among_edits_that_keep_the_constraint() -> None:
    edit, rho = null_space(), 0.1 * KEEP.k.trace() / D
    n = edit.directions
    assert n is not None
    identity = torch.eye(D, dtype=torch.float64)

    def gradient(start: Tensor) -> Tensor:
        free = start.clone().requires_grad_()
        t = identity + free @ n.mT
        value = (MALICIOUS @ t.mT - SAFE).square().sum() / N + rho * (t - identity).square().sum()
        return torch.autograd.grad(value, free)[0]

    found = (edit.transform - identity) @ n
    torch.testing.assert_close(found @ n.mT, edit.transform - identity)
    assert gradient(found).abs().max() < 1e-12
    assert gradient(found + 1e-4 * randn(10, *found.shape)).abs().max() > 1e-5


def test_the_null_space_is_speeds_closed_form() -> None:
    """T = I + (C_a − C_t) P [I − M K₂ (K₂ᵀ P M K₂)⁻¹ K₂ᵀ P] M, with P off the kept span and K₂ = ∅."""
    basis = torch.linalg.qr(KEPT[:4].mT).Q
    identity = torch.eye(D, dtype=torch.float64)
    p, k2 = identity - basis @ basis.mT, EMPTY.mT
    rho = 0.1 * KEEP.k.trace() / D
    m = torch.linalg.inv(PAIRS.m @ p + rho * identity)
    inner = torch.linalg.inv(k2.mT @ p @ m @ k2)
    speed = identity + (PAIRS.s - PAIRS.m) @ p @ (identity - m @ k2 @ inner @ k2.mT @ p) @ m
    torch.testing.assert_close(null_space().transform, speed, rtol=1e-8, atol=1e-10)


def test_the_share_bounds_what_kept_states_move_at_any_scale_and_width() -> None:
    keep = keep_statistics(randn(11, 60, D) * torch.logspace(0, -3, D, dtype=torch.float64))
    for share in (1e-4, 1e-2, 0.1):
        edit = solve_null_space(PAIRS, keep, EMPTY[:1], share=share, ridge=0.01)
        shift = torch.linalg.matrix_norm(edit.transform - torch.eye(D, dtype=torch.float64), 2)
        assert 0 < edit.keep_residual <= share * shift**2
        scaled = KeepStatistics(keep.k * 100, 1.0)
        pairs = pair_statistics(MALICIOUS * 10, SAFE * 10)
        same = solve_null_space(pairs, scaled, EMPTY[:1] * 10, share=share, ridge=0.01)
        torch.testing.assert_close(same.transform, edit.transform)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        null_space(share=share)
    with pytest.raises(ValueError, match="share must be"):
        removed(share=share)


def test_other_wrong_options_of_the_forms_are_refused() -> None:
    for ridge in (0.0, float("inf")):
        with pytest.raises(ValueError, match="ridge must be"):
            null_space(ridge=ridge)
        with pytest.raises(ValueError, match="ridge must be"):
            concept_directions(PAIRS.m, KEEP, share=0.5, ridge=ridge)
    everything = keep_statistics(randn(12, 50, D))
    with pytest.raises(ValueError, match="no direction holds as little"):
        solve_null_space(PAIRS, everything, EMPTY, share=1e-9, ridge=0.1)
    with pytest.raises(ValueError, match="one state size"):
        solve_null_space(PAIRS, KEEP, EMPTY[:, :3], share=0.1, ridge=0.1)


def test_nothing_reaches_the_projections_directions() -> None:
    edit, directions = removed()
    everything = torch.cat([randn(13, 100, D) * 1e3, MALICIOUS, torch.linalg.pinv(edit.transform).mT])
    assert (everything @ edit.transform.mT @ directions).abs().max() < 1e-9
    assert torch.linalg.matrix_rank(edit.transform) == D - directions.shape[1] < D
    plain = solve_edit(PAIRS, keep_statistics(randn(9, 50, D)), eta=ETA, ridge=RIDGE).transform
    assert (everything @ plain.mT @ directions).abs().max() > 1


def test_the_directions_are_the_leading_generalised_eigenvectors() -> None:
    span, keep = keep_statistics(randn(8, 30, D)).k, keep_statistics(randn(9, 50, D))
    metric = keep.k + 0.01 * keep.k.trace() / D * torch.eye(D, dtype=torch.float64)
    values = torch.linalg.eigvals(torch.linalg.solve(metric, span)).real.sort(descending=True).values
    for share in (0.1, 0.4, 0.9):
        w, found = concept_directions(span, keep, share=share, ridge=0.01)
        k = w.shape[1]
        torch.testing.assert_close(found, metric)
        torch.testing.assert_close(w.mT @ metric @ w, torch.eye(k, dtype=torch.float64))
        torch.testing.assert_close((w.mT @ span @ w).diagonal().flip(0), values[:k])
        torch.testing.assert_close(span @ w, metric @ w * (w.mT @ span @ w).diagonal())
        assert values[: k - 1].sum() < share * values.sum() <= values[:k].sum()
    # Neither the states' scale nor the number of concepts that are alike changes them.
    scaled = concept_directions(span * 300, KeepStatistics(keep.k * 100, 1.0), share=0.4, ridge=0.01)[0]
    assert scaled.shape == concept_directions(span, keep, share=0.4, ridge=0.01)[0].shape


def test_the_projection_moves_kept_states_least() -> None:
    span = keep_statistics(randn(8, 30, D)).k
    w, k = concept_directions(span, keep_statistics(randn(9, 50, D)), share=0.4, ridge=0.01)
    p, identity = projection(w, k), torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(p @ p, p)
    assert (p @ k @ w).abs().max() < 1e-12 and (w.mT @ p).abs().max() < 1e-12

    def moved(q: Tensor) -> Tensor:
        return torch.trace((q - identity) @ k @ (q - identity).mT)

    # All other solutions of P K W = 0 differ by matrices that are 0 on the span of K W.
    base = torch.linalg.qr(k @ w).Q
    for seed in range(5):
        step = randn(20 + seed, D, D)
        step = step - step @ base @ base.mT
        up, down = moved(p + 1e-4 * step), moved(p - 1e-4 * step)
        assert abs(up - down) < 1e-10 < up - moved(p)
    orthogonal = identity - base @ base.mT
    assert (orthogonal @ k @ w).abs().max() < 1e-12 and moved(orthogonal) > moved(p) + 1e-3


def test_the_adversarys_answer_is_stationary_and_undoes_a_ridge_edit() -> None:
    t = solve_edit(PAIRS, KEEP, eta=ETA, ridge=RIDGE).transform
    penalty = 0.01 * (BOTH.edited + BOTH.others).trace() / D
    answer = adversarial_answer(t, BOTH, ridge=0.01)

    def gradient(e: Tensor) -> Tensor:
        leaf = e.clone().requires_grad_()
        value = penalty * leaf.square().sum()
        for w in WEIGHTS:
            value = value + (leaf @ (w @ t).mT - MALICIOUS @ w.mT).square().sum()
        return torch.autograd.grad(value, leaf)[0]

    found = MALICIOUS @ answer.mT
    assert gradient(found).abs().max() < 1e-10
    assert gradient(MALICIOUS).abs().max() > 1
    free = adversarial_answer(t, BOTH, ridge=1e-12)
    torch.testing.assert_close(MALICIOUS @ free.mT @ t.mT, MALICIOUS, rtol=1e-4, atol=1e-4)


def test_matrices_that_are_not_edited_read_the_answer_as_it_is() -> None:
    t = solve_edit(PAIRS, KEEP, eta=ETA, ridge=RIDGE).transform
    one = readers(WEIGHTS[:1], WEIGHTS[1:], D)
    answer = adversarial_answer(t, one, ridge=0.01)
    penalty = 0.01 * (one.edited + one.others).trace() / D
    e = (MALICIOUS @ answer.mT).requires_grad_()
    edited, other = WEIGHTS
    value = (e @ (edited @ t).mT - MALICIOUS @ edited.mT).square().sum()
    value = value + (e @ other.mT - MALICIOUS @ other.mT).square().sum() + penalty * e.square().sum()
    assert torch.autograd.grad(value, e)[0].abs().max() < 1e-10
    assert not torch.allclose(answer, adversarial_answer(t, BOTH, ridge=0.01), atol=1e-2)


def test_answered_pairs_are_those_of_the_answered_states() -> None:
    answer = randn(30, D, D)
    found, expected = answered_pairs(PAIRS, answer), pair_statistics(MALICIOUS @ answer.mT, SAFE)
    for name in ("s", "m"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert (found.safe_energy, found.count) == (PAIRS.safe_energy, N)
    both, whole = (
        mean_pairs([PAIRS, found]),
        pair_statistics(torch.cat([MALICIOUS, MALICIOUS @ answer.mT]), torch.cat([SAFE, SAFE])),
    )
    torch.testing.assert_close(both.m, whole.m)
    torch.testing.assert_close(both.s, whole.s)
    assert both.count == whole.count


def least_distance(t: Tensor, edited: list[Tensor], others: list[Tensor]) -> float:
    """The keyless distance state by state, with the matrices stacked."""
    reach, wanted = torch.cat([*(w @ t for w in edited), *others]), torch.cat([*edited, *others])
    total = torch.zeros((), dtype=torch.float64)
    for e_m in MALICIOUS:
        e = torch.linalg.lstsq(reach, wanted @ e_m, driver="gelsd").solution
        total += (reach @ e - wanted @ e_m).square().sum()
    changed = sum((w @ (t @ MALICIOUS.mT - MALICIOUS.mT)).square().sum() for w in edited)
    return float(total / changed)


def test_ridge_has_a_key_and_the_projection_leaves_a_distance() -> None:
    edit, _ = removed()
    ridge = solve_edit(PAIRS, KEEP, eta=ETA, ridge=RIDGE).transform
    square = [randn(31, D, D), randn(32, D, D)]
    by = readers(square, [], D)
    assert keyless_distance(ridge, by, PAIRS.m) < 1e-12
    found = keyless_distance(edit.transform, by, PAIRS.m)
    assert found == pytest.approx(least_distance(edit.transform, square, []), rel=1e-6) and found > 0.01
    # No key for values alone either: the state must also look right to the keys that were left.
    one = keyless_distance(ridge, readers(square[:1], square[1:], D), PAIRS.m)
    assert one == pytest.approx(least_distance(ridge, square[:1], square[1:]), rel=1e-6) and one > 0.01
    assert keyless_distance(torch.eye(D, dtype=torch.float64), by, PAIRS.m) == 0


@pytest.mark.parametrize("form", ["ridge", "null_space"])
def test_a_concept_more_equals_solving_all_at_once(form: str) -> None:
    concepts = [(randn(40 + n, n, D), randn(50 + n, n, D)) for n in (3, 5, 5, 2)]
    keep = keep_statistics(torch.cat([KEPT, 0.1 * randn(60, 40, D)]))

    def solve(pairs: PairStatistics) -> Edit:
        if form == "ridge":
            return solve_edit(pairs, keep, eta=ETA, ridge=RIDGE)
        return solve_null_space(pairs, keep, EMPTY, share=0.2, ridge=0.1)

    edit = solve(pair_statistics(*concepts[0]))
    for known in range(1, len(concepts)):
        before = edit
        edit = with_concept(edit, *concepts[known])
        whole = solve(merge_pairs([pair_statistics(*concept) for concept in concepts[: known + 1]]))
        torch.testing.assert_close(edit.transform, whole.transform)
        assert whole.gain is not None and edit.gain is not None
        torch.testing.assert_close(edit.gain, whole.gain)
        assert not torch.allclose(edit.transform, before.transform, atol=1e-3)
    with pytest.raises(ValueError, match="must be"):
        with_concept(edit, concepts[0][0], concepts[1][1])
    with pytest.raises(ValueError, match="a projection is solved again"):
        with_concept(removed()[0], *concepts[0])


def test_sums_over_many_concepts_are_exact() -> None:
    concepts = [(randn(70 + i, n, D), randn(90 + i, n, D)) for i, n in enumerate((4, 2, 4, 7, 2, 4))]
    apart = merge_pairs([pair_statistics(*concept) for concept in concepts])
    found = sum_statistics(concepts)
    torch.testing.assert_close(found.s, apart.s)
    torch.testing.assert_close(found.m, apart.m)
    assert found.safe_energy == pytest.approx(apart.safe_energy) and found.count == apart.count
    pooled = pair_statistics(*(torch.cat(states) for states in zip(*concepts, strict=True)))
    assert not torch.allclose(found.m, pooled.m * len(concepts), atol=1e-3)
    one, alone = sum_statistics(concepts[:1]), pair_statistics(*concepts[0])
    assert torch.equal(one.s, alone.s) and torch.equal(one.m, alone.m), (
        "one concept's sums are the same bytes"
    )
