"""The commands as they are started: signals and lost readers are answered while all else is imported."""

from __future__ import annotations

import os

from trce_lightning.runtime.signals import answered
from trce_lightning.runtime.streams import keep_speaking

# Torch reads it when it is loaded. Waiting threads that spin make a run many times slower beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def train() -> None:
    """Run ``train.py``."""
    keep_speaking()
    with answered():
        from trce_lightning import cli

        cli.train()


def evaluate() -> None:
    """Run ``eval.py``."""
    keep_speaking()
    with answered():
        from trce_lightning import cli

        cli.evaluate()


def demonstrate() -> None:
    """Run ``demo.py``."""
    keep_speaking()
    with answered(remark=""):
        from trce_lightning import cli

        cli.demonstrate()
