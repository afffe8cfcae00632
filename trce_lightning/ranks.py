"""Work outside of training, on every process of a Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

Result = TypeVar("Result")


class _OnEachRank(pl.LightningModule):
    def __init__(self, function: Callable[[pl.LightningModule], Any]) -> None:
        super().__init__()
        self.function = function
        self.result: Any = None

    def predict_step(self, rank: int, batch_index: int) -> None:
        # What runs in half precision says so itself.
        with torch.autocast(self.device.type, enabled=False):
            self.result = self.function(self)


def on_each_rank(trainer: pl.Trainer, function: Callable[[pl.LightningModule], Result]) -> Result:
    """Call ``function`` once on every rank and return this rank's result.

    Its argument tells device, rank and Trainer. It shows its own progress: the Trainer's bar is off. With a
    strategy that forks or spawns its processes results stay there, and None returns.
    """
    module = _OnEachRank(function)
    loader: DataLoader[int] = DataLoader(range(trainer.world_size), batch_size=None)  # type: ignore[arg-type]
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.disable()
    trainer.predict(module, loader, return_predictions=False)
    if bar is not None:
        bar.enable()
    result: Result = module.result
    return result
