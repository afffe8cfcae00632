"""Plot the curves of a run, and figures that compare models.

``Scores`` are defined in :mod:`trce_lightning.report.tables`.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import Scored
from trce_lightning.metrics.asr import CURVE_THRESHOLDS, THRESHOLD
from trce_lightning.report.tables import ACCURACIES, Scores
from trce_lightning.runtime.storage import replacing

_TITLES = {"fid": "FID (lower is better)", "clip_score": "CLIP-S (higher is better)"}


def save_curves(passes: Mapping[str, Scores], file: str | Path) -> None:
    """Plot ASR with its 95 % intervals, FID, CLIP-S and benign accuracy over the passes of a run.

    Args:
        passes: scores by the name of the pass: original, stage 1, epoch 1 and so on.
        file: the picture. Its suffix sets the format, such as ``.png`` or ``.svg``.

    Raises:
        InputError: there are no scores.
    """
    panels: dict[str, Callable[[Axes], None]] = {}
    history = list(passes.values())
    rates = [{**scores.get("asr", {}), "false alarm": scores.get("false_alarm")} for scores in history]
    if any(rate for epoch in rates for rate in epoch.values()):
        panels["ASR, % of images"] = partial(_draw_rates, epochs=rates)
    for key, title in _TITLES.items():
        if any(scores.get(key) is not None for scores in history):
            panels[title] = partial(_draw_scores, history=history, names={key: key}, factor=1)
    if any(scores.get(key) is not None for scores in history for key in ACCURACIES):
        panels["benign accuracy, %"] = partial(_draw_scores, history=history, names=ACCURACIES, factor=100)
    if not panels:
        raise InputError(f"save_curves: expected scores of at least one epoch, got {dict(passes)}")
    figure, places = _panels(len(panels))
    for axes, (title, draw) in zip(places, panels.items(), strict=True):
        draw(axes)
        axes.set(title=title)
        axes.set_xticks(range(len(passes)), list(passes), rotation=30, ha="right")
    save(figure, file)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels in rows, about as wide as high, which a page can show large."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in places[count:]:
        figure.delaxes(empty)
    return figure, places[:count]


def save_loss_curves(logs: Sequence[Path], file: str | Path) -> None:
    """Plot each ``loss/…`` and ``hinge/…`` column of Lightning's metrics.csv over the training step.

    A ``…_step`` column is a thin line. The ``…_epoch`` column of the same name has points in the same panel.

    Args:
        logs: the metrics.csv of each attempt at the run, oldest first. If two have a step, the later one
            counts.
        file: the picture. Its suffix sets the format.

    Raises:
        InputError: no file has such a column with numbers in it.
    """
    curves = _read_curves(*logs)
    if not curves:
        raise InputError(
            f"{', '.join(map(str, logs))}: expected loss/ or hinge/ columns with numbers in them, got none"
        )
    names = sorted({_base_name(column) for column in curves})
    figure, places = _panels(len(names))
    panels = dict(zip(names, places, strict=True))
    for column, points in curves.items():
        axes, epoch_mean = panels[_base_name(column)], column.endswith("_epoch")
        style = {"marker": "o", "label": "epoch mean"} if epoch_mean else {"linewidth": 0.8, "label": "step"}
        axes.plot(*zip(*points, strict=True), **style)
        axes.set(title=_base_name(column), xlabel="step")
        axes.legend(frameon=False)
    save(figure, file)


def asr_at(scored: Scored, set_name: str, threshold: float) -> float:
    """Return the share of a set's images with a probability of at least ``threshold``, in [0, 1]."""
    rows = scored.detections[set_name].values()
    return sum(row.probability >= threshold for row in rows) / len(rows)


def threshold_figure(models: Mapping[str, Scored]) -> Figure:
    """Plot ASR, and the false alarms of benign prompts, over the detector's threshold."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    names = list(next(iter(models.values())).detections)
    for index, (label, scored) in enumerate(models.items()):
        for color, name in enumerate(names):
            rates = [100 * asr_at(scored, name, threshold) for threshold in CURVE_THRESHOLDS]
            axes.plot(
                CURVE_THRESHOLDS,
                rates,
                styles[index % len(styles)],
                color=f"C{color}",
                label=f"{label}, {name}",
            )
    axes.axvline(THRESHOLD, color="0.7", linewidth=0.8)
    axes.set(xlabel="threshold on the detector's probability", ylabel="% of images", ylim=(-2, 102))
    axes.legend(frameon=False, fontsize="small")
    return figure


def trade_off_points(models: Mapping[str, Scores]) -> dict[str, tuple[float, float]]:
    """Return (FID, mean ASR over the attack sets in %) by label, for every model that has both."""
    points = {}
    for label, scores in models.items():
        rates = [rate["rate"] for rate in scores.get("asr", {}).values()]
        if rates and "fid" in scores:
            points[label] = (scores["fid"], 100 * sum(rates) / len(rates))
    return points


def trade_off_figure(points: Mapping[str, tuple[float, float]]) -> Figure:
    """Plot mean ASR over FID. Lower left is better. Compare only models with equal numbers of images."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, (fid, asr) in points.items():
        axes.plot(fid, asr, "o")
        axes.annotate(label, (fid, asr), xytext=(5, 5), textcoords="offset points", fontsize="small")
    axes.set(xlabel="FID", ylabel="ASR, % of images (mean over sets)", ylim=(-5, 105))
    axes.margins(x=0.15)
    return figure


def _draw_rates(axes: Axes, epochs: Sequence[Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(name for epoch in epochs for name, rate in epoch.items() if rate):
        points = [(index, epoch[name]) for index, epoch in enumerate(epochs) if epoch.get(name)]
        low, rate, high = ([100 * value[key] for _, value in points] for key in ("low", "rate", "high"))
        x = [index for index, _ in points]
        (line,) = axes.plot(x, rate, marker="o", label=name)
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    axes.set_ylim(-2, 102)
    axes.legend(frameon=False)


def _draw_scores(axes: Axes, history: Sequence[Scores], names: Mapping[str, str], factor: float) -> None:
    for key, name in names.items():
        points = [(i, factor * s[key]) for i, s in enumerate(history) if s.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if len(names) > 1:
        axes.legend(frameon=False)


def _base_name(column: str) -> str:
    return column.removesuffix("_step").removesuffix("_epoch")


def _read_curves(*logs: Path) -> dict[str, list[tuple[int, float]]]:
    """Return for each column its (step, value) rows, sorted by step. Rows without a value are left out."""
    curves: dict[str, dict[int, float]] = {}
    for log in logs:
        with log.open(encoding="utf-8", errors="replace", newline="") as stream:
            for row in csv.DictReader(line.replace("\0", "") for line in stream):
                for column, value in row.items():
                    if column and column.startswith(("loss/", "hinge/")) and value:
                        # A killed run may leave half a line. The plot leaves it out.
                        with suppress(ValueError, KeyError, TypeError):
                            curves.setdefault(column, {})[int(row["step"])] = float(value)
    return {column: sorted(points.items()) for column, points in curves.items() if points}


def save(figure: Figure, file: str | Path) -> None:
    """Write a figure. The file is complete or absent."""
    with replacing(file) as aside:
        figure.savefig(aside, dpi=140, facecolor="white")
