"""Processes that should hold the same weights are checked to do so."""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist

from trce_lightning.runtime.fingerprints import tensors_fingerprint


class RanksAgree(pl.Callback):
    """After each epoch compares the changed tensors of all ranks bit by bit, by their hash.

    Comes before callbacks that score or save. ``RuntimeError`` naming the ranks that differ from the first.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Alone there is nothing to compare."""
        if trainer.world_size == 1:
            return
        digests = [""] * trainer.world_size
        dist.all_gather_object(digests, tensors_fingerprint(pl_module.changed_tensors()))  # type: ignore[operator]
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise RuntimeError(
                f"epoch {trainer.current_epoch + 1}: expected the same weights on all {trainer.world_size} "
                f"processes, got others than on rank 0 on rank {', '.join(map(str, different))}"
            )
