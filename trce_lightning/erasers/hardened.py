"""Hardened TRCE: training against an adversary that sits in the text, in the place of stage 2.

    min_θ  Σ_kinds mean ‖ε_θ(z_t, e, t) − ε(z_t, c_s, t)‖² / RMS(ε(z_t, c_m, t) − ε(z_t, c_s, t))
           + λ_k mean ‖ε_θ(z_k, c_k, t) − ε(z_k, c_k, t)‖² + λ_∅ mean ‖ε_θ(z, ∅, t) − ε(z, ∅, t)‖²

ε is the original network, z_t lies on its guided sampling run for a malicious prompt c_m, and c_s is the safe
counterpart. c_k are prompts to keep, z_k lies on their runs, and z also on unconditional ones. The division
makes early steps count, where the two predictions differ little. e is a text that may bring the concept back.
There are four kinds:

- *learnt*: vectors in the place of the concept's name. A pool of them is kept, with vectors of its own for
  each concept. Each step moves some of them down the gradient of ‖ε_θ(z_t, e, t) − ε(z_t, c_m, t)‖², so that
  they stay converged while the network changes. Some begin anew from time to time.
- *moved*: E(c_m) + δ with |δ_i| ≤ ρ RMS(E(c_m)_i) at every position i, by steps of projected gradient descent
  on the same objective.
- *keyed*: E(c_m) T⁺ᵀ, what stage 1's matrix maps back to the malicious states, if it comes before. Each
  stream of text that stage 1 edits has its own T. Else it is the malicious prompt itself.
- *other*: prompts to keep and ∅, at later steps, where z_t shows the concept already. So the network doesn't
  complete the concept from a trace of it.

The result is θ_0 + s (θ̄ − θ_0): θ_0 are the weights that training began with, θ̄ the average of the weights
over the steps, and s the strength. s > 1 goes further along the way than training did. Stage 1 comes before
training, after it, or not at all. T depends on the text encoder alone, so it is the same in both places.

This is not in the paper. STEREO (arXiv 2408.16807) and Receler (arXiv 2311.17717) train against adversaries
in embeddings too, and the ball around the states is RACE's (arXiv 2405.16341).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.slots import PLACEHOLDER, Slots, slots_of
from trce_lightning.concepts import Concept, prompt_pairs
from trce_lightning.config.schema import MATRICES, Count, Natural, NonNegative, OneOf, Positive, Share
from trce_lightning.erasers.pool import Pool
from trce_lightning.erasers.protocol import Ahead, Erased, Job, denoiser_name
from trce_lightning.erasers.teachers import EMPTY, draw_walks
from trce_lightning.erasers.tuning import ADAM_BYTES, Batch, Source, TunedEraser, Tuning
from trce_lightning.errors import InputError
from trce_lightning.losses import squared_distance
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import seeded
from trce_lightning.textual import apply_edit_, cached_kept, edited_streams, keys_of, textual_statistics
from trce_lightning.tokens import Text, state_rms, within_ball

KINDS = ("learnt", "moved", "keyed", "other")
"""The texts under which points of the concept are read."""
PLACES = ("none", "before", "after")
NONE, BEFORE, AFTER = PLACES
"""The places where stage 1 may come."""
LEAST = 1e-6
"""The least RMS that a distance is divided by."""
WARMUP = 10
"""The steps in which the learning rate rises."""
LAST_LR = 0.1
"""The learning rate of the last step, as a share of the highest."""
EMPTY_SHARE = 0.4
"""The share of "other" texts that are ∅."""


def relative_distance(prediction: Tensor, safe: Tensor, unsafe: Tensor) -> Tensor:
    """Return ‖ε̂ − ε_s‖² / RMS(ε_m − ε_s), ``[B, C, H, W]`` three times → ``[B]`` float32.

    At ε̂ = ε_m it is RMS(ε_m − ε_s), and at ε̂ = ε_s it is 0.
    """
    return squared_distance(prediction, safe) / squared_distance(unsafe, safe).sqrt().clamp_min(LEAST)


@dataclass(frozen=True)
class Rows:
    """Cached points: latents, timesteps, the teacher's predictions ``[B, texts, C, H, W]``, and prompts."""

    z_t: Tensor
    timestep: Tensor
    predictions: Tensor
    prompts: list[str]

    @staticmethod
    def of(rows: Batch) -> Rows:
        """Return the points of one kind of a batch. Their prompt is the first text."""
        prompts = [texts[0] for texts in rows["texts"]]
        return Rows(rows["z_t"], rows["timestep"], rows["predictions"], prompts)

    def __len__(self) -> int:
        return len(self.z_t)

    def part(self, start: int, stop: int) -> Rows:
        """Return the points from ``start`` to ``stop``."""
        rows = slice(start, stop)
        return Rows(self.z_t[rows], self.timestep[rows], self.predictions[rows], self.prompts[rows])


