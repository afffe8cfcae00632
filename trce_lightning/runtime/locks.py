"""The lock on a run's folder: one process writes there. However that process ends, its lock ends too."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: FileLock | None = None
"""The lock of this process's run. There is one at most, because the runs of a sweep follow each other.

:func:`own_lock` sets it aside for a run within.
"""


def hold(folder: Path) -> str | None:
    """Lock ``folder`` for this process, and release the folder that it held before.

    Returns:
        None. If another process holds the folder, a text about it: "process 12 on HOST since TIME".
    """
    global _held
    release()
    # A soft lock is a mere file that outlives its process. It also writes its own text into the file.
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return _holder(folder / LOCK)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; start no second run there", folder)
        return None
    _held = lock
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    # The text goes into the locked file itself: a file that replaced it would not be locked.
    text = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
    (folder / LOCK).write_text(text, encoding="utf-8")
    return None


def release() -> None:
    """Release the folder that this process holds, if it holds one."""
    global _held
    if _held is not None:
        _held.release()
        _held = None


@contextmanager
def own_lock() -> Iterator[None]:
    """Let the code within hold a folder of its own, and keep the one that this process holds already."""
    global _held
    outer, _held = _held, None
    try:
        yield
    finally:
        release()
        _held = outer


@contextmanager
def claimed(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock ``file`` within. It yields False if another process holds the lock, unless ``wait`` waits for it.

    A process may claim several files, beside the folder that it holds. On a file system without locks it
    yields True.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; start no second process there", file)
    try:
        yield True
    finally:
        lock.release()


def _holder(file: Path) -> str:
    try:
        said = json.loads(file.read_text("utf-8"))
        return f"process {said['process']} on {said['host']} since {said['since']}"
    except (ValueError, TypeError, LookupError):  # the other process has not written its text yet
        return "another process"
