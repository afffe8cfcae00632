"""Rows of attacks: hand-computed figures, intervals that cover, and verdicts that can go either way."""

import json

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap

from trce_lightning.errors import InputError
from trce_lightning.evaluation.attacked import (
    Outcome,
    Verdict,
    against,
    attack_row,
    attack_rows,
    budget_of_stages,
    evaluations_to,
    inflated_rate,
    pooled,
    positive_control,
    rate_of,
    recoverability,
)
from trce_lightning.metrics.asr import paired_test
from trce_lightning.metrics.uncertainty import clustered_rate, wilson_rate

PROMPTS = 40


def hits(count: int, first: int = 0, of: int = PROMPTS) -> dict[str, list[bool]]:
    """Outcomes of which ``count`` show the concept, from prompt ``first`` on."""
    return {f"p{index}": [first <= index < first + count] for index in range(of)}


def drawn(rate: np.ndarray, rng: np.random.Generator) -> dict[str, list[bool]]:
    return {f"p{index}": [bool(hit)] for index, hit in enumerate(rng.random(len(rate)) < rate)}


ERASED = Outcome(hits(30), hits(2), hits(4), hits(6), tries=8, forward=100, backward=50)
ORIGINAL = Outcome(hits(39), hits(40), hits(40), hits(40))
NEVER = Outcome(hits(3), hits(0), hits(0), hits(0))


def test_a_row_has_the_documented_form_and_figures_by_hand() -> None:
    row = attack_row(ERASED, original=ORIGINAL, never_learnt=NEVER, false_alarm=0.01)
    assert {key: row[key] for key in ("successes", "images", "rate", "low", "high")} == wilson_rate(30, 40)
    assert (row["pre"], row["post"], row["both"]) == (2 / 40, 28 / 40, 30 / 40)
    assert row["rho"]["value"] == pytest.approx((30 - 3) / (39 - 3))
    assert row["positive_control"] == {"attacked": 39 / 40, "unattacked": 1, "holds": True}
    assert row["false_alarm"]["inflated"] == pytest.approx(1 - 0.99**8)
    assert row["network_evaluations"] == {"forward": 100, "backward": 50}
    seeds, random = (row["control"][name] for name in ("seeds", "random"))
    assert (seeds["rate"], random["rate"], seeds["broken"]) == (0.1, 0.15, 0.1)
    assert seeds["difference"]["difference"] == pytest.approx(26 / 40)
    assert seeds["p_value"] == pytest.approx(2 * 0.5**26) == binomtest(26, 26).pvalue
    assert json.loads(json.dumps(row)) == row
    alone = attack_row(ERASED)
    assert not {"rho", "positive_control", "false_alarm"} & alone.keys()


def test_a_prompt_is_broken_before_or_by_the_attack_or_both() -> None:
    """Prompts 0 to 4 are broken before, 3 to 12 by the attack: 5 + 8 of 40."""
    row = attack_row(Outcome(hits(10, first=3), hits(5), hits(5)))
    assert (row["pre"], row["post"], row["both"]) == (5 / 40, 8 / 40, 13 / 40)
    assert row["rate"] == 10 / 40 != row["post"]


def test_several_images_of_a_prompt_are_one_prompt() -> None:
    attacked = {f"p{index}": [index < 10, index < 10] for index in range(20)}
    single = {f"p{index}": [index < 4] for index in range(20)}
    row = attack_row(Outcome(attacked, single, {name: [False, *hit] for name, hit in single.items()}))
    assert (row["successes"], row["images"], row["rate"]) == (20, 40, 0.5)
    assert (row["low"], row["high"]) == pytest.approx(
        (wilson_rate(10, 20)["low"], wilson_rate(10, 20)["high"]), abs=0.01
    )
    assert row["high"] - row["low"] > 1.3 * (wilson_rate(20, 40)["high"] - wilson_rate(20, 40)["low"])
    seeds = row["control"]["seeds"]
    assert (seeds["rate"], seeds["broken"]) == (0.1, 0.2)
    assert seeds["p_value"] == pytest.approx(2 * 0.5**6)
    flat = clustered_rate([hit for pair in attacked.values() for hit in pair], np.arange(20).repeat(2))
    assert rate_of(attacked) == flat


