"""The handler of Ctrl-C, SIGTERM and a closed terminal, and the exit from a run of several processes.

The module imports no torch.
"""

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
"""The time after which a further Ctrl-C counts as a second one.

Some programs pass on a Ctrl-C that the terminal has already sent to all processes. It then arrives twice.
"""


AGAIN_AFTER_SECONDS = 0.1
"""The time after which :class:`Stopped` is raised again, as long as no work has begun.

Some libraries catch every exception while they are imported, and go on.
"""


class Stopped(SystemExit):
    """The exit after a signal, when there is nothing to finish first."""


class Launcher(Protocol):
    """The launcher that has started this machine's other processes."""

    procs: list[subprocess.Popen[bytes]]


class Stop:
    """The signal handler of this process: it ends the current work and tells the processes that it started.

    ``told`` is the signal that came, or None. While ``deferred`` is True, a signal ends nothing: a fit looks
    at ``told`` after each step. A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        self.deferred = False
        self.remark = GOES_ON
        self.launchers: list[Launcher] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._told_at = 0.0
        self.raised = False
        """True if a later failure may come from :class:`Stopped`, which some libraries catch."""
        self._installed = self._starting = False

    def __call__(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        if self.told is None:
            self.told, self._told_at = signal.Signals(number), time.monotonic()
            for launcher in self.launchers:
                for child in launcher.procs:
                    # Always SIGTERM: a child has the terminal's Ctrl-C already, and a second would end it.
                    child.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT and time.monotonic() - self._told_at > SECOND_AFTER_SECONDS:
            self.end_now()
        elif number == signal.SIGINT:
            return
        self.check()

    def check(self) -> None:
        """Raise :class:`Stopped` if a signal came and is not deferred."""
        if self.told is not None and not self.deferred:
            self.adopt()
            self.raised = True
            if self._starting:
                signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER_SECONDS)
            raise Stopped(self.exit_code)

    @property
    def exit_code(self) -> int:
        """Return the code that shells report for a process that this signal has ended."""
        return 128 + (self.told or signal.SIGTERM)

    def tell(self) -> None:
        """Record that another process of the run has received a signal."""
        if self.told is None:
            self.told = signal.SIGTERM

    def begin(self) -> None:
        """Begin new work and forget earlier signals.

        If this handler is installed and a signal has come, raise :class:`Stopped` instead.
        """
        self.deferred = False
        if self._installed:
            self.check()
        self.told, self.raised, self._starting = None, False, False

    def adopt(self) -> None:
        """Take the child processes out of Lightning's list, so that they may end before this process.

        If a child in that list ends, Lightning's observer kills this process.
        """
        for launcher in self.launchers:
            self._children += launcher.procs
            launcher.procs.clear()

    def end_children(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the child processes, then kill those that are left.

        A child that waits in a collective operation reacts to nothing else.
        """
        self.adopt()
        deadline = time.monotonic() + seconds
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()

    def end_now(self) -> NoReturn:
        """End the process and its children at once, without a last checkpoint and without exit handlers."""
        self.adopt()
        for child in self._children:
            child.kill()
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\nended at once by a second Ctrl-C{self._remark()}\n".encode())
        os._exit(self.exit_code)

    def leave(self) -> NoReturn:
        """Write which signal ended the run and how to continue it, then exit."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        name = NAMES[self.told or signal.SIGTERM]
        sys.stderr.write(f"stopped by {name}{self._remark()}\n")
        leave(self.exit_code, GRACE_SECONDS)

    def _remark(self) -> str:
        return f"; {self.remark}" if self.remark else ""

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the code within at once, even in a fit.

        Use it for long work that keeps its finished parts on disk.
        """
        deferred, self.deferred = self.deferred, False
        try:
            self.check()
            yield
        finally:
            self.deferred = deferred

    @contextmanager
    def installed(self, remark: str = GOES_ON) -> Iterator[None]:
        """Install this handler within, and restore the earlier handlers afterwards.

        Lightning's Trainers keep this handler. If the parent process has a signal ignored, as nohup does with
        SIGHUP, it stays ignored. SIGTERM is never ignored. ``remark`` is shown to the user at the end.
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
        """Raise :class:`Stopped` again after Python dropped it.

        Python drops exceptions in destructors and callbacks, and imports run many of these.
        """
        if issubclass(unraisable.exc_type, Stopped):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER_SECONDS)
        else:
            sys.__unraisablehook__(unraisable)


stop = Stop()


@contextmanager
def answered(remark: str = GOES_ON) -> Iterator[None]:
    """Let a signal end the code within: write one sentence and exit with the signal's exit code."""
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
    """Return whether this process takes part in a run of several processes."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return bool(distributed.get_world_size() > 1)


def leave(code: int, grace_seconds: float = 0.0) -> NoReturn:
    """End the processes that this one has started, and exit with ``code``.

    In a run of several processes, exit without the exit handlers. Lightning's handler destroys NCCL's
    connections, and so waits for processes that wait for this one.
    """
    stop.end_children(grace_seconds)
    if not shared():
        sys.exit(code)
    try:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=code)  # as W&B does at exit
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
