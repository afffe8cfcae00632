"""A run of ``train.py`` with TRCE, and what all methods' runs share."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor

from trce_lightning import __version__, export
from trce_lightning.adapters import Adapter
from trce_lightning.adapters.cut import check_pairs, warn_of_cut
from trce_lightning.callbacks import (
    EpochEvaluation,
    ImageGrid,
    PromptTable,
    RanksAgree,
    SaveBeforeScoring,
    progress_checkpoints,
)
from trce_lightning.closed_form import Edit
from trce_lightning.concepts import Concept, prompt_pairs
from trce_lightning.config.schema import ModelConfig, TrainConfig
from trce_lightning.data.datamodule import TrajectoryDataModule, check_batch
from trce_lightning.data.plan import TrajectoryPlan, draw_plan, without_empty
from trce_lightning.data.trajectories import generator_of, sample_missing
from trce_lightning.erasers.protocol import Cost, denoiser_name
from trce_lightning.erasers.tuning import ADAM_BYTES
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import SCORED_SCHEMA, Scored, log_scores
from trce_lightning.evaluation.scorer import Scorer, score_on_all_ranks
from trce_lightning.jobs import results, runs
from trce_lightning.jobs.session import Session, base_name, concepts_of
from trce_lightning.jobs.trainers import AUTOCAST, LAST_CHECKPOINT, make_loggers, make_trainer
from trce_lightning.metrics.real_images import source_fingerprint
from trce_lightning.module import TRCE
from trce_lightning.runtime.checkout import commit
from trce_lightning.runtime.ranks import on_each_rank, peak_device_memory_mb, total_over_ranks
from trce_lightning.runtime.storage import reading
from trce_lightning.textual import TextualStatistics, cached_kept, stored_edits, textual_statistics

log = logging.getLogger(__name__)
ERASED = ", erased"
"""The end of the model's name in messages once it is changed."""
MODEL_IDENTITY = ("name", "path", "hub_id", "revision", "config", "dtype")
"""The model options that its weights and text states depend on."""


def merge_previous(config: TrainConfig) -> list[Concept]:
    """Return the concepts of the run ``previous``, followed by the configured ones.

    All of them are erased from the original model again. ``InputError`` if ``previous`` is not a run or
    erased from another model.
    """
    concepts = concepts_of(config)
    if config.previous is None:
        return concepts
    folder = Path(config.previous)
    if not (folder / runs.CONFIG).is_file():
        raise InputError(f"previous: expected the folder of an earlier run, got '{folder}'")
    with reading(folder / runs.CONFIG, "the configuration of an earlier run", "name another run"):
        written = OmegaConf.load(folder / runs.CONFIG)
        # Only these options are needed, so a run of an earlier version works too.
        model = OmegaConf.masked_copy(written.model, list(MODEL_IDENTITY))
        earlier = OmegaConf.merge(
            OmegaConf.structured(TrainConfig), {"model": model, "concept": written.concept}
        )
        restored = OmegaConf.to_object(earlier)
    assert isinstance(restored, TrainConfig)
    _check_same_model(restored.model, config.model)
    config.concept = restored.concept | config.concept
    return concepts_of(config)


def _check_same_model(earlier: ModelConfig, now: ModelConfig) -> None:
    """Raise ``InputError`` if the two models' weights or text states may differ.

    Options of generation and scoring may differ.
    """
    for name in MODEL_IDENTITY:
        before, asked = getattr(earlier, name), getattr(now, name)
        if before != asked:
            raise InputError(
                f"previous: expected a run on the same model, with model.{name}={asked}, "
                f"got one with model.{name}={before}"
            )


@dataclass(frozen=True)
class Original:
    """The original model's scores on one split, and the folder of its images."""

    scored: Scored
    folder: Path


