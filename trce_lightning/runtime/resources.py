"""Advice for failures of the machine: a full disk, full memory, a process that is gone.

The module imports no torch.
"""

import errno
import re

_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_TEXT = re.compile(rf"os error (?:{'|'.join(map(str, _CODES))})\b")  # safetensors' wording
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_PEER_GONE = re.compile(r"connection (?:reset|closed|refused) by peer|remote process exited", re.IGNORECASE)
_GOES_ON = (
    "the same command continues where this ended; one with other options starts a new run, which reuses the "
    "trajectories and images that they don't change"
)


def is_peer_gone(error: BaseException) -> bool:
    """Return whether the error says that another process of the run has ended."""
    return isinstance(error, RuntimeError) and _PEER_GONE.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that the host or a device has too little memory."""
    is_torchs = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError) or is_torchs


def explain_machine(error: BaseException) -> list[str] | None:
    """Return lines of advice if the error is such a failure of the machine, else None."""
    first = (str(error).splitlines() or [""])[0]
    is_full = isinstance(error, OSError) and error.errno in _CODES
    if is_full or _IN_TEXT.search(str(error)):
        return [
            f"no room on disk: {first}",
            "free some, or choose other places by output=FOLDER and cache=FOLDER; fewer "
            "trajectory.num_trajectories and metrics.final_images_per_set need less",
            _GOES_ON,
        ]
    if is_out_of_memory(error):
        return [
            f"out of memory: {first}",
            "if it was training, lower trajectory.batch_size (trainer.accumulate_grad_batches makes up for "
            "it); if it was generating images, lower metrics.batch_size",
            _GOES_ON,
        ]
    if is_peer_gone(error):
        return [
            "another process of this run has ended",
            "its own message stands above; a process that was killed, for example for lack of memory, leaves "
            "none",
            _GOES_ON,
        ]
    return None
