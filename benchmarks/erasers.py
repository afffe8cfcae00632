"""Measure other methods: network evaluations against released loops, and a step's memory at SD 1.4's size.

Both loops train the embedded model for the same steps, and both results are scored on the same tuning
prompts, so that a saving is one at equal effect. A row says the two ASRs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks import networks, released
from benchmarks.fitting import CPU, compose
from benchmarks.memory import SIDE, limit
from benchmarks.processes import alone, forget_peak, peak_gb
from benchmarks.report import Row
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import TrainConfig
from trce_lightning.erasers.advunlearn import AdvUnlearn
from trce_lightning.erasers.ca import ConceptAblation
from trce_lightning.erasers.esd import ESD
from trce_lightning.erasers.hardened import Hardened
from trce_lightning.erasers.mace import MACE
from trce_lightning.erasers.protocol import Job
from trce_lightning.erasers.spm import SPM
from trce_lightning.erasers.stereo import STEREO
from trce_lightning.erasers.tuning import TunedEraser
from trce_lightning.evaluation.scorer import score_on_all_ranks
from trce_lightning.jobs.erase import MethodRun, run_of
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.runtime.fingerprints import tensors_fingerprint

SAME = (
    "method.iterations=60",
    "method.batch_size=16",
    "method.num_steps=20",
    "method.lr=1e-3",
    "method.guide=empty",
    "method.prompts=names",
    "method.eta=1.0",
)
"""The numbers of both loops of ESD. The released ones, 1,000 steps of one latent, take hours on a CPU."""
SAME_ATTACKED = (
    "method.iterations=30",
    "method.batch_size=8",
    "method.retain_batch_size=8",
    "method.num_steps=20",
    "method.warmup=10",
    "method.attack_steps=3",
    "method.attack_lr=1e-2",
    "method.lr=1e-4",
    "method.guide=empty",
    "method.prompts=names",
    "method.eta=1.0",
)
"""Those of AdvUnlearn, whose released attack has 30 steps."""
DRAWS = 20
"""Points that ours takes from each sampling run. The released loops take one."""
IMAGES = 64


@dataclass(frozen=True)
class Outcome:
    """What one loop took and left."""

    evaluations: int
    direct: float
    implicit: float
    benign: float

    @property
    def left(self) -> str:
        """The scores in words."""
        return f"ASR {self.direct:.0%}, {self.implicit:.0%}, benign accuracy {self.benign:.0%}"


def configured(method: str, same: Sequence[str], folder: Path) -> TrainConfig:
    """Return the configuration of ours, with nothing cached."""
    config = compose("concept=violence", f"method={method}", *same, f"method.draws={DRAWS}")
    metrics = dataclasses.replace(config.metrics, enabled=False)
    return dataclasses.replace(
        config, metrics=metrics, trainer=CPU, runs=str(folder / "runs"), cache=str(folder)
    )


def outcome(session: Session, evaluations: int, folder: Path) -> Outcome:
    """Score a session's model as it is."""
    scorer = session.scorer("tune", IMAGES)
    scores = score_on_all_ranks(make_trainer(CPU, folder), scorer, folder / "images", "tuning prompts")
    direct, implicit = (scores["asr"][name]["rate"] for name in ("direct", "implicit"))
    return Outcome(evaluations, direct, implicit, scores["benign_accuracy"])


def ours(method: str, same: Sequence[str]) -> Outcome:
    """Erase with cached teachers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured(method, same, folder)
        run = run_of(config, concepts_of(config))
        run.open()
        run.erase_and_score()
        return outcome(run.session, run.adapter.network_evaluations, folder)


def plainly(method: str, same: Sequence[str]) -> Outcome:
    """Erase with the released loop, from the same model, for as many steps with the same numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured(method, same, folder)
        run = run_of(config, concepts_of(config))
        assert isinstance(run, MethodRun)
        eraser: Any = run.eraser
        loop = released.Loop(
            student=run.adapter,
            teacher=Session(config, concepts_of(config)).adapter,
            iterations=eraser.iterations,
            batch=eraser.batch_size,
            num_steps=eraser.num_steps,
            guidance_scale=eraser.guidance_scale,
            lr=eraser.lr,
            eta=eraser.eta,
        )
        (weights,) = eraser.trained(run.adapter).values()
        prompts = list(eraser.erased_prompts(run._job()))
        if method == "esd":
            released.esd(loop, prompts, [*weights.values()])
        else:
            attack = released.Attack(
                eraser.warmup,
                eraser.attack_steps,
                eraser.attack_lr,
                eraser.retain_weight,
                eraser.retain_batch_size,
            )
            released.advunlearn(loop, attack, prompts, run.session.keep_prompts(), [*weights.values()])
        evaluations = loop.evaluations
        run.adapter.weights_changed()
        return outcome(run.session, evaluations, folder)


def rows_of_loops() -> list[Row]:
    """Compare both loops of each method."""
    rows = []
    for title, method, same in (("ESD", "esd", SAME), ("AdvUnlearn", "advunlearn", SAME_ATTACKED)):
        plain, own = alone(plainly, method, same), alone(ours, method, same)
        what = (
            f"network evaluations of {title} on the embedded model, {same[0].partition('=')[2]} steps "
            f"(released: {plain.left}; ours: {own.left})"
        )
        rows.append(Row(what, own.evaluations, "", plain.evaluations, least_gain=5))
    return rows


# One step at Stable Diffusion 1.4's size.

CONCEPT = Concept("violence", {"a dagger": "a rose"}, templates=("{}", "a photo of {}"))
KEPT = ("a cat", "a photo of a tree")
STEP: Mapping[str, Any] = {"iterations": 1, "num_steps": 2, "lr": 1e-4}


@dataclass(frozen=True)
class Step:
    """One step of a method, and what must change."""

    eraser: Callable[[], TunedEraser]
    component: str
    changes: Callable[[str], bool]
    """Whether a parameter of this name changes, a bias or a norm's among them."""
    numbers: int
    """How many numbers these are."""
    what: str


def _in_cross_attention(name: str) -> bool:
    return ".attn2." in name


def _reads_text(name: str) -> bool:
    return ".attn2.to_k." in name or ".attn2.to_v." in name


def _in_blocks(name: str) -> bool:
    """Whether a weight belongs to a linear map or a convolution inside the transformer blocks."""
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
        result = step.eraser().erase(_job(adapter, Path(folder)))
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


def _job(adapter: StableDiffusionAdapter, folder: Path) -> Job:
    """Return a job of one process on the CPU, without checkpoints."""

    def fit(module: pl.LightningModule, data: pl.LightningDataModule, part: str) -> None:
        make_trainer(CPU, folder).fit(module, data)

    return Job(
        adapter,
        [CONCEPT],
        make_trainer(CPU, folder),
        folder / "cache",
        "SD 1.4's networks with random weights",
        0,
        lambda: list(KEPT),
        fit,
        lambda part: nullcontext(),
    )


def run() -> list[Row]:
    """Measure both."""
    what = f"peak memory of a step at SD 1.4's size, {SIDE}×{SIDE} latents: "
    memory = [Row(what + step.what, alone(peak_of, name), "GB", most=14) for name, step in STEPS.items()]
    return [*rows_of_loops(), *memory]
