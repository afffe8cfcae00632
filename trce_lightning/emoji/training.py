"""One resumable Lightning fit, shared by the parts of the embedded model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler

log = logging.getLogger(__name__)


class Part(pl.LightningModule):
    """A network with AdamW, a linear warm-up and a cosine decay to a tenth over ``max_steps``."""

    def __init__(
        self, lr: float, max_steps: int, warmup_steps: int = 200, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        self.lr, self.max_steps, self.warmup_steps, self.weight_decay = (
            lr,
            max_steps,
            warmup_steps,
            weight_decay,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Fused AdamW, schedule stepped per batch."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=True
        )
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=self.warmup_steps)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.max_steps - self.warmup_steps, eta_min=self.lr / 20
        )
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [self.warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: Lightning refuses ``gradient_clip_val`` with a fused optimizer."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


def fit(
    part: Part,
    batches: Iterable,
    folder: Path,
    *,
    ema_decay: float | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> None:
    """Train ``part`` for its ``max_steps``; a killed fit goes on from ``folder/last.ckpt``."""
    # On a CPU the backward of flash attention costs several times that of the plain formula.
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())
    checkpoint = ModelCheckpoint(
        folder, save_last=True, train_time_interval=timedelta(minutes=3), save_top_k=1
    )
    average = [EMAWeightAveraging(decay=ema_decay)] if ema_decay else []
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=part.max_steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=50,
        callbacks=[checkpoint, *average, *callbacks],
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    trainer.fit(part, batches, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    part.eval()
