"""What has started this process: nothing, Lightning, torchrun or SLURM."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from trce_lightning.errors import InputError


def process_rank() -> int:
    """0 for the first process of a run, as its launcher says, and where there is no other; else above."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return next((rank for name in names if (rank := whole_number(name, 0))), 0)


def other_launcher() -> str | None:
    """What started several processes in place of Lightning, if anything did."""
    for environment, count, name in (
        (TorchElasticEnvironment, "WORLD_SIZE", "torchrun"),
        (SLURMEnvironment, "SLURM_STEP_NUM_TASKS", "srun"),  # in a job's shell SLURM_NTASKS is the job's
    ):
        if environment.detect() and whole_number(count, 1) > 1:
            return name
    return None


def check_launcher(processes: int) -> None:
    """Refuse variables of a launcher that don't fit the processes that this run is to have.

    Left behind in a shell they make a process wait for others that never come; set by a launcher that has
    started more than the run knows of, each of them would do all the work.
    """
    launcher = other_launcher()
    started = {
        "torchrun": whole_number("WORLD_SIZE", 1),
        "srun": whole_number("SLURM_NTASKS", 1),
        None: processes,
    }
    if started[launcher] != processes:
        raise InputError(
            f"trainer.devices, trainer.num_nodes: expected {started[launcher]} processes, as {launcher} has "
            f"started, got {processes}"
        )
    stale = [name for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK") if name in os.environ]
    needed = ["MASTER_PORT"] if stale else []  # WORLD_SIZE goes when a Trainer of Lightning's own has ended
    if TorchElasticEnvironment.detect():
        needed = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    if missing := [name for name in needed if name not in os.environ]:
        raise InputError(
            f"{', '.join(stale)}: expected {', '.join(missing)} beside it, as what starts several processes "
            "sets them all, got none; unset it where nothing does"
        )


def started_by_none() -> bool:
    """Whether this is a process of a SLURM job that wants several, but not by srun, which starts them."""
    return SLURMEnvironment.detect() and other_launcher() is None and whole_number("SLURM_NTASKS", 1) > 1


def whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise InputError(
            f"{variable}: expected a whole number, as what starts several processes sets it, got {text!r}; "
            "unset it where nothing does"
        )
    return int(text)
