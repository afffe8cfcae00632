"""``train.py``: what it does, from a validated configuration."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from omegaconf import OmegaConf

from trce_lightning import announce, runs
from trce_lightning.concepts import Concept
from trce_lightning.logs import set_up_logging
from trce_lightning.schema import TrainConfig
from trce_lightning.session import concepts_of
from trce_lightning.training_run import TrainingRun


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
    run.erase_and_score()
    run.write()


def merge_previous(config: TrainConfig) -> list[Concept]:
    """The configured concepts after those of the run ``previous``: all are erased from the original anew.

    ``ValueError`` when ``previous`` is no run or erased another model.
    """
    concepts = concepts_of(config)
    if config.previous is None:
        return concepts
    folder = Path(config.previous)
    if not (folder / runs.CONFIG).is_file():
        raise ValueError(f"previous: expected the folder of an earlier run, got '{folder}'")
    written = OmegaConf.load(folder / runs.CONFIG)
    # Only what is compared and taken over, so that a run of an earlier version will do.
    earlier = OmegaConf.merge(
        OmegaConf.structured(TrainConfig), {"model": written.model, "concept": written.concept}
    )
    if OmegaConf.to_container(earlier.model) != OmegaConf.to_container(OmegaConf.structured(config.model)):
        raise ValueError(f"previous: expected a run on the same model, got one on {earlier.model.name}")
    restored = OmegaConf.to_object(earlier)
    assert isinstance(restored, TrainConfig)
    config.concept = restored.concept | config.concept
    return concepts_of(config)
