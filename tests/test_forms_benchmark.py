"""The plain SPEED and OCE are what they claim, many concepts are exact, and the forms' comparison is fair."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from tiny_runs import WEAPONS, stage1_statistics
from torch import Tensor

from benchmarks import concepts, forms, plain
from benchmarks.forms import Measured
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.closed_form import keep_statistics, pair_statistics, solve_null_space
from trce_lightning.config.schema import FORMS, TextualConfig
from trce_lightning.emoji.groups import concept_subjects

D = 12


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_plain_speed_is_our_null_space_without_its_augmentation() -> None:
    weight, targets, anchors = randn(0, 5, D), randn(1, 6, D), randn(2, 6, D)
    retain, empty = randn(3, 20, 4) @ randn(4, 4, D), randn(5, 3, D)
    generator = torch.Generator().manual_seed(0)

    def speed(augmented: int) -> Tensor:
        options: dict[str, Any] = {"threshold": 1e-9, "scale": 0.05, "augmented": augmented}
        return plain.speed(weight, targets, anchors, retain, empty.mT, generator, **options)

    keep = keep_statistics(retain)
    ridge = 0.05 * D / keep.k.trace().item()
    ours = solve_null_space(pair_statistics(targets, anchors), keep, empty, share=1e-9, ridge=ridge)
    torch.testing.assert_close(speed(0), weight @ ours.transform, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(speed(2), speed(0), atol=1e-3)


def test_the_plain_oce_turns_values_and_reflects_one_erased_direction() -> None:
    weight, state = randn(0, 6, D), randn(1, 1, D)
    captions = keep_statistics(randn(2, 50, D)).k
    found = plain.oce(weight, state, randn(3, 1, D), randn(4, 3, D), captions, erase=1e8)
    torch.testing.assert_close(found.mT @ found, weight.mT @ weight)
    before, after = weight @ state[0], found @ state[0]
    assert torch.cosine_similarity(before, after, 0) < -0.5
    other = randn(5, D)
    assert torch.cosine_similarity(weight @ other, found @ other, 0) > 0


def test_the_centres_begin_with_the_first_state_and_are_means() -> None:
    states = torch.cat([randn(0, 1, D), randn(1, 1, D) + 0.01 * randn(2, 8, D), randn(3, 9, D)])
    found = plain.centres(states, torch.Generator().manual_seed(1))
    assert found.shape == (D, 4) and torch.equal(found[:, 0], states[0])
    nearest = torch.cdist(states[1:], found[:, 1:].mT).argmin(1)
    for index in range(3):
        torch.testing.assert_close(found[:, 1 + index], states[1:][nearest == index].mean(0))


def test_the_benchmark_of_many_concepts_checks_what_it_times() -> None:
    stage1 = concepts.Stage1(d=64, outputs=(32, 80), concepts=4, kept=200)
    concepts.check(stage1)
    for edited in (stage1.speed(), stage1.oce()):
        assert [weight.shape for weight in edited] == [weight.shape for weight in stage1.values]
    assert len(stage1.edited(stage1.projection())) == 4
    found = concepts.cpu_in_turns({"busy": lambda: sum(range(200_000)), "idle": lambda: None}, 3)
    assert found["busy"] > 10 * found["idle"]
    assert len(concepts.OUTPUTS) == 16 and sum(concepts.OUTPUTS) == 12_480


def test_an_edit_is_taken_back_after_it_was_scored() -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    config = TextualConfig(eta=0.1)
    edit = stage1_statistics(adapter, config, [WEAPONS]).solve(config)
    before = {name: tensor.clone() for name, tensor in adapter.denoiser.state_dict().items()}

    def same() -> bool:
        now = adapter.denoiser.state_dict()
        return all(torch.equal(now[name], tensor) for name, tensor in before.items())

    with forms.edited(adapter, edit):
        assert not same()
    assert same()


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"rate": 0.5}

    for settings in ({"images": 1}, {"images": 1}, {"images": 2}):
        row = Measured(tmp_path / "forms.json")("a", settings, measure)
        assert row == {"settings": settings, "rate": 0.5}
    assert len(calls) == 2
    Measured(tmp_path / "forms.json", fresh=True)("a", {"images": 2}, measure)
    assert len(calls) == 3


def trial(direct: float, implicit: float, accuracy: float, keep: float, eta: float) -> dict[str, Any]:
    asr = {"direct": {"rate": direct}, "implicit": {"rate": implicit}}
    settings = {"options": {"form": "ridge", "eta": eta}}
    return {
        "asr": asr,
        "accuracy": accuracy,
        "erase residual": 0.1,
        "keep residual": keep,
        "directions": None,
        "settings": settings,
    }


def test_the_trial_of_least_loss_is_taken_and_of_equals_the_gentlest() -> None:
    trials = [trial(0.0, 0.2, 1.0, 0.3, 1.0), trial(0.1, 0.1, 1.0, 0.2, 2.0), trial(0.0, 0.0, 0.8, 0.1, 3.0)]
    assert forms.best({"ridge": trials}) == {"ridge": {"form": "ridge", "eta": 2.0}}
    assert forms.loss(trials[2]) == pytest.approx(0.2)
    assert "**ridge: eta=2** | 10.0 % | 10.0 % | 100.0 %" in forms.tuning_table({"ridge": trials})


def test_each_form_has_as_many_trials_and_subjects_are_nested() -> None:
    assert set(forms.TRIALS) == set(FORMS) and len(set(map(len, forms.TRIALS.values()))) == 1
    many, few = forms.subject_concepts(30), forms.subject_concepts(3)
    assert [concept.name for concept in few] == [concept.name for concept in many[:3]]
    erased = [concept_subjects(concept) for concept in many]
    assert all(len(subjects) == 1 for subjects in erased) and len(set(erased)) == 30
    counterparts = {safe for concept in many for safe in concept.terms.values()}
    assert not counterparts & {term for concept in many for term in concept.terms}
