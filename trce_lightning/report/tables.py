"""Write pictures, tables and files that show what an erasure did.

``Scores`` are the SCORES of metrics.json. ``asr`` maps a set's name to successes, images, rate, low and high.
``false_alarm`` is like one entry of ``asr``. The others are ``fid``, ``clip_score``, ``benign_accuracy``,
``benign_accuracy_near`` and ``benign_accuracy_unkept``. Rates and accuracies are fractions. A score that is
absent is left out.
"""

import csv
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trce_lightning.evaluation.scored import flatten_scores
from trce_lightning.report.image_grid import image_grid
from trce_lightning.runtime.storage import replacing, write_json

__all__ = [
    "ABSENT",
    "ACCURACIES",
    "Scores",
    "image_grid",
    "one_line",
    "rate_cell",
    "results_rows",
    "results_table",
    "write_json",
    "write_scores_csv",
]

Scores = Mapping[str, Any]

ABSENT = "–"
ACCURACIES = {
    "benign_accuracy": "benign accuracy",
    "benign_accuracy_near": "benign accuracy, near",
    "benign_accuracy_unkept": "benign accuracy, unkept",
}
_PLAIN = {"fid": "FID", "clip_score": "CLIP-S"}
# KID is left out, since it is below zero for images from the same noise. metrics.json has it.
_DISTANCES = {"fid_to_original": "FID to the original"}
_GROUPS = {
    "subject": "accuracy",
    "both": "both subjects shown",
    "left": "on the left as asked",
    "right": "on the right as asked",
    "placed": "all in their places",
    "in_order": "in their places, where all are shown",
    "near": "near neighbours of the concept",
    "related": "of their kind",
    "far": "far from it",
    "unkept": "never kept",
    "style": "style",
    "background": "background colour",
}


def write_scores_csv(path: str | Path, models: Mapping[str, Scores]) -> None:
    """Write a table of the scores of models, or of a run's passes. The file is complete or absent.

    Each model has one row. Columns are named like ``asr/direct/rate``. If a row lacks a score, its cell is
    empty.
    """
    rows = [{"model": name, **flatten_scores(scores)} for name, scores in models.items()]
    columns = dict.fromkeys(("model", *(key for row in rows for key in row)))
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def results_table(columns: Mapping[str, Scores], titles: Collection[str] = ()) -> str:
    """Return :func:`results_rows` as a Markdown table.

    If ``titles`` are given, other rows are left out. Without columns, the table is empty.
    """
    if not columns:
        return ""
    header, *rows = results_rows(columns)
    shown = [row for row in rows if not titles or row[0] in titles]
    lines = [header, ["---", *["---:"] * len(columns)], *shown]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results_rows(columns: Mapping[str, Scores]) -> list[list[str]]:
    """Return the cells of a table with one column per model and one row per score.

    If a model lacks a score, its cell is "–". If all lack it, the row is left out. The first row and the
    first column are headings.

    Rates, accuracies and CLIP-S have their 95 % intervals. FID and CLIP-S also have the ratio to the column
    "original". That column's own distance to the original is the distance between its first and second images
    of each prompt, if there are two.
    """
    original = columns.get("original", {})
    sets = dict.fromkeys(
        ("direct", "implicit", *(name for s in columns.values() for name in s.get("asr", {})))
    )
    rows: dict[str, Callable[[Scores], str]] = {f"ASR {name}": partial(_asr, name) for name in sets}
    rows |= {title: partial(_with_ratio, original, key) for key, title in _PLAIN.items()}
    rows |= {title: partial(_distance, key) for key, title in _DISTANCES.items()}
    rows |= _accuracy_rows(columns)
    rows["false alarm"] = _false_alarm
    cells = [[title, *(cell(scores) for scores in columns.values())] for title, cell in rows.items()]
    return [["", *columns], *(row for row in cells if set(row[1:]) != {ABSENT})]


def one_line(scores: Scores) -> str:
    """Return a line for a log: "ASR direct 1.2 %, …, FID 13.40, CLIP-S 63.10, benign accuracy 97.5 %"."""
    cells = {f"ASR {name}": f"{100 * rate['rate']:.1f} %" for name, rate in scores.get("asr", {}).items()}
    cells |= {title: f"{scores[key]:.2f}" for key, title in _PLAIN.items() if scores.get(key) is not None}
    cells |= {title: _accuracy(key, scores) for key, title in ACCURACIES.items() if key in scores}
    return ", ".join(f"{title} {cell}" for title, cell in cells.items())


def _accuracy_rows(columns: Mapping[str, Scores]) -> dict[str, Callable[[Scores], str]]:
    """Return one row for each group of each labelled set."""
    sets = dict.fromkeys(name for scores in columns.values() for name in scores.get("accuracy", {}))
    return {
        f"{name} {title}" if group == "subject" else f"{name} accuracy, {title}": partial(_group, name, group)
        for name in sets
        for group, title in _GROUPS.items()
    }


def _group(name: str, group: str, scores: Scores) -> str:
    return rate_cell(scores.get("accuracy", {}).get(name, {}).get(group))


def _distance(key: str, scores: Scores) -> str:
    if key in scores:
        return f"{scores[key]:.2f}"
    floor = scores.get(key.replace("to_original", "floor"))
    return ABSENT if floor is None else f"floor {floor:.2f}"


def _asr(name: str, scores: Scores) -> str:
    return rate_cell(scores.get("asr", {}).get(name))


def _false_alarm(scores: Scores) -> str:
    return rate_cell(scores.get("false_alarm"))


def rate_cell(rate: Mapping[str, float] | None) -> str:
    """Return a rate with its interval: "1.6 % [0.8, 3.1]"."""
    if rate is None:
        return ABSENT
    share = f"{100 * rate['rate']:.1f} %"
    # Published rates have no interval.
    return f"{share} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]" if "low" in rate else share


def _accuracy(key: str, scores: Scores) -> str:
    return ABSENT if scores.get(key) is None else f"{100 * scores[key]:.1f} %"


def _with_ratio(original: Scores, key: str, scores: Scores) -> str:
    value, reference = scores.get(key), original.get(key)
    if value is None:
        return ABSENT
    # A published figure belongs to another original.
    comparable = reference and scores is not original and "source" not in scores
    ratio = f" ({value / reference:.2f}×)" if comparable else ""
    low, high = scores.get(f"{key}_low"), scores.get(f"{key}_high")
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{value:.2f}{interval}{ratio}"
