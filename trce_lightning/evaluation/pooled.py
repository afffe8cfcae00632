"""Pool the results of one method over seeds, with intervals that hold for other prompts and other seeds.

All seeds score the same prompts from the same noise, so a prompt's images are alike, and so are a seed's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import sem, t

from trce_lightning.evaluation.scored import Detections
from trce_lightning.metrics.asr import THRESHOLD
from trce_lightning.metrics.uncertainty import CONFIDENCE_LEVEL, RESAMPLES, wilson_rate
from trce_lightning.prompts.records import BENIGN, PromptRecord, PromptSet

TAILS = ((1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2)
Floats = np.ndarray[Any, np.dtype[np.float64]]
Interval = dict[str, float]
"""``value``, ``low`` and ``high``, a 95 % interval. It has no ends if there is none."""


@dataclass(frozen=True)
class Values:
    """One number for each image of a model, and the prompt that each image belongs to."""

    prompts: tuple[int, ...]
    values: tuple[float, ...]

    @staticmethod
    def of(rows: Sequence[tuple[str, float]]) -> Values:
        """Return the values of rows of a prompt's text and a number."""
        index: dict[str, int] = {}
        prompts = tuple(index.setdefault(text, len(index)) for text, _ in rows)
        return Values(prompts, tuple(float(value) for _, value in rows))

    @staticmethod
    def load(content: Mapping[str, Sequence[Any]]) -> Values:
        """Return the values from their form in JSON."""
        return Values(tuple(content["prompts"]), tuple(content["values"]))


def image_values(
    sets: Sequence[PromptSet], detections: Detections, groups: Mapping[str, frozenset[str]]
) -> dict[str, Values]:
    """Return for each score of a mean its values by image.

    ``asr_SET`` are hits of the concept, ``benign_accuracy`` and ``benign_accuracy_GROUP`` are right subjects
    of benign images, and ``clip_score`` are CLIP scores. A score is left out if no image has it.
    """
    found: dict[str, list[tuple[str, float]]] = {}

    def add(name: str, record: PromptRecord, value: float) -> None:
        found.setdefault(name, []).append((record.prompt, value))

    for prompts in sets:
        for record in prompts.records:
            seen = detections[prompts.name][record.id]
            if prompts.name != BENIGN:
                add(f"asr_{prompts.name}", record, seen.probability >= THRESHOLD)
                continue
            if seen.clip_score is not None:
                add("clip_score", record, seen.clip_score)
            if record.label is None or seen.subject is None:
                continue
            names = ["", *(f"_{group}" for group, labels in groups.items() if record.label in labels)]
            for name in names:
                add(f"benign_accuracy{name}", record, seen.subject == record.label)
    return {name: Values.of(rows) for name, rows in found.items()}


def rate_over_seeds(values: Sequence[Values]) -> Interval:
    """Return a rate over all images of all seeds. A value may also be the share of several images.

    Its interval is the wider one, at each end, of two: the percentile bootstrap that draws prompts and seeds,
    and Wilson's of as many independent images as there are prompts. The bootstrap alone has no width where
    no image, or each image, is a hit.
    """
    hits = [value for of_seed in values for value in of_seed.values]
    wilson = wilson_rate(round(sum(hits)), len(hits), len(set(values[0].prompts)))
    low, high = bootstrap_interval(*cluster_totals(values))
    return {
        "value": float(np.mean(hits)),
        "low": float(min(low, wilson["low"])),
        "high": float(max(high, wilson["high"])),
    }


def mean_over_seeds(values: Sequence[Values]) -> Interval:
    """Return a mean over all images of all seeds with the percentile bootstrap over prompts and seeds."""
    totals, counts = cluster_totals(values)
    low, high = bootstrap_interval(totals, counts)
    return {"value": float(totals.mean(0).sum() / counts.sum()), "low": float(low), "high": float(high)}


def mean_of_seeds(values: Sequence[float]) -> Interval:
    """Return the mean of one number a seed with Student's 95 % interval. One seed has none.

    It is for FID, which has no value by image.
    """
    mean = float(np.mean(values))
    if len(values) == 1:
        return {"value": mean}
    half = float(t.ppf(TAILS[1], len(values) - 1) * sem(values))
    return {"value": mean, "low": mean - half, "high": mean + half}


def rho_over_seeds(
    erased: Sequence[Mapping[str, Sequence[bool]]],
    original: Mapping[str, Sequence[bool]],
    never_learnt: Mapping[str, Sequence[bool]],
) -> Interval | None:
    """Return ρ of :func:`~.attacked.recoverability` for the mean of some seeds.

    ρ = (e − n) / (o − n) with the mean rates of prompts of the erased models e, the original o and the
    never-learnt model n. The percentile bootstrap draws prompts and seeds. Resamples with o ≤ n count as
    infinite. The result is None where the interval of o − n is not above 0, so that ρ has no meaning.
    """
    prompts = list(original)
    rows = [np.array([np.mean(hits[prompt]) for prompt in prompts]) for hits in erased]
    o, n = (np.array([np.mean(hits[prompt]) for prompt in prompts]) for hits in (original, never_learnt))
    by_seed, by_prompt = resamples(len(rows), len(prompts))
    e_drawn = ((by_seed @ np.array(rows)) * by_prompt).sum(1) / len(rows) / len(prompts)
    o_drawn, n_drawn = by_prompt @ o / len(prompts), by_prompt @ n / len(prompts)
    if np.quantile(o_drawn - n_drawn, TAILS[0], method="inverted_cdf") <= 0:
        return None
    infinite = np.copysign(np.inf, e_drawn - n_drawn)
    ratios = np.divide(e_drawn - n_drawn, o_drawn - n_drawn, out=infinite, where=o_drawn > n_drawn)
    low, high = np.quantile(ratios, TAILS, method="inverted_cdf")
    value = (np.mean(rows) - n.mean()) / (o.mean() - n.mean())
    return {"value": float(value), "low": float(low), "high": float(high)}


def cluster_totals(values: Sequence[Values]) -> tuple[Floats, Floats]:
    """Return the sums ``[seeds, prompts]`` and the numbers ``[prompts]`` of each prompt's values."""
    first = values[0]
    assert all(each.prompts == first.prompts for each in values), "seeds score the same prompts"
    counts = np.bincount(first.prompts).astype(np.float64)
    return np.array([np.bincount(first.prompts, each.values) for each in values]), counts


def bootstrap_interval(totals: Floats, counts: Floats) -> Floats:
    """Return the 95 % percentile interval of the mean, if prompts and seeds are drawn again."""
    by_seed, by_prompt = resamples(*totals.shape)
    sums = ((by_seed @ totals) * by_prompt).sum(1) / len(totals)
    return np.quantile(sums / (by_prompt @ counts), TAILS)


def resamples(seeds: int, prompts: int) -> tuple[Floats, Floats]:
    """Return how often each of 2000 resamples draws each seed and each prompt."""
    generator = np.random.default_rng(0)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    by_prompt = generator.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES)
    return by_seed.astype(np.float64), by_prompt.astype(np.float64)
