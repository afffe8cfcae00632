"""The launcher that started this process: none, Lightning, torchrun or SLURM."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from trce_lightning.errors import InputError


def process_rank() -> int:
    """Return this process's rank in the run, as its launcher reports it.

    If there is no launcher, return 0.
    """
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return next((rank for name in names if (rank := whole_number(name, 0))), 0)


def other_launcher() -> str | None:
    """Return the launcher that started several processes in place of Lightning, or None."""
    for environment, count, name in (
        (TorchElasticEnvironment, "WORLD_SIZE", "torchrun"),
        (SLURMEnvironment, "SLURM_STEP_NUM_TASKS", "srun"),  # a job's shell has the job's SLURM_NTASKS
    ):
        if environment.detect() and whole_number(count, 1) > 1:
            return name
    return None


def check_launcher(processes: int) -> None:
    """Refuse a launcher's variables that don't fit the number of processes of this run.

    If the variables were left behind in a shell, a process would wait for others that never come. If a
    launcher has started more processes than the run expects, each process would do all of the work.
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
    needed = ["MASTER_PORT"] if stale else []  # Lightning removes WORLD_SIZE when its Trainer ends
    if TorchElasticEnvironment.detect():
        needed = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    if missing := [name for name in needed if name not in os.environ]:
        raise InputError(
            f"{', '.join(stale)}: expected {', '.join(missing)} beside it, as what starts several processes "
            "sets them all, got none; unset it where nothing does"
        )


def started_by_none() -> bool:
    """Return whether a SLURM job wants several processes, but srun did not start this one."""
    return SLURMEnvironment.detect() and other_launcher() is None and whole_number("SLURM_NTASKS", 1) > 1


def whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise InputError(
            f"{variable}: expected a whole number, as what starts several processes sets it, got {text!r}; "
            "unset it where nothing does"
        )
    return int(text)
