"""The log lines that a run writes to the terminal."""

from __future__ import annotations

import logging
import warnings

import diffusers
import transformers

from trce_lightning.runtime.launchers import process_rank


def set_up_logging() -> None:
    """Show this project's log lines at INFO with times, and hide what libraries repeat at every start."""
    level = logging.INFO if process_rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("lightning.pytorch", "httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for expected in (
        "in eval mode",
        "predict returned None",
        "does not have many workers",
        "smaller than the logging interval",
        "LeafSpec",
    ):
        warnings.filterwarnings("ignore", message=f".*{expected}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about kernels that nothing here uses
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it recommends another package at every start
    transformers.utils.logging.disable_progress_bar()
