"""Run ``train.py`` from a validated configuration, with TRCE or a method of ``erasers/``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.callbacks import EpochEvaluation, RanksAgree, progress_checkpoints
from trce_lightning.concepts import Concept
from trce_lightning.config.checks import TRCE_OPTIONS, check_values
from trce_lightning.config.schema import TrainConfig
from trce_lightning.data.trajectories import generator_of
from trce_lightning.erasers.protocol import Cost, Erased, Eraser, Job
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scorer import score_on_all_ranks
from trce_lightning.jobs import announce, streamed
from trce_lightning.jobs.train import ERASED, TrainingRun, merge_previous
from trce_lightning.jobs.trainers import AUTOCAST, LAST_CHECKPOINT, make_trainer
from trce_lightning.metrics.factories import made_by
from trce_lightning.runtime.locks import own_lock
from trce_lightning.runtime.logs import set_up_logging

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Erase ``config.concept`` and write a run folder; see :class:`.train.TrainingRun`, :mod:`.streamed`."""
    set_up_logging()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.streamed:
        streamed.train(config, merge_previous(config))
        return
    run = run_of(config, merge_previous(config))
    with own_lock():
        if not config.plan:
            run.open()  # before the first log line, so that run.log has it
        announce.training(run)
        if not config.plan:
            run.erase_and_score()
            run.write()


def run_of(config: TrainConfig, concepts: list[Concept], adapter: Adapter | None = None) -> TrainingRun:
    """Return the run of the configured method."""
    if _is_trce(config):
        return TrainingRun(config, concepts, adapter)
    return MethodRun(config, concepts, adapter)


def reads_seed(config: TrainConfig) -> bool:
    """Return whether the result depends on the seed, for the same prompts to keep and the same scenes."""
    return _is_trce(config) or make_eraser(config.method).reads_seed


def unread_options(config: TrainConfig) -> tuple[str, ...]:
    """Return the groups of options that the configured method doesn't read: TRCE's own, for all others.

    ``textual`` is not among them, because it has the captions to keep, which every method reads.
    """
    return () if _is_trce(config) else tuple(name for name in TRCE_OPTIONS if name != "textual")


def method_defaults(config: TrainConfig) -> dict[str, Any]:
    """Return the defaults of the configured method's options by name. TRCE's are not among them."""
    eraser = None if _is_trce(config) else make_eraser(config.method)
    if not dataclasses.is_dataclass(eraser):
        return {}
    options = dataclasses.fields(eraser)
    return {each.name: each.default for each in options if each.default is not dataclasses.MISSING}


def _is_trce(config: TrainConfig) -> bool:
    return config.method.get("name") == "trce"


def make_eraser(options: Mapping[str, Any]) -> Eraser:
    """Return the method that ``method`` describes. ``InputError`` names a wrong option."""
    given = dict(options)
    name, path = given.pop("name", None), given.pop("_target_", None)
    if path is None:
        raise InputError(f"method: expected a method chosen by method=NAME, got options of {name!r} alone")
    eraser = made_by("method", path, Eraser, **given)  # type: ignore[type-abstract]
    if dataclasses.is_dataclass(eraser):
        check_values(eraser, "method")
    return eraser


