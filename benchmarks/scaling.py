"""Training by one process against two, each on one thread, by `train.py` itself.

What more trajectories take is measured, which leaves out what a fit begins with. Sampling is not measured: it
begins with the start of the second process, which takes longer, and varies more, than a small sampling does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.report import Row

TRAIN = Path(__file__).parents[1] / "train.py"
OPTIONS = ("concept=violence", "trainer=cpu", "metrics.enabled=false", "trajectory.epochs=1")
FEW, MANY = 32, 224
"""Trajectories."""


def seconds(devices: int, trajectories: int) -> float:
    """Wall clock of training on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"output={folder}/run",
            f"cache={folder}/cache",
            f"trainer.devices={devices}",
            f"trajectory.num_trajectories={trajectories}",
        ]
        subprocess.run(
            [sys.executable, str(TRAIN), *OPTIONS, *options],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found: dict[str, float] = json.loads((Path(folder) / "run" / "metrics.json").read_text())["seconds"]
    return found["training"]


def run() -> list[Row]:
    """Gain 2 is perfect: processes meet in every step."""
    one, two = (seconds(devices, MANY) - seconds(devices, FEW) for devices in (1, 2))
    what = f"training on {MANY - FEW} more trajectories by two processes, against one"
    return [Row(what, two, "s", one)]
