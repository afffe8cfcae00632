"""Time alternatives in turns, so that other load on the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median wall-clock seconds of each function, called in turns ``repeats`` times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished. A CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(
    function: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = 2
) -> float:
    """Return the median seconds of ``repeats`` calls until the device is done, after some that warm up."""

    def call() -> None:
        function()
        synchronize(device)

    for _ in range(warm_up):
        call()
    return statistics.median(seconds(call) for _ in range(repeats))
