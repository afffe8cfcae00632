"""Ctrl-C, SIGTERM and a closed terminal, and how a process leaves a run that it shares. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Protocol

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP, the terminal's end"}
GOES_ON = "the same command continues"
GRACE_SECONDS = 5.0
SECOND_AFTER_SECONDS = 0.5
"""Some programs pass on a Ctrl-C that the terminal has sent to all: it comes twice at once."""


AGAIN_AFTER_SECONDS = 0.1
"""Libraries catch everything while they are imported, and go on: until work begins it is raised again."""


class Stopped(SystemExit):
    """A signal came where there is nothing to finish first."""


class Launcher(Protocol):
    """What has started this machine's further processes."""

    procs: list[subprocess.Popen[bytes]]


class Stop:
    """This process's handler: a signal ends what it finds, and goes on to the processes that it has started.

    ``told`` is the signal that came, or None. While ``deferred`` it ends nothing: a fit looks at ``told``
    after each step. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self.deferred = False
        self.remark = GOES_ON
        self.launchers: list[Launcher] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._told_at = 0.0
        self.raised = False
        """Whether what fails now may do so because of :class:`Stopped`, which some libraries catch."""
        self._installed = self._starting = False

    def __call__(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        if self.told is None:
            self.told, self._told_at = signal.Signals(number), time.monotonic()
            for launcher in self.launchers:
                for child in launcher.procs:
                    # Whatever came here: of a Ctrl-C the child has its own, and a second one means more.
                    child.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT and time.monotonic() - self._told_at > SECOND_AFTER_SECONDS:
            self.end_now()
        elif number == signal.SIGINT:
            return
        self.check()

    def check(self) -> None:
        """Raise :class:`Stopped` if there is reason to."""
        if self.told is not None and not self.deferred:
            self.adopt()
            self.raised = True
            if self._starting:
                signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER_SECONDS)
            raise Stopped(self.exit_code)

    @property
    def exit_code(self) -> int:
        """As shells report a process that a signal has ended."""
        return 128 + (self.told or signal.SIGTERM)

    def tell(self) -> None:
        """Another process of the run has been told."""
        if self.told is None:
            self.told = signal.SIGTERM

    def begin(self) -> None:
        """A new piece of work, which nobody has told to stop."""
        self.deferred = False
        if self._installed:
            self.check()
        self.told, self.raised, self._starting = None, False, False

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

    def end_now(self) -> NoReturn:
        """Without a last checkpoint and without a farewell."""
        self.adopt()
        for child in self._children:
            child.kill()
        with suppress(OSError):  # nobody is there to read it
            os.write(2, f"\nended at once by a second Ctrl-C{self._remark()}\n".encode())
        os._exit(self.exit_code)

    def leave(self) -> NoReturn:
        """Say what ended the run and how it goes on; exit."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        name = NAMES[self.told or signal.SIGTERM]
        sys.stderr.write(f"stopped by {name}{self._remark()}\n")
        leave(self.exit_code, GRACE_SECONDS)

    def _remark(self) -> str:
        return f"; {self.remark}" if self.remark else ""

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
    def installed(self, remark: str = GOES_ON) -> Iterator[None]:
        """In place of what this process does on these signals; Lightning's Trainers keep it.

        What its parent has it ignore, as nohup does with SIGHUP, stays ignored; not so SIGTERM. ``remark``
        is said to the user at the end.
        """
        self.remark = remark
        if self._installed:
            self.check()
            yield
            return
        self.told, self.deferred, self.raised = None, False, False
        self._installed = self._starting = True
        before = {number: signal.getsignal(number) for number in (*NAMES, signal.SIGALRM)}
        for number in NAMES:
            if before[number] is not signal.SIG_IGN or number == signal.SIGTERM:
                signal.signal(number, self)
        signal.signal(signal.SIGALRM, lambda *_: self.check())
        hook, sys.unraisablehook = sys.unraisablehook, self._raise_again
        try:
            yield
        finally:
            self._installed = self._starting = False
            sys.unraisablehook = hook
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _raise_again(self, unraisable: Any) -> None:
        """The exception came in a destructor or a callback, as imports have many, where Python drops it."""
        if issubclass(unraisable.exc_type, Stopped):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER_SECONDS)
        else:
            sys.__unraisablehook__(unraisable)


stop = Stop()


@contextmanager
def answered(remark: str = GOES_ON) -> Iterator[None]:
    """Answer the signals with a sentence and their exit code, whatever is done within."""
    with stop.installed(remark):
        try:
            yield
        except Stopped:
            stop.leave()
        except Exception:
            if not stop.raised:
                raise
            stop.leave()


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
    stop.end_children(grace_seconds)
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
