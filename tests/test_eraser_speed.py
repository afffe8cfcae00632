"""SPEED: the edit is the constrained optimum, and what it keeps doesn't move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline, entries_of
from eraser_jobs import D, Harness, normal
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.erasers.linear import Moments, edited_stream, moments, read_weights
from trce_lightning.erasers.oce import span
from trce_lightning.erasers.speed import SPEED, invariant_states, null_space, speed_transform
from trce_lightning.errors import InputError


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def speed_objective(delta: Tensor, w: Tensor, projector: Tensor, erased: Tensor, anchors: Tensor) -> Tensor:
    moved = delta @ projector
    return (erased @ (w + moved).mT - anchors @ w.mT).square().sum() / len(
        erased
    ) + 0.4 * moved.square().sum()


def test_speed_is_the_constrained_optimum() -> None:
    """No feasible direction lowers the objective, the invariants don't move, and kept states don't either."""
    w, erased, anchors = normal(7, D), normal(5, D, seed=1), normal(5, D, seed=2)
    kept, invariant = normal(4, D, seed=3), normal(2, D, seed=4)
    projector = null_space(kept.mT @ kept / len(kept), 1e-9)
    assert round(float(projector.trace())) == D - 4
    sums = moments(erased, anchors, 1 / len(erased))
    transform = speed_transform(sums, projector, invariant, ridge=0.4, slack=0.0)
    delta = (w @ transform - w).requires_grad_(True)
    assert (delta @ invariant.mT).abs().max() < 1e-9 and (delta @ kept.mT).abs().max() < 1e-9
    speed_objective(delta, w, projector, erased, anchors).backward()
    assert delta.grad is not None
    feasible = projector @ (torch.eye(D, dtype=torch.float64) - span(projector @ invariant.mT))
    assert (delta.grad @ feasible).abs().max() < 1e-9
    assert (delta.grad @ projector).abs().max() > 1e-3  # the constraint holds it back


def test_speeds_slack_is_an_inverse_penalty() -> None:
    w, erased, anchors, invariant = (
        normal(7, D),
        normal(5, D, seed=1),
        normal(5, D, seed=2),
        normal(2, D, seed=4),
    )
    kept, slack = normal(4, D, seed=3), 0.5
    projector = null_space(kept.mT @ kept / len(kept), 1e-9)
    sums = moments(erased, anchors, 1 / len(erased))
    transform = speed_transform(sums, projector, invariant, ridge=0.4, slack=slack)
    delta = (w @ transform - w).requires_grad_(True)
    penalty = (delta @ projector @ invariant.mT).square().sum() / slack
    (speed_objective(delta, w, projector, erased, anchors) + penalty).backward()
    assert delta.grad is not None and (delta.grad @ projector).abs().max() < 1e-9


def test_speed_moves_no_state_that_it_keeps(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    layers, empty = entries_of(adapter), adapter.empty().states["clip"][0]
    before = {name: layer(empty) for name, layer in layers.items()}
    gun = adapter.encode(["a gun"]).states["clip"][0, 4]
    moved = {name: layer(gun) for name, layer in layers.items()}
    eraser = SPEED(keep="empty", threshold=1e-3, ridge=1e-2, refined=False, copies=0, maps="kv")
    result = eraser.erase(Harness(adapter, tmp_path).job)
    assert 0 < result.facts["free directions"] < 32
    for name, layer in layers.items():
        assert (layer(empty) - before[name]).norm(dim=1).max() < 0.05 * before[name].norm(dim=1).min()
        assert (layer(gun) - moved[name]).norm() > 0.5 * moved[name].norm()


def test_a_texts_states_after_its_start_are_summed_and_texts_averaged(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """The goals are computed by hand: both texts have 31 states after the start."""
    both = [adapter.encode([text]).states["clip"][0, 1:].double() for text in ("a gun", "an axe")]
    empty = adapter.empty().states["clip"][0].double()
    assert [len(states) for states in both] == [31, 31]
    c_t = sum(states.mT @ states for states in both) / 2
    c_a = sum(empty[1:].mT @ states for states in both) / 2
    projector = null_space(empty.mT @ empty / len(empty), 1e-3)
    sums = Moments(c_a, c_t)
    expected = speed_transform(sums, projector, invariant_states(empty), ridge=0.7, slack=0.5)
    original = read_weights(edited_stream(adapter, "v"))
    options: dict[str, Any] = {"refined": False, "copies": 0, "threshold": 1e-3, "slack": 0.5, "ridge": 0.7}
    concept = Concept("two", {"a gun": "a kite", "an axe": "a hat"}, templates=("{}",))
    job = Harness(adapter, tmp_path, [concept]).job
    SPEED(positions="after_start", keep="empty", maps="v", **options).erase(job)
    for name, w in read_weights(edited_stream(adapter, "v")).items():
        torch.testing.assert_close(w, original[name] @ expected, atol=1e-5, rtol=1e-4)


def test_speed_says_that_nothing_is_free(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    norm = adapter.text_encoder.get_submodule("final_layer_norm")
    norm.bias.data = normal(32).float()  # at its initial values, all states lie in a plane
    eraser = SPEED(keep="prompts", threshold=1e-30, refined=False, copies=200)
    with pytest.raises(InputError, match=r"method\.threshold.*no direction"):
        eraser.erase(Harness(adapter, tmp_path).job)


def test_refining_keeps_what_a_plain_edit_moves_most() -> None:
    sums, kept = moments(normal(5, D), normal(5, D, seed=1), 1 / 5), normal(40, D, seed=2)
    gram_matrix = normal(D, D, seed=3)
    gram_matrix = gram_matrix @ gram_matrix.mT
    _, count = SPEED(refined=True, copies=0).retained(kept, sums, gram_matrix, 0)
    assert 0 < count < 40
    _, refined = SPEED(refined=True, copies=3).retained(kept, sums, gram_matrix, 0)
    assert count < refined < 4 * count
    plain, count = SPEED(refined=False, copies=0).retained(kept, sums, gram_matrix, 0)
    assert count == 40
    torch.testing.assert_close(plain, kept.mT @ kept)
    # Copies are moved along the direction that the maps read least. In the others, nothing changes.
    copied, count = SPEED(refined=False, copies=2).retained(kept, sums, gram_matrix, 0)
    assert count == 120
    least = torch.linalg.eigh(gram_matrix).eigenvectors[:, :1]
    others = torch.eye(D, dtype=torch.float64) - least @ least.mT
    torch.testing.assert_close(others @ copied @ others, 3 * others @ plain @ others)
    assert float(least.mT @ (copied - 3 * plain) @ least) > 40


def test_the_empty_prompts_invariants_are_its_start_and_centres() -> None:
    groups = [normal(1, D, seed=seed) + 1e-3 * normal(4, D, seed=seed + 9) for seed in (1, 2, 3)]
    empty = torch.cat([normal(1, D), *groups])
    found = invariant_states(empty)
    assert torch.equal(found[0], empty[0])
    torch.testing.assert_close(found[1:], torch.stack([group.mean(0) for group in groups]))


@pytest.mark.parametrize(("positions", "states"), [("last", 1), ("after_start", 32)])
def test_prompts_are_kept_where_texts_are_erased(
    adapter: StableDiffusionAdapter, tmp_path: Path, positions: str, states: int
) -> None:
    """At the last content token, or at all 32 positions; and the empty prompt at all of its own."""
    eraser = SPEED(keep="prompts", positions=positions, refined=False, copies=0)
    job = Harness(adapter, tmp_path).job
    kept = eraser.erase(job).facts["kept states"]
    assert kept == 32 + states * len(job.keep_prompts())
