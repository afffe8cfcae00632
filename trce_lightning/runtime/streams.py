"""What is said on a terminal may be lost, a run may not. Torch-free."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _Unbreakable(io.FileIO):
    """A file descriptor whose text goes nowhere from the first failure on: a reader or a terminal is gone."""

    def write(self, text: Any, /) -> int:
        size = memoryview(text).nbytes
        try:
            written = super().write(text)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # what libraries in C say goes there as well
            os.close(nowhere)
            return size
        return size if written is None else written  # None: a terminal that takes no more now


def keep_speaking() -> None:
    """Let nothing raise that is written to stdout and stderr: no text that they can't encode, no lost reader.

    Streams that are closed are opened to nowhere, before a file of the run takes their number.
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
    if stream is not None:  # as Python finds a closed one
        if not isinstance(stream, io.TextIOWrapper):  # a notebook's
            return stream
        unbuffered = isinstance(stream.buffer, io.FileIO)  # python -u
        raw = stream.buffer if unbuffered else getattr(stream.buffer, "raw", None)
        if type(raw) is not io.FileIO or raw.fileno() != number:  # pytest's, or one of these
            stream.reconfigure(errors="backslashreplace")
            return stream
        stream.flush()
        encoding = stream.encoding
    file = _Unbreakable(number, "w", closefd=False)
    binary: Any = file if unbuffered else io.BufferedWriter(file)
    return io.TextIOWrapper(
        binary, encoding, "backslashreplace", line_buffering=True, write_through=unbuffered
    )
