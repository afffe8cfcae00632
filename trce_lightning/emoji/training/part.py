"""Fit one part of the embedded model with Lightning. The fit can be resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel

from trce_lightning.jobs.trainers import choose_precision, native_dtype

log = logging.getLogger(__name__)


def native_autocast(device_type: str) -> torch.autocast:
    """Return autocast to half precision if the hardware has it.

    Emulating it may be a hundred times slower.
    """
    dtype = native_dtype(device_type)
    return torch.autocast(device_type, dtype, enabled=dtype is not None)


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
        """Return AdamW with a schedule that steps with each batch.

        It is fused unless the precision is 16-mixed.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # A fused optimizer takes gradients scaled by float16's loss scaling, and clipping them would be
        # wrong.
        fused = self.trainer.precision != "16-mixed"
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=fused
        )
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=self.warmup_steps)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.max_steps - self.warmup_steps, eta_min=self.lr / 20
        )
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [self.warmup_steps])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients here, because Lightning refuses ``gradient_clip_val`` with a fused optimizer."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


def fit(
    part: Part,
    batches: Iterable,
    folder: Path,
    *,
    ema_decay: float | None = None,
    validation: Iterable | None = None,
    validate_every_n_steps: int = 2500,
) -> None:
    """Train ``part`` for its ``max_steps``. A killed fit continues from ``folder/last.ckpt``."""
    checkpoint = ModelCheckpoint(
        folder, save_last=True, train_time_interval=timedelta(minutes=3), save_top_k=1
    )
    average = [EMAWeightAveraging(decay=ema_decay)] if ema_decay else []
    precision: Any = choose_precision("auto", "auto")
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        max_steps=part.max_steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=50,
        callbacks=[checkpoint, *average],
        val_check_interval=validate_every_n_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    # On a CPU, the backward pass of flash attention takes several times as long as that of the plain formula.
    with nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH):
        trainer.fit(
            part, batches, validation, ckpt_path=str(last) if last.exists() else None, weights_only=False
        )
    part.eval()
