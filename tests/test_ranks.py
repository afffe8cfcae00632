"""The counts on several processes are of all of them, and as announced. Idle ranks lend their threads."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_runs import cpu_trainer, one_thread
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.evaluation.scorer import Sampling, Scorer
from trce_lightning.metrics.scores import Evaluator
from trce_lightning.prompts.records import PromptRecord, PromptSet
from trce_lightning.runtime.ranks import (
    Rank,
    on_each_rank,
    peak_device_memory_mb,
    peak_memory_mb,
    threads_of_idle_ranks,
    total_over_ranks,
)


def brightness(images: Tensor) -> Tensor:
    return images.float().mean((1, 2, 3)) / 255


def scorer_of(adapter: StableDiffusionAdapter) -> Scorer:
    """Five images guided and one at its own scale of 1: their shares differ."""
    records = tuple(PromptRecord(f"d/{i}", "a gun", guidance_scale=1.0 if i == 4 else None) for i in range(6))
    sets = [PromptSet("direct", records[:5]), PromptSet("implicit", records[5:])]
    return Scorer(adapter, sets, Sampling(4.0, 2, 2, None), lambda names: Evaluator(brightness, names))


@pytest.mark.parametrize("processes", [1, 2])
def test_network_evaluations_are_of_all_processes_and_as_announced(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, capfd: pytest.CaptureFixture[str], processes: int
) -> None:
    options = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
    trainer = cpu_trainer(tmp_path, **options)
    scorer = scorer_of(tiny_adapter)
    announced = scorer.planned_evaluations
    assert announced == 2 * (5 * 2 + 1)

    def score(rank: Rank) -> None:
        scorer("model", rank.index, rank.world_size, tmp_path / "images")
        own = scorer.network_evaluations
        # What is there already is not made, and not counted, again.
        scorer("model", rank.index, rank.world_size, tmp_path / "images")
        counts = {"own": own, "images": scorer.network_evaluations, "one each": 1}
        found = {
            "own": own,
            "total": total_over_ranks(trainer, counts),
            "gpu": peak_device_memory_mb(trainer),
        }
        (tmp_path / f"{rank.index}.json").write_text(json.dumps(found))

    with one_thread():
        on_each_rank(trainer, score)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    totals = {"own": announced, "images": announced, "one each": processes}
    assert [row["total"] for row in found] == [totals] * processes
    assert sum(row["own"] for row in found) == announced
    assert (found[0]["own"] < announced) == (processes == 2)
    assert {row["gpu"] for row in found} == {None}
    # A bar is of the first process alone, and says so.
    of = ", 1 of 2 processes" if processes == 2 else ""
    bars = [line for line in capfd.readouterr().err.splitlines() if f"direct images{of}: 100%" in line]
    assert f"{10 if processes == 2 else 18}/" in bars[0]


def test_nothing_to_count_and_memory(tmp_path: Path) -> None:
    assert total_over_ranks(cpu_trainer(tmp_path), {}) == {}
    (line,) = (line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if "VmHWM" in line)
    assert peak_memory_mb() == pytest.approx(int(line.split()[1]) / 1024, rel=0.05)  # the kernel says KiB


@pytest.mark.parametrize(
    ("busy", "on_machine", "kind", "threads"),
    [
        (1, 1, "cpu", 2),
        (1, 2, "cpu", 4),
        (2, 2, "cpu", 2),
        (3, 2, "cpu", 2),
        (1, 9, "cpu", 6),
        (1, 2, "cuda", 2),
    ],
)
def test_a_rank_that_works_alone_has_the_threads_of_the_others(
    busy: int, on_machine: int, kind: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never has more threads than there are cores, nor those of another machine."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    torch.set_num_threads(2)
    try:
        with threads_of_idle_ranks(Rank(0, 4, torch.device(kind)), busy, on_machine):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
