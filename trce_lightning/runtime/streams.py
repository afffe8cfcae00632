"""Output streams that never fail: if the terminal is gone, its text is lost and the run goes on.

The module imports no torch.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Unbreakable(io.FileIO):
    """A file descriptor that drops all text after the first failure, when its reader or terminal is gone."""

    def write(self, text: Any, /) -> int:
        size = memoryview(text).nbytes
        try:
            written = super().write(text)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # the output of C libraries goes there as well
            os.close(nowhere)
            return size
        return size if written is None else written  # None: the terminal takes no more now


def keep_speaking() -> None:
    """Make writing to stdout and stderr safe.

    A lost reader, or a text that they can't encode, no longer raises.

    If a stream is closed, it is opened on the null device, so that no file of the run gets its number.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout = _lasting(sys.stdout, 1)
    sys.stderr = _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    encoding, unbuffered = "utf-8", False
    if stream is not None:  # Python sets a closed stream to None
        if not isinstance(stream, io.TextIOWrapper):  # a notebook's stream
            return stream
        unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
        raw = stream.buffer if unbuffered else getattr(stream.buffer, "raw", None)
        if type(raw) is not io.FileIO or raw.fileno() != number:  # pytest's, or one that is wrapped already
            stream.reconfigure(errors="backslashreplace")
            return stream
        stream.flush()
        encoding = stream.encoding
    file = _Unbreakable(number, "w", closefd=False)
    binary: Any = file if unbuffered else io.BufferedWriter(file)
    return io.TextIOWrapper(
        binary, encoding, "backslashreplace", line_buffering=True, write_through=unbuffered
    )
