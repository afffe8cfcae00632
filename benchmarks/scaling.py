"""One process against two, each on one thread: sampling trajectories, and training, by `train.py` itself."""

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
PARTS = ("trajectories", "training")


def seconds(devices: int) -> dict[str, float]:
    """Wall clock of a run's parts on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        places = [f"output={folder}/run", f"cache={folder}/cache"]
        subprocess.run(
            [sys.executable, str(TRAIN), *OPTIONS, *places, f"trainer.devices={devices}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        found: dict[str, float] = json.loads((Path(folder) / "run" / "metrics.json").read_text())["seconds"]
    return found


def run() -> list[Row]:
    """Gain 2 is perfect; processes meet before and after sampling, and in every step of training."""
    one, two = seconds(1), seconds(2)
    return [Row(f"{part} by two processes, against one", two[part], "s", one[part]) for part in PARTS]
