"""The launchers of a run's processes, the variables that others left behind, and what a machine lacks."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from trce_lightning.config.schema import TrainerConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.runtime import launchers

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
}
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "mine",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = SLURM | {"SLURM_STEP_NUM_TASKS": "4"}


@pytest.fixture(autouse=True)
def launched_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets what a launcher would, and nothing of another."""
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in (*TORCHRUN, "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)

    def launch(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def cpu(folder: Path, **options: object):
    return make_trainer(TrainerConfig(**({"accelerator": "cpu", "devices": 1} | options)), folder)


@pytest.mark.parametrize("variables", [SLURM, {"SLURM_NTASKS": "4"}, SRUN | {"SLURM_STEP_NUM_TASKS": "1"}])
@pytest.mark.parametrize("devices", [1, 2])
def test_in_a_job_of_slurm_a_run_starts_its_own_processes_unless_srun_has(
    variables: dict[str, str], devices: int, launched_by: Callable, tmp_path: Path
) -> None:
    launched_by(variables)
    assert (launchers.other_launcher(), launchers.process_rank()) == (None, 0)
    trainer = cpu(tmp_path, devices=devices)
    assert trainer.world_size == devices
    if devices > 1:
        assert isinstance(trainer.strategy.cluster_environment, LightningEnvironment)


@pytest.mark.parametrize(
    ("variables", "launcher", "rank"),
    [(TORCHRUN, "torchrun", 0), (TORCHRUN | {"RANK": "3"}, "torchrun", 3), (SRUN, "srun", 0)],
)
def test_a_launcher_is_known(
    variables: dict[str, str], launcher: str, rank: int, launched_by: Callable, tmp_path: Path
) -> None:
    launched_by(variables)
    assert (launchers.other_launcher(), launchers.process_rank()) == (launcher, rank)
    trainer = cpu(tmp_path, devices=4)
    assert trainer.world_size == 4
    assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment) == (launcher == "srun")


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        (TORCHRUN, {}, r"trainer\.devices.* expected 4 processes, as torchrun has started, got 1"),
        (SRUN, {}, r"trainer\.devices.* expected 4 processes, as srun has started, got 1"),
        (SRUN, {"devices": 2}, r"trainer\.devices=2.*--ntasks-per-node=4"),
        (SRUN, {"devices": 2, "num_nodes": 2}, r"trainer\.devices=2.*--ntasks-per-node=4"),
        (TORCHRUN, {"devices": 2}, r"trainer\.devices=2.*world size \(4\)"),
        ({"RANK": "first"}, {}, "RANK: expected a whole number, .* got 'first'; unset it"),
        ({"LOCAL_RANK": "-1"}, {}, "LOCAL_RANK: expected a whole number, .* got '-1'"),
        ({"NODE_RANK": ""}, {}, "NODE_RANK: expected a whole number, .* got ''"),
        ({"SLURM_PROCID": "x"}, {}, "SLURM_PROCID: expected a whole number, .* got 'x'"),
        ({"SLURM_NTASKS": "four"}, {}, "SLURM_NTASKS: expected a whole number, .* got 'four'"),
        (TORCHRUN | {"WORLD_SIZE": "all"}, {}, "WORLD_SIZE: expected a whole number, .* got 'all'"),
        ({"LOCAL_RANK": "0"}, {}, "LOCAL_RANK: expected MASTER_PORT beside it.*unset it"),
        ({"LOCAL_RANK": "0"}, {"devices": 2}, "LOCAL_RANK: expected MASTER_PORT beside it.*unset it"),
        ({"RANK": "3"}, {}, "RANK: expected MASTER_PORT beside it"),
        ({"TORCHELASTIC_RUN_ID": "x"}, {}, "TORCHELASTIC_RUN_ID: expected RANK, LOCAL_RANK, WORLD_SIZE"),
        ({}, {"accelerator": "gpu"}, r"trainer\.accelerator=gpu"),
        ({}, {"accelerator": "foo"}, r"trainer\.accelerator=foo.*Available names are"),
        ({}, {"accelerator": "tpu"}, r"trainer\.accelerator=tpu.*torch_xla"),
        ({}, {"strategy": "foo"}, r"trainer\.strategy=foo"),
        ({}, {"strategy": "fsdp"}, r"trainer\.strategy=fsdp.*GPU"),
        ({}, {"devices": [0, 1]}, r"trainer\.devices=\[0, 1\].*int > 0"),
        ({}, {"devices": -1}, r"trainer\.devices=-1.*int > 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    variables: dict[str, str], options: dict, expected: str, launched_by: Callable, tmp_path: Path
) -> None:
    launched_by(variables)
    with pytest.raises(InputError, match=expected):
        assert launchers.process_rank() >= 0 and cpu(tmp_path, **options)
