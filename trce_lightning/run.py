"""``train.py`` and ``eval.py``: what they do, from a validated configuration."""

from __future__ import annotations

import logging
import os
import time
import warnings
from pathlib import Path

import diffusers
import lightning.pytorch as pl
import transformers
from omegaconf import OmegaConf

from callbacks.image_grid import grid_of
from trce_lightning import announce, runs
from trce_lightning.concepts import Concept
from trce_lightning.report import results_table, write_scores_csv
from trce_lightning.schema import EvalConfig, TrainConfig
from trce_lightning.scoring import Scored, score_on_all_ranks
from trce_lightning.session import Session, concepts_of, source_of
from trce_lightning.storage import write_json
from trce_lightning.trainers import make_trainer
from trce_lightning.training_run import TrainingRun

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> None:
    """Erase ``config.concept`` and leave a run folder; see :class:`TrainingRun`."""
    set_up_logging()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    run = TrainingRun(config, merge_previous(config))
    announce.training(run)
    if config.plan:
        return
    run.open()
    run.sample_trajectories()
    run.score_original()
    run.solve()
    run.fit()
    run.score_erased()
    run.write()


def evaluate(config: EvalConfig) -> None:
    """Score one pipeline folder on the concept's sets and on CSV files; leaves scores and a grid."""
    set_up_logging()
    session = Session(config, concepts_of(config))
    scorer = session.scorer("report", config.metrics.final_images_per_set)
    folder = Path(config.output or Path(config.runs) / "eval" / scorer.fingerprint())
    trainer = make_trainer(config.trainer, folder)
    start = time.monotonic()
    scores = score_on_all_ranks(trainer, scorer, folder / "images")
    if not trainer.is_global_zero:
        return
    model = str(source_of(config.model))
    metrics = {
        "schema": 1,
        "concept": [concept.name for concept in session.concepts],
        "model": model,
        "commit": runs.commit(),
        "scores": scores,
        "seconds": {"images": round(time.monotonic() - start, 2)},
        "network_evaluations": {"images": scorer.network_evaluations},
    }
    Scored(scores, scorer.hits).save(folder / "scored" / "eval.json")
    grid_of(scorer, {Path(model).name: folder / "images"}, folder / "grid.png")
    write_scores_csv(folder / "metrics.csv", metrics)
    write_json(folder / "metrics.json", metrics)
    log.info("%s\n%s", folder, results_table({Path(model).name: scores}))


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
    earlier = OmegaConf.load(folder / runs.CONFIG)
    if OmegaConf.to_container(earlier.model) != OmegaConf.to_container(OmegaConf.structured(config.model)):
        raise ValueError(f"previous: expected a run on the same model, got one on {earlier.model.name}")
    restored = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), earlier))
    assert isinstance(restored, TrainConfig)
    config.concept = restored.concept | config.concept
    return concepts_of(config)


def set_up_logging() -> None:
    """Ours at INFO with times; what libraries repeat at every start, not at all."""
    level = logging.INFO if int(os.environ.get("LOCAL_RANK", "0")) == 0 else logging.WARNING
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about kernels that nothing here uses
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # recommends a further package at every start
    transformers.utils.logging.disable_progress_bar()
