"""A run of ``train.py`` with ``streamed=true``: stage 1 alone, on a denoiser that is never loaded."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from trce_lightning import __version__, export
from trce_lightning.adapters import load_stored
from trce_lightning.adapters.cut import check_pairs, warn_of_cut
from trce_lightning.closed_form import Edit
from trce_lightning.concepts import Concept, prompt_pairs
from trce_lightning.config.schema import TrainConfig
from trce_lightning.jobs import runs
from trce_lightning.jobs.session import Session, base_name
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.runtime.checkout import commit
from trce_lightning.runtime.fingerprints import digest_of
from trce_lightning.runtime.locks import own_lock
from trce_lightning.runtime.ranks import peak_memory_mb
from trce_lightning.runtime.storage import write_json
from trce_lightning.textual import cached_kept, stored_edits, textual_statistics

log = logging.getLogger(__name__)


def train(config: TrainConfig, concepts: list[Concept]) -> None:
    """Erase ``concepts`` from a model's files, and write a run folder without scores."""
    run = StreamedRun(config, concepts)
    with own_lock():
        folder = None if config.plan else runs.open_folder(config)  # before the first log line, for run.log
        run.announce()
        if folder is not None:
            edit = run.solve(folder)
            run.write(folder, edit)


class StreamedRun:
    """Stage 1 on the files of a model. Its text encoders are loaded, since T is solved from their states.

    The denoiser's edited tensors are read, edited and written one at a time.
    """

    def __init__(self, config: TrainConfig, concepts: list[Concept]) -> None:
        model = config.model
        self.adapter, self.pipeline = load_stored(
            Session(config, concepts).source(),
            dtype=getattr(torch, model.dtype),
            revision=model.revision,
            resolution=model.resolution,
            max_sequence_length=model.max_sequence_length,
        )
        self.config, self.base = config, base_name(model)
        self.adapter.name = self.base
        self.session = Session(config, concepts, self.adapter)
        one = replace(config.trainer, devices=1) if config.trainer.devices == "auto" else config.trainer
        self.trainer = make_trainer(one, runs.cache_folder(config))
        check_pairs(self.adapter, prompt_pairs(self.session.trained_concepts))
        self.fingerprint = self._fingerprint()
        self.seconds: dict[str, float] = {}

    def _fingerprint(self) -> str:
        """Return a hash of the text encoders and of the stored tensors that read their states."""
        names = [name for stream in self.adapter.streams().values() for name in stream.entries]
        tensors = ((name, self.pipeline.denoiser.read(f"{name}.weight")) for name in sorted(names))
        return f"{digest_of(tensors)}{self.adapter.text_fingerprint()}"

    def announce(self) -> None:
        """Log what is edited and what is written."""
        denoiser = self.pipeline.denoiser
        log.info("trce-lightning %s, %s", __version__, commit())
        log.info(
            "erasing %s from %s: stage 1 alone, on the files of its %s (%.1f GB), which is not loaded; "
            "export: %s",
            " + ".join(concept.name for concept in self.session.concepts),
            self.config.model.name,
            denoiser.folder.name,
            sum(file.stat().st_size for file in denoiser.files) / 1e9,
            ", ".join(self.config.export),
        )

    def solve(self, folder: Path) -> Edit:
        """Solve for T, and write it."""
        started = time.monotonic()
        config, adapter = self.config.textual, self.adapter
        prompts = self.session.keep_prompts()
        warn_of_cut(adapter, prompts, "those to keep")
        kept = cached_kept(self.trainer, adapter, prompts, runs.cache_folder(self.config))
        with adapter.encoding_on(self.trainer.strategy.root_device):
            statistics = textual_statistics(adapter, self.session.trained_concepts, kept, config)
        edit = statistics.solve(config)
        file = folder / "edit.safetensors"
        edits = stored_edits(adapter, edit)
        export.save_edit(file, statistics, edit, config, self.base, self.fingerprint, edits)
        self.seconds["textual"] = round(time.monotonic() - started, 2)
        return edit

    def write(self, folder: Path, edit: Edit) -> None:
        """Write what ``export`` asks for, then ``metrics.json``, which marks the run as finished."""
        started = time.monotonic()
        edits = list(stored_edits(self.adapter, edit).values())
        denoiser, dtype = self.pipeline.denoiser, getattr(torch, self.config.model.dtype)
        if "delta" in self.config.export:
            facts = {"base_model": self.base, "fingerprint": self.fingerprint}
            export.save_stored_delta(folder / "delta.safetensors", denoiser, edits, facts, dtype)
        if "pipeline" in self.config.export:
            names = [concept.name for concept in self.session.concepts]
            count = sum(len(own.columns) for own in edits)
            card = export.card_facts(self.base, names, export.TEXTUAL_METHOD, "", count)
            export.save_stored_pipeline(folder / "erased", self.pipeline, edits, card)
        self.seconds["writing"] = round(time.monotonic() - started, 2)
        metrics = {
            "schema": 1,
            "concept": [concept.name for concept in self.session.concepts],
            "model": self.config.model.name,
            "method": {"name": "trce"},
            "version": __version__,
            "commit": commit(),
            "seconds": self.seconds,
            "network_evaluations": {},
            "peak_memory_mb": peak_memory_mb(),
        }
        write_json(folder / runs.FINISHED, metrics)
        log.info("%s: not scored; at most %d MB in memory", folder, metrics["peak_memory_mb"])