class TrainingRun:
    """One run of ``train.py``. Each step is a method; :meth:`erase_and_score` has their order."""

    def __init__(self, config: TrainConfig, concepts: list[Concept], adapter: Adapter | None = None) -> None:
        self.config, self.session = config, Session(config, concepts, adapter)
        self.adapter = self.session.adapter
        if "single_file" in config.export:
            self.adapter.original_state()  # raises now if a tensor has no name in a single file
        self.base = base_name(config.model)
        self._original_weights = ExitStack()  # closed in :meth:`fit`
        self._original_weights.enter_context(self.adapter.unchanged())
        self.fingerprint = self.adapter.fingerprint()
        self.cache = runs.cache_folder(config)
        self.trainer = make_trainer(config.trainer, self.cache)
        if "trajectory" in config.stages:
            check_batch(config.trajectory.batch_size, self.trainer.world_size)
            self._check_precision()
        if "trajectory" in config.stages and not self.adapter.guided:
            config = self.config = replace(config, trajectory=without_empty(config.trajectory))
            log.info(
                "%s samples without ∅: trajectories follow their prompts alone, and %d prompts to keep are "
                "preserved with each malicious point, none unconditionally",
                self.adapter.name,
                config.trajectory.kept_per_malicious,
            )
        trained = self.session.trained_concepts
        pairs = prompt_pairs(trained)
        check_pairs(self.adapter, pairs)
        self.generator = generator_of(self.fingerprint, self.trainer)
        self.plan: TrajectoryPlan | None = None
        if "trajectory" in config.stages:
            if not config.trajectory.scenes and trained != concepts:
                pairs = prompt_pairs(concepts)
            every = [pair for rows in pairs.values() for pair in rows]
            keep_prompts = self.session.keep_prompts() if config.trajectory.kept_per_malicious else []
            self.plan = draw_plan(every, config.trajectory, config.seed, keep_prompts, concepts=len(concepts))
        self.scorers: dict[str, Scorer] = {}
        if config.metrics.enabled:
            if self.plan is not None:
                self.scorers["epochs"] = self.session.scorer("tune", config.metrics.images_per_set)
            self.scorers["final"] = self.session.scorer("report", config.metrics.final_images_per_set)
        self.original: dict[str, Original] = {}
        self.erased: Scored | None = None
        self.evaluation: EpochEvaluation | None = None
        self.seconds: dict[str, float] = {}
        self.evaluations: dict[str, int] = {}
        """The number of network evaluations by part: on this rank, and after :meth:`write` on all ranks."""
        self.peak_device_memory_mb: int | None = None
        self.edit: Edit | None = None
        self.statistics: TextualStatistics | None = None

    def _check_precision(self) -> None:
        """Raise ``InputError`` if half-precision weights meet passes in another precision.

        No kernel takes both.
        """
        weights = self.adapter.trainable(self.config.trajectory.trainable).values()
        half = {weight.dtype for weight in weights} - {torch.float32}
        for precision, dtype in AUTOCAST.items():
            if half == {dtype} and self.trainer.precision != precision:
                raise InputError(
                    f"trainer.precision: expected {precision} where stage 2 trains a denoiser in {dtype}, "
                    f"got {self.trainer.precision}; or model.dtype=float32"
                )

    def erase_and_score(self) -> None:
        """Run all steps between :meth:`open` and :meth:`write`."""
        self.sample_trajectories()
        self.score_original()
        self.solve()
        self.fit()
        self.score_erased()

    def open(self) -> None:
        """Choose and create the folder."""
        self.folder = runs.open_folder(self.config)
        log.info("trce-lightning %s, %s", __version__, commit())
        self.loggers = make_loggers(self.config.logger, self.folder, self.folder.name)

    @property
    def trajectory_folder(self) -> Path:
        """The folder of trajectories, which all runs with an equal plan and model share."""
        assert self.plan is not None
        return self.cache / "trajectories" / self.plan.fingerprint(self.generator)

    def sample_trajectories(self) -> None:
        """Sample the trajectories of the original network that are not cached."""
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
        """Score the original model on both splits, once per cache.

        This comes before stage 1 changes the model.
        """
        with self._stage("original"):
            for title, scorer in self.scorers.items():
                self.original[title] = self._cached_scores(title, scorer)

    def _original_folder(self, scorer: Scorer) -> Path:
        return self.cache / "original" / scorer.fingerprint()

    def _original_scores(self, scorer: Scorer) -> Path:
        # The file lies beside the images. Other judges and concepts with other neighbours may share the
        # images.
        model = self.config.model
        real = model.real_images and source_fingerprint(Path(model.real_images))
        judge = repr((SCORED_SCHEMA, model, real, self.session.concepts))
        name = hashlib.blake2b(judge.encode(), digest_size=4).hexdigest()
        return self._original_folder(scorer) / f"detections-{name}.json"

    def is_scored(self, scorer: Scorer) -> bool:
        """Return True if the original model's scores are cached. Call this before stage 1."""
        return self._original_scores(scorer).exists()

    def _cached_scores(self, title: str, scorer: Scorer) -> Original:
        folder = self._original_folder(scorer)
        file = self._original_scores(scorer)
        # Rank 0 decides: another run may write the file after one rank has looked for it and before the next.
        decide = self.trainer.strategy.broadcast
        if not on_each_rank(self.trainer, lambda _: decide(self.is_scored(scorer))):
            scores = score_on_all_ranks(self.trainer, scorer, folder, f"original model, {title}")
            if self.trainer.is_global_zero:
                Scored(scores, scorer.detections).save(file)
            self.trainer.strategy.barrier()
            scorer.network_evaluations = 0
        return Original(Scored.load(file), folder)

    def solve(self) -> None:
        """Solve for stage 1's matrix. The module's setup hook applies it."""
        if "textual" not in self.config.stages:
            return
        with self._stage("textual"):
            textual = self.config.textual
            prompts = self.session.keep_prompts()
            warn_of_cut(self.adapter, prompts, "those to keep")
            kept = cached_kept(self.trainer, self.adapter, prompts, self.cache)
            self.statistics = textual_statistics(self.adapter, self.session.trained_concepts, kept, textual)
            self.edit = self.statistics.solve(textual)
        if self.trainer.is_global_zero:
            export.save_edit(
                self.folder / "edit.safetensors",
                self.statistics,
                self.edit,
                textual,
                self.base,
                self.fingerprint,
                stored_edits(self.adapter, self.edit),
            )

    def fit(self) -> None:
        """Apply stage 1 in setup, train stage 2, and score after each epoch.

        If stage 2 is named first, apply stage 1 after training.
        """
        config = self.config
        self.adapter.name += ERASED
        self._original_weights.close()
        first = self.edit if self.edits_first else None
        self.module = TRCE(self.adapter, first, config.trajectory, config.optimizer)
        if self.plan is None:
            self.module.apply_stage_1()
            return
        callbacks = self._callbacks()
        trainer = make_trainer(
            config.trainer,
            self.folder,
            epochs=config.trajectory.epochs,
            callbacks=callbacks,
            loggers=self.loggers,
        )
        data = TrajectoryDataModule(
            self.adapter, self.plan, self.trajectory_folder, config.trajectory, config.seed
        )
        last = self.folder / "checkpoints" / LAST_CHECKPOINT
        with self._stage("training"):
            trainer.fit(self.module, data, ckpt_path=str(last) if last.exists() else None)
        if "epochs" in self.scorers:
            self.evaluations["epochs"] = self.scorers["epochs"].network_evaluations
            self.evaluations["training"] -= self.evaluations["epochs"]
        self.trainer = trainer
        if self.edit is not None and not self.edits_first:
            self.module.edit_last(self.edit)

    def changed(self) -> dict[str, dict[str, Tensor]]:
        """Return the changed tensors by the pipeline's component and by name."""
        return {denoiser_name(self.adapter): self.module.changed_tensors()}

    def method_title(self) -> str:
        """Return the method's name with its source, for the model card."""
        return f"TRCE (arXiv 2503.07389, stages {' + '.join(self.config.stages)})"

    def method_parts(self) -> dict[str, Cost]:
        """Return the network evaluations of another method than TRCE, by part."""
        return {}

    def method_facts(self) -> dict[str, Any]:
        """Return the method's own entry of ``metrics.json``."""
        return {"name": "trce"}

    def method_files(self) -> dict[str, Mapping[str, Tensor]]:
        """Return further tensors that the run stores, by file name."""
        return {}

    def trainable_numbers(self) -> int:
        """Return how many numbers the run trains."""
        parameters = self.adapter.trainable(self.config.trajectory.trainable).values()
        return sum(parameter.numel() for parameter in parameters)

    def training_bytes(self) -> int:
        """Return the bytes that training needs beside the network: gradients and optimizer states."""
        return ADAM_BYTES * self.trainable_numbers()

    def stored_bytes(self) -> int:
        """Return the bytes of the trajectories on disk."""
        return self.plan.stored_bytes(math.prod(self.adapter.latent_shape)) if self.plan else 0

    @property
    def trains(self) -> bool:
        """Return whether the run trains weights, and so has loss curves."""
        return self.plan is not None

    @property
    def edits_first(self) -> bool:
        """Return whether stage 1 comes before stage 2."""
        return self.config.stages[0] == "textual"

    @property
    def tuning_passes(self) -> int:
        """Return how often the erased model is scored on the tuning prompts."""
        return self.edits_first + self.config.trajectory.epochs

    def _callbacks(self) -> Sequence[pl.Callback]:
        checkpoints = progress_checkpoints(self.folder / "checkpoints", self.config.checkpoint_minutes)
        if "epochs" not in self.scorers:
            return [RanksAgree(), *checkpoints]
        self.evaluation = EpochEvaluation(self.scorers["epochs"])
        grid = ImageGrid(self.evaluation, self.original["epochs"].folder, self.folder / "grid.png")
        before = SaveBeforeScoring(self.folder / "checkpoints")
        return [RanksAgree(), before, self.evaluation, grid, PromptTable(self.evaluation), *checkpoints]

    def score_erased(self) -> None:
        """Score the erased model on the report split. No choice was made on its prompts and noise."""
        if "final" not in self.scorers:
            return
        with self._stage("final"):
            scorer = self.scorers["final"]
            scores = score_on_all_ranks(self.trainer, scorer, self.folder / "images", "erased model")
            self.erased = Scored(scores, scorer.detections)
        log_scores(self.loggers, scores, step=self.trainer.global_step, prefix="final/")

    def write(self) -> None:
        """Write the results. One process writes, after all have reported their costs."""
        self.evaluations = total_over_ranks(self.trainer, self.evaluations)
        self.peak_device_memory_mb = peak_device_memory_mb(self.trainer)
        if self.trainer.is_global_zero:
            results.write(self)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start, before = time.monotonic(), self.adapter.network_evaluations
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        self.evaluations[name] = self.adapter.network_evaluations - before
