"""Log a run to Weights & Biases: online if it is set up and answers, otherwise offline. It never prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from trce_lightning.config.schema import LoggerConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.attacked import Row
from trce_lightning.report.attacks import Find

log = logging.getLogger(__name__)
ONLINE = ("online", "run", "shared")
"""The modes of W&B that need a key and a server."""
ATTACK_COLUMNS = [
    "attack",
    "model",
    "success",
    "low",
    "high",
    "without attack",
    "other seeds",
    "not searched",
    "rho",
    "verdict",
]
BUDGET_COLUMNS = ["attack", "model", "cost", "success"]
FOUND_COLUMNS = ["model", "attack", "prompt", "found", "original", "attacked", "probability"]


def wandb_logger(config: LoggerConfig, folder: Path, name: str) -> WandbLogger:
    """Return a logger in W&B's mode. Its run has begun.

    Without a key, or without an answer within ``init_timeout`` seconds, it logs offline, and a log line says
    so.

    Raises:
        InputError: W&B refuses a setting, the key or the project's name.
        OSError: a folder that W&B needs can't be made or written to.
    """
    import wandb

    (folder / "wandb").mkdir(parents=True, exist_ok=True)
    with _refusals_explained():
        settings = wandb.setup().settings
        _check_identity_token(settings.identity_token_file)
        mode = settings.mode
        if mode in ONLINE and not (settings.api_key or wandb.login(prompt=False, verify=False)):
            log.info("no key for W&B (`wandb login`, or WANDB_API_KEY); logging offline")
            mode = "offline"
        try:
            return _begun(config, folder, name, mode)
        except wandb.errors.AuthenticationError:  # it is also a CommError
            raise
        except wandb.errors.CommError as error:
            log.warning("W&B can't be reached (%s); logging offline", " ".join(str(error).split()))
            return _begun(config, folder, name, "offline")


def log_attacks(
    logger: WandbLogger, rows: Mapping[str, Mapping[str, Row]], finds: Mapping[str, Sequence[Find]]
) -> None:
    """Log tables: ``attacks``, with each attack on each model, ``budget``, with its curve, and ``found``.

    ``found`` has what was found, with images. A cost is in network evaluations, or in encoded prompts.
    """
    import wandb

    data = [
        [
            name,
            label,
            row["rate"],
            row["low"],
            row["high"],
            row["pre"],
            row["control"]["seeds"]["rate"],
            row["control"].get("random", {}).get("rate"),
            row.get("rho", {}).get("value"),
            row["verdict"],
        ]
        for label, by_attack in rows.items()
        for name, row in by_attack.items()
    ]
    logger.log_table("attacks", columns=ATTACK_COLUMNS, data=data)
    points = [
        [name, label, cost, rate]
        for label, by_attack in rows.items()
        for name, row in by_attack.items()
        for cost, rate in row["by_budget"]
    ]
    logger.log_table("budget", columns=BUDGET_COLUMNS, data=points)
    shown = [
        [
            label,
            find.attack,
            find.prompt,
            find.found,
            wandb.Image(str(find.original)),
            wandb.Image(str(find.image)),
            find.probability,
        ]
        for label, found in finds.items()
        for find in found
    ]
    logger.log_table("found", columns=FOUND_COLUMNS, data=shown)


def _begun(config: LoggerConfig, folder: Path, name: str, mode: str) -> WandbLogger:
    import wandb

    # `mode` is used because Lightning's `offline` sets a variable, and W&B has already read its variables.
    logger = WandbLogger(
        project=config.project,
        name=name,
        save_dir=folder,
        mode=mode,
        settings=wandb.Settings(init_timeout=config.init_timeout),
    )
    logger.experiment.define_metric("*")
    # W&B stages tables in a folder of its own. If it isn't writable, the run fails now and not later.
    with wandb.Artifact("writable", type="check").new_file("file"):
        pass
    return logger


def _check_identity_token(file: str | None) -> None:
    """Raise ``FileNotFoundError`` if the token's file doesn't exist. W&B's own process would end on it."""
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"logger.wandb: expected a file in WANDB_IDENTITY_TOKEN_FILE, got {file!r}")


@contextmanager
def _refusals_explained() -> Iterator[None]:
    """Raise ``InputError`` that names what W&B refuses."""
    import pydantic  # W&B depends on it
    import wandb

    try:
        yield
    except wandb.errors.AuthenticationError as error:
        raise InputError(
            "logger.wandb: expected a key that W&B takes, in WANDB_API_KEY or ~/.netrc, got none: "
            f"{str(error).rstrip('.')}; WANDB_MODE=offline needs none"
        ) from error
    except wandb.errors.UsageError as error:
        raise InputError(
            f"logger.wandb: expected logger.project and the variables WANDB_* as W&B takes them, got: {error}"
        ) from error
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        names = [f"WANDB_{str(first['loc'][0]).upper()}"]
        names = [
            key for key, text in os.environ.items() if key.startswith("WANDB_") and text == first["input"]
        ] or names
        raise InputError(
            f"logger.wandb: expected a value that W&B takes in {names[0]}, got {first['input']!r}: "
            f"{first['msg']}"
        ) from error
