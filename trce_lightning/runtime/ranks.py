"""Functions that run work other than training on every process of a Trainer."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        # A function that wants half precision switches autocast on itself.
        with torch.autocast(self.device.type, enabled=False):
            self.result = self.function(rank)


def on_each_rank(trainer: pl.Trainer, function: Callable[[Rank], Result]) -> Result:
    """Call ``function`` once on every rank, wait for all ranks, and return this rank's result."""
    module = _OnEachRank(function)
    loader: DataLoader[int] = DataLoader(range(trainer.world_size), batch_size=None)  # type: ignore[arg-type]
    trainer.predict(module, loader, return_predictions=False)
    trainer.strategy.barrier()
    result: Result = module.result
    return result


@contextmanager
def threads_of_idle_ranks(rank: Rank, busy: int, on_machine: int) -> Iterator[None]:
    """Give this rank the CPU threads of its machine's ranks that have nothing to do within.

    Args:
        rank: this rank.
        busy: the number of ranks that have work. These are the first ones.
        on_machine: the number of ranks on each machine.
    """
    own = torch.get_num_threads()
    shared = own * on_machine // max(1, min(busy, on_machine))
    if rank.device.type == "cpu":
        torch.set_num_threads(max(own, min(shared, os.cpu_count() or own)))
    try:
        yield
    finally:
        torch.set_num_threads(own)


def total_over_ranks(trainer: pl.Trainer, counts: Mapping[str, int]) -> dict[str, int]:
    """Return each count summed over the ranks. All ranks call it with the same names."""
    if not counts:
        return {}
    own = torch.tensor([*counts.values()], device=trainer.strategy.root_device)
    total = trainer.strategy.reduce(own, reduce_op="sum")
    assert isinstance(total, torch.Tensor)
    return dict(zip(counts, total.tolist(), strict=True))


def peak_memory_mb() -> int:
    """Return the largest resident memory of this process, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak_device_memory_mb(trainer: pl.Trainer) -> int | None:
    """Return the most memory that a rank has allocated on its GPU, in MiB. All ranks call it.

    If there are no GPUs, return None.
    """
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    own = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    most = trainer.strategy.reduce(own, reduce_op="max")
    assert isinstance(most, torch.Tensor)
    return round(int(most) / 2**20)
