"""Run folders: a new one for each run, or the newest unfinished one of the same configuration."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf

from trce_lightning import __version__
from trce_lightning.errors import InputError
from trce_lightning.storage import write_text

log = logging.getLogger(__name__)

FINISHED = "metrics.json"
CONFIG = "config.yaml"
FOLDER_VARIABLE = "TRCE_RUN_FOLDER"
"""Tells further processes of a run which folder the first one has chosen."""
NOT_COMPARED = ("plan", "fresh", "output", "runs", "checkpoint_minutes")


def choose_folder(config: Any) -> Path:
    """``output``, the newest unfinished run of an equal configuration, or a new folder.

    ``InputError`` when ``output`` holds a run of another configuration, or is needed and not given.
    """
    launcher = other_launcher() or ("trainer.num_nodes" if config.trainer.num_nodes > 1 else None)
    if config.output is None and launcher:
        raise InputError(
            f"output: expected a folder that all processes share, since {launcher} starts them apart from "
            f"each other, got none"
        )
    if config.output is None and int(os.environ.get("LOCAL_RANK", "0")) > 0 and FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    parent = Path(config.runs) / "+".join(config.concept) / config.model.name
    if config.output is not None:
        folder = Path(config.output)
        if (folder / CONFIG).exists() and not config.fresh and not _equal(folder, config):
            raise InputError(
                f"output: {folder} holds a run of another configuration; choose another or fresh=true"
            )
        return folder
    if not config.fresh and parent.is_dir():
        for folder in sorted(parent.iterdir(), reverse=True):
            if (folder / CONFIG).exists() and not (folder / FINISHED).exists() and _equal(folder, config):
                log.info("continuing %s (fresh=true starts anew)", folder)
                return folder
    start = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = (start, *(f"{start}_{number}" for number in range(2, 1000)))
    return next(parent / name for name in names if not (parent / name).exists())


def open_folder(config: Any) -> Path:
    """Create the run's folder with its resolved configuration, and log into it."""
    folder = choose_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER_VARIABLE] = str(folder)
    if config.fresh and process_rank() == 0:
        for stale in ("checkpoints/last.ckpt", FINISHED):
            (folder / stale).unlink(missing_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
    write_text(folder / CONFIG, text)
    handler = logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return folder


def process_rank() -> int:
    """0 for the first process of a run, as its launcher says, and where there is no other; else above."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return next((rank for name in names if (rank := int(os.environ.get(name, "0")))), 0)


def other_launcher() -> str | None:
    """What started several processes in place of Lightning, if anything did."""
    for environment, count, name in (
        (TorchElasticEnvironment, "WORLD_SIZE", "torchrun"),
        (SLURMEnvironment, "SLURM_NTASKS", "srun"),
    ):
        if environment.detect() and int(os.environ.get(count, "1")) > 1:
            return name
    return None


def cache_folder(config: Any) -> Path:
    """Where caches and the original model's scores lie, shared between runs."""
    return Path(config.cache) if config.cache else Path(config.runs) / "cache"


def _comparable(config: Any) -> Any:
    content = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    assert isinstance(content, dict)
    return {key: value for key, value in content.items() if key not in NOT_COMPARED}


def _equal(folder: Path, config: Any) -> bool:
    return _comparable(OmegaConf.load(folder / CONFIG)) == _comparable(OmegaConf.structured(config))


def command() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["python", *sys.argv])


def commit() -> str:
    """This checkout's commit, or the installed version outside of one."""
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return head.stdout.strip() or f"v{__version__}"
