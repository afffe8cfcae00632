"""Write leaderboards and the trials into README and docs: `python -m benchmarks.leaderboard [FOLDER …]`.

A FOLDER is one of `python -m trce_lightning.leaderboard`. Several have different concepts. All rows go into
`docs/leaderboard.md`, with the figures, and into the table `docs/leaderboard.csv`. `--readme` also writes
some columns of the first concept into README. `--trials CSV` copies the table of
`python -m trce_lightning.tune` to `docs/tuning_trials.csv`, and writes each method's chosen trial into the
page.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pictures import publish
from benchmarks.report import refresh
from trce_lightning.report.leaderboard import COSTS, REFERENCE, Row, markdown, mean_asr

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "leaderboard.md"
SHOWN = ("asr_direct", "asr_implicit", "attacked", "fid", "benign_accuracy", "benign_accuracy_unkept")
"""The columns of README's table, and of the first table of the page."""


def load_rows(folder: Path) -> list[Row]:
    """Return the rows of a leaderboard: the references, then methods by their mean ASR."""
    content = json.loads((folder / "leaderboard.json").read_text("utf-8"))
    rows = [
        Row(row["concept"], row["method"], row["kind"], tuple(row["seeds"]), row["metrics"])
        for row in content["rows"]
    ]
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[str, bool, bool, float]:
    """Return what sorts the rows. A reference without images has no ASR."""
    asr = mean_asr(row)
    return row.concept, row.kind != REFERENCE, math.isnan(asr), 0.0 if math.isnan(asr) else asr


def sections(rows: Sequence[Row], images: Mapping[str, str]) -> str:
    """Return each set of concepts with its figure and three tables: scores, attacks and cost."""
    parts = []
    for concept in dict.fromkeys(row.concept for row in rows):
        own = [row for row in rows if row.concept == concept]
        metrics = list(dict.fromkeys(metric for row in own for metric in row.metrics))
        attacks = [metric for metric in metrics if metric.startswith(("attack_", "rho_"))]
        near = [
            metric for metric in metrics if metric.startswith("benign_accuracy_") or metric == "clip_score"
        ]
        parts += [f"### {concept}", f"![{concept}: ASR and attacks against FID]({images[concept]})"]
        for table in (SHOWN, near, attacks, COSTS):
            if shown := [row for row in own if _has(row, table)]:
                parts.append(markdown(shown, table))
    return "\n\n".join(parts)


def _has(row: Row, metrics: Sequence[str]) -> bool:
    return any(metric in row.metrics for metric in metrics)


def joined_tables(files: Sequence[Path]) -> str:
    """Return one CSV of several. A column that a file lacks is empty there."""
    lines: list[dict[str, str]] = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            lines += csv.DictReader(stream)
    table = io.StringIO()
    names = dict.fromkeys(name for line in lines for name in line)
    writer = csv.DictWriter(table, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return table.getvalue()


def chosen_trials(file: Path) -> str:
    """Return a Markdown table of each method's chosen trial."""
    with file.open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    head = ["method", "trials", "chosen", "loss", "ASR direct, implicit", "FID", "benign accuracy", "options"]
    table = [head, ["---", *["---:"] * 6, "---"]]
    for line in lines:
        if line["chosen"] != "1" and line["method"] != "original":
            continue
        count = sum(other["method"] == line["method"] for other in lines)
        rates = ", ".join(f"{100 * float(line[name]):.0f} %" for name in ("asr_direct", "asr_implicit"))
        accuracy = f"{100 * float(line['benign_accuracy']):.0f} %"
        options: dict[str, Any] = json.loads(line["options"])
        written = ", ".join(f"{key.partition('.')[2]}={value}" for key, value in options.items())
        cells = [
            line["method"],
            str(count),
            line["trial"],
            line["loss"],
            rates,
            line["fid"],
            accuracy,
            written,
        ]
        table.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def main() -> None:
    """Write what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--trials", type=Path, metavar="CSV")
    options = parser.parse_args()
    if options.trials is not None:
        shutil.copyfile(options.trials, PAGE.with_name("tuning_trials.csv"))
        refresh(chosen_trials(options.trials), PAGE, "tuning")
    if not options.folders:
        return
    rows, images = [], {}
    for folder in options.folders:
        if not (folder / "leaderboard.json").is_file():
            parser.error(f"FOLDER: expected one with leaderboard.json, got {folder}; make it first")
        own = load_rows(folder)
        rows += own
        for concept in dict.fromkeys(row.concept for row in own):
            if concept in images:
                parser.error(f"FOLDER: expected each concept in one folder, got {concept} in {folder} again")
            images[concept] = f"images/leaderboard-{concept}.png"
            publish(folder / f"pareto-{concept}.png", PAGE.parent / images[concept])
    table = joined_tables([folder / "leaderboard.csv" for folder in options.folders])
    PAGE.with_suffix(".csv").write_text(table, encoding="utf-8", newline="")
    refresh(sections(rows, images), PAGE, "leaderboard")
    if options.readme:
        first = [row for row in rows if row.concept == rows[0].concept and "fid" in row.metrics]
        refresh(markdown(first, SHOWN), ROOT / "README.md", "leaderboard")


if __name__ == "__main__":
    main()
