"""What a run says of the time ahead."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import cpu_trainer

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.announce import TRAINING, expected_seconds, seconds_per_evaluation

SECONDS = 0.2


def test_a_training_pass_takes_its_backward_pass_too() -> None:
    durations = expected_seconds({"trajectories": 100, TRAINING: 100, "erased model, final": 50}, 0.5)
    assert durations == {"trajectories": 50, TRAINING: pytest.approx(105), "erased model, final": 25}


class Asynchronous:
    """A prediction of a device that works while the program goes on, until somebody reads a number."""

    queued = 0

    def __init__(self, *_: Any) -> None:
        Asynchronous.queued += 1

    def mean(self) -> "Asynchronous":
        return self

    def __float__(self) -> float:
        time.sleep(SECONDS * Asynchronous.queued)
        Asynchronous.queued = 0
        return 0.0


def test_the_warm_up_is_over_when_the_timed_evaluation_begins(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_adapter, "predict", Asynchronous)
    config = SimpleNamespace(metrics=SimpleNamespace(batch_size=4))
    run: Any = SimpleNamespace(adapter=tiny_adapter, trainer=cpu_trainer(tmp_path), config=config)
    assert SECONDS <= 4 * seconds_per_evaluation(run) < 1.9 * SECONDS
