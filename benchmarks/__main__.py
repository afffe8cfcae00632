"""`python -m benchmarks [NAME …]`: run benchmarks, each in its own process; print and store the table.

`python -m benchmarks gpu [PART …]` measures on this machine's GPU instead: all parts, or those that are
named. The others' results on the same card stay.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.processes import alone, log_to_stderr
from benchmarks.report import load, refresh, save, table

if TYPE_CHECKING:
    from benchmarks import gpu

NAMES = (
    "textual",
    "concepts",
    "streamed",
    "plan",
    "step",
    "memory",
    "full_size",
    "generation",
    "attacks",
    "scaling",
    "options",
    "flops",
    "erasers",
    "eraser_memory",
    "help",
)
GPU = "gpu"


def main() -> None:
    """Run the chosen benchmarks, or all; results of the others stay."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"gpu and its parts, or of {', '.join(NAMES)}; none: these"
    )
    parser.add_argument("--stored", action="store_true", help="measure nothing, and write docs/ anew")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="of the GPU's results, and not docs/")
    options = parser.parse_args()
    if options.names[:1] == [GPU]:
        if options.stored:
            parser.error("--stored: expected no gpu beside it, which measures")
        from benchmarks import gpu  # not at the top: the others' processes read this file too

        parts = gpu.parts()
        asked = options.names[1:]
        if unknown := set(asked) - {part.name for part in parts}:
            known = ", ".join(part.name for part in parts)
            parser.error(f"gpu: expected parts among {known}, got {', '.join(sorted(unknown))}")
        if not torch.cuda.is_available():
            parser.error("gpu: expected a CUDA device, got none")
        log_to_stderr()
        chosen = [part for part in parts if not asked or part.name in asked]
        measure_gpu(gpu.Bench(), options.output, started, chosen)
        return
    if wrong := [name for name in options.names if name not in NAMES]:
        known = ", ".join(NAMES)
        parser.error(f"expected gpu and its parts, or names among {known}, got {', '.join(wrong)}")
    measure(() if options.stored else options.names or NAMES)


def measure(names: tuple[str, ...]) -> None:
    """Run benchmarks of the CPU, and write both tables of the page."""
    results = load()
    for name in (bar := tqdm(names, unit="benchmark")):
        bar.set_description(name)
        results[name] = alone(importlib.import_module(f"benchmarks.{name}").run)
        save(results, machine())
    rows = [row for name in NAMES for row in results.get(name, [])]
    facts = ", ".join(f"{key} {value}" for key, value in report.load_machine().items())
    refresh(f"{table(rows)}\n\n{facts}.")
    refresh(report.gpu_tables(report.load_cards()) or "No GPU has been measured yet.", name=GPU)
    sys.stdout.write(f"{table(rows)}\n")


def measure_gpu(bench: gpu.Bench, output: Path | None, started: float, parts: Sequence[gpu.Part]) -> None:
    """Measure ``parts`` on this machine's GPU, and keep what is known after each of them.

    Results of other cards stay, and those of the card's other parts if all versions are the same. With
    ``output`` all goes there; else into `benchmarks/` and the page.
    """
    from benchmarks import gpu

    cards, name = report.load_cards(), gpu.card(bench.device)
    card = report.Card(gpu.versions(bench.device))
    stored = cards[name].sections if name in cards and cards[name].versions == card.versions else []
    kept = {section.name: section for section in stored}
    cards[name] = card
    file = report.GPU_RESULTS if output is None else output / report.GPU_RESULTS.name
    new: list[gpu.Section] = []
    for section in gpu.run(bench, started=started, chosen=parts):
        new.append(section)
        # A part for which no time was left keeps its stored rows. A failure doesn't.
        if section.name not in kept or not section.note.startswith(gpu.LEFT_OUT):
            kept[section.name] = section
        card.sections[:] = kept.values()
        report.save_cards(cards, file)
        if output is not None:
            (output / "gpu.md").write_text(report.gpu_tables(cards) + "\n", encoding="utf-8")
    if output is None:
        refresh(report.gpu_tables(cards), name=GPU)
    sys.stdout.write(f"{report.gpu_tables(cards)}\n")
    if any(section.note.startswith("failed") for section in new):
        sys.exit(1)


def machine() -> dict[str, str]:
    """Return what the results depend on: the cores and the version of PyTorch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"CPU cores:": f"{cores} ({platform.machine()})", "PyTorch": torch.__version__}


if __name__ == "__main__":
    main()
