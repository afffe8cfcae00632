"""The LightningDataModule of stage 2: each batch mixes cached malicious, unconditional and kept points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import TrajectoryConfig
from trce_lightning.data.plan import TrajectoryPlan, epoch_order
from trce_lightning.data.trajectories import load_rows
from trce_lightning.errors import InputError
from trce_lightning.losses import squared_distance
from trce_lightning.tokens import Text

Batch = dict[str, Any]
"""The tensors of a batch's cached rows: ``malicious_*`` ``[B, …]``, ``unconditional_*`` and ``kept_*``.

``malicious_text`` is the :class:`Text` of the malicious prompts, ``kept_text`` that of the prompts to keep.
Of the last two kinds, there are k rows for each malicious one, or none.
"""


@dataclass(frozen=True)
class EpochItem:
    """The row numbers of one malicious point, and of the unconditional and kept points that go with it."""

    malicious: int
    unconditional: tuple[int, ...]
    kept: tuple[int, ...]


class TrajectoryPoints(Dataset[list[EpochItem]]):
    """A data set whose item ``i`` of epoch ``e`` is one point of trajectory ``i mod n``.

    The point is the trajectory's draw ``e · draws_per_epoch + i // n``. The index is the list of item numbers
    of a whole batch.
    """

    def __init__(self, plan: TrajectoryPlan, config: TrajectoryConfig) -> None:
        self.num_trajectories, self.draws = len(plan.malicious), config.draws_per_epoch
        self.draws_in_all = config.epochs * config.draws_per_epoch
        self.unconditional_each, self.kept_each = (
            config.unconditional_per_malicious,
            config.kept_per_malicious,
        )
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_trajectories * self.draws

    def __getitem__(self, batch: list[int]) -> list[EpochItem]:
        return [self._item(index) for index in batch]

    def _item(self, index: int) -> EpochItem:
        draw = self.epoch * self.draws + index // self.num_trajectories
        malicious = (index % self.num_trajectories) * self.draws_in_all + draw
        served = self.epoch * len(self) + index

        def rows(each: int) -> tuple[int, ...]:
            return tuple(range(served * each, (served + 1) * each))

        return EpochItem(malicious, rows(self.unconditional_each), rows(self.kept_each))


def check_batch(batch_size: int, world_size: int) -> None:
    """Raise ``InputError`` unless the batch size is divisible by the number of ranks."""
    if batch_size % world_size:
        raise InputError(
            f"trajectory.batch_size: expected a multiple of the {world_size} processes, got {batch_size}; "
            "trainer.devices sets their number"
        )


class EpochBatches(DistributedSampler[list[int]]):
    """A sampler of global batches, of which each rank takes its slice.

    The order is :func:`epoch_order`'s. All batches have one size, so the mean over ranks is the mean over the
    batch.

    Lightning reports the epoch only to a loader's ``sampler``. It replaces a sampler that isn't a
    ``DistributedSampler``.

    Raises:
        InputError: the batch size is not divisible by the number of ranks.
    """

    def __init__(
        self, points: TrajectoryPoints, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        check_batch(batch_size, world_size)
        super().__init__(points, num_replicas=world_size, rank=rank, seed=seed)
        self.points, self.batch_size = points, batch_size
        self.served = 0
        """The number of batches of this epoch that have been served. The next pass begins after them."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch. Lightning calls this before each epoch."""
        self.points.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.points) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(len(self.points), self.batch_size, self.seed, self.points.epoch)
        for batch in order.split(self.batch_size)[self.served :]:
            self.served = (self.served + 1) % len(self)
            yield batch[self.rank :: self.num_replicas].tolist()


Item = TypeVar("Item")


class ContinuedLoader(DataLoader[Item]):
    """A loader that can continue within an epoch. Lightning keeps its state in checkpoints.

    Its sampler begins after the first ``served`` of its items.
    """

    sampler: Any

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch have been served."""
        return {"served": self.sampler.served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue after the batches that have been served."""
        self.sampler.served = state_dict["served"]


class TrajectoryLoader(ContinuedLoader[list[EpochItem]]):
    """A loader of global batches, of which each rank takes its slice."""

    sampler: EpochBatches


