"""Show every prompt of a pass with its image and its detection, as a table on W&B."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from torchvision.transforms.v2.functional import to_pil_image

from trce_lightning.callbacks.evaluation import EpochEvaluation
from trce_lightning.generation.loop import shard

COLUMNS = ["set", "id", "prompt", "image", "probability", "subject"]


class PromptTable(pl.Callback):
    """Log the table ``prompts`` to W&B after each epoch. Other loggers get nothing.

    This callback comes after the evaluation in the trainer's list. With several ranks, the table has the
    first rank's images.
    """

    def __init__(self, evaluation: EpochEvaluation) -> None:
        self.evaluation = evaluation

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log one row for each image. If no judge names the subject, ``subject`` is empty."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or not trainer.is_global_zero:
            return
        rows = [row for name in self.evaluation.images for row in self._rows(name, trainer.world_size)]
        for logger in loggers:
            logger.log_table("prompts", columns=COLUMNS, data=rows, step=trainer.global_step)

    def _rows(self, set_name: str, world_size: int) -> list[list[object]]:
        import wandb

        scorer, images = self.evaluation.scorer, self.evaluation.images[set_name]
        seen = scorer.detections[set_name]
        return [
            [
                set_name,
                record.id,
                record.prompt,
                wandb.Image(to_pil_image(image)),
                seen[record.id].probability,
                seen[record.id].subject or "",
            ]
            for record, image in zip(shard(scorer.records(set_name), 0, world_size), images, strict=True)
        ]
