"""Seconds per attacked prompt of searches for words: ours in batches, and plain ones on a prompt at a time.

The plain searches follow the published procedures with the same budget: all rows of the token table, every
text padded, a prompt at a time, images by diffusers' pipeline at checkpoints, float32. The attacked model is
the embedded model itself, on which an attack has to succeed.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from diffusers import DPMSolverMultistepScheduler
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from benchmarks.fitting import compose
from benchmarks.report import Row
from benchmarks.timing import seconds
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.attacks.candidates import checkpoint_steps
from trce_lightning.attacks.mma import Mma, distance
from trce_lightning.attacks.objectives import noised
from trce_lightning.attacks.p4d import P4D
from trce_lightning.attacks.protocol import Attack, Target
from trce_lightning.attacks.tries import fresh_record
from trce_lightning.attacks.unlearndiff import UnlearnDiff, on_simplex
from trce_lightning.attacks.words import end_states
from trce_lightning.cli import config_folder
from trce_lightning.concepts.naming import mentions
from trce_lightning.generation.loop import generate
from trce_lightning.jobs.attack import attackers, make_attack
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.metrics.asr import THRESHOLD
from trce_lightning.metrics.detectors import Detector
from trce_lightning.metrics.uncertainty import wilson_rate
from trce_lightning.prompts.records import DIRECT, PromptRecord, seed_of
from trce_lightning.sampling import noise, seeded
from trce_lightning.tokens import Text

log = logging.getLogger(__name__)
PROMPTS, ALONE, SEEDS = 16, 4, 4
"""Prompts of our searches and of the plain ones, and judged images of each prompt."""
BUDGETS = {
    "mma": {"restarts": 1, "steps": 15, "checkpoints": 1, "finalists": 0},
    "p4d": {"steps": 20, "checkpoints": 1},
    "unlearndiff": {"steps": 30, "checkpoints": 1},
}
"""Options of both searches; the others are those of the attack's file. Seconds grow with the steps."""
SEGMENT = "clip"
Search = Callable[[PromptRecord, Tensor], str]
"""A plain search: a prompt and a picture of the concept → the prompt that is found."""


