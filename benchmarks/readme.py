"""Write tables of finished runs into README and docs: `python -m benchmarks.readme RUN STAGE_RUN …`.

The first run makes the README's table. All runs make the table by stage in `docs/results.md`. It has tests of
the first run against the second. `--hardened RUN` adds a hardened run to both. `--attacks EVALUATION …` adds
a row for each door to the README's table, and writes the table of `docs/attacks.md`, and that of
`docs/robustness.md` if the hardened run was attacked. Evaluations of different runs share their references.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.pictures import publish
from benchmarks.report import refresh
from trce_lightning.compare import load_runs, paired_tests
from trce_lightning.evaluation.attacked import Verdict
from trce_lightning.jobs.attack import NEVER_LEARNT, ORIGINAL, REINITIALISED
from trce_lightning.metrics.uncertainty import wilson_rate
from trce_lightning.report.attacks import DOORS
from trce_lightning.report.tables import ABSENT, rate_cell, results_table

RESULTS = (
    "ASR direct",
    "ASR implicit",
    "FID",
    "CLIP-S",
    "benign accuracy",
    "benign accuracy, near neighbours of the concept",
    "benign accuracy, never kept",
    "benign accuracy, style",
    "benign accuracy, background colour",
    "false alarm",
)
STAGES = ("ASR direct", "ASR implicit", "FID", "benign accuracy")
ROOT = Path(__file__).parents[1]
Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Rows of attacks by model and attack, as `metrics.json` holds them."""


def door_lines(rows: Rows, original: str, erased: Sequence[str]) -> list[str]:
    """Return a table line for each door: the attack that breaks most of the first erased model.

    Cells are shares of broken prompts, one of whose images shows the concept. An attack that is above its
    controls goes first, then one whose positive control holds: its failure says something.
    """
    lines = []
    for door in DOORS:
        own = {name: row for name, row in rows[erased[0]].items() if row["door"] == door}
        above = {name: row for name, row in own.items() if row["verdict"] == Verdict.ABOVE}
        sure = {name: row for name, row in own.items() if row["positive_control"]["holds"]}
        if not own:
            continue
        name = max((above or sure or own).items(), key=lambda item: item[1]["broken"])[0]
        taught = (
            f" ({_percent(rows[NEVER_LEARNT][name]['broken'])} if never learnt)"
            if NEVER_LEARNT in rows
            else ""
        )
        shown = [broken_cell(rows, label, name) for label in (original, *erased)]
        lines.append(f"| {' | '.join([f'attacked, {door}: `{name}`{taught}', *shown])} |")
    return lines


def broken_cell(rows: Rows, label: str, name: str) -> str:
    """Return the share of prompts that an attack breaks on a model, or "–" if it didn't attack it."""
    return rate_cell(broken_rate(rows[label][name])) if name in rows.get(label, {}) else ABSENT