def test_mcnemar_is_paired_by_prompt() -> None:
    """Equal rates on other prompts differ in nothing; the same gain, paired or not, is less or more sure."""
    assert against(hits(10, 20), hits(10))["p_value"] == 1
    nested, crossed = against(hits(14), hits(8)), against(hits(14), hits(8, 20))
    assert nested["difference"]["difference"] == crossed["difference"]["difference"] == pytest.approx(6 / 40)
    assert nested["p_value"] == binomtest(6, 6).pvalue == pytest.approx(2 / 64)
    assert crossed["p_value"] == pytest.approx(2 * binom.sf(13, 22, 0.5)) and crossed["p_value"] > 0.2
    shuffled = dict(reversed(hits(8).items()))
    assert against(hits(14), shuffled) == nested


def test_holm_counts_the_attacks_on_a_model() -> None:
    weak = Outcome(hits(10), hits(4), hits(4))  # p = 2/64
    one = attack_rows({"erased": {"a": weak}})["erased"]["a"]["control"]["seeds"]
    assert one["p_value"] == one["p_value_holm"] == pytest.approx(2 / 64)
    two = attack_rows({"erased": {"a": weak, "b": ERASED}, "original": {"a": ORIGINAL}})["erased"]
    assert two["b"]["control"]["seeds"]["p_value_holm"] == pytest.approx(2 * 2 * 0.5**26)
    assert two["a"]["control"]["seeds"]["p_value_holm"] == pytest.approx(2 / 64)
    alike = attack_rows({"erased": {"a": weak, "b": weak, "c": weak}})["erased"]
    assert all(row["control"]["seeds"]["p_value_holm"] == pytest.approx(6 / 64) for row in alike.values())


def verdict_of(erased: Outcome, original: Outcome | None = ORIGINAL) -> str:
    models = {"erased": {"a": erased}} | ({} if original is None else {"original": {"a": original}})
    return attack_rows(models)["erased"]["a"]["verdict"]


def test_verdicts() -> None:
    assert verdict_of(ERASED) == Verdict.ABOVE
    # What is above its controls is a finding, whatever the attack does to the original.
    assert verdict_of(ERASED, None) == Verdict.ABOVE
    assert verdict_of(Outcome(hits(5), hits(2), hits(4)), None) == Verdict.UNCHECKED
    assert verdict_of(Outcome(hits(5), hits(2), hits(4))) == Verdict.EQUAL
    assert verdict_of(Outcome(hits(4), hits(2), hits(30))) == Verdict.EQUAL
    # A control that does as well spoils it, however poor the other one is.
    assert verdict_of(Outcome(hits(30), hits(2), hits(4), hits(29))) == Verdict.EQUAL
    reach = [Outcome(hits(count), hits(40), hits(40)) for count in (35, 36)]
    assert [positive_control(outcome)["holds"] for outcome in reach] == [False, True]
    low = Outcome(hits(5), hits(2), hits(4))
    assert [verdict_of(low, outcome) for outcome in reach] == [Verdict.TOO_WEAK, Verdict.EQUAL]
    assert verdict_of(low, Outcome(hits(40), hits(0), hits(0))) == Verdict.TOO_WEAK
    assert verdict_of(ERASED, reach[0]) == Verdict.ABOVE


def test_the_positive_control_is_judged_on_its_own_prompts() -> None:
    """Twenty of the original's forty unattacked prompts show the concept, and all of the attacked ones do."""
    original = Outcome(hits(10, of=20), hits(20), hits(20))
    assert positive_control(original) == {"attacked": 0.5, "unattacked": 1, "holds": False}


def test_the_positive_control_is_judged_by_prompts() -> None:
    """One of three tries shows the concept: a third of the images, and every prompt."""
    tried = {prompt: [False, True, False] for prompt in hits(0)}
    assert positive_control(Outcome(tried, hits(40), hits(40)))["holds"]
    row = attack_rows({"erased": {"a": Outcome(tried, hits(0), hits(0))}})["erased"]["a"]
    assert row["broken"] == 1 and row["rate"] == pytest.approx(1 / 3)


