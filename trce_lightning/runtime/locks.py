"""A folder belongs to one process while it writes there: the lock ends with its process, however it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: FileLock | None = None
"""The lock of this process's run; runs of a sweep come one after the other."""


def hold(folder: Path) -> str | None:
    """Lock ``folder`` for this process, and release what it held before.

    Returns:
        None, or who holds it, where that is another process: "process 12 on HOST since TIME".
    """
    global _held
    release()
    # A lock that is a mere file would outlive its process, and its text is ours.
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
    # Into the locked file itself: another in its place would not be locked.
    text = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
    (folder / LOCK).write_text(text, encoding="utf-8")
    return None


def release() -> None:
    """Let others have the folder that this process holds, if any."""
    global _held
    if _held is not None:
        _held.release()
        _held = None


def _holder(file: Path) -> str:
    try:
        said = json.loads(file.read_text("utf-8"))
        return f"process {said['process']} on {said['host']} since {said['since']}"
    except (ValueError, TypeError, LookupError):  # it has just begun
        return "another process"
