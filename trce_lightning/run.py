"""``train.py``: what it does, from a validated configuration."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from omegaconf import OmegaConf

from trce_lightning import announce, runs
from trce_lightning.concepts import Concept
from trce_lightning.errors import InputError
from trce_lightning.locks import release
from trce_lightning.logs import set_up_logging
from trce_lightning.schema import ModelConfig, TrainConfig
from trce_lightning.session import concepts_of
from trce_lightning.storage import reading
from trce_lightning.training_run import TrainingRun

MODEL_IDENTITY = ("name", "path", "hub_id", "revision", "config", "dtype")
"""Options of a model that its weights and text states depend on."""


def train(config: TrainConfig) -> None:
    """Erase ``config.concept`` and leave a run folder; see :class:`TrainingRun`."""
    set_up_logging()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    run = TrainingRun(config, merge_previous(config))
    if not config.plan:
        run.open()  # before anything is said, so that run.log has it
    announce.training(run)
    if config.plan:
        return
    try:
        run.erase_and_score()
        run.write()
    finally:
        release()


def merge_previous(config: TrainConfig) -> list[Concept]:
    """The configured concepts after those of the run ``previous``: all are erased from the original anew.

    ``InputError`` when ``previous`` is no run or erased another model.
    """
    concepts = concepts_of(config)
    if config.previous is None:
        return concepts
    folder = Path(config.previous)
    if not (folder / runs.CONFIG).is_file():
        raise InputError(f"previous: expected the folder of an earlier run, got '{folder}'")
    with reading(folder / runs.CONFIG, "the configuration of an earlier run", "name another run"):
        written = OmegaConf.load(folder / runs.CONFIG)
        # Only what is compared and taken over, so that a run of an earlier version will do.
        earlier = OmegaConf.merge(
            OmegaConf.structured(TrainConfig), {"model": written.model, "concept": written.concept}
        )
        restored = OmegaConf.to_object(earlier)
    assert isinstance(restored, TrainConfig)
    _check_same_model(restored.model, config.model)
    config.concept = restored.concept | config.concept
    return concepts_of(config)


def _check_same_model(earlier: ModelConfig, now: ModelConfig) -> None:
    """Whether text states and weights are the same; how images are drawn and scored may differ."""
    for name in MODEL_IDENTITY:
        before, asked = getattr(earlier, name), getattr(now, name)
        if before != asked:
            raise InputError(
                f"previous: expected a run on the same model, with model.{name}={asked}, "
                f"got one with model.{name}={before}"
            )
