"""RECE: the attacking state is the best one, and the rounds are as said, in both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import D, Harness, normal
from tiny_runs import WEAPONS

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.linear import edited_stream, gram, read_weights
from trce_lightning.erasers.rece import RECE, adversarial_states
from trce_lightning.erasers.texts import erased_pairs, paired_states
from trce_lightning.erasers.uce import uce_transform
from trce_lightning.errors import InputError


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def test_the_attacking_state_is_the_minimiser() -> None:
    layers, transform, states = (
        [normal(7, D), normal(9, D, seed=1)],
        normal(D, D, seed=2),
        normal(3, D, seed=3),
    )
    found = adversarial_states(states, transform, sum(w.mT @ w for w in layers), 0.2).requires_grad_(True)
    loss = sum((found @ (w @ transform).mT - states @ w.mT).square().sum() for w in layers)
    (loss + 0.2 * found.square().sum()).backward()
    assert found.grad is not None and found.grad.abs().max() < 1e-9


def test_rounds_of_rece_from_the_original_solve_one_problem_over_all_attacks(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """The transform equals one round by hand, in both ways."""
    options: dict[str, Any] = {"positions": "last", "rounds": 1, "guide": "counterpart"}
    stream = edited_stream(adapter, "kv")
    erased, guides = (
        states.double()
        for states in paired_states(
            adapter, ["clip"], erased_pairs([WEAPONS], "names", "counterpart"), "last"
        )
    )
    empty = adapter.empty().states["clip"][0].double()
    kept, original = empty.mT @ empty, read_weights(stream)
    first = uce_transform(erased, guides, kept, erase_scale=1.0, keep_scale=1.0, ridge=0.5)
    attack = adversarial_states(erased, first, gram(stream), 0.1)
    joint = uce_transform(
        torch.cat([erased, attack]),
        torch.cat([guides, guides]),
        kept,
        erase_scale=1.0,
        keep_scale=1.0,
        ridge=0.5,
    )
    step = uce_transform(attack, guides, kept, erase_scale=1.0, keep_scale=0.1, ridge=0.1)
    for from_original, expected in ((True, joint), (False, first @ step)):
        own = StableDiffusionAdapter(build_tiny_pipeline())
        RECE(**options, from_original=from_original).erase(Harness(own, tmp_path).job)
        for name, w in read_weights(edited_stream(own, "kv")).items():
            torch.testing.assert_close(w, original[name] @ expected, atol=1e-5, rtol=1e-4)
    assert (joint - first @ step).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["round_ridge", "round_keep_scale"])
def test_scales_of_rounds_are_refused_where_no_round_reads_them(
    name: str, adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    job = Harness(adapter, tmp_path).job
    with pytest.raises(InputError, match=rf"method\.{name}: expected none with method\.from_original=true"):
        RECE(**{name: 2.0}).ahead(job)
    RECE(**{name: 2.0}, from_original=False).ahead(job)


def test_rece_is_harder_to_attack_by_its_own_attack_than_uce(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """How near the best state brings the original's keys and values back, for equal λ of the edit."""
    erased, _ = paired_states(adapter, ["clip"], erased_pairs([WEAPONS], "names", "empty"), "last")
    original = read_weights(edited_stream(adapter, "kv"))
    left = {}
    for rounds in (0, 5):
        own = StableDiffusionAdapter(build_tiny_pipeline())
        eraser = RECE(positions="last", keep="none", rounds=rounds, ridge=0.1, penalty=1e-2)
        eraser.erase(Harness(own, tmp_path).job)
        edited = read_weights(edited_stream(own, "kv"))
        states = erased.double()
        g = sum(w.mT @ w for w in edited.values()) + 1e-2 * torch.eye(states.shape[1], dtype=torch.float64)
        right = sum(edited[name].mT @ w for name, w in original.items()) @ states.mT
        found = torch.linalg.solve(g, right).mT
        left[rounds] = sum(
            float((found @ edited[name].mT - states @ w.mT).square().sum()) for name, w in original.items()
        )
    assert left[5] > 1.5 * left[0]
