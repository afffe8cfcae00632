"""Stage 1's matrix against its own objective, against naive loops, and against the identities it promises."""

import pytest
import torch
from torch import Tensor

from trce_lightning.closed_form import (
    Edit,
    KeepStatistics,
    apply_edits,
    keep_statistics,
    merge_keep,
    merge_pairs,
    pair_statistics,
    solve_edit,
)

D, D_OUT, ETA, RIDGE = 7, 5, 0.3, 0.02


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def objective(
    edited: Tensor, weight: Tensor, concepts: list[tuple[Tensor, Tensor]], kept: Tensor, kept_weights: Tensor
) -> Tensor:
    """The stage-1 objective, pair by pair and state by state."""
    total = RIDGE * (edited - weight).square().sum()
    for malicious, safe in concepts:
        for e_m, e_s in zip(malicious, safe, strict=True):
            total = total + (edited @ e_m - weight @ e_s).square().sum() / len(malicious)
    for e_k, w in zip(kept, kept_weights, strict=True):
        total = total + ETA * w * (edited @ e_k - weight @ e_k).square().sum() / kept_weights.sum()
    return total


def edited_by(weight: Tensor, transform: Tensor) -> Tensor:
    (edited,) = apply_edits([weight], transform)
    return edited


def gradient(edited: Tensor, *rest: object) -> Tensor:
    leaf = edited.clone().requires_grad_()
    (grad,) = torch.autograd.grad(objective(leaf, *rest), leaf)  # type: ignore[arg-type]
    return grad


@pytest.mark.parametrize("concept_sizes", [[4], [4, 9]])
def test_gradient_of_objective_is_zero(generator: torch.Generator, concept_sizes: list[int]) -> None:
    weight, kept = randn(generator, D_OUT, D), randn(generator, 11, D)
    kept_weights = torch.rand(11, generator=generator, dtype=torch.float64)
    concepts = [(randn(generator, n, D), randn(generator, n, D)) for n in concept_sizes]
    pairs = merge_pairs([pair_statistics(*concept) for concept in concepts])
    edit = solve_edit(pairs, keep_statistics(kept, kept_weights), eta=ETA, ridge=RIDGE)

    rest = (weight, concepts, kept, kept_weights)
    assert gradient(edited_by(weight, edit.transform), *rest).abs().max() < 1e-12
    for not_minimal in (edit.transform + 1e-4 * randn(generator, D, D), torch.eye(D, dtype=torch.float64)):
        assert gradient(weight @ not_minimal, *rest).abs().max() > 1e-5
    assert pairs.count == sum(concept_sizes)


def test_naive_loop_per_layer_agrees(generator: torch.Generator) -> None:
    malicious, safe, kept = randn(generator, 6, D), randn(generator, 6, D), randn(generator, 9, D)
    edit = solve_edit(pair_statistics(malicious, safe), keep_statistics(kept), eta=ETA, ridge=RIDGE)
    for _ in range(3):
        weight = randn(generator, D_OUT, D)
        left, right = RIDGE * weight, RIDGE * torch.eye(D, dtype=torch.float64)
        for e_m, e_s in zip(malicious, safe, strict=True):
            left = left + torch.outer(weight @ e_s, e_m) / 6
            right = right + torch.outer(e_m, e_m) / 6
        for e_k in kept:
            left = left + ETA * torch.outer(weight @ e_k, e_k) / 9
            right = right + ETA * torch.outer(e_k, e_k) / 9
        torch.testing.assert_close(edited_by(weight, edit.transform), left @ torch.linalg.inv(right))


def test_edited_projection_equals_original_on_transformed_states(generator: torch.Generator) -> None:
    edit, weight, states = _some_edit(generator), randn(generator, D_OUT, D), randn(generator, 2, 4, D)
    edited = states @ edited_by(weight, edit.transform).mT
    torch.testing.assert_close(edited, (states @ edit.transform.mT) @ weight.mT)
    assert not torch.allclose(edited, (states @ edit.transform) @ weight.mT)


def test_transform_tends_to_identity_as_ridge_grows(generator: torch.Generator) -> None:
    identity = torch.eye(D, dtype=torch.float64)
    distances = [
        (_some_edit(generator.manual_seed(1), ridge).transform - identity).norm().item()
        for ridge in (1e-2, 1.0, 1e3, 1e9)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] < 1e-7


def test_streaming_keep_equals_one_batch(generator: torch.Generator) -> None:
    states, weights = randn(generator, 12, D), torch.rand(12, generator=generator, dtype=torch.float64)
    whole = keep_statistics(states, weights)
    parts = [keep_statistics(states[rows], weights[rows]) for rows in torch.arange(12).split(5)]
    merged = merge_keep(parts)
    torch.testing.assert_close(merged.k, whole.k)
    assert merged.weight == pytest.approx(whole.weight)
    unweighted = torch.stack([part.k for part in parts]).mean(0)
    assert not torch.allclose(unweighted, whole.k)
    torch.testing.assert_close(keep_statistics(states).k, keep_statistics(states, torch.ones(12)).k)


def test_union_solves_from_the_original_without_accumulating(generator: torch.Generator) -> None:
    concepts = [pair_statistics(randn(generator, n, D), randn(generator, n, D)) for n in (3, 8, 5)]
    keep, weight = keep_statistics(randn(generator, 30, D)), randn(generator, D_OUT, D)
    once = edited_by(weight, solve_edit(merge_pairs(concepts), keep, eta=ETA, ridge=RIDGE).transform)
    for known in (1, 2, 3):
        grown = edited_by(
            weight, solve_edit(merge_pairs(concepts[:known]), keep, eta=ETA, ridge=RIDGE).transform
        )
    assert torch.equal(grown, once)

    composed = weight
    for concept in concepts:
        composed = edited_by(composed, solve_edit(concept, keep, eta=ETA, ridge=RIDGE).transform)
    assert not torch.allclose(composed, once, atol=1e-3)