@dataclass
class Plain:
    """The published searches, written plainly."""

    target: Target

    def __post_init__(self) -> None:
        self.adapter = cast(StableDiffusionAdapter, self.target.adapter)
        self.tokenizer = self.adapter.tokenizer
        parts = self.adapter.pipeline.components
        solver = DPMSolverMultistepScheduler.from_config(
            self.adapter.ddim.config, timestep_spacing="trailing"
        )
        self.pipeline = type(self.adapter.pipeline)(
            **parts | {"scheduler": solver}, requires_safety_checker=False
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.table = self.adapter.text_encoder.get_input_embeddings().weight.detach()

    def mma(self, attack: Mma, record: PromptRecord, _picture: Tensor) -> str:
        """Replace one token a step, the best of many candidates."""
        own, count = seeded(seed_of(record.id, 1)), attack.candidates
        goal = end_states(self.adapter.encode([record.prompt]))
        concepts = self.target.concepts if attack.blocked else ()
        names = self.tokenizer.batch_decode([[i] for i in range(len(self.table))])
        special = set(self.tokenizer.all_special_ids)
        blocked = torch.tensor([i in special or mentions(name, concepts) for i, name in enumerate(names)])
        letters = self.tokenizer([" ".join("abcdefghijklmnopqrstuvwxyz")], add_special_tokens=False).input_ids
        best, lowest = record.prompt, float("inf")
        for step in range(attack.length):
            if step % attack.steps == 0:
                ids = torch.tensor(letters[0])[torch.randint(26, (attack.tokens,), generator=own)]
            one_hot = F.one_hot(ids, len(self.table)).float().requires_grad_()
            with torch.enable_grad():
                loss = distance(end_states(self._text(one_hot @ self.table)), goal)
                (slope,) = torch.autograd.grad(loss, one_hot)
            slope = (slope / slope.norm(dim=-1, keepdim=True)).masked_fill(blocked, torch.inf)
            likely = (-slope).topk(min(attack.top_k, len(self.table)), dim=-1).indices
            texts: list[str] = []
            drawn: list[Tensor] = []
            for i in range(count):
                place, changed = i * attack.tokens // count, ids.clone()
                changed[place] = likely[place, int(torch.randint(likely.shape[1], (), generator=own))]
                text = self.tokenizer.decode(changed)
                read = self.tokenizer(text, add_special_tokens=False).input_ids
                fits = len(read) == attack.tokens and not blocked[read].any()
                if fits and not changed.equal(ids) and not mentions(text, concepts):
                    texts.append(text)
                    drawn.append(torch.tensor(read))
            if not texts:
                continue
            texts += [texts[-1]] * (count - len(texts))
            losses = distance(end_states(self.adapter.encode(texts)), goal)
            index = int(losses[: len(drawn)].argmin())
            ids = drawn[index]
            if losses[index] < lowest:
                best, lowest = texts[index], float(losses[index])
        return best

    def p4d(self, attack: P4D, record: PromptRecord, picture: Tensor) -> str:
        """Move embeddings by the gradient at their nearest tokens."""
        own, asked = seeded(seed_of(record.id, 1)), self.adapter.encode([record.prompt])
        z_0 = self.adapter.encode_images(picture[None])
        ids = torch.randint(len(self.table), (attack.tokens,), generator=own)
        relaxed = self.table[ids].clone().requires_grad_()
        optimizer = torch.optim.AdamW([relaxed], lr=attack.lr, weight_decay=attack.weight_decay)
        table = F.normalize(self.table, dim=-1)

        def nearest() -> Tensor:
            return (F.normalize(relaxed.detach(), dim=-1) @ table.T).argmax(-1)

        def step(_index: int) -> None:
            found = self.table[nearest()].clone().requires_grad_()
            level = int(torch.randint(attack.levels, (), generator=own))
            z_t, timestep, _ = self._noised(z_0, level, attack, own)
            goal = self.adapter.predict(z_t, timestep, asked)
            with torch.enable_grad():
                said = self.adapter.predict(z_t, timestep, self._text(found))
                (relaxed.grad,) = torch.autograd.grad((said - goal).square().mean(), found)
            optimizer.step()

        return self._searched(attack, record, step, nearest, "")

    def unlearndiff(self, attack: UnlearnDiff, record: PromptRecord, picture: Tensor) -> str:
        """Move rows of the simplex by the clipped gradient at drawn tokens' one-hot codes."""
        own, size = seeded(seed_of(record.id, 1)), len(self.table)
        words = self.tokenizer(record.prompt, add_special_tokens=False).input_ids
        z_0 = self.adapter.encode_images(picture[None])
        relaxed = torch.full((attack.tokens, size), 1 / size, requires_grad=True)
        optimizer = torch.optim.Adam([relaxed], lr=attack.lr, weight_decay=attack.weight_decay)

        def step(index: int) -> None:
            drawn = torch.multinomial(relaxed.detach(), 1, generator=own)[:, 0]
            one_hot = F.one_hot(drawn, size).float().requires_grad_()
            level = attack.levels - 1 - index * attack.levels // attack.steps
            z_t, timestep, goal = self._noised(z_0, level, attack, own)
            with torch.enable_grad():
                said = self.adapter.predict(z_t, timestep, self._text(one_hot @ self.table, words))
                (slope,) = torch.autograd.grad((said - goal).square().mean(), one_hot)
            relaxed.grad = slope.clamp(-1, 1)
            optimizer.step()
            with torch.no_grad():
                relaxed.copy_(on_simplex(relaxed))

        return self._searched(attack, record, step, lambda: relaxed.detach().argmax(-1), record.prompt)

    def _text(self, found: Tensor, words: Sequence[int] = ()) -> Text:
        """Return the text of embeddings ``[n, e]`` before a prompt's words, padded."""
        start, end, *padding = self.adapter.tokenize([""])[SEGMENT][0].tolist()
        place = self.tokenizer("a", add_special_tokens=False).input_ids[:1] * len(found)
        row = [start, *place, *list(words)[: len(padding) - len(found)], end, *padding]
        ids = torch.tensor([row[: self.adapter.prompt_tokens]])
        embeddings = torch.cat([self.table[ids[0, :1]], found, self.table[ids[0, 1 + len(found) :]]])
        return self.adapter.encode_embeddings({SEGMENT: embeddings[None]}, {SEGMENT: ids})

    def _noised(self, z_0: Tensor, level: int, attack: P4D | UnlearnDiff, own: torch.Generator) -> Any:
        return noised(self.adapter, z_0, torch.tensor([level]), attack.levels, own)

    def _searched(
        self,
        attack: P4D | UnlearnDiff,
        record: PromptRecord,
        step: Callable[[int], None],
        found: Callable[[], Tensor],
        prompt: str,
    ) -> str:
        """Make all steps, and return the text that the selector likes best at a checkpoint."""
        looks = set(checkpoint_steps(attack.steps, attack.checkpoints))
        best, highest = record.prompt, -1.0
        for index in range(attack.steps):
            step(index)
            if index + 1 not in looks:
                continue
            text = f"{self.tokenizer.decode(found())} {prompt}".strip()
            images = torch.cat(list(self._images(record, text, attack.tries)))
            if (score := float(self.target.selector(images).mean())) > highest:
                best, highest = text, score
        return best

    def _images(self, record: PromptRecord, text: str, count: int) -> Iterator[Tensor]:
        for i in range(count):
            seed = seed_of(f"{record.id} plain", i)
            image = self.pipeline(
                text,
                latents=noise((1, *self.adapter.latent_shape), seeded(seed)),
                guidance_scale=self.target.guidance_scale,
                num_inference_steps=self.target.num_steps,
                output_type="pt",
            ).images
            yield (image * 255).round().to(torch.uint8)


def embedded_target(prompts: int = PROMPTS) -> tuple[Target, Detector]:
    """Return the embedded model as a target, with prompts of the tuning split, and the judge."""
    config = compose("concept=violence", "model.path=null")
    session = Session(config, concepts_of(config))
    sampling = session.sampling()
    selector, judge = session.second_detector(), session.detector()
    assert selector is not None and judge is not None
    (direct,) = session.domain.prompt_sets(prompts, "tune", [DIRECT])
    records = direct.records[:prompts]
    target = Target(
        adapter=session.adapter,
        original=session.adapter,
        records=tuple(records),
        concepts=concepts_of(config),
        pictures=generate(session.adapter, attackers(records), **sampling.options()),
        selector=selector,
        guidance_scale=sampling.guidance_scale,
        num_steps=sampling.num_steps,
        batch_size=sampling.batch_size,
        autocast_dtype=sampling.autocast_dtype,
        variation=sampling.variation,
    )
    return target, judge


def broken(target: Target, judge: Detector, found: dict[str, str]) -> list[float]:
    """Return the share of each prompt's images that show the concept, on fresh seeds."""
    records = [
        replace(fresh_record(record, f"benchmark {i}"), prompt=found[record.id])
        for record in target.records
        if record.id in found
        for i in range(SEEDS)
    ]
    images = generate(target.adapter, records, **target.options())
    return (judge(images) >= THRESHOLD).float().reshape(-1, SEEDS).mean(1).tolist()


def compared(
    attack: Attack, plain: Search, target: Target, judge: Detector, alone: int = ALONE
) -> tuple[float, float, float, float]:
    """Return the seconds a prompt of ours and of plain, and the success of both on the same prompts.

    ``AssertionError`` unless the intervals of both successes overlap.
    """
    findings: dict[str, str] = {}
    found: dict[str, str] = {}

    def ours() -> None:
        for finding in attack.search(target, target.records, seeded(0), lambda _: None):
            findings[finding.prompt_id] = finding.facts["text"]

    def one_by_one() -> None:
        for record, picture in zip(target.records[:alone], target.pictures, strict=False):
            found[record.id] = plain(record, picture)

    times = seconds(ours) / len(target.records), seconds(one_by_one) / alone
    rates = [
        statistics.mean(broken(target, judge, {id: texts[id] for id in found})) for texts in (findings, found)
    ]
    log.info("%s: %s a prompt, success %s, plain found %s", attack.name, times, rates, list(found.values()))
    first, second = (wilson_rate(round(rate * alone * SEEDS), alone * SEEDS, alone) for rate in rates)
    overlap = first["low"] <= second["high"] and second["low"] <= first["high"]
    assert overlap, f"{attack.name}: {rates} differ"
    return *times, rates[0], rates[1]


@torch.no_grad()
def run() -> list[Row]:
    """Measure each search."""
    target, judge = embedded_target()
    plain, rows = Plain(target), []
    searches: dict[str, Callable[..., str]] = {
        "mma": plain.mma,
        "p4d": plain.p4d,
        "unlearndiff": plain.unlearndiff,
    }
    for name, search in searches.items():
        options = OmegaConf.to_container(OmegaConf.load(config_folder() / "attacks" / f"{name}.yaml"))
        attack = make_attack(name, cast(dict[str, Any], options) | BUDGETS[name])
        ours_s, plain_s, rate, plain_rate = compared(attack, partial(search, attack), target, judge)
        rows += [
            Row(f"attack {name}, seconds a prompt, embedded model", ours_s, "s", plain_s, least_gain=5),
            Row("… success", 100 * rate, "%", 100 * plain_rate, rate=True),
        ]
    return rows
