"""Signals in a Trainer: a fit ends after the same step on all of its processes."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from trce_lightning.runtime.signals import stop


class StopTogether(pl.Callback):
    """A callback that ends a fit after the same step on all ranks, whichever rank got the signal."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the fit finish a step before a signal ends it."""
        stop.deferred = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask all ranks whether one of them got a signal.

        If one did, Lightning raises ``SIGTERMException`` after it has logged the step.
        """
        if trainer.strategy.reduce_boolean_decision(stop.told is not None, all=False):
            stop.tell()
            stop.adopt()
            trainer._signal_connector.received_sigterm = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise if a signal arrived after the last check."""
        stop.deferred = False
        stop.check()


def stop_when_told(trainer: pl.Trainer) -> None:
    """Replace the Trainer's signal handler by this project's, and tell it which processes the Trainer starts.

    Lightning's own handler broadcasts, so it may meet another collective operation and wait forever. It knows
    only the processes that the same Trainer has started. It only sets a flag, which predicting ignores.
    Lightning installs its handler after the last hook before a barrier, so no callback could replace it.
    """
    stop.begin()
    trainer._signal_connector._sigterm_notifier_fn = stop  # type: ignore[assignment]
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        stop.launchers.append(trainer.strategy.launcher)