class _Prompts:
    """The text states of trajectories' prompts. Each different prompt is encoded once."""

    def __init__(self, adapter: Adapter, prompts: Sequence[str]) -> None:
        unique = list(dict.fromkeys(prompts))
        self.texts = [adapter.encode([prompt]).to("cpu") for prompt in unique]
        self.index = torch.tensor([unique.index(prompt) for prompt in prompts])

    def of(self, trajectory: Tensor) -> Text:
        """Return the text of the trajectories with these numbers."""
        return Text.cat([self.texts[number] for number in self.index[trajectory].tolist()])


class TrajectoryDataModule(pl.LightningDataModule):
    """A data module that reads the shards of a plan once and collates their rows into batches."""

    def __init__(
        self,
        adapter: Adapter,
        plan: TrajectoryPlan,
        folder: Path,
        config: TrajectoryConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.adapter, self.plan, self.folder, self.config, self.seed = adapter, plan, folder, config, seed
        self.malicious: dict[str, Tensor] = {}
        self.unconditional: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of batches of an epoch, without loading any row."""
        return -(-len(TrajectoryPoints(self.plan, self.config)) // self.config.batch_size)

    @property
    def target_distance(self) -> float:
        """Return the mean ‖ε(c_s) − ε(c_m)‖² of all malicious points: the scale of what the concept changes.

        On the embedded models it is 0.04 for a network that predicts ε, ten times that for a velocity, and a
        hundred times for a guidance-distilled network, whose predictions are guided already.
        """
        pairs = zip(self.malicious["safe"].split(64), self.malicious["malicious"].split(64), strict=True)
        return float(torch.cat([squared_distance(safe, malicious) for safe, malicious in pairs]).mean())

    def setup(self, stage: str) -> None:
        """Load all rows, and the text states of their prompts."""
        if self.malicious:
            return
        self.malicious = load_rows(self.plan, self.folder, self.config.shard_size, "malicious")
        self.unconditional = self._interleaved("unconditional", len(self.plan.unconditional))
        self.kept = self._interleaved("kept", len(self.plan.kept))
        self.prompts = _Prompts(self.adapter, [row.pair.malicious for row in self.plan.malicious if row.pair])
        self.keep_prompts = _Prompts(
            self.adapter, [row.prompt for row in self.plan.kept if row.prompt is not None]
        )

    def _interleaved(self, kind: str, trajectories: int) -> dict[str, Tensor]:
        """Return the rows of a kind in such an order that an epoch's points come from many trajectories."""
        rows = load_rows(self.plan, self.folder, self.config.shard_size, kind)
        if not rows:
            return rows
        each = len(rows["timestep"]) // trajectories
        order = torch.arange(trajectories * each).view(-1, each).T.flatten()
        return {key: values[order] for key, values in rows.items()}

    def collate(self, items: list[EpochItem]) -> Batch:
        """Return the rows of one batch, with the text states of malicious and kept prompts."""
        rows = torch.tensor([item.malicious for item in items])
        batch: Batch = {f"malicious_{key}": values[rows] for key, values in self.malicious.items()}
        batch["malicious_text"] = self.prompts.of(batch["malicious_trajectory"])
        others = torch.tensor([row for item in items for row in item.unconditional], dtype=torch.long)
        batch |= {f"unconditional_{key}": values[others] for key, values in self.unconditional.items()}
        kept = torch.tensor([row for item in items for row in item.kept], dtype=torch.long)
        if self.kept and len(kept):
            batch |= {f"kept_{key}": values[kept] for key, values in self.kept.items()}
            batch["kept_text"] = self.keep_prompts.of(batch["kept_trajectory"])
        return batch

    def train_dataloader(self) -> TrajectoryLoader:
        """Return a loader for one pass over an epoch's draws."""
        assert self.trainer is not None
        points = TrajectoryPoints(self.plan, self.config)
        batches = EpochBatches(
            points, self.config.batch_size, self.seed, self.trainer.global_rank, self.trainer.world_size
        )
        return TrajectoryLoader(
            points, batch_size=None, sampler=batches, collate_fn=self.collate, num_workers=0
        )
