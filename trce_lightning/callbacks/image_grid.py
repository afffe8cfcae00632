"""Show images of the original and the erased model for the same prompts and noise, after each pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from trce_lightning.callbacks.evaluation import EpochEvaluation
from trce_lightning.generation.loop import load_images, shard
from trce_lightning.prompts.records import PromptRecord, PromptSet
from trce_lightning.report.image_grid import image_grid
from trce_lightning.runtime.storage import replacing


class ImageGrid(pl.Callback):
    """Write ``grid.png`` from the images that ``EpochEvaluation`` has just generated, and send it to W&B.

    This callback comes after the evaluation in the trainer's list. ``original`` is the folder of the original
    model's images.
    """

    def __init__(self, evaluation: EpochEvaluation, original: Path, file: Path, columns: int = 8) -> None:
        self.evaluation, self.original, self.file, self.columns = evaluation, original, file, columns

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write a grid of this rank's first images. With n ranks, their prompts are every n-th."""
        if not trainer.is_global_zero:
            return
        scorer, images = self.evaluation.scorer, self.evaluation.images
        shares = {name: shard(scorer.records(name), 0, trainer.world_size)[: self.columns] for name in images}
        originals = {name: load_images(self.original / name, share) for name, share in shares.items()}
        draw(shares, {"original": originals, "erased": images}, self.file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("grid", [str(self.file)], step=trainer.global_step)


def grid_of(sets: Sequence[PromptSet], folders: Mapping[str, Path], file: Path, columns: int = 8) -> None:
    """Write a grid of every set's first prompts from folders of images.

    ``folders`` are by label, such as the original above the erased model.
    """
    shares = {prompts.name: prompts.records[:columns] for prompts in sets}
    images = {
        label: {name: load_images(folder / name, share) for name, share in shares.items()}
        for label, folder in folders.items()
    }
    draw(shares, images, file)


def draw(
    shares: Mapping[str, Sequence[PromptRecord]], images: Mapping[str, Mapping[str, Tensor]], file: Path
) -> None:
    """Write a grid with labels as rows, prompts as columns and one block per set."""
    prompts = [record.prompt for share in shares.values() for record in share]
    rows = [
        (label, torch.cat([by_set[name][: len(share)] for name, share in shares.items()]))
        for label, by_set in images.items()
    ]
    columns = max(len(share) for share in shares.values())
    picture = image_grid(rows, prompts, columns=columns)
    with replacing(file) as aside:
        picture.save(aside)
