"""Measure how certain a number is: intervals, paired differences, and p-values of several tests at once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap, norm

CONFIDENCE_LEVEL = 0.95
RESAMPLES = 2000
DRAWN_AT_ONCE = 10**7
"""The largest number of resampled values in memory. The values take 80 MB, and their indices as much."""
Z = float(norm.ppf(0.5 + CONFIDENCE_LEVEL / 2))
Clusters = Sequence[Hashable]
"""The cluster of each value, such as its prompt. Values of one cluster are not independent."""


def wilson_rate(successes: int, images: int, effective_images: float | None = None) -> dict[str, float]:
    """Return a fraction p = k/n with its Wilson 95 % interval.

    The interval is (p + z²/2m ± z √(p (1 − p)/m + z²/4m²)) / (1 + z²/m) with z = 1.96. m is the number of
    independent images: n, or ``effective_images`` if a prompt has several images.

    Returns:
        ``successes`` and ``images`` (counts); ``rate``, ``low`` and ``high`` in [0, 1].

    Raises:
        ValueError: there are no images.
    """
    if images == 0:
        raise ValueError("rate: expected at least one image, got none")
    rate, m = successes / images, effective_images or images
    centre = rate + Z**2 / (2 * m)
    half = Z * math.sqrt(rate * (1 - rate) / m + Z**2 / (4 * m**2))
    low, high = ((centre + sign * half) / (1 + Z**2 / m) for sign in (-1, 1))
    return {
        "successes": successes,
        "images": images,
        "rate": rate,
        "low": max(low, 0.0) if successes else 0.0,
        "high": min(high, 1.0) if successes < images else 1.0,
    }


def clustered_rate(hits: Sequence[bool], clusters: Clusters) -> dict[str, float]:
    """Return :func:`wilson_rate` of images. A prompt may have several images.

    If it has, n is replaced by :func:`effective_images`, and the result also holds the interval of
    :func:`mean_interval` as ``bootstrap_low`` and ``bootstrap_high``. The bootstrap interval is too narrow
    for rates near 0 and 1, and the rates of erased models are near 0.
    """
    values = [float(hit) for hit in hits]
    rate = wilson_rate(sum(hits), len(hits), effective_images(values, clusters) if values else None)
    if len(set(clusters)) == len(values):
        return rate
    low, high = mean_interval(values, clusters)
    return rate | {"bootstrap_low": low, "bootstrap_high": high}


def effective_images(values: Sequence[float], clusters: Clusters) -> float:
    """Return the effective sample size: the images' variance divided by the squared error of their mean.

    C is the number of prompts, n_c the number of images of prompt c, n the number of all images, and r_c the
    sum of prompt c's differences from the mean. The squared error is C/(C − 1) Σ r_c² / n².

    The result is clipped to [n²/Σ n_c², n]. The lower bound is C if all prompts have equally many images. If
    all values are equal, the result is the lower bound, because the values then don't show how similar the
    images of one prompt are.
    """
    totals, counts = cluster_sums(values, clusters)
    prompts, images = len(counts), len(values)
    least = images**2 / np.square(counts).sum()
    if prompts in (1, images) or np.ptp(values) == 0:
        return float(least)
    residuals = totals - counts * np.mean(values)
    squared_error = prompts / (prompts - 1) * np.square(residuals).sum() / images**2
    found = np.var(values) / squared_error if squared_error > 0 else images
    return float(np.clip(found, least, images))


def mean_interval(values: Sequence[float], clusters: Clusters) -> tuple[float, float]:
    """Return the percentile bootstrap 95 % interval of the mean.

    Each of 2000 resamples draws whole prompts, with all of their values, from a fixed seed. If there is one
    prompt, both ends are its mean.
    """
    totals, counts = cluster_sums(values, clusters)
    if len(totals) == 1:
        mean = float(totals[0] / counts[0])
        return mean, mean
    interval = bootstrap(
        (totals, counts),
        lambda totals, counts, axis: totals.sum(axis) / counts.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // len(totals)),
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def cluster_sums(values: Sequence[float], clusters: Clusters) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the sum and number of each prompt's values, ``[2, prompts]``, in order of appearance."""
    if len(values) != len(clusters) or not values:
        raise ValueError(
            f"intervals: expected a cluster for each value, got {len(values)} and {len(clusters)}"
        )
    by_cluster: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        by_cluster.setdefault(cluster, []).append(value)
    return np.array([(sum(rows), len(rows)) for rows in by_cluster.values()], dtype=np.float64).T


def paired_difference(
    first: Sequence[float], second: Sequence[float], clusters: Clusters
) -> dict[str, float]:
    """Return the mean of second − first over the same images, with the interval of :func:`mean_interval`."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    low, high = mean_interval(differences, clusters)
    return {"difference": float(np.mean(differences)), "low": low, "high": high}


def paired_rate_difference(
    first: Sequence[bool], second: Sequence[bool], clusters: Clusters
) -> dict[str, float]:
    """Return the difference of two rates on the same images, second − first, with a 95 % interval.

    The interval is Agresti and Min's. b images are hits of the first model only, c of the second only, and
    half an image is added to each of the four cells, so m = n + 2. The interval is
    (c − b)/m ± z √((b + c + 1) − (c − b)²/m)/m. It has a width even if no image differs. The counts are
    scaled by :func:`effective_images`.
    """
    changes = [float(b) - float(a) for a, b in zip(first, second, strict=True)]
    scale = effective_images(changes, clusters) / len(changes)
    lost, gained = scale * changes.count(-1.0), scale * changes.count(1.0)
    m = scale * len(changes) + 2
    centre = (gained - lost) / m
    half = Z * math.sqrt(max(lost + gained + 1 - (gained - lost) ** 2 / m, 0.0)) / m
    return {
        "difference": float(np.mean(changes)),
        "low": max(centre - half, -1.0),
        "high": min(centre + half, 1.0),
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number m by Holm's step-down method.

    p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)) for p_(1) ≤ … ≤ p_(m).
    """
    names = sorted(p_values, key=p_values.__getitem__)
    factors = np.arange(len(names), 0, -1)
    scaled = factors * np.array([p_values[name] for name in names])
    adjusted = np.minimum(np.maximum.accumulate(scaled), 1).tolist()
    by_name = dict(zip(names, adjusted, strict=True))
    return {name: by_name[name] for name in p_values}
