"""``python two_processes.py WHAT FOLDER``: small work in two real processes; tests and Lightning start it."""

import atexit
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trce_lightning.cli import expected_failures
from trce_lightning.config.schema import TrainerConfig
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.runtime.ranks import Rank, on_each_rank
from trce_lightning.runtime.signals import stop

FOREVER = 300.0
CONFIG = TrainerConfig(accelerator="cpu", devices=2, precision="32-true", enable_progress_bar=False)


class OneLayer(pl.LightningModule):
    """Says when it has begun, and each rank the step after which it was stopped."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.layer = folder, torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        time.sleep(0.01 * (1 + self.global_rank))
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tell(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        (module.folder / "begun").touch()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        (module.folder / f"stopped{trainer.global_rank}").write_text(str(trainer.global_step))


def fit(folder: Path) -> None:
    """A second Trainer, as in a run: the first has started the other process."""
    on_each_rank(make_trainer(CONFIG, folder), lambda _: None)
    data: DataLoader[Tensor] = DataLoader(torch.zeros(100_000, 1))  # type: ignore[arg-type]
    make_trainer(CONFIG, folder, callbacks=[Tell()]).fit(OneLayer(folder), data)


def draw(folder: Path) -> None:
    """Busy for long without a word to each other."""

    def busy(rank: Rank) -> None:
        (folder / "begun").touch()
        for _ in range(int(FOREVER * 100)):
            time.sleep(0.01)

    on_each_rank(make_trainer(CONFIG, folder), busy)


def fail(folder: Path, culprit: int) -> None:
    """One process fails and, as NCCL does at exit, would wait for the other, which waits for it."""

    def work(rank: Rank) -> None:
        atexit.register(time.sleep, FOREVER)
        (folder / "begun").touch()
        if rank.index == culprit:
            raise ValueError("trainer.devices: expected a better day")
        torch.distributed.barrier()
        time.sleep(FOREVER)

    on_each_rank(make_trainer(CONFIG, folder), work)


if __name__ == "__main__":
    work, folder = sys.argv[1], Path(sys.argv[2])
    with stop.installed(), expected_failures():
        if work == "fit":
            fit(folder)
        elif work == "draw":
            draw(folder)
        else:
            os.environ["TRCE_TRACEBACK"] = "1"  # its place is none of the package's
            fail(folder, int(work.removeprefix("fail")))
