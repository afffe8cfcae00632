"""Work outside of training, on every process of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

Result = TypeVar("Result")


@dataclass(frozen=True)
class Rank:
    """One of ``world_size`` processes, counted from 0, and its device."""

    index: int
    world_size: int
    device: torch.device


class _OnEachRank(pl.LightningModule):
    def __init__(self, function: Callable[[Rank], Any]) -> None:
        super().__init__()
        self.function = function
        self.result: Any = None

    def predict_step(self, item: int, batch_index: int) -> None:
        rank = Rank(self.global_rank, self.trainer.world_size, self.device)
        # What runs in half precision says so itself.
        with torch.autocast(self.device.type, enabled=False):
            self.result = self.function(rank)


def on_each_rank(trainer: pl.Trainer, function: Callable[[Rank], Result]) -> Result:
    """Call ``function`` once on every rank, wait for all, and return this rank's result.

    The function shows its own progress: the Trainer's bar is off.
    """
    module = _OnEachRank(function)
    loader: DataLoader[int] = DataLoader(range(trainer.world_size), batch_size=None)  # type: ignore[arg-type]
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.disable()
    try:
        trainer.predict(module, loader, return_predictions=False)
    finally:
        if bar is not None:
            bar.enable()
    trainer.strategy.barrier()
    result: Result = module.result
    return result
