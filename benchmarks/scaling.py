"""One process against two, each on one thread: sampling trajectories, and training, by `train.py` itself.

What more trajectories take is measured, which leaves out how long a second process takes to start.
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
PARTS = ("trajectories", "training")


def seconds(devices: int, trajectories: int) -> dict[str, float]:
    """Wall clock of a run's parts on so many processes."""
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
    return found


def of_more(devices: int) -> dict[str, float]:
    """Seconds of many trajectories less those of few."""
    few, many = seconds(devices, FEW), seconds(devices, MANY)
    return {part: many[part] - few[part] for part in PARTS}


def run() -> list[Row]:
    """Gain 2 is perfect; processes meet before and after sampling, and in every step of training."""
    one, two = of_more(1), of_more(2)
    return [
        Row(f"{part}, {MANY - FEW} more, by two processes against one", two[part], "s", one[part])
        for part in PARTS
    ]
