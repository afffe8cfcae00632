"""`python -m benchmarks [NAME …]`: run benchmarks, each in its own process; print and store the table."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys

import torch

from benchmarks.processes import alone
from benchmarks.report import load, refresh, save, table

NAMES = (
    "textual",
    "plan",
    "step",
    "memory",
    "full_size",
    "generation",
    "scaling",
    "options",
    "flops",
    "help",
)


def main() -> None:
    """The chosen benchmarks, or all; results of the others stay."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)}; none: all")
    chosen = parser.parse_args().names
    if wrong := [name for name in chosen if name not in NAMES]:
        parser.error(f"expected names among {', '.join(NAMES)}, got {', '.join(wrong)}")
    results = load()
    for name in chosen or NAMES:
        results[name] = alone(importlib.import_module(f"benchmarks.{name}").run)
        save(results, machine())
    rows = [row for name in NAMES for row in results.get(name, [])]
    refresh(f"{table(rows)}\n\n{', '.join(f'{key} {value}' for key, value in machine().items())}.")
    sys.stdout.write(f"{table(rows)}\n")


def machine() -> dict[str, str]:
    """Return what the results depend on: the cores and the version of PyTorch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"CPU cores:": f"{cores} ({platform.machine()})", "PyTorch": torch.__version__}


if __name__ == "__main__":
    main()
