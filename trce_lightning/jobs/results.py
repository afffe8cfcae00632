"""Write the files of a finished run: scores, pictures and the erased model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trce_lightning import __version__, export
from trce_lightning.callbacks.image_grid import grid_of
from trce_lightning.config.schema import ExpectedConfig
from trce_lightning.evaluation.comparison import compare, measure_distances, p_values
from trce_lightning.evaluation.scored import Column, detection_rates
from trce_lightning.jobs import runs
from trce_lightning.metrics.asr import TABLE_THRESHOLDS
from trce_lightning.report.curves import save_curves, save_loss_curves
from trce_lightning.report.page import Report, write_page
from trce_lightning.report.tables import (
    Scores,
    results_table,
    write_scores_csv,
)
from trce_lightning.runtime.checkout import commit
from trce_lightning.runtime.ranks import peak_memory_mb
from trce_lightning.runtime.storage import write_json

if TYPE_CHECKING:
    from trce_lightning.jobs.train import TrainingRun

log = logging.getLogger(__name__)


def write(run: TrainingRun) -> None:
    """Write all files of a run folder. ``metrics.json`` comes last, because it marks the run as finished."""
    columns, second = {}, {}
    if run.erased:
        columns = {"original": run.original["final"].scored.scores, "erased": run.erased.scores}
    write_model(run, results_table(columns))  # first, so that an error in a picture doesn't lose the model
    # Each start of the run has its own log.
    logs = sorted(run.folder.glob("logs/version_*/metrics.csv"), key=lambda log: log.stat().st_mtime)
    if run.trains:
        save_loss_curves(logs, run.folder / "losses.png")
    if run.erased:
        second = write_scores(run)
    expected = expected_scores(run.config.expected)
    metrics = facts(run) | {"zero_shot_clip": second} | columns | expected
    tuned = {f"{name} (tuning prompts)": scores for name, scores in passes(run).items()}
    write_scores_csv(run.folder / "metrics.csv", tuned | columns)
    write_json(run.folder / "metrics.json", metrics)
    log.info("%s\n%s", run.folder, results_table(columns | expected) or "not scored")


def write_scores(run: TrainingRun) -> dict[str, Any]:
    """Write scores, detections, grid, curves and page. Return the second detector's rates."""
    columns, sets = columns_of(run), run.scorers["final"].sets
    measure_distances(run.session.features(), sets, columns, run.trainer.strategy.root_device)
    for label, column in columns.items():
        column.scored.save(run.folder / "scored" / f"{label}.json")
    grid_of(sets, {label: column.images for label, column in columns.items()}, run.folder / "grid.png")
    if during := passes(run):
        save_curves(during, run.folder / "curves.png")
    write_page(run.folder / "report.html", report_of(run, columns))
    return second_opinion(run, columns)


def columns_of(run: TrainingRun) -> dict[str, Column]:
    """Return the columns of the original and the erased model on the report split."""
    assert run.erased is not None
    original = run.original["final"]
    return {
        "original": Column(original.scored, original.folder),
        "erased": Column(run.erased, run.folder / "images"),
    }


def report_of(run: TrainingRun, columns: Mapping[str, Column]) -> Report:
    """Return the content of a run's ``report.html``."""
    sets = run.scorers["final"].sets
    names = [concept.name for concept in run.session.concepts]
    titles = {"curves.png": "Scores after each pass", "losses.png": "Losses and hinge while training"}
    return Report(
        title=f"{' + '.join(names)} erased from {run.config.model.name}",
        columns=columns,
        comparisons={"erased": compare(columns["original"].scored, columns["erased"].scored, sets)},
        sets=sets,
        pictures={
            title: run.folder / name for name, title in titles.items() if (run.folder / name).is_file()
        },
        facts={
            "command": runs.command(),
            "version": __version__,
            "commit": commit(),
            "base model": f"{run.base}, fingerprint {run.fingerprint}",
            "configuration": run.folder / runs.CONFIG,
            "images": run.scorers["final"].sampling,
            "network evaluations": run.evaluations,
            "seconds": run.seconds,
            **expected_scores(run.config.expected),
        },
    )


