"""Measure a step of each tuned method at SD 1.4's size: its peak memory, and what it changes (Linux)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks import networks
from benchmarks.fitting import CPU
from benchmarks.memory import SIDE, limit
from benchmarks.processes import alone, forget_peak, peak_gb
from benchmarks.report import Row
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import TrainerConfig
from trce_lightning.erasers.advunlearn import AdvUnlearn
from trce_lightning.erasers.ca import ConceptAblation
from trce_lightning.erasers.esd import ESD
from trce_lightning.erasers.hardened import Hardened
from trce_lightning.erasers.mace import MACE
from trce_lightning.erasers.protocol import Job
from trce_lightning.erasers.spm import SPM
from trce_lightning.erasers.stereo import STEREO
from trce_lightning.erasers.tuning import TunedEraser
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.runtime.fingerprints import tensors_fingerprint

CONCEPT = Concept("violence", {"a dagger": "a rose"}, templates=("{}", "a photo of {}"))
KEPT = ("a cat", "a photo of a tree")
STEP: Mapping[str, Any] = {"iterations": 1, "num_steps": 2, "lr": 1e-4}


@dataclass(frozen=True)
class Step:
    """One step of a method, and what must change."""

    eraser: Callable[[], TunedEraser]
    component: str
    changes: Callable[[str], bool]
    """The test of a parameter's name: true if it changes, a bias or a norm's among them."""
    numbers: int
    """How many numbers these are."""
    what: str


def _in_cross_attention(name: str) -> bool:
    return ".attn2." in name


def _reads_text(name: str) -> bool:
    return ".attn2.to_k." in name or ".attn2.to_v." in name


def _in_blocks(name: str) -> bool:
    """Return whether a weight belongs to a linear map or a convolution inside the transformer blocks."""
    return ".attentions." in name and name.endswith(".weight") and "norm" not in name


CROSS, TEXT_MAPS, BLOCKS, ENCODER = 43_962_560, 19_169_280, 266_977_280, 85_056_000
"""Numbers of SD 1.4: cross-attention, its K and V, all maps of transformer blocks, CLIP less embeddings."""
STEPS: Mapping[str, Step] = {
    "esd": Step(lambda: ESD(**STEP), "unet", _in_cross_attention, CROSS, "ESD-x"),
    "ca": Step(
        lambda: ConceptAblation(guide="counterpart", **STEP), "unet", _reads_text, TEXT_MAPS, "CA, K and V"
    ),
    "spm": Step(lambda: SPM(warmup=0, anchors=4, **STEP), "unet", _in_blocks, BLOCKS, "SPM, 4 anchors"),
    "advunlearn": Step(
        lambda: AdvUnlearn(warmup=0, attack_steps=1, **STEP),
        "text_encoder",
        lambda name: "embedding" not in name,
        ENCODER,
        "AdvUnlearn, attacked, 5 prompts retained",
    ),
    "stereo": Step(
        lambda: STEREO(
            variant="x",
            rounds=1,
            round_iterations=1,
            inversion_steps=1,
            pictures=1,
            initial="object",
            **STEP,
        ),
        "unet",
        _in_cross_attention,
        CROSS,
        "STEREO on cross-attention, a round",
    ),
    "mace": Step(
        lambda: MACE(masks="whole", pictures=1, ridge=0.1, **STEP), "unet", _reads_text, TEXT_MAPS, "MACE"
    ),
    "hardened": Step(
        lambda: Hardened(
            trainable="*.attn2.*",
            learnt=1,
            moved=1,
            keyed=0,
            other=0,
            keep=1,
            unconditional=1,
            pool=1,
            visited=1,
            learnt_steps=1,
            moved_steps=1,
            concept_runs=1,
            keep_runs=1,
            unconditional_runs=1,
            draws=1,
            early_steps=2,
            other_from=0,
            **STEP,
        ),
        "unet",
        _in_cross_attention,
        CROSS,
        "hardened on cross-attention, 4 points",
    ),
}


def peak_of(name: str, side: int = SIDE) -> float:
    """Return the peak in GB of one step of a method at SD 1.4's size."""
    limit()
    adapter = StableDiffusionAdapter(networks.pipeline(), resolution=8 * side)
    forget_peak()
    numbers = one_step(STEPS[name], adapter)
    peak = peak_gb()
    assert numbers == STEPS[name].numbers, f"{name}: {numbers} numbers have changed"
    return peak


def one_step(step: Step, adapter: StableDiffusionAdapter) -> int:
    """Run one step, check that what changes is what must, and return how many numbers that is."""
    before = {component: _marks(network) for component, network in adapter.networks().items()}
    with tempfile.TemporaryDirectory() as folder:
        result = step.eraser().erase(job_of(adapter, Path(folder)))
    for component, network in adapter.networks().items():
        after = _marks(network)
        moved = {key for key, mark in after.items() if mark != before[component][key]}
        expected = {key for key in after if step.changes(key)} if component == step.component else set()
        assert moved == expected, f"{step.what}, {component}: {sorted(moved ^ expected)[:5]}"
    (changed,) = result.changed.values()
    assert [*result.changed] == [step.component] and all(map(step.changes, changed))
    return sum(tensor.numel() for tensor in changed.values())


def _marks(network: torch.nn.Module) -> dict[str, str]:
    """Return a hash of each parameter."""
    return {name: tensors_fingerprint({name: parameter}) for name, parameter in network.named_parameters()}


def job_of(
    adapter: StableDiffusionAdapter, folder: Path, place: TrainerConfig = CPU, *callbacks: pl.Callback
) -> Job:
    """Return a job of one process, without checkpoints."""

    def fit(module: pl.LightningModule, data: pl.LightningDataModule, part: str) -> None:
        make_trainer(place, folder, callbacks=callbacks).fit(module, data)

    return Job(
        adapter,
        [CONCEPT],
        [CONCEPT],
        make_trainer(place, folder),
        folder / "cache",
        "SD 1.4's networks with random weights",
        0,
        lambda: list(KEPT),
        fit,
        lambda part: nullcontext(),
    )


def run() -> list[Row]:
    """Measure all, one after another."""
    what = f"peak memory of a step at SD 1.4's size, {SIDE}×{SIDE} latents: "
    return [Row(what + step.what, alone(peak_of, name), "GB", most=14) for name, step in STEPS.items()]
