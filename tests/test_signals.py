"""Ctrl-C, SIGTERM and failures in real processes: all end soon, with the right code, and nothing is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trce_lightning.emoji.package import weights_folder
from trce_lightning.runtime.signals import NAMES

ROOT = Path(__file__).parents[1]
STOPPED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
GOES_ON = "stopped by Ctrl-C; the same command continues\n"
STARTS_WITHIN, ENDS_WITHIN = 300, 60  # seconds; on a busy machine
SMALL = ["concept=violence", "experiment=smoke", "logger=csv", "trainer.precision=32-true"]
TWO = ["--trainer.devices", "2", "trainer.accelerator=cpu"]


def hear_all() -> None:
    """Hear the signals that a shell has its background jobs ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(*command: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=hear_all, **pipes)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process: subprocess.Popen) -> str:
    """Return all that its processes said. Their common pipe closes with the last of them."""
    try:
        return process.communicate(timeout=ENDS_WITHIN)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def stop_two_processes(work: str, folder: Path, number: signal.Signals) -> None:
    process = start(ROOT / "tests" / "two_processes.py", work, folder)
    wait_for((folder / "begun").exists, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    said = end(process)
    assert process.returncode == 128 + number and "Traceback" not in said, said
    assert f"stopped by {NAMES[number]}; the same command continues" in said


BOTH = pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)


@BOTH
def test_a_fit_of_two_processes_stops_after_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    stop_two_processes("fit", tmp_path, number)
    steps = [(tmp_path / f"stopped{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1] and int(steps[0]) > 0


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_ends_two_processes_that_draw(tmp_path: Path, number: signal.Signals) -> None:
    stop_two_processes("draw", tmp_path, number)


def catches(process: subprocess.Popen, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.parametrize(
    "seconds", [0, 0.5, 2.0, *(pytest.param(seconds, marks=pytest.mark.slow) for seconds in (0.2, 1.0, 3.0))]
)
def test_ctrl_c_is_answered_while_a_run_begins(tmp_path: Path, seconds: float) -> None:
    process = start(ROOT / "train.py", *SMALL, f"runs={tmp_path}")
    wait_for(lambda: catches(process, signal.SIGHUP), process)  # the last one that we install
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    assert end(process) == GOES_ON
    assert process.returncode == INTERRUPTED


SCRIPT = "import os, signal, time, sys; from trce_lightning.runtime.signals import answered, stop\n"
SLOW = (
    SCRIPT
    + """
with answered():
    stop.deferred = True  # as in a step of a fit
    print("begun", flush=True)
    time.sleep(300)
"""
)
CAUGHT = (
    SCRIPT
    + """
with answered():
    for _ in range(3):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(300)
        except BaseException:
            pass
    time.sleep(300)
"""
)
CHANGED = (
    SCRIPT
    + """
with answered():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(300)
    except BaseException as error:
        raise RuntimeError("as dataclasses do") from error
"""
)
DROPPED = (
    SCRIPT
    + """
class Trap:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
with answered():
    Trap()
    time.sleep(300)
"""
)
IGNORED = (
    SCRIPT
    + """
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
with answered():
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
"""
)


def test_a_second_ctrl_c_ends_at_once() -> None:
    process = start("-c", SLOW)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    # Some programs pass on what the terminal has sent to all.
    for pause in (0, 0.7):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process) == "\nended at once by a second Ctrl-C; the same command continues\n"
    assert process.returncode == INTERRUPTED


@pytest.mark.parametrize("script", [DROPPED, CAUGHT, CHANGED], ids=["dropped", "caught", "changed"])
def test_ctrl_c_is_not_lost_to_a_library(script: str) -> None:
    process = start("-c", script)
    assert end(process) == GOES_ON and process.returncode == INTERRUPTED


def test_what_nohup_and_shells_have_ignored_stays_ignored() -> None:
    process = start("-c", IGNORED)
    assert end(process) == "" and process.returncode == 0


def test_the_end_of_the_terminal_ends_a_run_as_ctrl_c_does() -> None:
    process = start("-c", SLOW.replace("True", "False"))
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    assert "the same command continues" in end(process)
    assert process.returncode == 128 + signal.SIGHUP


def test_ctrl_c_ends_an_expansion_that_waits_for_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        file = tmp_path / "mine.yaml"
        process = start("-m", "trce_lightning.expand", "knife crime", "--model", "m", "--out", file)
        server.settimeout(STARTS_WITHIN)
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        said = end(process)
        connection.close()
    assert process.returncode == INTERRUPTED and said.endswith("stopped by Ctrl-C; nothing is written\n"), (
        said
    )
    assert "Traceback" not in said and not file.exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gradio") is None, reason="the demo's extra is not installed")
def test_ctrl_c_closes_the_demo(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = f"model.path={weights_folder()}"
    process = start(ROOT / "demo.py", "concept=violence", model, f"port={port}", "trainer.accelerator=cpu")

    def serves() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    wait_for(serves, process)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    said = end(process)
    assert process.returncode in (0, INTERRUPTED) and "Traceback" not in said, said
    assert "same command" not in said


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_fails_ends_the_other(tmp_path: Path, culprit: int) -> None:
    process = start(ROOT / "tests" / "two_processes.py", f"fail{culprit}", tmp_path)
    wait_for((tmp_path / "begun").exists, process)
    said = end(process)
    assert process.returncode in (1, -signal.SIGKILL), said  # the latter if Lightning sees it first
    assert "ValueError: trainer.devices: expected a better day" in said


@pytest.mark.slow
@BOTH
def test_a_signal_ends_one_process_that_draws(tmp_path: Path, number: signal.Signals) -> None:
    command = [ROOT / "train.py", *SMALL, f"runs={tmp_path}", "stages=[textual]"]
    process = start(*command, "metrics.final_images_per_set=512")  # minutes
    wait_for(lambda: any(tmp_path.glob("cache/original/**/*.png")), process)
    told = time.monotonic()
    process.send_signal(number)
    said = end(process)
    sentence = f"stopped by {NAMES[number]}; the same command continues\n"
    assert process.returncode == 128 + number and said.endswith(sentence), said
    assert time.monotonic() - told < 15


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_after_sigterm_to_the_same_weights(tmp_path: Path) -> None:
    command = [ROOT / "train.py", *SMALL, *TWO, "metrics.enabled=false", f"cache={tmp_path / 'cache'}"]
    command += ["trajectory.epochs=3", "trajectory.num_trajectories=16", "trajectory.batch_size=2"]
    command += ["trajectory.draws_per_epoch=3"]
    steps_per_epoch = 24
    whole, stopped = (f"output={tmp_path / name}" for name in ("whole", "stopped"))
    process = start(*command, stopped)
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    wait_for(last.exists, process)
    process.send_signal(signal.SIGTERM)
    said = end(process)
    assert process.returncode == STOPPED, said
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"told to stop after step {step}:" in said or step % steps_per_epoch == 0
    for output in (stopped, whole):
        process = start(*command, output)
        said, _ = process.communicate(timeout=STARTS_WITHIN)
        assert process.returncode == 0, said
    unet = Path("erased", "unet", "diffusion_pytorch_model.safetensors")
    found, expected = (load_file(tmp_path / name / unet) for name in ("stopped", "whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
