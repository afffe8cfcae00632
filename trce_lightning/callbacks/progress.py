"""Keeping what a fit has done: checkpoints between epochs' ends, and when the process is told to stop."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger(__name__)
LAST = "last"


class SaveBeforeScoring(pl.Callback):
    """Keeps an epoch's training before its images are drawn, which may take longer than a notice of SIGTERM.

    Comes before the evaluation in the trainer's list; a run that continues scores that epoch first.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"{LAST}.ckpt"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `ModelCheckpoint` does after the other callbacks."""
        trainer.save_checkpoint(self.file)


def progress_checkpoints(folder: Path, minutes: float) -> list[ModelCheckpoint]:
    """What keeps ``folder/last.ckpt`` up to date: after each epoch, every ``minutes``, and on SIGTERM."""
    options: dict[str, Any] = {"dirpath": folder, "filename": LAST, "enable_version_counter": False}
    return [
        ProgressCheckpoint(train_time_interval=timedelta(minutes=minutes), **options),
        ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **options),
    ]


class ProgressCheckpoint(ModelCheckpoint):
    """Saves after a step of the optimizer when its time has come, and when SIGTERM ends the fit.

    Between the steps of an accumulated gradient nothing is saved, since that gradient would be lost, nor
    after the last batch of an epoch, whose end is saved anyway.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save what SIGTERM ends: between two batches, the same on all ranks; others come anywhere."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        whole = progress.current.ready % trainer.accumulate_grad_batches == 0
        if isinstance(exception, SIGTERMException) and whole and not progress.is_last_batch:
            file = Path(str(self.dirpath)) / f"{LAST}.ckpt"
            trainer.save_checkpoint(file)
            log.info("told to stop after step %d: saved in %s", trainer.global_step, file)
