"""SIGTERM, and how a process leaves a run that it shares with others. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, Protocol

EXIT_CODE = 128 + signal.SIGTERM
GRACE_SECONDS = 5.0


class Stopped(SystemExit):
    """SIGTERM came where there is nothing to finish first."""


class Launcher(Protocol):
    """What has started this machine's further processes."""

    procs: list[subprocess.Popen[bytes]]


class Sigterm:
    """This process's handler: SIGTERM ends what it finds, and goes on to the processes that it has started.

    ``told`` says that it came. While ``deferred`` it ends nothing: a fit looks at ``told`` after each step.
    """

    def __init__(self) -> None:
        self.told = self.deferred = False
        self.launchers: list[Launcher] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def __call__(self, *_: object) -> None:
        if not self.told:
            self.told = True
            for launcher in self.launchers:
                for child in launcher.procs:
                    child.send_signal(signal.SIGTERM)
        self.check()

    def check(self) -> None:
        """Raise :class:`Stopped` if there is reason to."""
        if self.told and not self.deferred:
            self.adopt()
            raise Stopped(EXIT_CODE)

    def begin(self) -> None:
        """A new piece of work, which nobody has told to stop."""
        self.told = self.deferred = False

    def adopt(self) -> None:
        """Children may end first from here on: Lightning's observer, which shares the list, would kill us."""
        for launcher in self.launchers:
            self._children += launcher.procs
            launcher.procs.clear()

    def end_children(self, seconds: float) -> None:
        """Wait for them, then kill those that are left: one in a collective hears nothing else."""
        self.adopt()
        deadline = time.monotonic() + seconds
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Not deferred within, even in a fit: for what takes long and leaves what it has done on disk."""
        deferred, self.deferred = self.deferred, False
        try:
            self.check()
            yield
        finally:
            self.deferred = deferred

    @contextmanager
    def installed(self) -> Iterator[None]:
        """In place of what this process does on SIGTERM; Lightning's Trainers keep it."""
        before = signal.signal(signal.SIGTERM, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


sigterm = Sigterm()


def shared() -> bool:
    """Whether this process takes part in a run of several."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return bool(distributed.get_world_size() > 1)


def leave(code: int, grace_seconds: float = 0.0) -> NoReturn:
    """``sys.exit``, with the processes that this one has started; of several, without what exits wait for.

    Lightning destroys NCCL's connections at exit, which waits for processes that wait for this one.
    """
    sigterm.end_children(grace_seconds)
    if not shared():
        sys.exit(code)
    try:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=code)  # as it would at exit
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
