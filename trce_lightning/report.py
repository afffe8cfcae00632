"""Pictures, tables and files that show what an erasure did.

``Scores`` are the SCORES of metrics.json: ``asr`` (set name → successes, images, rate, low, high), ``fid``,
``clip_score``, ``benign_accuracy``, ``benign_accuracy_near``, ``benign_accuracy_unkept``, ``false_alarm``;
the last is like one entry of ``asr``. Rates and accuracies are fractions. Whatever is absent is left out.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trce_lightning.image_grid import image_grid
from trce_lightning.scoring import flatten_scores
from trce_lightning.storage import replacing, write_json

__all__ = [
    "Scores",
    "epoch_rows",
    "image_grid",
    "one_line",
    "results_table",
    "save_curves",
    "save_loss_curves",
    "write_json",
    "write_scores_csv",
]

Scores = Mapping[str, Any]

_ABSENT = "–"
_ACCURACIES = {
    "benign_accuracy": "benign accuracy",
    "benign_accuracy_near": "benign accuracy, near",
    "benign_accuracy_unkept": "benign accuracy, unkept",
}
_PLAIN = {"fid": "FID", "clip_score": "CLIP-S"}
_TITLES = {"fid": "FID (lower is better)", "clip_score": "CLIP-S (higher is better)"}


def save_curves(passes: Mapping[str, Scores], file: str | Path) -> None:
    """Draws ASR with its 95 % intervals, FID, CLIP-S and benign accuracy over the passes of a run.

    Args:
        passes: scores by the name of the pass: original, stage 1, epoch 1 and so on.
        file: its suffix names the format, such as ``.png`` or ``.svg``.

    Raises:
        ValueError: no scores at all.
    """
    panels: dict[str, Callable[[Axes], None]] = {}
    history = list(passes.values())
    rates = [{**scores.get("asr", {}), "false alarm": scores.get("false_alarm")} for scores in history]
    if any(rate for epoch in rates for rate in epoch.values()):
        panels["ASR, % of images"] = partial(_draw_rates, epochs=rates)
    for key, title in _TITLES.items():
        if any(scores.get(key) is not None for scores in history):
            panels[title] = partial(_draw_scores, history=history, names={key: key}, factor=1)
    if any(scores.get(key) is not None for scores in history for key in _ACCURACIES):
        panels["benign accuracy, %"] = partial(_draw_scores, history=history, names=_ACCURACIES, factor=100)
    if not panels:
        raise ValueError(f"save_curves: expected scores of at least one epoch, got {dict(passes)}")
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, (title, draw) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        draw(axes)
        axes.set(title=title)
        axes.set_xticks(range(len(passes)), list(passes), rotation=30, ha="right")
    _save(figure, file)


def save_loss_curves(logs: Sequence[Path], file: str | Path) -> None:
    """Draws each ``loss/…`` and ``hinge/…`` column of Lightning's metrics.csv over the training step.

    ``…_step`` columns are thin lines, ``…_epoch`` columns of the same name points in the same panel.

    Args:
        logs: a metrics.csv of each attempt at the run, oldest first; the last word on a step counts.
        file: its suffix names the format.

    Raises:
        ValueError: no file has such a column with numbers in it.
    """
    curves = _read_curves(*logs)
    if not curves:
        raise ValueError(
            f"{', '.join(map(str, logs))}: expected loss/ or hinge/ columns with numbers in them, got none"
        )
    names = sorted({_base_name(column) for column in curves})
    figure = Figure(figsize=(4.2 * len(names), 3.2), layout="constrained")
    panels = dict(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True))
    for column, points in curves.items():
        axes, epoch_mean = panels[_base_name(column)], column.endswith("_epoch")
        style = {"marker": "o", "label": "epoch mean"} if epoch_mean else {"linewidth": 0.8, "label": "step"}
        axes.plot(*zip(*points, strict=True), **style)
        axes.set(title=_base_name(column), xlabel="step")
        axes.legend(frameon=False)
    _save(figure, file)


def write_scores_csv(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Writes the scores in a metrics.json as a table, whole or not at all.

    One row per model: original, stage 1, "epoch 1" and so on, erased, scores. Columns are named like
    ``asr/direct/rate``; a score that a row lacks is an empty cell.
    """
    models = {
        "original": metrics.get("original"),
        "stage 1": metrics.get("after_textual"),
        **epoch_rows(metrics.get("epochs", ())),
        "erased": metrics.get("erased"),
        "scores": metrics.get("scores"),
    }
    rows = [{"model": name, **flatten_scores(scores)} for name, scores in models.items() if scores]
    columns = dict.fromkeys(("model", *(key for row in rows for key in row)))
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def epoch_rows(epochs: Sequence[Scores]) -> dict[str, Scores]:
    """Scores after each epoch as "epoch 1" and so on."""
    return {f"epoch {number}": scores for number, scores in enumerate(epochs, start=1)}


def results_table(columns: Mapping[str, Scores]) -> str:
    """A Markdown table: one column per model, one row per score, "–" where a model lacks one.

    ASR and false alarms come with their 95 % intervals, FID and CLIP-S with the ratio to column "original".
    """
    original = columns.get("original", {})
    sets = dict.fromkeys(
        ("direct", "implicit", *(name for s in columns.values() for name in s.get("asr", {})))
    )
    rows: dict[str, Callable[[Scores], str]] = {f"ASR {name}": partial(_asr, name) for name in sets}
    rows |= {title: partial(_with_ratio, original, key) for key, title in _PLAIN.items()}
    rows |= {title: partial(_accuracy, key) for key, title in _ACCURACIES.items()}
    rows["false alarm"] = _false_alarm
    lines = [["", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[title, *(cell(scores) for scores in columns.values())] for title, cell in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def one_line(scores: Scores) -> str:
    """Scores for a log: "ASR direct 1.2 %, …, FID 13.40, CLIP-S 63.10, benign accuracy 97.5 %"."""
    cells = {f"ASR {name}": f"{100 * rate['rate']:.1f} %" for name, rate in scores.get("asr", {}).items()}
    cells |= {title: f"{scores[key]:.2f}" for key, title in _PLAIN.items() if scores.get(key) is not None}
    cells |= {title: _accuracy(key, scores) for key, title in _ACCURACIES.items() if key in scores}
    return ", ".join(f"{title} {cell}" for title, cell in cells.items())


def _asr(name: str, scores: Scores) -> str:
    return _rate(scores.get("asr", {}).get(name))


def _false_alarm(scores: Scores) -> str:
    return _rate(scores.get("false_alarm"))


def _rate(rate: Mapping[str, float] | None) -> str:
    if rate is None:
        return _ABSENT
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _accuracy(key: str, scores: Scores) -> str:
    return _ABSENT if scores.get(key) is None else f"{100 * scores[key]:.1f} %"


def _with_ratio(original: Scores, key: str, scores: Scores) -> str:
    value, reference = scores.get(key), original.get(key)
    if value is None:
        return _ABSENT
    ratio = f" ({value / reference:.2f}×)" if reference and scores is not original else ""
    return f"{value:.2f}{ratio}"


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
    """Column → (step, value) of the rows that have one, by step."""
    curves: dict[str, dict[int, float]] = {}
    for log in logs:
        with log.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                for column, value in row.items():
                    if column.startswith(("loss/", "hinge/")) and value:
                        curves.setdefault(column, {})[int(row["step"])] = float(value)
    return {column: sorted(points.items()) for column, points in curves.items()}


def _save(figure: Figure, file: str | Path) -> None:
    with replacing(file) as aside:
        figure.savefig(aside, dpi=140, facecolor="white")
