"""A full disk and a full memory are answered with advice, and what was there before stays usable."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trce_lightning.runtime.resources import explain_machine

ROOT = Path(__file__).parents[1]
COMMAND = [
    sys.executable,
    str(ROOT / "train.py"),
    "concept=violence",
    "experiment=smoke",
    "metrics.enabled=false",
    "trainer.precision=32-true",
]


def train(folder: Path, limit_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """A small run whose files may not grow beyond a limit: what a quota does, on any machine."""

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    return subprocess.run(
        [*COMMAND, f"runs={folder}"],
        preexec_fn=limit,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_full_disk_gets_advice_and_the_command_goes_on(tmp_path: Path) -> None:
    full = train(tmp_path, limit_bytes=1_200_000)  # room for trajectories, not for the erased model
    assert full.returncode == 2, full.stderr
    assert "error: no room on disk: " in full.stderr
    assert "trajectory.num_trajectories" in full.stderr and "Traceback" not in full.stderr
    shards = {file: file.read_bytes() for file in tmp_path.glob("cache/trajectories/*/*.safetensors")}
    assert shards
    again = train(tmp_path)
    assert again.returncode == 0, again.stderr
    assert all(file.read_bytes() == content for file, content in shards.items())
    assert len(list(tmp_path.glob("violence/emoji/*/erased/unet/*.safetensors"))) == 1


def test_full_memory_gets_advice() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    lines = explain_machine(caught.value)
    assert (
        lines is not None and lines[0].startswith("out of memory: ") and "trajectory.batch_size" in lines[1]
    )
    assert explain_machine(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) is not None
    assert explain_machine(RuntimeError("shape mismatch")) is None
    assert explain_machine(FileNotFoundError(2, "No such file")) is None
