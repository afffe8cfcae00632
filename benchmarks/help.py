"""Measure the CPU time of `--help`."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Row

ROOT = Path(__file__).parents[1]
REPEATS = 7


def cpu_seconds(script: str) -> float:
    """Return the user and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, ROOT / script, "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run() -> list[Row]:
    """Return the medians."""
    return [
        Row(
            f"`{script} --help`, CPU time",
            statistics.median(cpu_seconds(script) for _ in range(REPEATS)),
            "s",
            most=1.0,
        )
        for script in ("train.py", "eval.py")
    ]
