"""Check that all processes hold the same weights."""

from __future__ import annotations

import lightning.pytorch as pl
import torch.distributed as dist

from trce_lightning.runtime.fingerprints import tensors_fingerprint


class RanksAgree(pl.Callback):
    """Compare the hashes of all ranks' changed tensors after each epoch.

    If they differ, ``RuntimeError`` names the ranks that differ from the first. This callback comes before
    callbacks that score or save.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranks' hashes. A single process has nothing to compare."""
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
