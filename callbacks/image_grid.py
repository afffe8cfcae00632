"""A picture of the same prompts and noise through the original and the erased model, after each pass."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from callbacks.evaluation import EpochEvaluation
from trce_lightning.report import image_grid
from trce_lightning.scoring import Scorer


class ImageGrid(pl.Callback):
    """Writes ``grid.png`` from the images that ``EpochEvaluation`` has made, and shows it to W&B."""

    def __init__(self, evaluation: EpochEvaluation, original: dict[str, Tensor], file: Path, columns: int = 8) -> None:
        self.evaluation, self.original, self.file, self.columns = evaluation, original, file, columns

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs after the evaluation when it comes after it in the trainer's list."""
        if not trainer.is_global_zero:
            return
        grid_of(self.evaluation.scorer, self.original, self.evaluation.images, self.file, self.columns)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("grid", [str(self.file)], step=trainer.global_step)


def grid_of(
    scorer: Scorer, original: dict[str, Tensor], erased: dict[str, Tensor], file: Path, columns: int = 8
) -> None:
    """Draw the first ``columns`` prompts of every set, original above erased."""
    names = [name for name in original if name in erased]
    count = min([columns, *(len(rows[name]) for rows in (original, erased) for name in names)])
    prompts = [record.prompt for name in names for record in scorer.records(name)[:count]]
    rows = [
        (label, torch.cat([images[name][:count] for name in names]))
        for label, images in (("original", original), ("erased", erased))
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, prompts, columns=count).save(file)
