"""Show what hardening costs at each strength: `python -m benchmarks.tradeoff RUN [--stored] [STRENGTH …]`.

RUN is the folder of a run of `experiment=hardened`. A model of strength s has the weights W + s (W' − W),
where W are the original's and W' the run's. Each is scored and attacked on tuning prompts, as in a sweep
(`benchmarks/sweep.py`). Strengths that `benchmarks/tradeoff.json` has for this run are not measured again.
The table and the picture go into `docs/robustness.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.fitting import compose
from benchmarks.pictures import publish
from benchmarks.report import refresh
from benchmarks.sweep import ATTACKS, IMAGES, RUNS, attacked, benign_cells, rates_of
from trce_lightning.adapters import load_adapter
from trce_lightning.evaluation.scored import Scores
from trce_lightning.jobs.attack import NEVER_LEARNT
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.runtime.storage import write_json

RESULTS = Path(__file__).with_suffix(".json")
DOCS = Path(__file__).parents[1] / "docs"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
Row = dict[str, Any]
"""The ``scores`` of a strength, and the rates of ``attacks`` on it and on the ``references``."""


def session_of(path: Path | None = None) -> Session:
    """Return the session of violence on the embedded model, or on the pipeline at ``path``."""
    config = compose("concept=violence", *([] if path is None else [f"model.path={path}"]))
    return Session(config, concepts_of(config))


def save_blend(run: Path, strength: float, folder: Path) -> None:
    """Save the pipeline whose denoiser has the weights W + ``strength`` (W' − W) into ``folder``."""
    adapter, erased = session_of().adapter, load_adapter(run / "erased")
    own, other = adapter.denoiser.state_dict(), erased.denoiser.state_dict()
    with torch.no_grad():
        for name, weight in own.items():
            weight.lerp_(other[name].to(weight), strength)
    adapter.pipeline.save_pretrained(folder)


def measured(run: Path, strength: float) -> Row:
    """Return the row of a strength."""
    folder = RUNS / f"tradeoff-{strength:g}"
    save_blend(run, strength, folder / "erased")
    session = session_of(folder / "erased")
    with session.adapter.unchanged():
        scores, _ = session.scorer("tune", IMAGES)(f"strength {strength:g}")
    rates = attacked(str(folder), ())
    references = {label: row for label, row in rates.items() if label != folder.name}
    return {"scores": scores, "attacks": rates[folder.name], "references": references}


def lines_of(rows: Mapping[float, Row]) -> list[str]:
    """Return a table with a line for each strength, and one for the never-learnt model."""
    header = ["strength", "direct", "implicit", *ATTACKS, "FID", "CLIP-S", "benign", "never kept"]
    lines = [header, ["---:"] * len(header)]
    for strength, row in sorted(rows.items()):
        scores: Scores = row["scores"]
        cells = [f"{strength:g}", *(f"{100 * rate:.1f} %" for rate in rates_of(row))]
        cells += [f"{scores['fid']:.2f}", f"{scores['clip_score']:.2f}"]
        lines.append([*cells, *benign_cells(scores)])
    never = next(iter(rows.values()))["references"][NEVER_LEARNT]
    lines.append([NEVER_LEARNT, "", "", *(f"{100 * never[attack]:.1f} %" for attack in ATTACKS), *[""] * 4])
    return [f"| {' | '.join(line)} |" for line in lines]


def figure_of(rows: Mapping[float, Row]) -> Figure:
    """Return a picture: the rate of each attack over the FID, with a point for each strength."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(rows.items())
    fids = [row["scores"]["fid"] for _, row in ordered]
    for attack in ATTACKS:
        rates = [100 * row["attacks"][attack] for _, row in ordered]
        axes.plot(fids, rates, marker="o", label=attack)
    for fid, (strength, row) in zip(fids, ordered, strict=True):
        top = 100 * max(row["attacks"].values())
        axes.annotate(f"{strength:g}", (fid, top), xytext=(0, 6), textcoords="offset points", ha="center")
    axes.set(xlabel="FID of benign pictures (lower is better)", ylabel="% of images that show the concept")
    axes.set_ylim(-3, 108)
    figure.legend(loc="outside lower center", ncols=len(ATTACKS), frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the strengths that are not stored, and write table and picture."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("strengths", nargs="*", type=float, default=STRENGTHS, metavar="STRENGTH")
    parser.add_argument("--stored", action="store_true")
    asked = parser.parse_args(argv)
    edited = load_adapter(asked.run / "erased").fingerprint()
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if stored.get("run") != edited:
        stored = {"run": edited, "strengths": {}}
    missing = [each for each in asked.strengths if f"{each:g}" not in stored["strengths"]]
    for strength in tqdm([] if asked.stored else missing, "strengths", unit="model"):
        stored["strengths"][f"{strength:g}"] = measured(asked.run, strength)
        write_json(RESULTS, stored)
    rows = {float(name): row for name, row in stored["strengths"].items()}
    publish(figure_of(rows), DOCS / "images" / "tradeoff.png")
    text = "\n".join(lines_of(rows))
    refresh(text, DOCS / "robustness.md", "tradeoff")
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
