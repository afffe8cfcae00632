"""What a finished run leaves in its folder: scores, pictures, the erased model."""

from __future__ import annotations

import logging
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from callbacks.image_grid import grid_of
from trce_lightning import export, runs
from trce_lightning.curves import save_curves, save_loss_curves
from trce_lightning.metrics.asr import paired_test
from trce_lightning.page import Column, Report, write_page
from trce_lightning.report import (
    Scores,
    results_table,
    write_scores_csv,
)
from trce_lightning.scoring import detection_rates
from trce_lightning.storage import write_json

if TYPE_CHECKING:
    from trce_lightning.training_run import TrainingRun

log = logging.getLogger(__name__)


def write(run: TrainingRun) -> None:
    """Everything that a run folder holds; ``metrics.json`` last: it marks the run as finished."""
    columns, second = {}, {}
    if run.plan is not None:
        # One file for every time that the run was started.
        logs = sorted(run.folder.glob("logs/version_*/metrics.csv"), key=lambda log: log.stat().st_mtime)
        save_loss_curves(logs, run.folder / "losses.png")
    if run.erased:
        columns = {"original": run.original["final"].scored.scores, "erased": run.erased.scores}
        second = write_scores(run)
    write_model(run, results_table(columns))
    expected = expected_scores(run.config.expected)
    metrics = facts(run) | {"zero_shot_clip": second} | columns | expected
    tuned = {f"{name} (tuning prompts)": scores for name, scores in passes(run).items()}
    write_scores_csv(run.folder / "metrics.csv", tuned | columns)
    write_json(run.folder / "metrics.json", metrics)
    log.info("%s\n%s", run.folder, results_table(columns | expected))


def write_scores(run: TrainingRun) -> dict[str, Any]:
    """Scores with their hits, grid and curves; returns what the second detector saw."""
    assert run.erased is not None
    original, scorer = run.original["final"], run.scorers["final"]
    original.scored.save(run.folder / "scored" / "original.json")
    run.erased.save(run.folder / "scored" / "erased.json")
    folders = {"original": original.folder, "erased": run.folder / "images"}
    grid_of(scorer.sets, folders, run.folder / "grid.png")
    save_curves(passes(run), run.folder / "curves.png")
    write_page(run.folder / "report.html", report_of(run, folders))
    return second_opinion(run, folders)


def report_of(run: TrainingRun, folders: Mapping[str, Path]) -> Report:
    """What ``report.html`` shows of a run; ``folders`` are those of the images, by label."""
    assert run.erased is not None
    names = [concept.name for concept in run.session.concepts]
    scored = {"original": run.original["final"].scored, "erased": run.erased}
    titles = {"curves.png": "Scores after each pass", "losses.png": "Losses and hinge while training"}
    return Report(
        title=f"{' + '.join(names)} erased from {run.config.model.name}",
        columns={label: Column(scored[label], folders[label]) for label in scored},
        sets=run.scorers["final"].sets,
        pictures={
            title: run.folder / name for name, title in titles.items() if (run.folder / name).is_file()
        },
        facts={
            "command": runs.command(),
            "commit": runs.commit(),
            "base model": f"{run.base}, fingerprint {run.fingerprint}",
            "configuration": run.folder / runs.CONFIG,
            "network evaluations": run.evaluations,
            "seconds": run.seconds,
            **expected_scores(run.config.expected),
        },
    )


def expected_scores(expected: Mapping[str, Any]) -> dict[str, Scores]:
    """``expected`` in the form of measured scores, under that name; nothing where it says nothing."""
    if not expected:
        return {}
    rates = {name: {"rate": rate} for name, rate in expected.get("asr", {}).items()}
    return {"expected": {"source": "unstated", **expected, "asr": rates}}


def passes(run: TrainingRun) -> dict[str, Scores]:
    """Scores on the epochs' prompts: of the original, of stage 1 alone, if it was, and of each epoch."""
    rows: dict[str, Scores] = {}
    if "epochs" in run.original:
        rows["original"] = run.original["epochs"].scored.scores
    if run.evaluation is not None:
        if run.evaluation.after_textual is not None:
            rows["stage 1"] = run.evaluation.after_textual
        rows |= {f"epoch {number}": scores for number, scores in enumerate(run.evaluation.epochs, start=1)}
    return rows


def second_opinion(run: TrainingRun, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Rates of a detector that nothing was tuned on, by model and set; empty where there is none."""
    detector = run.session.second_detector()
    if detector is None:
        return {}
    return {
        label: detection_rates(detector, run.scorers["final"].sets, folder)
        for label, folder in folders.items()
    }


def write_model(run: TrainingRun, table: str) -> None:
    """What ``export`` names: the erased pipeline with its card, the changed tensors, all in one file."""
    changed, config = run.module.changed_tensors(), run.config
    if "delta" in config.export:
        export.save_delta(run.folder / "delta.safetensors", changed, run.base, run.fingerprint)
    if "single_file" in config.export:
        export.save_single_file(run.folder / "erased.safetensors", run.adapter, run.base, run.fingerprint)
    if "pipeline" in config.export:
        names = [concept.name for concept in run.session.concepts]
        card = export.card_facts(run.base, names, config.stages, table, len(changed))
        export.save_pipeline(run.folder / "erased", run.adapter, card)


def facts(run: TrainingRun) -> dict[str, Any]:
    """The record of ``metrics.json`` but for the two models' scores."""
    tests = {}
    if run.erased:
        before, after = run.original["final"].scored, run.erased
        tests = {name: paired_test(before.hits(name), after.hits(name)) for name in after.detections}
    return {
        "schema": 1,
        "concept": [concept.name for concept in run.session.concepts],
        "model": run.config.model.name,
        "commit": runs.commit(),
        "after_textual": run.evaluation.after_textual if run.evaluation else None,
        "epochs": run.evaluation.epochs if run.evaluation else [],
        "seconds": run.seconds,
        "network_evaluations": run.evaluations,
        "paired_p_value": tests,
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
