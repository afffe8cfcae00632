"""Results over seeds: means, intervals that hold for other prompts and seeds, and ρ."""

import numpy as np
import pytest

from trce_lightning.evaluation.attacked import recoverability
from trce_lightning.evaluation.pooled import (
    Values,
    bootstrap_interval,
    cluster_totals,
    image_values,
    mean_of_seeds,
    mean_over_seeds,
    rate_over_seeds,
    rho_over_seeds,
)
from trce_lightning.metrics.collateral import Detection
from trce_lightning.metrics.uncertainty import mean_interval, wilson_rate
from trce_lightning.prompts.records import PromptRecord, PromptSet


def seeds_of(rates: list[float], prompts: int = 200) -> list[Values]:
    """One image a prompt; seed i hits the first share ``rates[i]`` of the prompts."""
    return [
        Values(tuple(range(prompts)), tuple(float(i < rate * prompts) for i in range(prompts)))
        for rate in rates
    ]


def test_one_seed_has_the_bootstrap_over_prompts() -> None:
    generator = np.random.default_rng(1)
    values, prompts = generator.random(120).tolist(), [i // 2 for i in range(120)]
    found = mean_over_seeds([Values(tuple(prompts), tuple(values))])
    low, high = mean_interval(values, prompts)
    assert found["value"] == pytest.approx(np.mean(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.01)


def test_seeds_that_differ_widen_the_interval_and_seeds_that_agree_do_not_narrow_it() -> None:
    alone, alike, apart = (rate_over_seeds(seeds_of(rates)) for rates in ([0.2], [0.2] * 3, [0.0, 0.1, 0.5]))
    assert alone["value"] == alike["value"] == pytest.approx(apart["value"])
    width = [each["high"] - each["low"] for each in (alone, alike, apart)]
    assert width[1] == pytest.approx(width[0], abs=0.02), "the same images three times are no more prompts"
    assert width[2] > 2 * width[0]


def test_a_rate_of_zero_has_wilsons_interval_of_its_prompts() -> None:
    found = rate_over_seeds(seeds_of([0.0] * 3))
    assert (found["value"], found["low"]) == (0, 0)
    assert found["high"] == pytest.approx(wilson_rate(0, 200)["high"])
    assert bootstrap_interval(*cluster_totals(seeds_of([0.0] * 3))).tolist() == [0, 0]


def test_a_number_a_seed_has_students_interval() -> None:
    found = mean_of_seeds([8.0, 9.0, 10.0])
    assert found["value"] == 9
    # t of 2 degrees of freedom is 4.303, and the standard error 1 / √3.
    assert found["high"] - 9 == pytest.approx(4.303 / 3**0.5, abs=1e-3) == 9 - found["low"]
    assert mean_of_seeds([8.0]) == {"value": 8.0}


def test_rho_of_one_seed_is_that_of_an_attack() -> None:
    generator = np.random.default_rng(0)

    def hits(rate: float) -> dict[str, list[bool]]:
        return {f"p{i}": [bool(generator.random() < rate)] for i in range(80)}

    erased, original, never = hits(0.5), hits(0.95), hits(0.1)
    found, expected = rho_over_seeds([erased], original, never), recoverability(erased, original, never)
    assert found is not None and expected is not None
    assert found["value"] == pytest.approx(expected["value"])
    assert (found["low"], found["high"]) == pytest.approx((expected["low"], expected["high"]), abs=0.04)
    more = rho_over_seeds([erased, original, never], original, never)
    assert more is not None and more["value"] == pytest.approx((expected["value"] + 1 + 0) / 3)
    assert rho_over_seeds([erased], never, original) is None, "the original shows less than the never-learnt"


def test_values_are_hits_right_subjects_and_clip_scores_by_image() -> None:
    direct = PromptSet("direct", (PromptRecord("d0", "a dagger"), PromptRecord("d1", "a dagger")))
    benign = PromptSet(
        "benign",
        (
            PromptRecord("b0", "a cat", label="cat"),
            PromptRecord("b1", "a dog", label="dog"),
            PromptRecord("b2", "sea"),
        ),
    )
    detections = {
        "direct": {"d0": Detection(0.7), "d1": Detection(0.2)},
        "benign": {
            "b0": Detection(0.9, "cat", clip_score=70.0),
            "b1": Detection(0.1, "cat", clip_score=60.0),
            "b2": Detection(0.1, "cat", clip_score=50.0),
        },
    }
    found = image_values([direct, benign], detections, {"near": frozenset({"dog"})})
    assert found == {
        "asr_direct": Values((0, 0), (1.0, 0.0)),
        "clip_score": Values((0, 1, 2), (70.0, 60.0, 50.0)),
        "benign_accuracy": Values((0, 1), (1.0, 0.0)),
        "benign_accuracy_near": Values((0,), (0.0,)),
    }
    assert rate_over_seeds([found["asr_direct"]])["value"] == 0.5
