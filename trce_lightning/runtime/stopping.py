"""Signals in a Trainer: one process or several, a fit ends after the same step everywhere."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from trce_lightning.runtime.signals import stop


class StopTogether(pl.Callback):
    """Ends a fit that is told to stop after the same step on all ranks, whichever of them was told."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on a step is finished first."""
        stop.deferred = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree; Lightning then raises ``SIGTERMException`` once it has logged the step."""
        if trainer.strategy.reduce_boolean_decision(stop.told is not None, all=False):
            stop.tell()
            stop.adopt()
            trainer._signal_connector.received_sigterm = True

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A fit that came to its end before it looked."""
        stop.deferred = False
        stop.check()


def stop_when_told(trainer: pl.Trainer) -> None:
    """Put our handler in place of the Trainer's, and let it know the processes that this Trainer starts.

    Lightning's broadcasts within the handler, where it may meet another collective and wait for ever; knows
    no processes but those that the same Trainer has started; and only sets a flag, which predicting ignores.
    It is installed after the last hook before a barrier, so no callback could replace it in time.
    """
    stop.begin()
    trainer._signal_connector._sigterm_notifier_fn = stop  # type: ignore[assignment]
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        stop.launchers.append(trainer.strategy.launcher)
