"""How sure a number is: intervals, paired differences, and p-values of several tests at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

CONFIDENCE_LEVEL = 0.95
RESAMPLES = 2000
Clusters = Sequence[Hashable]
"""What each value belongs to: values of one prompt are not independent."""


def wilson_rate(successes: int, images: int) -> dict[str, float]:
    """A fraction with its Wilson 95 % interval, for independent images.

    Of k in n images, with z = 1.96: (k + z²/2 ± z √(k (n − k) / n + z²/4)) / (n + z²).

    Returns:
        ``successes`` and ``images`` (counts); ``rate``, ``low`` and ``high`` in [0, 1].

    Raises:
        ValueError: no images.
    """
    if images == 0:
        raise ValueError("rate: expected at least one image, got none")
    interval = binomtest(successes, images).proportion_ci(CONFIDENCE_LEVEL, method="wilson")
    low, high = float(interval.low), float(interval.high)
    return {
        "successes": successes,
        "images": images,
        "rate": successes / images,
        "low": low,
        "high": high,
    }


def clustered_rate(hits: Sequence[bool], clusters: Clusters) -> dict[str, float]:
    """Like :func:`wilson_rate` for images of which several may be of one prompt.

    With one image a prompt it is Wilson's interval, else :func:`mean_interval` over prompts. Where all
    prompts have one rate, resampling says nothing; then it is Wilson's of as many images as prompts.
    """
    rate = wilson_rate(sum(hits), len(hits))
    means = cluster_means([float(hit) for hit in hits], clusters)
    if len(means) == len(hits):
        return rate
    if np.ptp(means) == 0:
        of_prompts = wilson_rate(round(float(means.sum())), len(means))
        return rate | {"low": of_prompts["low"], "high": of_prompts["high"]}
    low, high = mean_interval([float(hit) for hit in hits], clusters)
    return rate | {"low": low, "high": high}


def mean_interval(values: Sequence[float], clusters: Clusters) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of the mean, prompts being drawn with all of their values.

    2000 resamples of :func:`cluster_means` from a fixed seed. A single prompt gives its mean twice.
    """
    means = cluster_means(values, clusters)
    if len(means) == 1:
        return float(means[0]), float(means[0])
    interval = bootstrap(
        (means,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def cluster_means(values: Sequence[float], clusters: Clusters) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean of each prompt's values, ``[prompts]``, in the order of their first values."""
    if len(values) != len(clusters) or not values:
        raise ValueError(
            f"intervals: expected a cluster for each value, got {len(values)} and {len(clusters)}"
        )
    by_cluster: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        by_cluster.setdefault(cluster, []).append(value)
    return np.array([np.mean(rows) for rows in by_cluster.values()], dtype=np.float64)


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Clusters
) -> dict[str, float]:
    """Mean of second − first over the same images, with the 95 % interval of :func:`mean_interval`."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    low, high = mean_interval(differences, clusters)
    return {"difference": float(np.mean(differences)), "low": low, "high": high}


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number m by Holm's step-down method.

    p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)) for p_(1) ≤ … ≤ p_(m).
    """
    names = sorted(p_values, key=p_values.__getitem__)
    factors = np.arange(len(names), 0, -1)
    scaled = factors * np.array([p_values[name] for name in names])
    adjusted = np.minimum(np.maximum.accumulate(scaled), 1).tolist()
    by_name = dict(zip(names, adjusted, strict=True))
    return {name: by_name[name] for name in p_values}
