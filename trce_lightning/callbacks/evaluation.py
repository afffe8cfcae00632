"""Generate and score images after each epoch."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import Scores, log_scores
from trce_lightning.evaluation.scorer import Scorer
from trce_lightning.report.tables import one_line
from trce_lightning.runtime.signals import stop

log = logging.getLogger(__name__)


class EpochEvaluation(pl.Callback):
    """Score the erased model after stage 1 and after each epoch: FID, CLIP-S, ASR and benign accuracy.

    If stage 1 comes last, it comes after all of these.
    ``after_textual`` holds the SCORES of stage 1 alone, and ``epochs`` holds those of each epoch. ``images``
    holds this rank's images of the last pass by prompt set, for the callbacks that follow. Scores reach every
    logger as ``asr/direct/rate``, ``fid`` and so on.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.after_textual: Scores | None = None
        self.epochs: list[Scores] = []
        self.images: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score stage 1 alone, if there is one.

        If an interrupted run has trained an epoch without scoring it, score that epoch too.
        """
        if self.after_textual is None and pl_module.edit is not None:
            self.after_textual = self._evaluate(trainer, pl_module, "after stage 1")
        self._score_missing(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the epoch."""
        self.epochs.append(self._evaluate(trainer, pl_module, f"epoch {trainer.current_epoch + 1}"))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score the last epoch if an interrupted run has trained it without scoring it.

        Such a fit has nothing left to train, so no hook of training is called.
        """
        assert trainer.max_epochs is not None, "a fit has a number of epochs"
        self._score_missing(trainer, pl_module, trainer.max_epochs)

    def _score_missing(self, trainer: pl.Trainer, pl_module: pl.LightningModule, trained: int) -> None:
        if len(self.epochs) < trained:
            self.epochs.append(self._evaluate(trainer, pl_module, f"epoch {trained}"))

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, title: str) -> Scores:
        with stop.at_once():
            scores, self.images = self.scorer(title, trainer.global_rank, trainer.world_size)
        log_scores(trainer.loggers, scores, step=trainer.global_step)
        log.info("%s: %s", title, one_line(scores))
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Return the scores so far, for the checkpoint."""
        return {"after_textual": self.after_textual, "epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores. ``InputError`` if the checkpoint is from an earlier version."""
        if "after_textual" not in state_dict:
            raise InputError("checkpoint: expected one of this version, got an earlier one; use fresh=true")
        self.after_textual, self.epochs = state_dict["after_textual"], state_dict["epochs"]