class Hardening(Tuning):
    """The network in training, beside its adversary.

    Args:
        eraser: the method.
        job: the job.
        keys: by segment of text the matrix, ``[w, w]``, which maps states to those that stage 1 maps back;
            see :func:`keys_of`. Without stage 1 there is none.
    """

    def __init__(self, eraser: Hardened, job: Job, keys: Mapping[str, Tensor]) -> None:
        super().__init__(eraser, job.adapter, eraser.trained(job.adapter), seed=job.seed)
        adapter = job.adapter
        self.slots = eraser.slots(job)
        self.keys = {segment: key.float() for segment, key in keys.items()}
        pairs = prompt_pairs(eraser.trained_concepts(job)).values()
        self.concept_of = {pair.malicious: index for index, rows in enumerate(pairs) for pair in rows}
        self.concepts = len(job.concepts)
        begin = {
            name: adapter.embed({name: ids[None]})[name][0] for name, ids in adapter.vocabulary().items()
        }
        entries = eraser.pool * self.concepts
        self.pool = Pool(begin, entries, eraser.vectors, seeded(seed_of("pool", job.seed)))
        self.empty = adapter.empty()
        own = nn.ParameterList([weight.detach().float() for weight in self.parameters_in_training()])
        self.begun = [weight.detach().clone() for weight in own]
        # It keeps a copy of the parameters. The network itself stays the only one.
        self.average = AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(eraser.average_decay))
        self.average.requires_grad_(False)

    def changed_tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors, their average and the pool's, so that a continued fit goes on alike."""
        parts = {"pool": self.pool, "average": self.average}
        states = {
            f"{part}.{name}": own
            for part, module in parts.items()
            for name, own in module.state_dict().items()
        }
        return super().changed_tensors() | states

    def average_weights(self) -> None:
        """Let the average follow the weights of the last step."""
        self.average.update_parameters(nn.ParameterList(self.parameters_in_training()))

    def take_average(self, strength: float) -> None:
        """Replace the weights by θ_0 + s (θ̄ − θ_0), where s is the ``strength``.

        θ_0 are the weights before training, and θ̄ their average over the steps, the last one among them.
        """
        self.average_weights()
        averaged = self.average.module.parameters()
        for weight, before, mean in zip(self.parameters_in_training(), self.begun, averaged, strict=True):
            weight.data.copy_(torch.lerp(before.to(mean), mean, strength))

    def common_generator(self, step: int, purpose: str) -> torch.Generator:
        """Return a CPU generator of this step that all ranks share."""
        return seeded(seed_of(f"{purpose} {self.seed}", step))

    def averaged(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients averaged over the ranks, so that all move their pools alike."""
        if self.trainer.world_size == 1:
            return dict(gradients)
        reduce = self.trainer.strategy.reduce
        return {name: reduce(gradient, reduce_op="mean") for name, gradient in gradients.items()}


@dataclass(kw_only=True)
class Hardened(TunedEraser):
    """Train against learnt, moved, keyed and other texts, and apply stage 1 where ``edit`` says.

    ``textual.*`` has the options of stage 1.

    Args:
        edit: ``before`` or ``after`` training for stage 1 there, ``none`` for no stage 1.
        scenes: True if training reads the sentences of ``scene_templates``, too. Stage 1 always reads them.
        draws: points of each sampling run, if it has as many.
        trainable: fnmatch pattern of the denoiser's modules that train.
        learnt: points of each step that are read under the pool's embeddings.
        moved: points of each step that are read under states moved within a ball.
        keyed: points of each step that are read under states that undo stage 1.
        other: points of each step that are read under prompts to keep and ∅.
        keep: points of prompts to keep in each step, read under their own prompt.
        unconditional: points in each step, of prompts to keep and of unconditional runs, read under ∅.
        keep_weight: λ_k.
        unconditional_weight: λ_∅.
        pool: entries of the pool for each concept.
        visited: entries that move in each step; each of them reads ``learnt / visited`` points.
        vectors: embeddings of an entry, in the place of the concept's name.
        learnt_steps: steps of Adam of the visited entries.
        learnt_lr: their learning rate.
        anew_share: the share of the entries that begin anew.
        anew_every: the steps between such beginnings.
        radius: ρ, the radius of the ball as a share of the RMS of each position's states.
        moved_steps: steps of projected gradient descent in the ball.
        concept_runs: sampling runs of malicious prompts, whose points are reused.
        keep_runs: sampling runs of prompts to keep.
        unconditional_runs: unconditional sampling runs.
        average_decay: decay of the average of the weights over the steps.
        strength: s, how far the result goes on the way from the first weights to their average, which is 1.
        early_steps: points of the concept come from so many first steps.
        other_from: the first step whose points are read under other texts.
    """

    scenes: bool = True
    draws: Count = 10
    edit: Annotated[str, OneOf(PLACES)] = "none"
    trainable: str = "*"
    learnt: Count = 16
    moved: Natural = 12
    keyed: Natural = 6
    other: Natural = 6
    keep: Count = 24
    unconditional: Count = 8
    keep_weight: NonNegative = 120.0
    unconditional_weight: NonNegative = 120.0
    pool: Count = 24
    visited: Count = 4
    vectors: Count = 2
    learnt_steps: Natural = 2
    learnt_lr: Positive = 0.02
    anew_share: Share = 0.25
    anew_every: Count = 40
    radius: Positive = 0.11
    moved_steps: Natural = 2
    concept_runs: Count = 156
    keep_runs: Count = 900
    unconditional_runs: Count = 40
    average_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.97
    strength: Positive = 1.2
    early_steps: Count = 13
    other_from: Natural = 6
    name: ClassVar[str] = "hardened"
    title: ClassVar[str] = "TRCE (arXiv 2503.07389), hardened by adversarial training"
    bytes_per_number: ClassVar[int] = ADAM_BYTES + 8  # the average, and the weights before training

    def sources(self, job: Job) -> dict[str, Source]:
        """Return points of malicious prompts, late ones among them, of prompts to keep, and of ∅."""
        if not self.other_from < self.early_steps <= self.num_steps:
            raise InputError(
                f"method.early_steps: expected more than method.other_from = {self.other_from} and at most "
                f"method.num_steps = {self.num_steps}, got {self.early_steps}"
            )
        pairs = [pair for rows in prompt_pairs(self.trained_concepts(job)).values() for pair in rows]
        safe, kept = {pair.malicious: pair.safe for pair in pairs}, job.keep_prompts()
        every, early = range(self.num_steps), range(self.early_steps)

        def source(kind: str, prompts: list[str], runs: int, steps: range, per_step: int) -> Source:
            plan = draw_walks(
                kind,
                prompts,
                lambda prompt, _: (prompt, safe.get(prompt, EMPTY)) if prompt else (EMPTY,),
                points=runs * min(self.draws, len(steps)),
                draws=min(self.draws, len(steps)),
                steps=steps,
                num_steps=self.num_steps,
                guidance_scale=self.guidance_scale,
                seed=job.seed,
            )
            return Source(plan, per_step)

        half = self.unconditional // 2
        sources = {
            "concept": source(
                "concept", list(safe), self.concept_runs, early, self.learnt + self.moved + self.keyed
            ),
            "keep": source("keep", kept, self.keep_runs, every, self.keep + half),
            "empty": source("empty", [EMPTY], self.unconditional_runs, every, self.unconditional - half),
        }
        if self.other:
            late = range(self.other_from, self.early_steps)
            sources["late"] = source("late", list(safe), self.concept_runs // 2 or 1, late, self.other)
        return sources

    def trained_concepts(self, job: Job) -> Sequence[Concept]:
        """Return the concepts whose prompts training reads."""
        return job.concepts if self.scenes else job.alone

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return the denoiser's parameters that ``trainable`` names."""
        return {denoiser_name(adapter): adapter.trainable(self.trainable, "method.trainable")}

    def ahead(self, job: Job) -> Ahead:
        """Return the work ahead. If the points can't be shared out, raise ``InputError``."""
        world_size = job.trainer.world_size
        counts = {kind: getattr(self, kind) for kind in (*KINDS, "keep", "unconditional")}
        for name, count in counts.items():
            shares = 2 * world_size if name == "unconditional" else world_size
            if count % shares:
                raise InputError(
                    f"method.{name}: expected a multiple of {shares}, since {world_size} processes share the "
                    f"points, got {count}"
                )
        if self.learnt % (world_size * self.visited) or self.visited > self.pool:
            raise InputError(
                f"method.visited: expected at most method.pool = {self.pool} entries, which share "
                f"method.learnt = {self.learnt} points of {world_size} processes evenly, got {self.visited}"
            )
        if self.edit == BEFORE and self.keyed and set(job.textual.matrices) != set(MATRICES):
            raise InputError(
                "textual.matrices: expected keys and values with method.keyed > 0, since no state undoes an "
                f"edit of one of them, got {job.textual.matrices}"
            )
        if self.edit != NONE:
            edited_streams(job.adapter, job.textual)
        self.slots(job)
        return super().ahead(job)

    @property
    def evaluations_per_step(self) -> int:
        """Return the network evaluations of a step: those of the adversary, and those of the losses."""
        attacking = self.learnt_steps * self.learnt + self.moved_steps * self.moved
        erased = self.learnt + self.moved + self.keyed + self.other
        return attacking + erased + self.keep + self.unconditional

    def lr_factor(self, step: int) -> float:
        """Return a short rise and then half a cosine down to :data:`LAST_LR`."""
        fall = (1 + math.cos(math.pi * min(1.0, step / self.iterations))) / 2
        return min(1.0, (step + 1) / WARMUP) * (LAST_LR + (1 - LAST_LR) * fall)

    def weight_of(self, term: str) -> float:
        """Return the weight of a term. The four kinds of texts weigh alike, however many points they have."""
        weights = {"keep": self.keep_weight, "unconditional": self.unconditional_weight}
        return weights.get(term, 1.0)

    def factor_of(self, term: str) -> str:
        """Return a term's weight, or what moves the adversary in it."""
        others = {"unconditional": "unconditional_weight", "learnt": "learnt_lr", "moved": "radius"}
        return others.get(term, "keep_weight")

    def slots(self, job: Job) -> Slots:
        """Return the sentences of all concepts' templates, with free places for the concept's name.

        Sentences that the model can't read whole are left out. If all are, raise ``InputError``.
        """
        adapter = job.adapter
        templates = dict.fromkeys(
            each for concept in self.trained_concepts(job) for each in concept.templates
        )
        prompts = [template.format(PLACEHOLDER) for template in templates]
        word = _foreign_word(adapter, " ".join(prompts))
        counts = adapter.token_counts([prompt.replace(PLACEHOLDER, word) for prompt in prompts])
        room = adapter.prompt_tokens - self.vectors
        fitting = [prompt for prompt, count in zip(prompts, counts, strict=True) if count <= room]
        return slots_of(adapter, fitting or prompts, word, self.vectors, "method")

    def module(self, job: Job) -> Hardening:
        """Apply stage 1, if it comes before, and return the module that is fitted."""
        self._edited: dict[str, nn.Parameter] = {}
        self._files: dict[str, Mapping[str, Tensor]] = {}
        if self.edit != BEFORE:
            return Hardening(self, job, {})
        return Hardening(self, job, keys_of(job.adapter, self.apply_stage_1(job)))

    def apply_stage_1(self, job: Job) -> dict[str, Tensor]:
        """Edit the denoiser as it is, and return stage 1's matrix T of each stream, ``[d, d]``."""
        adapter = job.adapter
        kept = cached_kept(job.trainer, adapter, job.keep_prompts(), job.cache)
        edit = textual_statistics(adapter, job.concepts, kept, job.textual).solve(job.textual)
        names = apply_edit_(adapter, edit)
        self._edited = {name: adapter.denoiser.get_parameter(name) for name in names}
        further = {each.stream: each.transform for each in edit.further}
        files = {f"{name}.transform": transform for name, transform in further.items()}
        self._files = {"edit": {"transform": edit.transform, **files}}
        return {edit.stream: edit.transform, **further}

    def result(self, job: Job, module: Tuning) -> Erased:
        """Apply stage 1, if it comes after, and return what it and training have changed."""
        assert isinstance(module, Hardening)
        module.take_average(self.strength)
        if self.edit == AFTER:
            self.apply_stage_1(job)
        trained = module.trained[denoiser_name(job.adapter)]
        changed = {name: own.detach() for name, own in (trained | self._edited).items()}
        return Erased({denoiser_name(job.adapter): changed}, files=self._files)

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the distances from the safe prediction under each kind of text, and from what is kept.

        The adversary moves first.
        """
        assert isinstance(module, Hardening)
        if batch["step"]:
            module.average_weights()  # a checkpoint of a step is written before the module hears of its end
        ranks = module.trainer.world_size
        concept, kept = Rows.of(batch["concept"]), Rows.of(batch["keep"])
        counts = [getattr(self, kind) // ranks for kind in KINDS[:3]]
        ends = [sum(counts[: index + 1]) for index in range(3)]
        erased = dict(zip(KINDS, map(concept.part, [0, *ends], ends), strict=False))
        own = self.keep // ranks
        parts = {
            "learnt": (erased["learnt"], self.learnt_text(module, erased["learnt"], batch["step"])),
        }
        if self.moved:
            parts["moved"] = (erased["moved"], self.moved_text(module, erased["moved"], batch["step"]))
        if self.keyed:
            parts["keyed"] = (erased["keyed"], self.keyed_text(module, erased["keyed"]))
        if self.other:
            late = Rows.of(batch["late"])
            parts["other"] = (late, self.other_text(module, kept.prompts, len(late), batch["step"]))
        held = kept.part(own, len(kept))
        empty = Rows.of(batch["empty"])
        parts |= {
            "keep": (kept.part(0, own), module.text(kept.prompts[:own])),
            "held": (held, module.empty.to(module.device).expand(len(held))),
            "empty": (empty, module.empty.to(module.device).expand(len(empty))),
        }
        predicted = dict(zip(parts, self._predicted(module, list(parts.values())), strict=True))
        terms = {}
        for kind in KINDS:
            if kind in parts:
                unsafe, safe = parts[kind][0].predictions.unbind(1)
                terms[kind] = relative_distance(predicted[kind], safe, unsafe).mean()
        terms["keep"] = squared_distance(predicted["keep"], parts["keep"][0].predictions[:, 0]).mean()
        under_empty = torch.cat([predicted["held"], predicted["empty"]])
        goal = torch.cat([held.predictions[:, 1], empty.predictions[:, 0]])
        terms["unconditional"] = squared_distance(under_empty, goal).mean()
        return terms

    def _predicted(self, module: Tuning, parts: list[tuple[Rows, Text]]) -> tuple[Tensor, ...]:
        """Return the network's predictions of all parts, from one forward pass."""
        z_t = torch.cat([points.z_t for points, _ in parts])
        timestep = torch.cat([points.timestep for points, _ in parts])
        text = Text.cat([text for _, text in parts])
        return module.adapter.predict(z_t, timestep, text).split([len(points) for points, _ in parts])

    def learnt_text(self, module: Hardening, points: Rows, step: int) -> Text:
        """Move the visited entries, and return their sentences, one for each point, without gradients."""
        pool, common, concepts = module.pool, module.common_generator(step, "entries"), module.concepts
        if step and step % self.anew_every == 0:
            count = int(self.anew_share * self.pool) * concepts
            pool.begin_anew(torch.randperm(self.pool * concepts, generator=common)[:count], common)
        visited = torch.randperm(self.pool, generator=common)[: self.visited]
        # Each visited entry has vectors for every concept, and a point is read under those of its own.
        entries = (visited[:, None] * concepts + torch.arange(concepts)).flatten()
        own = torch.tensor([module.concept_of[prompt] for prompt in points.prompts])
        read = torch.arange(len(points)) // (len(points) // self.visited) * concepts + own
        generator = module.generator(step, "sentences")
        for _ in range(self.learnt_steps):
            vectors = {name: each.requires_grad_(True) for name, each in pool.values(entries).items()}
            text = self._filled(module, vectors, read, generator)
            loss = self.attacked(module.adapter, points, text)
            slopes = dict(zip(vectors, self._slopes(loss, points, vectors), strict=True))
            pool.descend(entries, module.averaged(slopes), self.learnt_lr)
        with torch.no_grad():
            return self._filled(module, pool.values(entries), read, generator)

    def _filled(
        self, module: Hardening, vectors: Mapping[str, Tensor], read: Tensor, generator: torch.Generator
    ) -> Text:
        """Return a sentence for each of ``read``, which says whose vectors it has. Sentences are drawn."""
        some = torch.randint(len(next(iter(module.slots.ids.values()))), read.shape, generator=generator)
        each = {name: own[read] for name, own in vectors.items()}
        return module.slots.rows(some).filled(module.adapter, each)

    @staticmethod
    def _slopes(loss: Tensor, points: Rows, of: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of the sum of ``loss`` over points and over the numbers of a latent.

        A mean over these would underflow in half precision. Neither Adam nor a sign knows the scale.
        """
        return torch.autograd.grad(loss.sum() * points.z_t[0].numel(), list(of.values()))

    def attacked(self, adapter: Adapter, points: Rows, text: Text) -> Tensor:
        """Return the adversary's objective ‖ε̂(z_t, e, t) − ε(z_t, c_m, t)‖² → ``[B]``."""
        return squared_distance(adapter.predict(points.z_t, points.timestep, text), points.predictions[:, 0])

    def moved_text(self, module: Hardening, points: Rows, step: int) -> Text:
        """Return the malicious prompts' states, moved within the ball to the objective's descent.

        δ begins at random in the ball. Each step goes by 2 ρ RMS(E) / steps against the gradient's sign.
        """
        text, generator = module.text(points.prompts), module.generator(step, "moves")
        radius = {name: self.radius * rms for name, rms in state_rms(text).items()}
        delta = {
            name: (2 * torch.rand(own.shape, generator=generator).to(own.device) - 1) * radius[name]
            for name, own in text.states.items()
        }
        for _ in range(self.moved_steps):
            for own in delta.values():
                own.requires_grad_(True)
            moved = Text({name: own + delta[name] for name, own in text.states.items()}, text.roles)
            slopes = self._slopes(self.attacked(module.adapter, points, moved), points, delta)
            step_size = 2 / self.moved_steps
            delta = {
                name: within_ball(own.detach() - step_size * radius[name] * slope.sign(), radius[name])
                for (name, own), slope in zip(delta.items(), slopes, strict=True)
            }
        return Text({name: own + delta[name].detach() for name, own in text.states.items()}, text.roles)

    def keyed_text(self, module: Hardening, points: Rows) -> Text:
        """Return E(c_m) T⁺ᵀ, which stage 1 maps to the malicious prompts' states as far as it can.

        Segments that stage 1 leaves alone stay. Without stage 1, return E(c_m).
        """
        text = module.text(points.prompts)
        states = {
            name: own @ module.keys[name].to(module.device) if name in module.keys else own
            for name, own in text.states.items()
        }
        return Text(states, text.roles)

    def other_text(self, module: Hardening, prompts: list[str], count: int, step: int) -> Text:
        """Return ``count`` texts, each a prompt to keep or, with a chance of :data:`EMPTY_SHARE`, ∅."""
        generator = module.generator(step, "other texts")
        empty = (torch.rand(count, generator=generator) < EMPTY_SHARE).tolist()
        return module.text([EMPTY if empty[row] else prompts[row % len(prompts)] for row in range(count)])


def _foreign_word(adapter: Adapter, sentences: str) -> str:
    """Return a word that the tokenizer leaves whole and that the sentences don't hold. It marks a place."""
    for name, ids in adapter.vocabulary().items():
        for i in ids.tolist():
            word = adapter.detokenize(name, [[i]])[0].strip()
            if word.isalpha() and word not in sentences:
                return word
    raise InputError(f"method=hardened: expected a model with a tokenizer of words, got '{adapter.name}'")
