"""A run of ``train.py``, step by step."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import EpochEvaluation, ImageGrid
from callbacks.image_grid import grid_of
from trce_lightning import export, runs
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.closed_form import Edit
from trce_lightning.concepts import Concept
from trce_lightning.data.datamodule import TrajectoryDataModule
from trce_lightning.data.plan import TrajectoryPlan, draw_plan
from trce_lightning.data.trajectories import sample_missing
from trce_lightning.metrics.asr import paired_test
from trce_lightning.module import TRCE
from trce_lightning.report import results_table, save_curves, write_scores_csv
from trce_lightning.schema import TrainConfig
from trce_lightning.scoring import Scored, Scorer, detection_rates
from trce_lightning.session import Session, source_of
from trce_lightning.storage import write_json
from trce_lightning.textual import TextualStatistics, textual_statistics
from trce_lightning.trainers import make_loggers, make_trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Original:
    """The original model's scores on one split, and where its images lie."""

    scored: Scored
    folder: Path


class TrainingRun:
    """One run of ``train.py``: each step is a method, in the order in which :func:`train` calls them."""

    def __init__(
        self, config: TrainConfig, concepts: list[Concept], adapter: StableDiffusionAdapter | None = None
    ) -> None:
        self.config, self.session = config, Session(config, concepts, adapter)
        self.adapter = self.session.adapter
        self.base = str(source_of(config.model))
        self.fingerprint = self.adapter.fingerprint()
        self.cache = runs.cache_folder(config)
        self.trainer = make_trainer(config.trainer, self.cache)
        self.plan: TrajectoryPlan | None = None
        if "trajectory" in config.stages:
            self.plan = draw_plan(self.session.pairs(), config.trajectory, config.seed)
        self.scorers: dict[str, Scorer] = {}
        if config.metrics.enabled:
            self.scorers = {
                "epochs": self.session.scorer("tune", config.metrics.images_per_set),
                "final": self.session.scorer("report", config.metrics.final_images_per_set),
            }
        self.original: dict[str, Original] = {}
        self.erased: Scored | None = None
        self.evaluation: EpochEvaluation | None = None
        self.history: list[dict[str, Any]] = []
        self.second: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.evaluations: dict[str, int] = {}
        self.edit: Edit | None = None
        self.statistics: TextualStatistics | None = None

    def open(self) -> None:
        """Choose and create the folder."""
        self.folder = runs.open_folder(self.config)

    @property
    def ranks(self) -> dict[str, int]:
        """This process among those of the run; alone until Lightning has launched the others."""
        if not torch.distributed.is_initialized():
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    @property
    def trajectory_folder(self) -> Path:
        """Shared by all runs of an equal plan and model."""
        assert self.plan is not None
        return self.cache / "trajectories" / self.plan.fingerprint(self.fingerprint)

    def sample_trajectories(self) -> None:
        """Trajectories of the original network, those that are cached aside."""
        if self.plan is None:
            return
        with self._stage("trajectories"):
            sample_missing(
                self.trainer,
                self.adapter,
                self.plan,
                self.trajectory_folder,
                self.config.trajectory.shard_size,
            )

    def score_original(self) -> None:
        """The original model on both splits, computed once per machine. Before stage 1 changes the model."""
        with self._stage("original"):
            for title, scorer in self.scorers.items():
                self.original[title] = self._cached_scores(title, scorer)

    def _original_folder(self, scorer: Scorer) -> Path:
        return self.cache / "original" / scorer.fingerprint()

    def is_scored(self, scorer: Scorer) -> bool:
        """Whether the original model's scores are cached. Before stage 1."""
        return (self._original_folder(scorer) / "scored.json").exists()

    def _cached_scores(self, title: str, scorer: Scorer) -> Original:
        folder = self._original_folder(scorer)
        file = folder / "scored.json"
        if not self.is_scored(scorer):
            self.adapter.to(self.trainer.strategy.root_device)
            scores, _ = scorer(f"original model, {title}", folder=folder, **self.ranks)
            if self.trainer.is_global_zero:
                Scored(scores, scorer.hits).save(file)
            self.trainer.strategy.barrier()
            scorer.network_evaluations = 0
        return Original(Scored.load(file), folder)

    def solve(self) -> None:
        """Stage 1's matrix; the module's setup hook applies it."""
        if "textual" not in self.config.stages:
            return
        with self._stage("textual"):
            textual = self.config.textual
            self.statistics = textual_statistics(
                self.adapter, self.session.concepts, self.session.keep_prompts(), textual, self.cache
            )
            self.edit = self.statistics.solve(textual)
        if self.trainer.is_global_zero:
            export.save_edit(
                self.folder / "edit.safetensors",
                self.statistics,
                self.edit,
                textual,
                self.base,
                self.fingerprint,
            )

    def fit(self) -> None:
        """Stage 1 in setup, stage 2 as training; scores after each epoch."""
        config = self.config
        self.module = TRCE(self.adapter, self.edit, config.trajectory, config.optimizer)
        if self.plan is None:
            self.module.setup("fit")
            return
        callbacks = self._callbacks()
        loggers = make_loggers(config.logger, self.folder, self.folder.name)
        trainer = make_trainer(
            config.trainer, self.folder, epochs=config.trajectory.epochs, callbacks=callbacks, loggers=loggers
        )
        data = TrajectoryDataModule(
            self.adapter, self.plan, self.trajectory_folder, config.trajectory, config.seed
        )
        last = self.folder / "checkpoints" / "last.ckpt"
        with self._stage("training"):
            trainer.fit(self.module, data, ckpt_path=str(last) if last.exists() else None)
        if "epochs" in self.scorers:
            self.evaluations["epochs"] = self.scorers["epochs"].network_evaluations
            self.evaluations["training"] -= self.evaluations["epochs"]
        self.trainer = trainer
        self.history = self.evaluation.history if self.evaluation else []

    def _callbacks(self) -> list[pl.Callback]:
        checkpoint = ModelCheckpoint(
            self.folder / "checkpoints",
            filename="last",
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        if "epochs" not in self.scorers:
            return [checkpoint]
        self.evaluation = EpochEvaluation(self.scorers["epochs"])
        grid = ImageGrid(self.evaluation, self.original["epochs"].folder, self.folder / "grid.png")
        return [self.evaluation, grid, checkpoint]

    def score_erased(self) -> None:
        """The erased model on the report split, whose prompts and noise no choice has seen."""
        if "final" not in self.scorers:
            return
        self.adapter.to(self.trainer.strategy.root_device)
        with self._stage("final"):
            scorer = self.scorers["final"]
            scores, _ = scorer("erased model", folder=self.folder / "images", **self.ranks)
            self.erased = Scored(scores, scorer.hits)

    def export(self) -> None:
        """Everything that DESIGN's run folder holds; ``metrics.json`` last: it marks the run as finished."""
        if not self.trainer.is_global_zero:
            return
        columns = {}
        if self.erased:
            columns = {"original": self.original["final"].scored.scores, "erased": self.erased.scores}
            self.original["final"].scored.save(self.folder / "scored" / "original.json")
            self.erased.save(self.folder / "scored" / "erased.json")
            folders = {"original": self.original["final"].folder, "erased": self.folder / "images"}
            grid_of(self.scorers["final"], folders, self.folder / "grid.png")
            self.second = self._second_opinion(folders)
            history = [self.original["epochs"].scored.scores, *self.history]
            save_curves(history, self.folder / "curves.png")
        table = results_table(columns)
        changed = self.module.changed_tensors()
        if self.config.export in ("delta", "both"):
            export.save_delta(self.folder / "delta.safetensors", changed, self.base, self.fingerprint)
        if self.config.export in ("pipeline", "both"):
            names = [concept.name for concept in self.session.concepts]
            card = export.card_facts(self.base, names, self.config.stages, table, len(changed))
            export.save_pipeline(self.folder / "erased", self.adapter, card)
        metrics = self._metrics() | columns
        write_scores_csv(self.folder / "metrics.csv", metrics)
        write_json(self.folder / "metrics.json", metrics)
        log.info("%s\n%s", self.folder, table)

    def _second_opinion(self, folders: Mapping[str, Path]) -> dict[str, Any]:
        detector, sets = self.session.second_detector(), self.scorers["final"].sets
        if detector is None:
            return {}
        return {label: detection_rates(detector, sets, folder) for label, folder in folders.items()}

    def _metrics(self) -> dict[str, Any]:
        """The record of DESIGN's ``metrics.json`` but for the two scores."""
        tests = {}
        if self.erased:
            tests = {
                name: paired_test(self.original["final"].scored.hits[name], hits)
                for name, hits in self.erased.hits.items()
            }
        return {
            "schema": 1,
            "concept": [concept.name for concept in self.session.concepts],
            "model": self.config.model.name,
            "commit": runs.commit(),
            "epochs": self.history,
            "seconds": self.seconds,
            "network_evaluations": self.evaluations,
            "paired_p_value": tests,
            "zero_shot_clip": self.second,
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start, before = time.monotonic(), self.adapter.network_evaluations
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        self.evaluations[name] = self.adapter.network_evaluations - before