class MethodRun(TrainingRun):
    """One run of ``train.py`` with a method other than TRCE.

    The original's scores, the folder, the exports and the report are those of a TRCE run. The erased model is
    scored on the tuning prompts as well, as TRCE's epochs are, so that settings can be chosen there.
    """

    def __init__(self, config: TrainConfig, concepts: list[Concept], adapter: Adapter | None = None) -> None:
        self.eraser = make_eraser(config.method)
        super().__init__(dataclasses.replace(config, stages=[]), concepts, adapter)
        if config.metrics.enabled:
            final = self.scorers.pop("final")
            tuning = self.session.scorer("tune", config.metrics.images_per_set)
            self.scorers |= {"epochs": tuning, "final": final}
        self.work = self.eraser.ahead(self._job())
        self._check_half()
        self.result: Erased | None = None

    def _job(self) -> Job:
        return Job(
            adapter=self.adapter,
            concepts=self.session.trained_concepts,
            alone=self.session.concepts,
            trainer=self.trainer,
            cache=self.cache,
            generator=generator_of(self.fingerprint, self.trainer),
            seed=self.config.seed,
            keep_prompts=self.session.keep_prompts,
            fit=self._fit,
            part=self._stage,
            textual=self.config.textual,
        )

    def _check_half(self) -> None:
        """Raise ``InputError`` if a fit's half-precision weights meet passes in another precision."""
        half = {weight.dtype for weight in self.adapter.denoiser.parameters()} - {torch.float32}
        if not any(cost.backward for cost in self.work.parts.values()):
            return
        for precision, dtype in AUTOCAST.items():
            if half == {dtype} and self.trainer.precision != precision:
                raise InputError(
                    f"trainer.precision: expected {precision} where a denoiser in {dtype} is trained, got "
                    f"{self.trainer.precision}; or model.dtype=float32"
                )

    def method_parts(self) -> dict[str, Cost]:
        """Return the network evaluations of the method, by part."""
        return self.work.parts

    def method_files(self) -> dict[str, Mapping[str, Tensor]]:
        """Return further tensors of the method, such as a LoRA, by file name."""
        assert self.result is not None
        return self.result.files

    def trainable_numbers(self) -> int:
        """Return how many numbers the method may change."""
        return self.work.trainable

    def stored_bytes(self) -> int:
        """Return the bytes of the method's cache on disk."""
        return self.work.stored_bytes

    def training_bytes(self) -> int:
        """Return the bytes that training needs beside the network."""
        return self.work.training_bytes

    @property
    def trains(self) -> bool:
        """Return whether the method trains weights, and so has loss curves."""
        return any(cost.backward for cost in self.work.parts.values())

    @property
    def tuning_passes(self) -> int:
        """Return how often the erased model is scored on the tuning prompts."""
        return 1

    def method_title(self) -> str:
        """Return the method's name, for the model card."""
        return self.eraser.title

    def fit(self) -> None:
        """Erase, then score the tuning prompts."""
        self._original_weights.close()
        self.result = self.eraser.erase(self._job())
        self._name_erased()
        self.adapter.weights_changed()
        if "epochs" in self.scorers:
            self._score_tuning()

    def _name_erased(self) -> None:
        """Let messages speak of the erased model. Before training, the adapter's is the original."""
        if not self.adapter.name.endswith(ERASED):
            self.adapter.name += ERASED

    def _fit(self, module: pl.LightningModule, data: pl.LightningDataModule, part: str) -> None:
        self._name_erased()
        config, folder = self.config, self.folder / "checkpoints"
        folder = folder if part == "training" else folder / part
        callbacks = [RanksAgree(), *progress_checkpoints(folder, config.checkpoint_minutes)]
        trainer = make_trainer(config.trainer, self.folder, callbacks=callbacks, loggers=self.loggers)
        last = folder / LAST_CHECKPOINT
        with self._stage(part):
            trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
        self.trainer = trainer

    def _score_tuning(self) -> None:
        scorer = self.scorers["epochs"]
        self.evaluation = EpochEvaluation(scorer)
        with self._stage("epochs"):
            folder = self.folder / "tuning"
            self.evaluation.epochs.append(score_on_all_ranks(self.trainer, scorer, folder, "tuning prompts"))

    def changed(self) -> dict[str, dict[str, Tensor]]:
        """Return the changed tensors by component and name."""
        assert self.result is not None
        return self.result.changed

    def method_facts(self) -> dict[str, Any]:
        """Return the method's part of ``metrics.json``: options, exact planned counts, figures of its own."""
        assert self.result is not None
        options: dict[str, Any] = (
            dataclasses.asdict(self.eraser) if dataclasses.is_dataclass(self.eraser) else {}
        )
        planned = {
            kind: sum(getattr(cost, kind) for cost in self.work.parts.values())
            for kind in ("forward", "backward")
        }
        return {"name": self.eraser.name, "options": options, "trainable": self.work.trainable} | {
            "planned_network_evaluations": planned,
            "facts": self.result.facts,
        }
