"""Show a fit's progress, and save it: checkpoints during an epoch, after it, and on SIGTERM."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tqdm.auto import tqdm

log = logging.getLogger(__name__)
LAST = "last"


class ProgressBars(pl.Callback):
    """A bar over all steps of a fit, and one over the files that a sampler writes, on the first rank.

    A module that predicts is a sampler with a bar if it has a ``title``. In a log file, bars add a line every
    so often, as the project's other bars do. Lightning's bars add one line at an epoch's end, or one for each
    step.
    """

    bar: tqdm

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step from which the fit continues."""
        assert trainer.max_epochs is not None, "a fit has a number of epochs"
        self.bar = tqdm(
            desc="training",
            unit="step",
            initial=trainer.fit_loop.epoch_loop.batch_progress.total.completed,
            total=trainer.max_epochs * int(trainer.num_training_batches),
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step. If the bar is drawn, its next drawing has the losses that are logged for it."""
        if self.bar.update():
            self.bar.set_postfix(trainer.progress_bar_metrics, refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a sampler's bar."""
        title: str | None = getattr(pl_module, "title", None)
        files = int(sum(trainer.num_predict_batches))
        self.bar = tqdm(desc=title, unit="file", total=files, disable=not (title and trainer.is_global_zero))

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the file."""
        self.bar.update()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the bar as it is, if there is one."""
        if hasattr(self, "bar"):
            self.bar.close()


class SaveBeforeScoring(pl.Callback):
    """Save an epoch's training before its images are generated.

    Generating them may take longer than the time between SIGTERM and the kill. A run that continues scores
    that epoch first. This callback comes before the evaluation in the trainer's list.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / f"{LAST}.ckpt"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save ``last.ckpt``. `ModelCheckpoint` saves it again after the other callbacks."""
        trainer.save_checkpoint(self.file)


def progress_checkpoints(folder: Path, minutes: float) -> list[ModelCheckpoint]:
    """Return callbacks that save ``folder/last.ckpt`` after each epoch, every ``minutes``, and on SIGTERM."""
    options: dict[str, Any] = {"dirpath": folder, "filename": LAST, "enable_version_counter": False}
    return [
        ProgressCheckpoint(train_time_interval=timedelta(minutes=minutes), **options),
        ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **options),
    ]


class ProgressCheckpoint(ModelCheckpoint):
    """Save after an optimizer step if the interval has passed, and if SIGTERM ends the fit.

    Between the steps of an accumulated gradient nothing is saved, because the gradient would be lost. After
    the last batch of an epoch nothing is saved either, because the end of the epoch is saved.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the interval has passed."""
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save if SIGTERM ends the fit.

        SIGTERM ends it between two batches, at the same one on all ranks. Other exceptions may come anywhere,
        so they save nothing.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        whole = progress.current.ready % trainer.accumulate_grad_batches == 0
        if isinstance(exception, SIGTERMException) and whole and not progress.is_last_batch:
            file = Path(str(self.dirpath)) / f"{LAST}.ckpt"
            trainer.save_checkpoint(file)
            log.info("told to stop after step %d: saved in %s", trainer.global_step, file)
