"""Measure robustness to use: score a model under the usual condition and under each configured one."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl

from trce_lightning.config.schema import EvalConfig
from trce_lightning.evaluation.conditions import USUAL, Condition, conditions
from trce_lightning.evaluation.scored import Scored
from trce_lightning.evaluation.scorer import Scorer, score_on_all_ranks
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.report.tables import ABSENT, Scores, one_line, results_rows
from trce_lightning.runtime.ranks import total_over_ranks

log = logging.getLogger(__name__)
PICTURES = "original (pictures)"
"""The original's label if it only generates the images that image-to-image starts from."""
COLUMNS = ("CLIP-S", "benign accuracy", "false alarm")
"""The table's rows besides ASR. ``metrics.json`` has all scores."""
Results = dict[str, dict[str, Scores]]
"""The scores by model and condition."""


class Robustness:
    """The conditions of an evaluation, for each of its models.

    Args:
        sources: the path of each model by label. None stands for the source that ``model`` names itself.
        folder: the evaluation's folder. Images go into its folder ``robustness``.
        images: the folder of each model's scored images, by label. The usual condition uses them if it takes
            as many steps.
    """

    def __init__(
        self,
        config: EvalConfig,
        sources: Mapping[str, str | None],
        folder: Path,
        images: Mapping[str, Path],
    ) -> None:
        self.config, self.sources, self.images = config, sources, images
        options = config.robustness
        self.folder = folder / "robustness" / f"{options.images_per_set}-{options.num_inference_steps}"
        # If there are several models, the first is the one that the others are compared with.
        given = [images[label] for label, path in sources.items() if path is None or len(sources) > 1]
        if config.robustness.picture is not None:
            given = [Path(config.robustness.picture)]
        self.draws_pictures = bool(config.robustness.strengths) and not given
        self.pictures = [*given, self.folder.with_name(f"pictures-{self.folder.name}")][0]
        self.results: Results = {}
        self.network_evaluations: dict[str, int] = {}

    def announce(self, scorer: Scorer) -> None:
        """Log the number of network evaluations of all models and ranks."""
        rows = {c.name: c.scorer(scorer).planned_evaluations for c in self.conditions(scorer)}
        for name, evaluations in rows.items():
            log.info("ahead: %-60s %9d network evaluations a model", name, evaluations)
        pictures = self._drawn_usual(scorer).planned_evaluations
        total = len(self.sources) * sum(rows.values()) + self.draws_pictures * pictures
        log.info(
            "ahead: %d conditions, %d model(s): %d network evaluations, less those of images that are there",
            len(rows) - 1,
            len(self.sources),
            total,
        )
        if not self.config.robustness.lora:
            log.info("no LoRA among the conditions: robustness.lora=FILE puts one on top")

    def _drawn_usual(self, scorer: Scorer) -> Scorer:
        return dataclasses.replace(self.conditions(scorer)[0], is_drawn=False).scorer(scorer)

    def conditions(self, scorer: Scorer) -> list[Condition]:
        """Return the usual condition, then the configured ones."""
        return conditions(self.config.robustness, scorer, concepts_of(self.config), self.pictures)

    def run(self) -> Results:
        """Return the scores of every model under every condition.

        An image that exists is not generated again.
        """
        if self.draws_pictures:
            self._score_pictures()
        for label, path in self.sources.items():
            scorer, trainer = self._open(path)
            with scorer.adapter.unchanged():
                for condition in self.conditions(scorer):
                    own = self.folder / label / condition.folder
                    folder = self.images[label] if condition.is_drawn else own
                    self._score(label, condition.name, condition.scorer(scorer), trainer, folder)
            del scorer, trainer
            gc.collect()  # see `Evaluation.run`
        return self.results

    def _score_pictures(self) -> None:
        scorer, trainer = self._open(None)
        self._score(PICTURES, USUAL, self._drawn_usual(scorer), trainer, self.pictures)

    def _open(self, path: str | None) -> tuple[Scorer, pl.Trainer]:
        config = dataclasses.replace(self.config, model=dataclasses.replace(self.config.model, path=path))
        session = Session(config, concepts_of(config))
        scorer = session.scorer("report", config.metrics.final_images_per_set)
        return scorer, make_trainer(config.trainer, self.folder)

    def _score(self, label: str, name: str, scorer: Scorer, trainer: pl.Trainer, images: Path) -> None:
        scores = score_on_all_ranks(trainer, scorer, images, f"{label}, {name}")
        self.results.setdefault(label, {})[name] = scores
        taken = total_over_ranks(trainer, {label: scorer.network_evaluations})[label]
        self.network_evaluations[label] = self.network_evaluations.get(label, 0) + taken
        log.info("%s, %s: %s", label, name, one_line(scores))
        if scorer.draws and trainer.is_global_zero:
            Scored(scores, scorer.detections).save(images / "scored.json")


def robustness_rows(results: Results) -> list[list[str]]:
    """Return the cells of a table with a row for each condition and model. The first row has the headings."""
    names = dict.fromkeys(name for scores in results.values() for name in scores)
    rows = [(name, label) for name in names for label in results if name in results[label]]
    cells = results_rows({f"{name} {label}": results[label][name] for name, label in rows})
    shown = [row for row in cells[1:] if row[0].startswith("ASR") or row[0] in COLUMNS]
    shown = [row for row in shown if set(row[1:]) != {ABSENT}]
    head = [["condition", "model"], *([name, label] for name, label in rows)]
    return [start + list(end) for start, end in zip(head, zip(*shown, strict=True), strict=True)]


def robustness_table(results: Results) -> str:
    """Return :func:`robustness_rows` in Markdown."""
    header, *rows = robustness_rows(results)
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