def test_recoverability_ends_at_its_references_and_needs_them_apart() -> None:
    low, high = hits(3), hits(38)
    assert recoverability(low, high, low) == {"value": 0, "low": 0, "high": 0, "prompts": PROMPTS}
    assert recoverability(high, high, low) == {"value": 1, "low": 1, "high": 1, "prompts": PROMPTS}
    assert recoverability(hits(20), hits(5), hits(5)) is None
    assert recoverability(hits(20), hits(6), hits(5)) is None
    assert recoverability(hits(20), hits(2), hits(30)) is None
    assert recoverability(hits(20), hits(38), {"q": [True]}) is None
    # Original and never-learnt differ in five prompts of forty: hardly, so the interval is wide but finite.
    wide = recoverability(hits(12), hits(9), hits(4))
    assert wide is not None and 1 < wide["high"] - wide["low"] < np.inf
    assert recoverability(hits(9), hits(9), hits(6)) is None
    some = recoverability(hits(8, of=20), hits(38), hits(2, first=12))
    assert some is not None and some["prompts"] == 20
    assert some["value"] == pytest.approx((8 - 2) / (20 - 2))


def test_recoverability_is_the_paired_bootstrap_of_scipy() -> None:
    rng = np.random.default_rng(3)
    rate = rng.random(60)
    models = [drawn(rate * scale, rng) for scale in (0.6, 1.2, 0.2)]
    found = recoverability(*models)
    assert found is not None
    rows = [np.array([float(hit[0]) for hit in model.values()]) for model in models]

    def rho(e, o, n, axis):
        return (e.mean(axis) - n.mean(axis)) / (o.mean(axis) - n.mean(axis))

    options = {"vectorized": True, "n_resamples": 4000, "rng": np.random.default_rng(1)}
    paired = bootstrap(rows, rho, paired=True, method="percentile", **options).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((paired.low, paired.high), abs=0.02)
    # Models that show the concept on the same prompts are compared more surely if they are paired.
    same = [hits(count) for count in (20, 38, 4)]
    rows = [np.array([float(hit[0]) for hit in model.values()]) for model in same]
    loose = bootstrap(rows, rho, paired=False, method="percentile", **options).confidence_interval
    tight = recoverability(*same)
    assert tight is not None and tight["high"] - tight["low"] < 0.95 * (loose.high - loose.low)


def test_intervals_cover_and_narrower_ones_would_not() -> None:
    """Intervals are tried in 400 simulations of 64 unequal prompts. Three standard errors are the bound."""
    rng = np.random.default_rng(0)
    ease = rng.beta(2, 2, 64) * 2  # mean 1
    scales = {"erased": 0.3, "original": 0.5, "never": 0.05}
    rates = {name: np.clip(scale * ease, 0, 1) for name, scale in scales.items()}
    means = {name: float(rate.mean()) for name, rate in rates.items()}
    truth = (means["erased"] - means["never"]) / (means["original"] - means["never"])
    gap = means["erased"] - means["never"]
    covered = np.zeros((2, 2))
    runs = 400
    for _ in range(runs):
        # Prompts are drawn anew as well: what holds for these prompts alone is not what an interval says.
        pick = rng.integers(64, size=64)
        erased, original, never = (drawn(rate[pick], rng) for rate in rates.values())
        rho = recoverability(erased, original, never)
        assert rho is not None
        difference = against(erased, never)["difference"]
        for index, (found, value, true) in enumerate(
            ((rho, rho["value"], truth), (difference, difference["difference"], gap))
        ):
            covered[index] += [
                found["low"] <= true <= found["high"],
                (value + found["low"]) / 2 <= true <= (value + found["high"]) / 2,
            ]
    share = covered / runs
    bound = 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)
    assert (share[:, 0] >= bound).all(), share
    assert (share[:, 1] < bound).all(), share


def test_false_alarms_grow_with_the_tries() -> None:
    assert inflated_rate(0.02, 1) == pytest.approx(0.02)
    assert inflated_rate(0.02, 8) == pytest.approx(binom.sf(0, 8, 0.02))
    assert (inflated_rate(0, 50), inflated_rate(1, 1)) == (0, 1)


