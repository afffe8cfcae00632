"""Write the leaderboard: rows pooled over seeds as CSV, JSON, Markdown, figures and a sortable page."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from trce_lightning.evaluation.pooled import (
    Interval,
    Values,
    mean_of_seeds,
    mean_over_seeds,
    rate_over_seeds,
    rho_over_seeds,
)
from trce_lightning.report.curves import save
from trce_lightning.report.page import rendered, svg
from trce_lightning.report.tables import ABSENT
from trce_lightning.runtime.storage import replacing, write_json, write_text

CONCEPTS = "concepts"
ORIGINAL, NEVER_LEARNT = "original", "never-learnt"
REFERENCE, PUBLISHED = "reference", "published"
"""The kinds of rows that are no method of this leaderboard."""
COSTS = (
    "erase_seconds",
    "forward",
    "backward",
    "trainable",
    "cache_bytes",
    "delta_bytes",
    "evaluations_per_image",
)
"""The metrics of cost, which are means over seeds without an interval."""
TITLES = {
    "asr_direct": "ASR direct",
    "asr_implicit": "ASR implicit",
    "attacked": "under attack, mean",
    "fid": "FID",
    "clip_score": "CLIP-S",
    "benign_accuracy": "benign accuracy",
    "benign_accuracy_near": "… near",
    "benign_accuracy_related": "… of their kind",
    "benign_accuracy_far": "… far",
    "benign_accuracy_unkept": "… never kept",
    "erase_seconds": "seconds",
    "forward": "evaluations forward",
    "backward": "… with backward",
    "trainable": "numbers that change",
    "cache_bytes": "cached, MB",
    "delta_bytes": "stored, MB",
    "evaluations_per_image": "evaluations an image",
}
"""The columns' headings by metric. Attacks and their ρ have headings of their own."""
FID_TICKS = (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
"""The ticks of a decade."""


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard."""

    concept: str
    method: str
    kind: str
    seeds: tuple[int, ...]
    metrics: Mapping[str, Interval]
    source: str = ""

    def value(self, metric: str) -> float:
        """Return a metric's value, NaN if there is none."""
        return self.metrics.get(metric, {}).get("value", math.nan)


@dataclass(frozen=True)
class Published:
    """Figures that a paper reports, of another model with other prompts and detectors."""

    experiment: str
    source: str
    asr: Mapping[str, float] = field(default_factory=dict)
    fid: float | None = None
    clip_score: float | None = None


def rows_of(references: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of one set of concepts: the references, then each method with its seeds pooled."""
    concept = "+".join(references[CONCEPTS])
    hits = references["hits"]
    rows = [
        Row(
            concept,
            ORIGINAL,
            REFERENCE,
            (),
            metrics_of([dict(references) | {"hits": hits.get(ORIGINAL, {})}], {}),
        )
    ]
    rows += [
        Row(concept, label, REFERENCE, (), attack_metrics([by_attack], {}))
        for label, by_attack in hits.items()
        if label != ORIGINAL
    ]
    by_method: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault((cell["kind"], cell["method"]), []).append(cell)
    for (kind, method), own in by_method.items():
        seeds = tuple(cell["seed"] for cell in own)
        rows.append(Row(concept, method, kind, seeds, metrics_of(own, hits)))
    return rows


def metrics_of(cells: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> dict[str, Interval]:
    """Return all metrics of cells that differ by their seed."""
    metrics: dict[str, Interval] = {}
    for name in cells[0]["values"]:
        pool = mean_over_seeds if name == "clip_score" else rate_over_seeds
        metrics[name] = pool([Values.load(cell["values"][name]) for cell in cells])
    if "fid" in cells[0]["scores"]:
        metrics["fid"] = mean_of_seeds([cell["scores"]["fid"] for cell in cells])
    metrics |= attack_metrics([cell.get("hits", {}) for cell in cells], references)
    for name in COSTS:
        own = [(cell | cell.get("network_evaluations", {})).get(name) for cell in map(dict, cells)]
        found = [value for value in own if value is not None]
        if found:
            metrics[name] = {"value": sum(found) / len(found)}
    return metrics


def attack_metrics(hits: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> dict[str, Interval]:
    """Return each attack's success, their mean, and ρ where the references allow it.

    Args:
        hits: for each seed, by attack and prompt, which images show the concept.
        references: the same of each reference, by its label.
    """
    metrics: dict[str, Interval] = {}
    for attack in hits[0]:
        metrics[f"attack_{attack}"] = rate_over_seeds([_images(own[attack]) for own in hits])
        if ORIGINAL in references and NEVER_LEARNT in references:
            others = references[ORIGINAL][attack], references[NEVER_LEARNT][attack]
            if (rho := rho_over_seeds([own[attack] for own in hits], *others)) is not None:
                metrics[f"rho_{attack}"] = rho
    if hits[0]:
        metrics["attacked"] = rate_over_seeds([_mean_over_attacks(own) for own in hits])
    return metrics


def _images(by_prompt: Mapping[str, Sequence[bool]]) -> Values:
    return Values.of([(prompt, hit) for prompt, tried in by_prompt.items() for hit in tried])


def _mean_over_attacks(by_attack: Mapping[str, Mapping[str, Sequence[bool]]]) -> Values:
    """Return for each prompt the mean of the share of its images that show the concept.

    It is the mean over the attacks that were scored on the prompt. Relearning leaves out what it taught.
    """
    shares: dict[str, list[float]] = {}
    for own in by_attack.values():
        for prompt, tried in own.items():
            shares.setdefault(prompt, []).append(sum(tried) / len(tried))
    return Values.of([(prompt, sum(found) / len(found)) for prompt, found in shares.items()])


def titles_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return the headings of the metrics that any row has, in the order of the columns."""
    there = dict.fromkeys(metric for row in rows for metric in row.metrics)
    attacks = [metric.removeprefix("attack_") for metric in there if metric.startswith("attack_")]
    attacked = {f"attack_{name}": f"under {name}" for name in attacks}
    rhos = {f"rho_{name}": f"ρ of {name}" for name in attacks}
    order: dict[str, str] = {}
    for metric, title in TITLES.items():
        order[metric] = title
        if metric == "attacked":
            order |= attacked | rhos
    other = {metric: metric for metric in there if metric not in order}
    return {metric: title for metric, title in {**order, **other}.items() if metric in there}


def write_csv(file: Path, rows: Sequence[Row], published: Sequence[Published]) -> None:
    """Write a line for each row, with columns for a metric's value and the ends of its interval."""
    lines = [_flat(row) for row in rows]
    for figures in published:
        known: dict[str, float | None] = {f"asr_{name}": rate for name, rate in figures.asr.items()}
        known |= {"fid": figures.fid, "clip_score": figures.clip_score}
        about = {"concept": figures.experiment, "method": "trce", "kind": PUBLISHED, "source": figures.source}
        lines.append(about | {name: value for name, value in known.items() if value is not None})
    columns = dict.fromkeys(("concept", "method", "kind", "seeds", *(key for line in lines for key in line)))
    with replacing(file) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _flat(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"concept": row.concept, "method": row.method, "kind": row.kind}
    line["seeds"] = " ".join(map(str, row.seeds))
    for metric, interval in row.metrics.items():
        ends = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
        line |= {ends[end]: value for end, value in interval.items()}
    return line


def cell_text(metric: str, interval: Interval | None) -> tuple[str, str]:
    """Return how a metric's value and its interval are shown."""
    if interval is None:
        return ABSENT, ""
    show = _format_of(metric)
    ends = [show(interval[end]) for end in ("low", "high") if end in interval]
    return show(interval["value"]), f"[{', '.join(ends)}]" if ends else ""


def _format_of(metric: str) -> Callable[[float], str]:
    if metric.startswith(("asr", "attack", "benign_accuracy")):
        return lambda value: f"{100 * value:.1f}"
    if metric in ("fid", "clip_score") or metric.startswith("rho"):
        return lambda value: f"{value:.2f}"
    if metric.endswith("_bytes"):
        return lambda value: f"{value / 1e6:.1f}"
    return lambda value: f"{value:,.0f}"


def markdown(rows: Sequence[Row], metrics: Sequence[str] = ()) -> str:
    """Return the rows as a Markdown table, with all metrics or the given ones."""
    titles = titles_of(rows)
    shown = [metric for metric in (metrics or titles) if metric in titles]
    head = ["", *(f"{titles[metric]}{unit_of(metric)}" for metric in shown)]
    lines = [head, ["---", *["---:"] * len(shown)]]
    for row in rows:
        cells = [" ".join(cell_text(metric, row.metrics.get(metric))).strip() for metric in shown]
        lines.append([row.method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def unit_of(metric: str) -> str:
    """Return the unit behind a heading."""
    return ", %" if metric.startswith(("asr", "attack", "benign_accuracy")) else ""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of points that no other point beats in one number without losing in the other.

    Less is better in both. The result is sorted by the first number.
    """
    best, chosen = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            chosen.append(index)
    return chosen


def pareto_figure(rows: Sequence[Row]) -> Figure:
    """Plot ASR against FID, and if there are attacks, their success against FID, of one set of concepts."""
    is_attacked = any("attacked" in row.metrics for row in rows)
    figure = Figure(figsize=(11 if is_attacked else 6, 5.2), layout="constrained")
    axes = figure.subplots(1, 1 + is_attacked, squeeze=False)[0]
    _draw(axes[0], rows, mean_asr, "mean of direct and implicit ASR, %")
    if is_attacked:
        _draw(axes[1], rows, lambda row: row.value("attacked"), "mean success of the attacks, %")
    for row in rows:
        if row.method == NEVER_LEARNT:
            height = 100 * row.value("attacked")
            axes[1].axhline(height, color="grey", linestyle=":", linewidth=1)
            place = axes[1].get_yaxis_transform()
            axes[1].text(0.99, height, NEVER_LEARNT, transform=place, ha="right", va="bottom", color="grey")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return figure


def mean_asr(row: Row) -> float:
    """Return the mean of the direct and the implicit ASR."""
    return (row.value("asr_direct") + row.value("asr_implicit")) / 2


def _draw(axes: Axes, rows: Sequence[Row], height: Callable[[Row], float], title: str) -> None:
    colours, shapes = colormaps["tab20"], "osD^vPX*<>hpd8"
    own = [row for row in rows if row.kind != REFERENCE or row.method == ORIGINAL]
    for index, row in enumerate(own):
        style: dict[str, Any] = {"color": colours(index % 20), "marker": shapes[index % len(shapes)], "s": 60}
        if row.method == ORIGINAL:
            style = {"color": "black", "marker": "*", "s": 120}
        axes.scatter(row.value("fid"), 100 * height(row), label=row.method, zorder=3, **style)
    known = [(row.value("fid"), 100 * height(row)) for row in own]
    known = [point for point in known if not any(map(math.isnan, point))]
    line = [known[index] for index in front(known)]
    axes.plot([x for x, _ in line], [y for _, y in line], color="grey", linewidth=1, zorder=1)
    axes.set(xlabel="FID (less is better)", ylabel=title, ylim=(-3, 103), xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=FID_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.2)


def write_leaderboard(
    folder: Path,
    rows: Sequence[Row],
    published: Sequence[Published],
    facts: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``leaderboard.csv``, ``.json``, ``.md`` and ``.html``, and a figure for each set of concepts."""
    write_csv(folder / "leaderboard.csv", rows, published)
    lines = [{**_about(row), "metrics": dict(row.metrics)} for row in rows]
    slim = [{key: value for key, value in cell.items() if key not in ("values", "hits")} for cell in cells]
    write_json(folder / "leaderboard.json", {"schema": 1, "facts": dict(facts), "rows": lines, "cells": slim})
    concepts = dict.fromkeys(row.concept for row in rows)
    tables, figures = [], {}
    for concept in concepts:
        own = [row for row in rows if row.concept == concept]
        tables.append(f"## {concept}\n\n{markdown(own)}\n")
        figure = pareto_figure(own)
        save(figure, folder / f"pareto-{concept}.png")
        figures[concept] = svg(figure)
    write_text(folder / "leaderboard.md", "\n".join(tables))
    titles = titles_of(rows)
    body = [
        {
            "row": row,
            "cells": [
                (metric, row.value(metric), *cell_text(metric, row.metrics.get(metric))) for metric in titles
            ],
        }
        for row in rows
    ]
    page = rendered(
        "leaderboard.html.j2",
        titles={metric: f"{title}{unit_of(metric)}" for metric, title in titles.items()},
        body=body,
        concepts=list(concepts),
        figures=figures,
        published=published,
        facts=facts,
        is_number=lambda value: not math.isnan(value),
        reference=REFERENCE,
    )
    write_text(folder / "leaderboard.html", page)


def _about(row: Row) -> dict[str, Any]:
    return {"concept": row.concept, "method": row.method, "kind": row.kind, "seeds": list(row.seeds)}
