"""Measure what other methods take, against the training loops of their released code.

Both loops train the embedded model with the options that tuning chose for it, and both results are scored on
the same tuning prompts, so that a saving is one at equal effect. A row says the two ASRs. Ours takes several
points from each sampling run (``draws``), and the released loops take one.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import released
from benchmarks.fitting import CPU, compose
from benchmarks.processes import alone
from benchmarks.report import Row
from trce_lightning.config.schema import TrainConfig
from trce_lightning.erasers.texts import erased_pairs
from trce_lightning.evaluation.scorer import score_on_all_ranks
from trce_lightning.jobs.erase import MethodRun, run_of
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.trainers import make_trainer

IMAGES = 64


@dataclass(frozen=True)
class Outcome:
    """The cost and the result of one loop."""

    evaluations: int
    direct: float
    implicit: float
    benign: float

    @property
    def left(self) -> str:
        """The scores in words."""
        return f"ASR {self.direct:.0%}, {self.implicit:.0%}, benign accuracy {self.benign:.0%}"


def configured(method: str, folder: Path) -> TrainConfig:
    """Return the configuration of ours, with nothing cached."""
    config = compose("concept=violence", f"method={method}")
    metrics = dataclasses.replace(config.metrics, enabled=False)
    return dataclasses.replace(
        config,
        metrics=metrics,
        trainer=dataclasses.replace(CPU, enable_progress_bar=True),
        runs=str(folder / "runs"),
        cache=str(folder),
    )


def outcome(session: Session, evaluations: int, folder: Path) -> Outcome:
    """Score a session's model as it is."""
    scorer = session.scorer("tune", IMAGES)
    scores = score_on_all_ranks(make_trainer(CPU, folder), scorer, folder / "images", "tuning prompts")
    direct, implicit = (scores["asr"][name]["rate"] for name in ("direct", "implicit"))
    return Outcome(evaluations, direct, implicit, scores["benign_accuracy"])


def ours(method: str) -> Outcome:
    """Erase with cached teachers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured(method, folder)
        run = run_of(config, concepts_of(config))
        run.open()
        run.erase_and_score()
        return outcome(run.session, run.adapter.network_evaluations, folder)


def plainly(method: str) -> Outcome:
    """Erase with the released loop, from the same model, for as many steps with the same numbers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configured(method, folder)
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
        pairs = erased_pairs(run.session.concepts, eraser.prompts, eraser.guide)
        prompts = [pair.malicious for pair in pairs]
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


def run() -> list[Row]:
    """Compare both loops of each method."""
    rows = []
    for title, method in (("ESD", "esd"), ("AdvUnlearn", "advunlearn")):
        plain, own = alone(plainly, method), alone(ours, method)
        steps = configured(method, Path()).method["iterations"]
        what = (
            f"network evaluations of {title} on the embedded model, {steps} steps "
            f"(released: {plain.left}; ours: {own.left})"
        )
        rows.append(Row(what, own.evaluations, "", plain.evaluations, least_gain=5))
    return rows
