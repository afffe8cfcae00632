"""Functions in fresh processes: no warmed caches, and a peak memory of their own."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def alone(function: Callable[..., Result], *arguments: object) -> Result:
    """The function's result, computed in a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), log_to_stderr) as executor:
        return executor.submit(function, *arguments).result()


def log_to_stderr() -> None:
    """Warnings of all, and what benchmarks say."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("benchmarks").setLevel(logging.INFO)


def forget_peak() -> None:
    """Start this process's peak of resident memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_gb() -> float:
    """This process's peak of resident memory in GB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def available_gb() -> float:
    """Return what the machine can still give, in GB (Linux)."""
    memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    return int(memory.partition("MemAvailable:")[2].split()[0]) * 1024 / 1e9
