"""Make Lightning Trainers and loggers from the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trce_lightning.callbacks import ProgressBars
from trce_lightning.config.schema import DeviceConfig, LoggerConfig, TrainerConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs.wandb_runs import wandb_logger
from trce_lightning.runtime.launchers import check_launcher, process_rank, started_by_none
from trce_lightning.runtime.stopping import StopTogether, stop_when_told
from trce_lightning.runtime.storage import reading, replacing

LAST_CHECKPOINT = "last.ckpt"
"""The checkpoint from which a run continues."""
CHECKPOINT_KEYS = {"state_dict", "optimizer_states", "loops", "callbacks", "epoch", "global_step"}
TRAIN_AGAIN = "delete it, and the same command trains from the start"
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "32-true": None}


def choose_precision(precision: str, accelerator: str) -> str:
    """Return the precision that ``auto`` stands for.

    If the hardware has native bfloat16, it is bf16-mixed. Otherwise it is 16-mixed on CUDA and 32-true
    elsewhere.
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native and accelerator in ("auto", "cpu") else "32-true"


def native_dtype(device_type: str) -> torch.dtype | None:
    """Return the type that ``auto`` casts to on a device of this machine, or None if it casts to none."""
    return AUTOCAST[choose_precision("auto", device_type)]


def make_trainer(
    config: DeviceConfig,
    folder: Path,
    *,
    epochs: int = 1,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> pl.Trainer:
    """Return a Trainer on the configured devices. With a plain ``DeviceConfig`` it only predicts.

    ``InputError`` if the options don't fit each other, this machine or the launcher of this process.
    """
    fitting: dict[str, Any] = {}
    if isinstance(config, TrainerConfig):
        fitting = {
            "gradient_clip_val": config.gradient_clip_val,
            "accumulate_grad_batches": config.accumulate_grad_batches,
            "log_every_n_steps": config.log_every_n_steps,
        }
    precision: Any = choose_precision(config.precision, config.accelerator)
    plugins: list[Any] = [WholeCheckpoints()]
    if started_by_none():
        plugins.append(LightningEnvironment())
    places: dict[str, Any] = {
        name: getattr(config, name) for name in ("accelerator", "devices", "num_nodes", "strategy")
    }
    with _refusals_explained(places):
        trainer = pl.Trainer(
            **places,
            precision=precision,
            max_epochs=epochs,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,  # a model that moves to another device in inference mode can't train later
            use_distributed_sampler=True,
            callbacks=[*callbacks, *([ProgressBars()] if config.enable_progress_bar else []), StopTogether()],
            logger=list(loggers),
            default_root_dir=folder,
            plugins=plugins,
            enable_checkpointing=any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
            **fitting,
        )
        if environment := getattr(trainer.strategy, "cluster_environment", None):
            environment.validate_settings(trainer.num_devices, trainer.num_nodes)  # as a fit does
    check_launcher(trainer.num_devices * trainer.num_nodes)
    stop_when_told(trainer)
    return trainer


@contextmanager
def _refusals_explained(places: Mapping[str, Any]) -> Iterator[None]:
    """Name the options that Lightning refuses.

    Lightning raises several types of errors, so wrap no other call.
    """
    try:
        yield
    except (MisconfigurationException, ModuleNotFoundError, RuntimeError, TypeError, ValueError) as error:
        chosen = ", ".join(f"trainer.{name}={value}" for name, value in places.items())
        raise InputError(
            "trainer: expected options that fit each other, this machine and what has started this process, "
            f"got {chosen}: {' '.join(str(error).split())}"
        ) from error


class WholeCheckpoints(TorchCheckpointIO):
    """Write a checkpoint to a temporary file beside its place and rename it.

    Lightning's own way copies the file across file systems, which may leave half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole checkpoint or nothing."""
        with replacing(path) as aside:
            super().save_checkpoint(checkpoint, aside, storage_options)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint as Lightning does. If the file is damaged, ``InputError`` names it."""
        with reading(path, "a checkpoint", TRAIN_AGAIN):
            checkpoint = super().load_checkpoint(path, *arguments, **options)
            missing = CHECKPOINT_KEYS - set(checkpoint)
            # Lightning also loads a forked process's result this way, which has fewer keys.
            if missing and Path(path).name == LAST_CHECKPOINT:
                raise KeyError(min(missing))
            return checkpoint


def make_loggers(config: LoggerConfig, folder: Path, name: str) -> list[Logger]:
    """Return a CSV logger, and the dashboards that the configuration asks for.

    A run that continues logs into another ``logs/version_N``, so earlier logs stay.
    """
    return [CSVLogger(folder, name="logs"), *dashboards(config, folder, name)]


def dashboards(config: LoggerConfig, folder: Path, name: str) -> list[Logger]:
    """Return loggers of TensorBoard and of W&B, if the configuration asks for them."""
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if config.wandb and process_rank() == 0:
        loggers.append(wandb_logger(config, folder, name))
    return loggers
