"""Batches: each draw once an epoch, unconditional rows with it, the same for any number of processes."""

from collections import Counter
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tiny_runs import cpu_trainer, plan_of, sample_plan, trajectory_config
from torch import Tensor, nn

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.config.schema import TrajectoryConfig
from trce_lightning.data.datamodule import Batch, EpochBatches, TrajectoryDataModule, TrajectoryPoints
from trce_lightning.data.trajectories import load_rows

CONFIG = trajectory_config(kept_per_malicious=3, num_kept=5)


@pytest.fixture(scope="module")
def cache(tiny_adapter: StableDiffusionAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trajectories")
    sample_plan(tiny_adapter, CONFIG, folder)
    return folder


class Recorder(pl.LightningModule):
    """Keeps what a Trainer serves, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[Batch]] = {}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def served(
    adapter: StableDiffusionAdapter, cache: Path, seed: int = 0, config: TrajectoryConfig = CONFIG
) -> dict[int, list[Batch]]:
    """All batches of a fit, by epoch."""
    recorder = Recorder()
    data = TrajectoryDataModule(adapter, plan_of(CONFIG), cache, config, seed)
    cpu_trainer(cache, epochs=config.epochs).fit(recorder, data)
    return recorder.epochs


def global_batches(
    config: TrajectoryConfig, world_size: int, seed: int = 0, epoch: int = 0
) -> list[list[int]]:
    """Items of each batch over all ranks."""
    by_rank = []
    for rank in range(world_size):
        batches = EpochBatches(
            TrajectoryPoints(plan_of(config), config), config.batch_size, seed, rank, world_size
        )
        batches.set_epoch(epoch)
        assert len(list(batches)) == len(batches)
        by_rank.append(list(batches))
    assert len({len(rows) for shares in zip(*by_rank, strict=True) for rows in shares}) == 1
    return [sorted(chain.from_iterable(shares)) for shares in zip(*by_rank, strict=True)]


def test_an_epoch_serves_each_of_its_draws_once(tiny_adapter: StableDiffusionAdapter, cache: Path) -> None:
    plan, epochs = plan_of(CONFIG), served(tiny_adapter, cache)
    assert list(epochs) == [0, 1]
    for epoch, batches in epochs.items():
        found = [
            point
            for batch in batches
            for point in zip(
                batch["malicious_trajectory"].tolist(), batch["malicious_step_index"].tolist(), strict=True
            )
        ]
        draws = range(epoch * CONFIG.draws_per_epoch, (epoch + 1) * CONFIG.draws_per_epoch)
        assert Counter(found) == Counter(
            (row.index, row.step_indices[draw]) for row in plan.malicious for draw in draws
        )


def test_unconditional_rows_come_with_every_batch(tiny_adapter: StableDiffusionAdapter, cache: Path) -> None:
    """Two a malicious row, none twice in a run, and several trajectories in an epoch."""
    rows = []
    for batches in served(tiny_adapter, cache).values():
        for batch in batches:
            assert len(batch["unconditional_z_t"]) == 2 * len(batch["malicious_z_t"]) == 2 * CONFIG.batch_size
            labels = (batch["unconditional_trajectory"].tolist(), batch["unconditional_step_index"].tolist())
            rows += list(zip(*labels, strict=True))
        assert {trajectory for trajectory, _ in rows} == {0, 1, 2}
    planned = Counter((row.index, step) for row in plan_of(CONFIG).unconditional for step in row.step_indices)
    assert len(rows) == 32 and not Counter(rows) - planned


def test_kept_rows_come_with_every_batch(tiny_adapter: StableDiffusionAdapter, cache: Path) -> None:
    """Three a malicious row, none twice in a run, and all five trajectories in an epoch."""
    rows = []
    for batches in served(tiny_adapter, cache).values():
        for batch in batches:
            assert len(batch["kept_z_t"]) == len(batch["kept_text"]) == 3 * CONFIG.batch_size
            labels = (batch["kept_trajectory"].tolist(), batch["kept_step_index"].tolist())
            rows += list(zip(*labels, strict=True))
        assert {trajectory for trajectory, _ in rows} == set(range(5))
    planned = Counter((row.index, step) for row in plan_of(CONFIG).kept for step in row.step_indices)
    assert len(rows) == 48 and not Counter(rows) - planned


def test_rows_of_a_batch_belong_together(tiny_adapter: StableDiffusionAdapter, cache: Path) -> None:
    """Latents and predictions are those cached for the trajectory and step; states those of its prompt."""
    plan = plan_of(CONFIG)
    for kind in ("malicious", "unconditional", "kept"):
        prefix = f"{kind}_"
        cached = load_rows(plan, cache, CONFIG.shard_size, kind)
        keys = list(zip(cached["trajectory"].tolist(), cached["step_index"].tolist(), strict=True))
        for batch in served(tiny_adapter, cache)[1]:
            labels = (batch[f"{prefix}trajectory"].tolist(), batch[f"{prefix}step_index"].tolist())
            where = [keys.index(key) for key in zip(*labels, strict=True)]
            for name, values in cached.items():
                assert torch.equal(batch[prefix + name], values[where]), name
    for batch in served(tiny_adapter, cache)[0]:
        prompts = [plan.malicious[index].pair.malicious for index in batch["malicious_trajectory"].tolist()]
        expected = tiny_adapter.encode(prompts).states["clip"]
        torch.testing.assert_close(batch["malicious_text"].states["clip"], expected, atol=1e-5, rtol=1e-4)
        assert len(set(prompts)) > 1
        kept = [plan.kept[index].prompt for index in batch["kept_trajectory"].tolist()]
        expected = tiny_adapter.encode(kept).states["clip"]
        torch.testing.assert_close(batch["kept_text"].states["clip"], expected, atol=1e-5, rtol=1e-4)
        assert len(set(kept)) > 1


def test_batches_depend_on_seed_and_epoch_alone(tiny_adapter: StableDiffusionAdapter, cache: Path) -> None:
    def order(epochs: dict[int, list[Batch]]) -> list[list[list[int]]]:
        return [[batch["malicious_trajectory"].tolist() for batch in batches] for batches in epochs.values()]

    first, again, other = (order(served(tiny_adapter, cache, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != first[1]
    assert first != other


@pytest.mark.parametrize(("num_trajectories", "batch_size"), [(12, 6), (8, 6), (5, 6), (3, 12), (1, 6)])
def test_processes_split_the_batches_of_one_process(num_trajectories: int, batch_size: int) -> None:
    config = trajectory_config(num_trajectories=num_trajectories, batch_size=batch_size, draws_per_epoch=1)
    for epoch in (0, 1):
        alone = global_batches(config, 1, epoch=epoch)
        assert [len(batch) for batch in alone] == [batch_size] * len(alone)
        assert global_batches(config, 2, epoch=epoch) == global_batches(config, 3, epoch=epoch) == alone
        assert set(chain.from_iterable(alone)) == set(range(num_trajectories))
        # What fills the last batch up is spread evenly.
        counts = Counter(chain.from_iterable(alone)).values()
        assert max(counts) - min(counts) <= 1


def test_a_batch_that_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trajectory\.batch_size.*multiple of the 3 processes, got 4"):
        EpochBatches(TrajectoryPoints(plan_of(CONFIG), CONFIG), 4, 0, 0, 3)


def test_no_unconditional_rows_if_none_are_asked_for(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    config = trajectory_config(unconditional_per_malicious=0, num_trajectories=2, epochs=1)
    plan = sample_plan(tiny_adapter, config, tmp_path)
    recorder = Recorder()
    cpu_trainer(tmp_path).fit(recorder, TrajectoryDataModule(tiny_adapter, plan, tmp_path, config, 0))
    (batch,) = recorder.epochs[0]
    assert [name for name in batch if name.startswith(("unconditional", "kept"))] == []
    assert len(batch["malicious_z_t"]) == 4
