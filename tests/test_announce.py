"""A run says how much time and work lies ahead."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_configs import composed
from tiny_runs import cpu_trainer
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.jobs import announce, erase
from trce_lightning.jobs.announce import TRAINING, expected_seconds, seconds_per_evaluation

SECONDS = 0.2


def test_a_training_pass_takes_its_backward_pass_too() -> None:
    durations = expected_seconds({"trajectories": 100, TRAINING: 100, "erased model, final": 50}, 0.5)
    assert durations == {"trajectories": 50, TRAINING: pytest.approx(105), "erased model, final": 25}


class Asynchronous:
    """A prediction of a device that works while the program goes on, until somebody reads a number."""

    queued = 0
    sizes: list[int] = []  # noqa: RUF012

    def __init__(self, z_t: Tensor, *_: Any) -> None:
        Asynchronous.queued += 1
        Asynchronous.sizes.append(len(z_t))

    def mean(self) -> "Asynchronous":
        return self

    def __float__(self) -> float:
        time.sleep(SECONDS * Asynchronous.queued)
        Asynchronous.queued = 0
        return 0.0


def run_of(adapter: StableDiffusionAdapter, folder: Path, batch_size: int = 32) -> Any:
    config = SimpleNamespace(metrics=SimpleNamespace(batch_size=batch_size))
    return SimpleNamespace(adapter=adapter, trainer=cpu_trainer(folder), config=config)


def test_the_warm_up_is_over_when_the_timed_evaluation_begins(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow device gets one latent, twice."""
    monkeypatch.setattr(tiny_adapter, "predict", Asynchronous)
    monkeypatch.setattr(Asynchronous, "sizes", [])
    seconds = seconds_per_evaluation(run_of(tiny_adapter, tmp_path))
    assert seconds is not None and SECONDS <= seconds < 1.9 * SECONDS
    assert Asynchronous.sizes == [1, 1]


def test_one_evaluation_is_enough_where_it_is_long(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_adapter, "predict", Asynchronous)
    monkeypatch.setattr(Asynchronous, "sizes", [])
    monkeypatch.setattr(announce, "LONG", SECONDS / 2)
    assert seconds_per_evaluation(run_of(tiny_adapter, tmp_path)) >= SECONDS
    assert Asynchronous.sizes == [1]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
@pytest.mark.parametrize("room", [0, 1, 3, 100])
def test_memory_that_is_too_small_for_many_latents_ends_nothing(
    tiny_adapter: StableDiffusionAdapter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    room: int,
) -> None:
    sizes: list[int] = []

    def predict(z_t: Tensor, *_: Any) -> Tensor:
        sizes.append(len(z_t))
        assert not torch.is_grad_enabled()
        if len(z_t) > room:
            raise error
        return z_t

    monkeypatch.setattr(tiny_adapter, "predict", predict)
    monkeypatch.setattr(announce, "QUICK", 60.0)
    seconds = seconds_per_evaluation(run_of(tiny_adapter, tmp_path, batch_size=8))
    assert (seconds is None) == (room == 0)
    assert sizes == {0: [1], 1: [1, 1, 2], 3: [1, 1, 2, 2, 4], 100: [1, 1, 2, 2, 4, 4, 8, 8]}[room]


def test_other_failures_are_not_taken_for_it(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(*_: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(tiny_adapter, "predict", predict)
    with pytest.raises(RuntimeError, match="mat1"):
        seconds_per_evaluation(run_of(tiny_adapter, tmp_path))


def test_the_estimate_is_that_of_a_batch_and_counts_nothing(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    counted = tiny_adapter.network_evaluations
    seconds = seconds_per_evaluation(run_of(tiny_adapter, tmp_path))
    assert seconds is not None and tiny_adapter.network_evaluations == counted
    z_t, text = torch.randn(16, *tiny_adapter.latent_shape), tiny_adapter.encode([""] * 16)
    start = time.monotonic()
    with torch.no_grad():
        for _ in range(5):
            tiny_adapter.predict(z_t, 500, text)
    expected = (time.monotonic() - start) / 5 / 16
    assert expected / 5 < seconds < 5 * expected  # of a busy machine


def test_a_plan_is_told_though_no_latent_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def predict(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StableDiffusionAdapter, "predict", predict)
    monkeypatch.setattr(
        "trce_lightning.jobs.erase.set_up_logging", lambda: None
    )  # it removes caplog's handler
    options = ["concept=violence", "experiment=smoke", "plan=true", "trainer.accelerator=cpu"]
    config = composed("train", *options, f"cache={tmp_path}", f"runs={tmp_path}")
    with caplog.at_level(logging.INFO):
        erase.train(config)
    assert "out of memory: one latent of 64 px has no room on cpu" in caplog.text
    assert "network evaluations, about an unknown time" in caplog.text
    assert "ahead: an unknown time in all" in caplog.text
