"""Intervals cover, adjusted p-values equal hand-computed ones, and images of one prompt count as one."""

import numpy as np
import pytest
from scipy.stats import norm

from trce_lightning.metrics.uncertainty import (
    clustered_rate,
    effective_images,
    holm,
    mean_interval,
    paired_difference,
    paired_rate_difference,
    wilson_rate,
)


def test_mean_interval_is_near_the_normal_one_and_repeats() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400).tolist()
    low, high = mean_interval(values, range(400))
    half = norm.ppf(0.975) * np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.05)
    assert (low, high) == mean_interval(values, range(400))
    assert mean_interval([2.0, 4.0], ["a", "a"]) == (3, 3)


def test_copies_of_an_image_make_nothing_surer() -> None:
    hits = [True] * 12 + [False] * 28
    once, copies = clustered_rate(hits, range(40)), clustered_rate(hits * 5, [*range(40)] * 5)
    assert once == wilson_rate(12, 40)
    with pytest.raises(ValueError, match="got 40 and 80"):
        clustered_rate(hits, [*range(40)] * 2)
    resampled = mean_interval([float(hit) for hit in hits * 5], [*range(40)] * 5)
    assert (copies["bootstrap_low"], copies["bootstrap_high"]) == resampled
    assert resampled == pytest.approx((once["low"], once["high"]), abs=0.03)
    assert copies["rate"] == once["rate"] == 0.3
    assert (copies["low"], copies["high"]) == pytest.approx((once["low"], once["high"]), abs=0.03)
    unaware = wilson_rate(60, 200)
    assert copies["high"] - copies["low"] > 2 * (unaware["high"] - unaware["low"])


def test_fewer_hits_are_never_less_sure_of_being_few() -> None:
    """256 prompts of two images: the upper end rises with the hits; without any, prompts count."""
    highs = []
    for hits in range(6):
        flat = [prompt < hits and image == 0 for prompt in range(256) for image in range(2)]
        assert sum(flat) == hits
        highs.append(clustered_rate(flat, [prompt for prompt in range(256) for _ in range(2)])["high"])
    assert highs[1:] == sorted(highs[1:])
    assert highs[0] == pytest.approx(wilson_rate(0, 256)["high"])
    assert highs[1] == pytest.approx(wilson_rate(1, 512)["high"], rel=0.02)


def test_prompts_with_more_images_weigh_more() -> None:
    clusters = ["a"] * 4 + ["b", "c", "d", "e"]
    values = [1.0, 1, 1, 0, 1, 0, 0, 0]  # p = 1/2; r is 1 for the first prompt and ±1/2 for four others
    assert effective_images(values, clusters) == pytest.approx(0.25 / (5 / 4 * 2 / 64))
    alike = [1.0, 1, 1, 1, 0, 0, 0, 0]
    assert effective_images(alike, clusters) == pytest.approx(64 / 20)
    low, high = mean_interval(alike, clusters)
    assert low == 0 and high > 0.8  # resampled means of the five prompts' means end at 3/5


def test_rate_difference_by_hand_and_with_nothing_changed() -> None:
    first, second = [True] * 30 + [False] * 10, [True] * 24 + [False] * 16
    found = paired_rate_difference(first, second, range(40))
    half = norm.ppf(0.975) * np.sqrt(7 - 36 / 42) / 42  # b = 6, c = 0, m = 42
    assert found["difference"] == pytest.approx(-0.15)
    assert (found["low"], found["high"]) == pytest.approx((-6 / 42 - half, -6 / 42 + half))
    same = paired_rate_difference(first, first, range(40))
    assert same["low"] < 0 < same["high"] and same["difference"] == 0
    doubled = paired_rate_difference(first * 2, second * 2, [*range(40)] * 2)
    assert (doubled["low"], doubled["high"]) == pytest.approx((found["low"], found["high"]), abs=1e-3)


def test_prompts_that_all_agree_still_leave_doubt() -> None:
    none = clustered_rate([False] * 60, [*range(20)] * 3)
    assert (none["rate"], none["low"], none["high"]) == (0, *(wilson_rate(0, 20)[k] for k in ("low", "high")))
    every = clustered_rate([True] * 60, [*range(20)] * 3)
    assert every["high"] == 1
    assert every["low"] == wilson_rate(20, 20)["low"]


def test_paired_difference_sees_what_unpaired_intervals_do_not() -> None:
    first = np.random.default_rng(0).normal(50, 10, 200).tolist()
    second = [value - 0.5 for value in first]
    found = paired_difference(first, second, range(200))
    assert found["difference"] == pytest.approx(-0.5)
    assert found["low"] == pytest.approx(found["high"], abs=1e-9)
    low, _ = mean_interval(first, range(200))
    assert low < np.mean(second)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        paired_difference(first, second[1:], range(200))


def test_holm_by_hand() -> None:
    # 0.01·3, max(0.03, 0.04·2), max(0.08, 0.05·1)
    adjusted = holm({"b": 0.04, "a": 0.01, "c": 0.05})
    assert adjusted == pytest.approx({"b": 0.08, "a": 0.03, "c": 0.08})
    assert list(adjusted) == ["b", "a", "c"]
    assert holm({"a": 0.7, "b": 0.9}) == {"a": 1, "b": 1}


def test_values_need_their_prompts() -> None:
    for values, clusters in (([1.0, 2.0], ["a"]), ([], [])):
        with pytest.raises(ValueError, match="a cluster for each value"):
            mean_interval(values, clusters)
    with pytest.raises(ValueError, match="at least one image"):
        wilson_rate(0, 0)
