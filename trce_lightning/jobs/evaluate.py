"""Run ``eval.py``: score one pipeline, or several on the same prompts and noise."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import time
from itertools import product
from pathlib import Path
from typing import Any

from trce_lightning import __version__
from trce_lightning.callbacks.image_grid import grid_of
from trce_lightning.config.schema import EvalConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.comparison import (
    Comparison,
    compare,
    measure_distances,
    one_line,
    p_values,
)
from trce_lightning.evaluation.conditions import asked
from trce_lightning.evaluation.scored import Column, Scored, category_rates, log_scores
from trce_lightning.evaluation.scorer import Scorer, score_on_all_ranks
from trce_lightning.jobs import runs
from trce_lightning.jobs.attack import Attacks, attacks_table, make_attack
from trce_lightning.jobs.robustness import Robustness, robustness_rows, robustness_table
from trce_lightning.jobs.session import Session, base_name, concepts_of
from trce_lightning.jobs.trainers import dashboards, make_trainer
from trce_lightning.metrics.asr import TABLE_THRESHOLDS
from trce_lightning.metrics.class_detectors import load_class_detector
from trce_lightning.metrics.detections import detect
from trce_lightning.prompts.published import log_sets
from trce_lightning.report.attacks import pooled_sentence
from trce_lightning.report.page import Report, write_page
from trce_lightning.report.tables import results_table, write_scores_csv
from trce_lightning.runtime.checkout import commit
from trce_lightning.runtime.launchers import process_rank
from trce_lightning.runtime.locks import hold, own_lock
from trce_lightning.runtime.logs import set_up_logging
from trce_lightning.runtime.ranks import peak_device_memory_mb, peak_memory_mb, total_over_ranks
from trce_lightning.runtime.storage import clean_up, write_json

log = logging.getLogger(__name__)


class Evaluation:
    """One run of ``eval.py``.

    It scores ``model`` and then each of ``models``, with one in memory at a time.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.sources = sources(config)
        for name, options in config.attack.items():
            make_attack(name, options)  # to refuse a wrong option before a model is opened
        self.detectors = [load_class_detector(path) for path in config.detectors]
        self.columns: dict[str, Column] = {}
        self.seconds: dict[str, float] = {}
        self.evaluations: dict[str, int] = {}

    def run(self) -> None:
        """Score every model and write the results. One process writes."""
        for label, path in self.sources.items():
            model = dataclasses.replace(self.config.model, path=path)
            session = Session(dataclasses.replace(self.config, model=model), concepts_of(self.config))
            scorer = session.scorer("report", self.config.metrics.final_images_per_set)
            with session.adapter.unchanged():
                if not self.columns:
                    self.begin(scorer)
                self.score(label, scorer)
            self.sets, self.features = scorer.sets, session.features()
            del session, scorer
            gc.collect()  # Trainer and module refer to each other, so only the collector frees the model
        if asked(self.config.robustness):
            self.robustness.run()
        if self.config.attack:
            self.attacks.run()
        if self.is_global_zero:
            # This comes last: the other processes have finished, so none waits for this one.
            measure_distances(self.features, self.sets, self.columns, self.device)
            self.detect()
            self.write()

    def begin(self, scorer: Scorer) -> None:
        """Choose the folder. Log the prompts and the number of network evaluations."""
        self.folder = Path(self.config.output or self.default_folder(scorer))
        self.claim()
        # Now, so that a dashboard's refusal comes before hours of work.
        self.loggers = dashboards(self.config.logger, self.folder, self.folder.name)
        self.prompt_sets, self.sampling = log_sets(scorer.sets), scorer.sampling
        images = {label: self.images(label) for label in self.sources}
        self.robustness = Robustness(self.config, self.sources, self.folder, images)
        planned = len(self.sources) * scorer.planned_evaluations
        log.info(
            "ahead: scores of %d model(s): %d network evaluations; images in %s",
            len(self.sources),
            planned,
            self.sampling,
        )
        if asked(self.config.robustness):
            self.robustness.announce(scorer)
        if self.config.attack:
            self.attacks = Attacks(self.config, self.sources, self.folder)
            self.attacks.announce()

    def claim(self) -> None:
        """Lock the folder until this evaluation ends. The first of its processes does this."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if process_rank() > 0:
            return
        if (holder := hold(self.folder)) is not None:
            raise InputError(
                f"output: expected a folder that no evaluation is using, got '{self.folder}', which {holder} "
                "is writing; wait for its end or choose another by output=FOLDER"
            )
        clean_up(self.folder)

    def images(self, label: str) -> Path:
        """Return the folder of a model's images, which has a folder for each prompt set."""
        return self.folder / "images" / (label if len(self.sources) > 1 else "")

    def score(self, label: str, scorer: Scorer) -> None:
        """Score one model. Its images are files, and an image that exists is not generated again."""
        images = self.images(label)
        trainer = make_trainer(self.config.trainer, self.folder)
        start = time.monotonic()
        scores = score_on_all_ranks(trainer, scorer, images, label)
        self.seconds[label] = round(time.monotonic() - start, 2)
        self.evaluations |= total_over_ranks(trainer, {label: scorer.network_evaluations})
        self.peak_device_memory_mb = peak_device_memory_mb(trainer)
        self.device = trainer.strategy.root_device
        self.columns[label] = Column(Scored(scores, scorer.detections), images)
        self.is_global_zero = trainer.is_global_zero

    def detect(self) -> None:
        """Write each detector's class scores of all images to ``detections/LABEL/SET-DETECTOR.csv``."""
        for detector, label, prompts in product(self.detectors, self.columns, self.sets):
            file = self.folder / "detections" / label / f"{prompts.name}-{detector.name}.csv"
            images = self.columns[label].images / prompts.name
            detect(detector, images, prompts.records, file, device=self.device)

    def default_folder(self, scorer: Scorer) -> Path:
        """Return a folder that is the same for the same command, so that a killed run can continue.

        The first model enters the name by its fingerprint, the others by their paths. If a path's weights
        have changed, the folder's images are refused.
        """
        name = scorer.fingerprint()
        if self.config.models:
            text = "\n".join([name, *map(str, self.sources.values())])
            name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return Path(self.config.runs) / "eval" / name

    def write(self) -> None:
        """Write scores, detections, table, grid and page. ``metrics.json`` comes last."""
        scores = {label: column.scored.scores for label, column in self.columns.items()}
        for label, column in self.columns.items():
            column.scored.save(self.folder / "scored" / f"{label}.json")
        images = {label: column.images for label, column in self.columns.items()}
        grid_of(self.sets, images, self.folder / "grid.png")
        rates = {
            label: column.scored.rates_at(self.sets, TABLE_THRESHOLDS)
            for label, column in self.columns.items()
        }
        memory = {"peak_memory_mb": peak_memory_mb(), "peak_device_memory_mb": self.peak_device_memory_mb}
        metrics = (
            self.facts()
            | memory
            | self.results()
            | {"categories": self.categories(), "asr_by_threshold": rates}
        )
        if self.robustness.results:
            metrics["robustness"] = self.robustness.results
            metrics["robustness_evaluations"] = self.robustness.network_evaluations
        if self.config.attack:
            metrics["attacks"] = self.attacks.rows
            metrics["attacks_pooled"] = self.attacks.pooled
            metrics["transfer"] = self.attacks.transferred
        for label, own in scores.items():
            log_scores(self.loggers, own, step=0, prefix=f"{label}/")
        if self.config.attack:
            self.attacks.log(self.loggers)
        for logger in self.loggers:
            logger.finalize("success")
        write_scores_csv(self.folder / "metrics.csv", scores)
        write_page(self.folder / "report.html", self.report())
        write_json(self.folder / "metrics.json", metrics)
        log.info("%s\n%s", self.folder, results_table(scores))
        if self.robustness.results:
            log.info("robustness to use\n%s", robustness_table(self.robustness.results))
        if self.config.attack:
            log.info("attacks\n%s", attacks_table(self.attacks.rows))
            for row in self.attacks.pooled:
                log.info("%s", pooled_sentence(row))
        for label, comparison in self.comparisons().items():
            log.info("%s against %s: %s", label, next(iter(self.columns)), one_line(comparison))

    def comparisons(self) -> dict[str, Comparison]:
        """Return the comparison of each further model with the first, by label."""
        (_, first), *others = self.columns.items()
        return {label: compare(first.scored, column.scored, self.sets) for label, column in others}

    def categories(self) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
        """Return attack success by model, set and category. Sets without categories are left out."""
        return {
            label: {
                prompts.name: rates
                for prompts in self.sets
                if (rates := category_rates(prompts, column.scored))
            }
            for label, column in self.columns.items()
        }

    def facts(self) -> dict[str, Any]:
        """Return the facts of this evaluation: concepts, model, version, prompts and cost."""
        return {
            "schema": 1,
            "concept": list(self.config.concept),
            "model": base_name(self.config.model),
            "version": __version__,
            "commit": commit(),
            "seconds": self.seconds,
            "network_evaluations": self.evaluations,
            "prompt_sets": self.prompt_sets,
        }

    def results(self) -> dict[str, Any]:
        """Return ``scores`` of ``model``, and ``models``: each other model's path, scores and comparison."""
        first = next(iter(self.columns.values()))
        further = {
            label: {
                "path": self.sources[label],
                "scores": self.columns[label].scored.scores,
                "paired_p_value": p_values(comparison),
                "comparison": comparison,
            }
            for label, comparison in self.comparisons().items()
        }
        return {"scores": first.scored.scores} | ({"models": further} if further else {})

    def report(self) -> Report:
        """Return the content of ``report.html``."""
        return Report(
            title=f"{' + '.join(self.config.concept)}: {', '.join(self.columns)}",
            columns=self.columns,
            sets=self.sets,
            comparisons=self.comparisons(),
            categories=self.categories(),
            facts={
                "command": runs.command(),
                **self.facts(),
                "models": self.sources,
                "images": self.sampling,
            },
            robustness=robustness_rows(self.robustness.results) if self.robustness.results else [],
            attacks=self.attacks.sections() if self.config.attack else [],
        )


def evaluate(config: EvalConfig) -> None:
    """Score ``model``, and ``models`` on the same prompts and noise. Write scores, a grid and a report."""
    set_up_logging()
    with own_lock():
        Evaluation(config).run()


def sources(config: EvalConfig) -> dict[str, str | None]:
    """Return the folder of each model by label, ``model`` first. None stands for the model's own source.

    A label is the folder's name. For a folder ``erased``, it is the name of the run around it. If there are
    ``models``, the label of ``model`` is "original". ``InputError`` if two models have one label.
    """
    first = label_of(config.model.path) if config.model.path else config.model.name
    labelled: dict[str, str | None] = {"original" if config.models else first: config.model.path}
    for path in config.models:
        label = label_of(path)
        if label in labelled:
            raise InputError(f"models: expected folders of different names, got two named '{label}'")
        labelled[label] = path
    return labelled


def label_of(path: str) -> str:
    """Return a model's name in tables: its folder's name, or the run's name if the folder is ``erased``."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "erased" else folder.name