def expected_scores(expected: ExpectedConfig) -> dict[str, Scores]:
    """Return published scores in the form of measured scores. If none are configured, the result is empty."""
    if expected == ExpectedConfig():
        return {}
    known = {name: value for name, value in asdict(expected).items() if value is not None}
    return {"expected": known | {"asr": {name: {"rate": rate} for name, rate in expected.asr.items()}}}


def passes(run: TrainingRun) -> dict[str, Scores]:
    """Return the scores on the epochs' prompts: of the original, of stage 1 alone, and of each epoch.

    If a pass didn't run, it is left out.
    """
    rows: dict[str, Scores] = {}
    if "epochs" in run.original:
        rows["original"] = run.original["epochs"].scored.scores
    if run.evaluation is not None:
        if run.evaluation.after_textual is not None:
            rows["stage 1"] = run.evaluation.after_textual
        rows |= {f"epoch {number}": scores for number, scores in enumerate(run.evaluation.epochs, start=1)}
    return rows


def second_opinion(run: TrainingRun, columns: Mapping[str, Column]) -> dict[str, Any]:
    """Return the rates of a detector that nothing was tuned on, by model and set.

    Empty without such a detector.
    """
    detector = run.session.second_detector()
    if detector is None:
        return {}
    device = run.trainer.strategy.root_device
    return {
        label: detection_rates(detector, run.scorers["final"].sets, column.images, device)
        for label, column in columns.items()
    }


def write_model(run: TrainingRun, table: str) -> None:
    """Write what ``export`` asks for: the pipeline with its card, the changed tensors, or a single file."""
    changed, config = run.changed(), run.config
    if "delta" in config.export:
        for component, tensors in changed.items():
            name = export.delta_name(run.adapter, component)
            export.save_delta(run.folder / name, tensors, run.base, run.fingerprint)
    for name, further in run.method_files().items():
        export.save_delta(run.folder / f"{name}.safetensors", further, run.base, run.fingerprint)
    if "single_file" in config.export:
        export.save_single_file(run.folder / "erased.safetensors", run.adapter, run.base, run.fingerprint)
    if "pipeline" in config.export:
        names = [concept.name for concept in run.session.concepts]
        if "final" in run.scorers:
            table += f"\nImages were drawn in {run.scorers['final'].sampling}."
        count = sum(map(len, changed.values()))
        card = export.card_facts(run.base, names, run.method_title(), table, count)
        export.save_pipeline(run.folder / "erased", run.adapter, card)


def facts(run: TrainingRun) -> dict[str, Any]:
    """Return the record of ``metrics.json`` without the two models' scores."""
    tests: dict[str, Any] = {"paired_p_value": {}}
    if run.erased:
        sets = run.scorers["final"].sets
        comparison = compare(run.original["final"].scored, run.erased, sets)
        tests = {
            "paired_p_value": p_values(comparison),
            "comparison": comparison,
            "asr_by_threshold": {
                label: column.scored.rates_at(sets, TABLE_THRESHOLDS)
                for label, column in columns_of(run).items()
            },
        }
    return {
        "schema": 1,
        "concept": [concept.name for concept in run.session.concepts],
        "model": run.config.model.name,
        "method": run.method_facts(),
        "version": __version__,
        "commit": commit(),
        "after_textual": run.evaluation.after_textual if run.evaluation else None,
        "epochs": run.evaluation.epochs if run.evaluation else [],
        "seconds": run.seconds,
        "network_evaluations": run.evaluations,
        "peak_memory_mb": peak_memory_mb(),
        "peak_device_memory_mb": run.peak_device_memory_mb,
        **tests,
    }