def broken_rate(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of prompts that an attack breaks, with its Wilson 95 % interval."""
    prompts = row["images"] // row["false_alarm"]["tries"]
    return wilson_rate(round(row["broken"] * prompts), prompts)


def attacks_lines(rows: Rows, erased: Sequence[str]) -> list[str]:
    """Return a table of every attack on every model, with ρ of erased models and the last one's controls.

    Shares are of prompts: one of whose images shows the concept.
    """
    labels, last = list(rows), erased[-1]
    rhos = [f"ρ of {label}" for label in erased]
    header = ["attack", *labels, *rhos, f"{last}: other seeds", "not searched", "control holds", "cost"]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for door in DOORS:
        for name, row in rows[last].items():
            if row["door"] != door:
                continue
            cost = row["network_evaluations"]
            costs = {kind[0].upper(): cost[kind] for kind in cost} | {"T": row["prompts_encoded"]}
            cells = [
                f"{door}: `{name}`",
                *(_percent(rows[label][name]["broken"]) for label in labels),
                *(_rho_cell(rows[label][name]) for label in erased),
                _percent(row["control"]["seeds"]["broken"]),
                _percent(row["control"]["random"]["broken"]) if "random" in row["control"] else ABSENT,
                "yes" if row["positive_control"]["holds"] else "**no**",
                " + ".join(f"{count:,} {kind}" for kind, count in costs.items() if count) or "0",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rho_cell(row: Mapping[str, Any]) -> str:
    rho = row.get("rho")
    return ABSENT if rho is None else f"{rho['value']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]"


def attacks_figure(rows: Rows) -> Figure:
    """Return a picture of every attack's success: a row an attack, a point with its interval a model."""
    names = [name for door in DOORS for name, row in next(iter(rows.values())).items() if row["door"] == door]
    figure = Figure(figsize=(8, 2 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots()
    for index, (label, by_attack) in enumerate(rows.items()):
        shares = [by_attack[name] for name in names]
        height = [place + (index - len(rows) / 2) * 0.12 for place in range(len(names))]
        value = [100 * row["rate"] for row in shares]
        spread = [[100 * abs(row["rate"] - row[end]) for row in shares] for end in ("low", "high")]
        axes.errorbar(value, height, xerr=spread, fmt="o", markersize=5, elinewidth=1, label=label)
    axes.set_yticks(range(len(names)), [f"{rows[next(iter(rows))][name]['door']}: {name}" for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0.2)
    axes.set(xlim=(-2, 102), xlabel="% of images that show the concept under attack, with 95 % intervals")
    figure.legend(loc="outside lower center", ncols=len(rows), frameon=False)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def load_attacks(evaluations: Sequence[Path]) -> Rows:
    """Return the rows of several evaluations. Those of a reference, which all have, are the first one's."""
    rows: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for evaluation in evaluations:
        rows = json.loads((evaluation / "metrics.json").read_text("utf-8"))["attacks"] | rows
    return rows


def write_attacks(rows: Rows, stages: Sequence[str], hardened: Sequence[str]) -> None:
    """Write the table and the picture of ``docs/attacks.md``, and the table of ``docs/robustness.md``."""
    pages = {"attacks": stages, "robustness": hardened}
    for name, erased in pages.items():
        labels = (ORIGINAL, *erased, NEVER_LEARNT, REINITIALISED)
        shown = {label: rows[label] for label in labels if label in rows}
        attacked = [label for label in erased if label in shown]
        if attacked:
            refresh("\n".join(attacks_lines(shown, attacked)), ROOT / "docs" / f"{name}.md", name)
            publish(attacks_figure(shown), ROOT / "docs" / "images" / f"{name}.png")


def main() -> None:
    """Write all tables between their marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("stage_runs", nargs="+", type=Path, metavar="STAGE_RUN")
    parser.add_argument("--attacks", nargs="+", type=Path, metavar="EVALUATION")
    parser.add_argument("--hardened", type=Path, metavar="RUN")
    options = parser.parse_args()
    hardened = [] if options.hardened is None else [options.hardened]
    titles = ["original", "erased", "hardened"]
    found = [scored.scores for scored in load_runs([options.run, *hardened]).values()]
    lines = results_table(dict(zip(titles, found, strict=False)), RESULTS).splitlines()
    if options.attacks is not None:
        rows, last = load_attacks(options.attacks), [run.name for run in hardened]
        write_attacks(rows, [run.name for run in (*options.stage_runs, options.run)], last)
        lines += door_lines(rows, ORIGINAL, [options.run.name, *last])
    refresh("\n".join(lines), ROOT / "README.md", "results")
    columns = load_runs([*options.stage_runs, options.run, *hardened])
    scores = {title: scored.scores for title, scored in columns.items()}
    names = list(columns)
    tests = paired_tests({name: columns[name] for name in (names[1], names[1 + len(options.stage_runs)])})
    text = "\n".join([results_table(scores, STAGES), "Exact McNemar tests, paired by image:", "", *tests])
    refresh(text, ROOT / "docs" / "results.md", "stages")


if __name__ == "__main__":
    main()
