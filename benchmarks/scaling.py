"""Measure sampling and training by one process and by two, each on one thread, by `train.py` itself.

Training is measured as the time that more trajectories add, which leaves out the start of a fit. Sampling is
measured from the first shard to the last, which leaves out the start of the second process.
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
SHARD = 8
OPTIONS = (
    "concept=violence",
    "trainer=cpu",
    "metrics.enabled=false",
    "trajectory.epochs=1",
    f"trajectory.shard_size={SHARD}",
)
FEW, MANY = 32, 224
"""The numbers of trajectories. A file has ``SHARD`` of them."""


def seconds(devices: int, trajectories: int) -> dict[str, float]:
    """Return the wall-clock seconds of training, and of sampling a shard, on so many processes."""
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
        stages = json.loads((Path(folder) / "run" / "metrics.json").read_text())["seconds"]
        shards = Path(folder, "cache", "trajectories").rglob("malicious-*.safetensors")
        written = sorted(file.stat().st_mtime for file in shards)
    return {
        "training": stages["training"],
        "shard": (written[-1] - written[0]) / (len(written) - devices),
    }


def run() -> list[Row]:
    """Measure the gain of two processes. 2 is perfect, but processes meet in every step."""
    many, few = ([seconds(devices, count) for devices in (1, 2)] for count in (MANY, FEW))
    one, two = (more["training"] - less["training"] for more, less in zip(many, few, strict=True))
    return [
        Row(
            f"sampling of {SHARD} trajectories by two processes, against one",
            many[1]["shard"],
            "s",
            many[0]["shard"],
        ),
        Row(f"training on {MANY - FEW} more trajectories by two processes, against one", two, "s", one),
    ]
