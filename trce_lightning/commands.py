"""The entry points of the commands. They handle signals and lost readers before the slow imports."""

from __future__ import annotations

import os

from trce_lightning.runtime.signals import answered
from trce_lightning.runtime.streams import keep_speaking

# Torch reads this when it is loaded. If waiting threads spin, a run beside other work is many times slower.
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


def tune() -> None:
    """Run ``python -m trce_lightning.tune``."""
    keep_speaking()
    with answered():
        from trce_lightning import cli

        cli.tune()


def leaderboard() -> None:
    """Run ``python -m trce_lightning.leaderboard``."""
    keep_speaking()
    with answered():
        from trce_lightning import cli

        cli.leaderboard()