def test_a_budget_curve_has_a_point_for_each_stage() -> None:
    assert budget_of_stages([(300, hits(30)), (0, hits(2)), (80, hits(10))]) == [
        (0, 0.05),
        (80, 0.25),
        (300, 0.75),
    ]
    row = attack_row(Outcome(hits(1), hits(1), hits(1), by_budget=[(9, 0.5), (3, 0.1)]))
    assert row["by_budget"] == [[3, 0.1], [9, 0.5]]


def test_the_evaluations_to_a_rate_lie_between_the_points() -> None:
    curve = [(0, 0.05), (80, 0.25), (300, 0.75)]
    assert evaluations_to(curve, 0.5) == pytest.approx(190)
    assert evaluations_to(curve, 0.25) == 80
    assert evaluations_to(curve, 0.01) == 0
    assert evaluations_to(curve, 0.8) is None
    assert evaluations_to([(0, 0.1), (10, 0.1), (20, 0.2)], 0.1) == 0


def test_outcomes_must_be_of_the_same_prompts() -> None:
    with pytest.raises(InputError, match="expected outcomes of one prompt or more, got none"):
        Outcome({}, {}, {})
    with pytest.raises(
        InputError, match="expected seeds outcomes of all 40 attacked prompts, got none of 20"
    ):
        Outcome(hits(4), hits(4), hits(4, of=20))
    with pytest.raises(InputError, match="expected an image of each prompt, got none of 'p1'"):
        Outcome({"p1": []}, {"p1": [True]}, {"p1": [True]})
    assert Outcome(hits(4, of=20), hits(4), hits(4)).attacked.keys() < hits(4).keys()


def outcome(found: dict[str, list[bool]]) -> Outcome:
    return Outcome(found, found, found)


def test_attacks_are_pooled_by_prompt_and_an_attack_more_that_finds_the_same_changes_nothing() -> None:
    """Eight prompts, of which six differ, all in one direction: p is 2 of the 2⁶ signs."""
    first, second = outcome(hits(7, of=8)), outcome(hits(1, of=8))
    once = pooled({"a": first}, {"a": second})
    assert once == {
        "attacks": 1,
        "searches": 8,
        "broken_first": 7,
        "broken_second": 1,
        "p_value": 2 / 2**6,
    }
    twice = pooled({"a": first, "b": first}, {"a": second, "b": second})
    assert twice == once | {"attacks": 2, "searches": 16, "broken_first": 14, "broken_second": 2}
    assert pooled({"a": first}, {"a": first})["p_value"] == 1


def test_an_attack_that_leaves_out_prompts_is_pooled_over_the_others() -> None:
    """Fine-tuning is not judged on prompts whose texts it taught."""
    whole, part = outcome(hits(4, of=8)), outcome(hits(2, of=3))
    other = {"whole": outcome(hits(1, of=8)), "part": outcome(hits(0, of=3))}
    row = pooled({"whole": whole, "part": part}, other)
    assert (row["searches"], row["broken_first"], row["broken_second"]) == (11, 6, 1)
    assert row["p_value"] == 2 / 2**4, "four prompts differ: by 1, 2, 1 and 1 attacks"


def test_equal_models_differ_by_chance_and_searches_taken_for_independent_would_not() -> None:
    """Three attacks that find the same in 30 prompts. McNemar's test takes them for 90 prompts."""
    rng, found, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        pair = [drawn(np.full(30, 0.5), rng) for _ in range(2)]
        models = [{name: outcome(each) for name in "abc"} for each in pair]
        found.append(pooled(*models)["p_value"])
        flat = [{(p, name): any(tried) for p, tried in each.items() for name in "abc"} for each in pair]
        naive.append(paired_test(*flat))
    assert np.mean(np.array(found) < 0.05) <= 0.075
    assert np.mean(np.array(naive) < 0.05) > 0.15


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({}, "the same attacks on both models, got a and none"),
        ({"b": ERASED}, "the same attacks on both models, got a and b"),
        ({"a": outcome(hits(1, of=2))}, "expected a on the same prompts of both models"),
    ],
)
def test_only_the_same_searches_are_pooled(second: dict[str, Outcome], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        pooled({"a": ERASED}, second)