def test_residuals_and_condition_number_by_definition(generator: torch.Generator) -> None:
    malicious, safe, kept = randn(generator, 6, D), randn(generator, 6, D), randn(generator, 9, D)
    pairs, keep = pair_statistics(malicious, safe), keep_statistics(kept)
    edit = solve_edit(pairs, keep, eta=ETA, ridge=RIDGE)
    t = edit.transform
    erase = (malicious @ t.mT - safe).square().sum() / safe.square().sum()
    kept_moved = (kept @ t.mT - kept).square().sum() / kept.square().sum()
    b = pairs.m + ETA * keep.k + RIDGE * torch.eye(D, dtype=torch.float64)
    assert edit.erase_residual == pytest.approx(erase.item(), rel=1e-9)
    assert edit.keep_residual == pytest.approx(kept_moved.item(), rel=1e-9)
    assert edit.condition_number == pytest.approx(torch.linalg.cond(b, 1).item(), rel=1e-9)
    # Fewer pairs than dimensions and nothing to keep: every malicious state can reach its safe one.
    free = solve_edit(pairs, keep, eta=0.0, ridge=1e-9)
    assert free.erase_residual < 1e-6 < edit.erase_residual
    assert free.keep_residual > edit.keep_residual


def test_orthogonal_states_by_hand() -> None:
    """Malicious state on axis 0, safe on 1, kept on 1 and 2: T maps axis 0 to 1 and keeps the rest."""
    axes = torch.eye(3, dtype=torch.float64)
    edit = solve_edit(pair_statistics(axes[:1], axes[1:2]), keep_statistics(axes[1:]), eta=1.0, ridge=1e-10)
    expected = torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(edit.transform, expected, atol=1e-9, rtol=0)
    assert edit.erase_residual < 1e-15
    assert edit.keep_residual < 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_edit_keeps_the_weights_dtype_and_precision(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    edit, weight = _some_edit(generator), randn(generator, D_OUT, D).to(dtype)
    edited = edited_by(weight, edit.transform)
    assert edited.dtype == dtype
    precision = torch.finfo(dtype).eps
    expected = weight.double() @ edit.transform
    torch.testing.assert_close(edited.double(), expected, rtol=precision, atol=4 * min(precision, 2**-23))
    half_states = randn(generator, 4, D).to(dtype)
    assert torch.equal(keep_statistics(half_states).k, keep_statistics(half_states.double()).k)


@pytest.mark.parametrize("option", ["eta", "ridge"])
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_negative_or_infinite_options_refused(generator: torch.Generator, option: str, value: float) -> None:
    pairs = pair_statistics(randn(generator, 9, D), randn(generator, 9, D))
    keep = keep_statistics(randn(generator, 9, D))
    options = {"eta": 0.0, "ridge": 0.0}
    solve_edit(pairs, keep, **options)
    with pytest.raises(ValueError, match=f"{option} must be finite and not negative"):
        solve_edit(pairs, keep, **options | {option: value})


def test_singular_matrix_refused_and_cured_by_ridge(generator: torch.Generator) -> None:
    # States whose entries sum to zero, as after a LayerNorm at its initial values.
    centred = [states - states.mean(1, keepdim=True) for states in randn(generator, 3, 20, D)]
    pairs, keep = pair_statistics(centred[0], centred[1]), keep_statistics(centred[2])
    with pytest.raises(ValueError, match=r"not positive definite with eta=0\.5 and ridge=0"):
        solve_edit(pairs, keep, eta=0.5, ridge=0.0)
    assert solve_edit(pairs, keep, eta=0.5, ridge=1e-6).transform.isfinite().all()
    zero = KeepStatistics(torch.zeros(D, D, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="not positive definite"):
        solve_edit(pair_statistics(torch.zeros(1, D), torch.zeros(1, D)), zero, eta=0.0, ridge=0.0)


def test_malformed_statistics_refused() -> None:
    ones = torch.ones(2, D)
    with pytest.raises(ValueError, match="malicious and safe must have one shape"):
        pair_statistics(ones, torch.ones(3, D))
    with pytest.raises(ValueError, match=r"states must be \[n, d\]"):
        keep_statistics(torch.ones(0, D))
    with pytest.raises(ValueError, match="states must be finite, got NaN or infinity in 1 of 2 rows"):
        keep_statistics(torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))
    for weights in (torch.tensor([1.0, -1.0]), torch.zeros(2), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="weights must be finite, not negative and not all zero"):
            keep_statistics(ones, weights)
    with pytest.raises(ValueError, match=r"weights must be \[2\]"):
        keep_statistics(ones, torch.ones(3))
    with pytest.raises(ValueError, match="one state size"):
        merge_keep([])
    with pytest.raises(ValueError, match=r"sizes \[2, 7\]"):
        merge_pairs([pair_statistics(ones, ones), pair_statistics(torch.ones(1, 2), torch.ones(1, 2))])
    with pytest.raises(ValueError, match=r"weight must be \[d_out, 7\]"):
        list(apply_edits([torch.ones(D, 3)], torch.eye(D)))


def _some_edit(generator: torch.Generator, ridge: float = RIDGE) -> Edit:
    pairs = pair_statistics(randn(generator, 6, D), randn(generator, 6, D))
    return solve_edit(pairs, keep_statistics(randn(generator, 9, D)), eta=ETA, ridge=ridge)
