"""The Python API: it does the work of ``train.py`` on a pipeline in memory."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import hydra
from diffusers import DiffusionPipeline
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from trce_lightning import cli
from trce_lightning.adapters import adapter_of
from trce_lightning.concepts import Concept
from trce_lightning.config import checks
from trce_lightning.config.arguments import settle
from trce_lightning.config.schema import ConceptConfig, TrainConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs.erase import run_of
from trce_lightning.jobs.train import merge_previous
from trce_lightning.runtime.host import hydra_kept, pipeline_kept, process_kept
from trce_lightning.runtime.locks import own_lock

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def erase(
    pipeline: Pipeline,
    concept: str | Concept | Sequence[str],
    *options: str,
    cache: str | Path | None = None,
) -> Pipeline:
    """Erase ``concept`` from ``pipeline`` in place, and return the pipeline.

    The weights are those that ``train.py`` would give. The work is done on one device, unless ``options``
    name more. All else stays as it was: the pipeline's device, modes and gradients, and the process's random
    state, environment, log handlers, locks and Hydra. If an error is raised, some of the weights may have
    changed. Load the pipeline again in that case.

    Args:
        pipeline: a pipeline of diffusers in memory, of a class that has an adapter.
        concept: a shipped concept's name, a YAML file's path, several of them, or a :class:`Concept`.
        options: options as on the command line, such as ``"trajectory.epochs=1"`` or ``"stages=[textual]"``.
        cache: a folder of trajectories to reuse. If it is None, they are sampled into a temporary folder.

    Raises:
        InputError: an option or the model doesn't fit. The message names it.
    """
    with tempfile.TemporaryDirectory() as folder, process_kept(), pipeline_kept(pipeline), own_lock():
        places = [f"runs={folder}", f"cache={cache or folder}", "trainer.devices=1"]
        config = compose(concept, "metrics.enabled=false", *places, *options)
        checks.check(config)
        for option in ("streamed", "plan"):
            if getattr(config, option):
                raise InputError(f"option '{option}': expected false for a pipeline in memory, got true")
        adapter = adapter_of(
            pipeline,
            max_sequence_length=config.model.max_sequence_length,
            guidance_scale=config.model.guidance_scale,
        )
        if config.model.channels_last:
            adapter.to_channels_last()
        run = run_of(config, merge_previous(config), adapter)
        if run.trainer.world_size > 1 and cache is None:
            raise InputError("cache: expected a folder that all processes see, got none")
        run.open()
        run.sample_trajectories()
        run.solve()
        run.fit()
    return pipeline


def compose(concept: str | Concept | Sequence[str], *options: str) -> TrainConfig:
    """Return the configuration that ``train.py`` would have with these arguments."""
    chosen = [] if isinstance(concept, Concept) else [_choice(concept)]
    with hydra_kept(), hydra.initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        overrides = cli.overrides("train", TrainConfig, [*chosen, *options])
        config = OmegaConf.to_object(hydra.compose("train", overrides))
    assert isinstance(config, TrainConfig)
    settle(config.concept, overrides)
    if isinstance(concept, Concept):
        values = dataclasses.asdict(concept)
        values |= {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
        for key in ("wordings", "translations"):
            values[key] = {name: list(phrases) for name, phrases in values[key].items()}
        config.concept = {concept.name: ConceptConfig(**values)}
    return config


def _choice(concept: str | Sequence[str]) -> str:
    if isinstance(concept, str):
        return f"concept={concept}"
    return f"concept=[{','.join(str(QuotedString(name, Quote.single).with_quotes()) for name in concept)}]"
