"""Choose the run folder: a new one, or the newest unfinished one of the same configuration."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trce_lightning.errors import InputError
from trce_lightning.runtime.launchers import other_launcher, process_rank, whole_number
from trce_lightning.runtime.locks import hold, release
from trce_lightning.runtime.storage import clean_up, reading, write_text

log = logging.getLogger(__name__)

FINISHED = "metrics.json"
CONFIG = "config.yaml"
FOLDER_VARIABLE = "TRCE_RUN_FOLDER"
"""The variable that tells a run's further processes which folder the first process has chosen."""
OUTPUTS = (
    *("checkpoints", "tuning", "images", "scored", "logs", "erased", "*.safetensors", "metrics.csv"),
    *("curves.png", "losses.png", "grid.png", "report.html", FINISHED),
)
"""The files and folders that a run leaves, and ``fresh`` deletes. The log stays."""
NOT_COMPARED = ("plan", "fresh", "output", "runs", "checkpoint_minutes")


def open_folder(config: Any) -> Path:
    """Claim the run's folder for this process, write the resolved configuration into it, and log into it.

    The folder is ``output`` if it is given. Otherwise it is the newest unfinished run of an equal
    configuration that no process is running, or else a new folder. ``InputError`` if ``output`` holds a run
    of another configuration, holds a run in progress, or is needed and not given.
    """
    folder = claim_folder(config)
    os.environ[FOLDER_VARIABLE] = str(folder)
    if process_rank() == 0:
        clean_up(folder)
        if config.fresh and (folder / CONFIG).exists():
            delete_outputs(folder)
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
    _log_into(folder / "run.log")
    return folder


def delete_outputs(folder: Path) -> None:
    """Delete what an earlier run left, since another model's parts must not be taken for this one's."""
    for path in (path for pattern in OUTPUTS for path in folder.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class _RunLog(logging.FileHandler):
    """The log of the run that this process is at."""


def _log_into(file: Path) -> None:
    """Write all log records to a file, and no longer to that of an earlier run of this process."""
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, _RunLog)]:
        root.removeHandler(earlier)
        earlier.close()
    handler = _RunLog(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root.addHandler(handler)


def claim_folder(config: Any) -> Path:
    """Return the folder of :func:`open_folder`.

    The run's first process locks it and creates it if it is new.
    """
    launcher = other_launcher() or ("trainer.num_nodes" if config.trainer.num_nodes > 1 else None)
    if config.output is None and launcher:
        raise InputError(
            f"output: expected a folder that all processes share, since {launcher} starts them apart from "
            f"each other, got none"
        )
    if config.output is None and whole_number("LOCAL_RANK", 0) > 0 and FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    if config.output is not None:
        return _claim_output(Path(config.output), config)
    parent = Path(config.runs) / "+".join(config.concept) / config.model.name
    parent.mkdir(parents=True, exist_ok=True)
    if not config.fresh:
        for folder in sorted(parent.iterdir(), reverse=True):
            if _claim_unfinished(folder, config):
                log.info("continuing %s (fresh=true starts anew)", folder)
                return folder
    start = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in (start, *(f"{start}_{number}" for number in range(2, 1000))):
        # If several processes try one name, one of them creates the folder.
        with suppress(FileExistsError):
            (parent / name).mkdir()
            hold(parent / name)
            return parent / name
    raise FileExistsError(f"{parent}: expected room for a folder named {start}, got 999 of them")


def _claim_output(folder: Path, config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if process_rank() > 0:
        return folder
    if (holder := hold(folder)) is not None:
        raise InputError(
            f"output: expected a folder that no run is using, got '{folder}', which {holder} is writing; "
            "wait for its end or choose another"
        )
    if (folder / CONFIG).exists() and not config.fresh:
        with reading(folder / CONFIG, "a run's configuration", "choose another folder or fresh=true"):
            same = is_equal(folder, config)
        if not same:
            release()
            raise InputError(
                f"output: {folder} holds a run of another configuration; choose another or fresh=true"
            )
    return folder


def _claim_unfinished(folder: Path, config: Any) -> bool:
    """Claim the run in ``folder`` if it is unfinished and has an equal configuration.

    Return True if it is claimed.
    """
    if not (folder / CONFIG).exists() or (folder / FINISHED).exists():
        return False
    try:
        with reading(folder / CONFIG, "a run's configuration", "that run can't be continued"):
            if not is_equal(folder, config):
                return False
    except InputError as error:  # a damaged run doesn't stop this one
        log.warning("%s", error)
        return False
    if (holder := hold(folder)) is not None:
        log.info("%s is being written by %s", folder, holder)
        return False
    if (folder / FINISHED).exists():  # it has finished in the meantime
        release()
        return False
    return True


def cache_folder(config: Any) -> Path:
    """Return the folder of caches and of the original model's scores, which runs share."""
    return Path(config.cache) if config.cache else Path(config.runs) / "cache"


def _comparable(config: Any) -> Any:
    content = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    if not isinstance(content, dict):
        raise TypeError(f"expected options, got a {type(content).__name__}")
    return {key: value for key, value in content.items() if key not in NOT_COMPARED}


def is_equal(folder: Path, config: Any) -> bool:
    """Return whether a folder's run has this configuration, but for what :data:`NOT_COMPARED` names."""
    return _comparable(OmegaConf.load(folder / CONFIG)) == _comparable(OmegaConf.structured(config))


def command() -> str:
    """Return the command line, quoted for a shell."""
    return shlex.join(["python", *sys.argv])
