"""STEREO (arXiv 2408.16807): find what brings the concept back, round by round, then erase all of it at once.

The search has n rounds. Round r begins with the weights of round r − 1 and erases e_{r−1}, where e_0 is the
concept's own text c. Then it learns an embedding e_r that makes the erased network denoise pictures of the
concept:

    min_θ ‖ε_θ(z_t, e_{r−1}, t) − (ε(z_t, g, t) − η (ε(z_t, c, t) − ε(z_t, ∅, t)))‖²
    e_r = argmin_v E ‖ε_θ(z_t', t', template(v)) − goal‖²

Then the weights are the original's again, and e, one of e_0 … e_n, is erased from them:

    min_θ ‖ε_θ(z_t, e, t) − (ε(g) + w_a (ε(a) − ε(∅)) − w_e mean_j (ε(e_j) − ε(∅)))‖²

ε is the original network throughout, and its predictions are cached. z_t lies on its guided sampling runs for
the text to erase. z_t' are its pictures of the concept with noise. The anchor a is a sentence that contains
the concept, so that what else the sentence says stays. g is ∅, or the text with the safe counterpart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.slots import PLACEHOLDER, Slots, initial_vectors, slots_of
from trce_lightning.attacks.inversion import inversion_loss, training_sentences
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import Count, NonNegative, OneOf, Positive
from trce_lightning.erasers.esd import ESD
from trce_lightning.erasers.protocol import Ahead, Cost, Erased, Job, denoiser_name
from trce_lightning.erasers.teachers import (
    EMPTY,
    Encode,
    Teachers,
    Walks,
    finished,
    latent_numbers,
    picture_walks,
    teachers_of,
)
from trce_lightning.erasers.texts import erased_pairs
from trce_lightning.erasers.tuning import ADAM_BYTES, Batch, PictureEraser, PromptEraser, Source, Tuning
from trce_lightning.erasers.weights import KINDS, weights_of
from trce_lightning.errors import InputError
from trce_lightning.losses import squared_distance
from trce_lightning.prompts.records import seed_of
from trce_lightning.runtime.fingerprints import tensors_fingerprint
from trce_lightning.runtime.storage import read_safetensors, write_safetensors
from trce_lightning.tokens import Text

SEARCH = "search"
"""The part in which the original's pictures and its predictions for the rounds are sampled."""
Found = Mapping[str, Mapping[str, Tensor]]
"""Embeddings ``[n, e]`` by segment, by the text that stands for them."""


def composed_target(
    guide: Tensor, empty: Tensor, anchor: Tensor, erased: Tensor, anchor_weight: float, erase_weight: float
) -> Tensor:
    """Return ε(g) + w_a (ε(a) − ε(∅)) − w_e mean_j (ε(e_j) − ε(∅)).

    ``erased`` is ``[B, n, C, H, W]``, and all others are ``[B, C, H, W]``.
    """
    return guide + anchor_weight * (anchor - empty) - erase_weight * (erased.mean(1) - empty)


class Erasable(NamedTuple):
    """A text to erase."""

    guide: str
    """The text in its place."""
    anchors: tuple[str, ...]
    """The sentences of the concept's templates with the words of the text that name the concept."""
    concept: int
    """The concept's index."""


@dataclass(kw_only=True)
class _Round(ESD):
    """The erasing of a round. It reads the points of the concept's own texts under what was found last."""

    number: int
    read: Mapping[str, str]
    """The text under which the points of each of the concept's texts are read."""
    found: Found
    initial: str

    @property
    def panel(self) -> str:
        return f"round {self.number} "

    def option(self, name: str) -> str:
        return f"method.round_{name}"

    def draw(
        self,
        job: Job,
        kind: str,
        prompts: Sequence[str],
        texts_of: Callable[[str, int], tuple[str, ...]],
        points: int,
        taught: Sequence[str] | None = None,
    ) -> Walks:
        taught = [self.read[prompt] for prompt in prompts]
        return super().draw(job, f"round {self.number}", prompts, texts_of, points, taught)

    def encoder(self, adapter: Adapter) -> Encode:
        return _encoder(adapter, self.found, self.initial)


@dataclass(kw_only=True)
class _Inversion(PictureEraser):
    """The search for one embedding of each concept, with the network as it is."""

    number: int
    slots: Sequence[Slots]
    """The training sentences of each concept."""
    begin: Mapping[str, Tensor]
    pictures: Sequence[Tensor]
    """The latents of each concept's pictures."""
    name: ClassVar[str] = "stereo"
    title: ClassVar[str] = "textual inversion (arXiv 2208.01618)"

    @property
    def panel(self) -> str:
        return f"inversion {self.number} "

    def option(self, name: str) -> str:
        return f"method.inversion_{name}"

    @property
    def evaluations_per_step(self) -> int:
        return self.batch_size * len(self.pictures)

    def module(self, job: Job) -> Tuning:
        vectors = nn.ParameterDict(
            {name: own.repeat(len(self.pictures), 1, 1) for name, own in self.begin.items()}
        )
        return Tuning(self, job.adapter, {}, vectors, job.seed)

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        generator = module.generator(batch["step"], f"inversion {self.number}")
        count = self.batch_size // module.trainer.world_size
        losses = [
            inversion_loss(
                module.adapter,
                slots,
                z_0.to(module.device),
                {name: own[index] for name, own in _vectors(module).items()},
                count,
                self.levels,
                generator,
            )
            for index, (slots, z_0) in enumerate(zip(self.slots, self.pictures, strict=True))
        ]
        return {"denoising": torch.stack(losses).mean()}


def _vectors(module: Tuning) -> dict[str, Tensor]:
    """Return the embeddings in training, ``[concepts, n, e]`` by segment."""
    assert isinstance(module.extra, nn.ParameterDict)
    return dict(module.extra.items())


def _encoder(adapter: Adapter, found: Found, initial: str) -> Encode:
    """Return what encodes prompts, and texts that stand for found embeddings alone."""

    @torch.no_grad()
    def encode(text: str) -> Text:
        if text not in found:
            return adapter.encode([text])
        return slots_of(adapter, [PLACEHOLDER], initial, 1, "method").filled(adapter, found[text])

    return encode


@dataclass(kw_only=True)
class STEREO(PromptEraser):
    """Search in rounds, then erase once.

    Args:
        variant: the weights that train, as in ESD, in the rounds and at the end.
        anchor_weight: w_a.
        erase_weight: w_e.
        rounds: number n of rounds, each of which finds one embedding for each concept.
        round_iterations: optimizer steps of a round's erasing.
        round_lr: learning rate of a round's erasing.
        round_eta: η of a round's erasing.
        initial: the word as whose embedding the search begins.
        inversion_steps: optimizer steps of a round's inversion.
        inversion_lr: learning rate of the inversion.
        inversion_batch_size: noised pictures of each concept in a step of the inversion.
        levels: noise levels of the inversion, those of a sampling run of so many steps.
        pictures: pictures of each concept in a round. Rounds share none.
        picture_guidance_scale: scale with which the pictures are sampled.
    """

    variant: Annotated[str, OneOf(KINDS)] = "x"
    anchor_weight: NonNegative = 1.0
    erase_weight: NonNegative = 3.0
    rounds: Count = 4
    round_iterations: Count = 200
    round_lr: Positive = 5e-6
    round_eta: NonNegative = 0.0
    initial: str = "object"
    inversion_steps: Count = 3000
    inversion_lr: Positive = 5e-3
    inversion_batch_size: Count = 1
    levels: Count = 999
    pictures: Count = 125
    picture_guidance_scale: NonNegative = 7.5
    name: ClassVar[str] = "stereo"
    title: ClassVar[str] = "STEREO (arXiv 2408.16807)"
    bytes_per_number: ClassVar[int] = ADAM_BYTES + 4  # the original's weights

    def __post_init__(self) -> None:
        self._found: Found = {}

    def erasable(self, job: Job) -> dict[str, Erasable]:
        """Return the concepts' own texts to erase."""
        texts: dict[str, Erasable] = {}
        for pair in erased_pairs(job.concepts, self.prompts, self.guide):
            index, concept = _named_by(pair.term, job.concepts)
            anchors = tuple(template.replace("{}", pair.term) for template in concept.templates)
            texts[pair.malicious] = Erasable(pair.safe, anchors, index)
        return texts

    def sources(self, job: Job) -> dict[str, Source]:
        """Return points on sampling runs for the concept's texts and for what the search finds, evenly.

        The predictions at each point are those for ∅, the guide, the anchor, the concept's text, and all that
        the search finds.
        """
        own = self.erasable(job)
        of_concept = {
            index: [prompt for prompt, text in own.items() if text.concept == index]
            for index in range(len(job.concepts))
        }
        learnt = {self._named(job, index): self._stand_ins(job, index) for index in of_concept}
        concept_of = {text: index for index, texts in enumerate(learnt.values()) for text in texts}
        prompts = [*own, *(text for text, index in concept_of.items() for _ in of_concept[index])]

        def texts(prompt: str, walk: int) -> tuple[str, ...]:
            if prompt in concept_of:
                names = of_concept[concept_of[prompt]]
                prompt = names[seed_of(f"name {job.seed}", walk) % len(names)]
            text = own[prompt]
            anchor = text.anchors[seed_of(f"anchor {job.seed}", walk) % len(text.anchors)]
            return EMPTY, text.guide, anchor, prompt, *self._stand_ins(job, text.concept)

        points = self.iterations * self.batch_size
        return {"erase": Source(self.draw(job, "erase", prompts, texts, points), self.batch_size)}

    def teachers(self, job: Job, sources: Mapping[str, Source]) -> dict[str, Teachers]:
        """Return the caches, which belong to what the search has found."""
        found = self._read(job) if not self._found else self._found
        mark = tensors_fingerprint(_flat(found)) if found else f"not found yet {self._searched(job)}"
        return super().teachers(replace(job, generator=f"{job.generator} {mark}"), sources)

    def encoder(self, adapter: Adapter) -> Encode:
        """Return what encodes prompts, and the texts that stand for what was found."""
        return _encoder(adapter, self._found, self.initial)

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return the variant's weights."""
        return {denoiser_name(adapter): weights_of(adapter, self.variant)}

    def factor_of(self, term: str) -> str:
        """Return w_e's option."""
        return "erase_weight"

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared distance from the composed target."""
        rows = batch["erase"]
        empty, guide, anchor, *erased = rows["predictions"].unbind(1)
        target = composed_target(
            guide, empty, anchor, torch.stack(erased, 1), self.anchor_weight, self.erase_weight
        )
        predicted = module.adapter.predict(rows["z_t"], rows["timestep"], module.text(rows["taught"]))
        return {"erase": squared_distance(predicted, target).mean()}

    @property
    def scales(self) -> tuple[str, ...]:
        """Return the scale of the points and that of the pictures."""
        return (*super().scales, "picture_guidance_scale")

    def ahead(self, job: Job) -> Ahead:
        """Return the work ahead, with that of the search unless its result is cached."""
        world_size = job.trainer.world_size
        if self.inversion_batch_size % world_size:
            raise InputError(
                f"method.inversion_batch_size: expected a multiple of the {world_size} processes, got "
                f"{self.inversion_batch_size}"
            )
        self._inversion(job, 1, [])  # raises if a sentence is too long, or the first word is none
        work = super().ahead(job)
        if self._read(job):
            return work
        before = self._before(job)
        parts = {SEARCH: Cost(forward=sum(each.evaluations for each in before.values()))}
        for number in range(1, self.rounds + 1):
            erasing, inverting = _parts(number)
            parts[erasing] = Cost(backward=self.round_iterations * self.batch_size)
            pictures = self.inversion_batch_size * len(job.concepts)
            parts[inverting] = Cost(backward=self.inversion_steps * pictures)
        numbers = latent_numbers(job.adapter)
        stored = sum(each.plan.stored_bytes(numbers) for each in before.values())
        return replace(work, parts=parts | work.parts, stored_bytes=work.stored_bytes + stored)

    def erase(self, job: Job) -> Erased:
        """Search, unless the result is cached, then erase what was found from the original."""
        self._found = self._read(job) or self._search(job)
        return super().erase(job)

    def _search(self, job: Job) -> Found:
        """Run the rounds, restore the weights, and store what was found."""
        adapter, before = job.adapter, self._before(job)
        with job.part(SEARCH):
            for each in before.values():
                each.sample(job.trainer, adapter, lambda text: adapter.encode([text]))
        weights = weights_of(adapter, self.variant)
        original = {name: weight.detach().clone() for name, weight in weights.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for number in range(1, self.rounds + 1):
            erasing, inverting = _parts(number)
            round_ = self._round(job, number, found)
            round_.fit(job, round_.module(job), round_.sources(job), erasing)
            inversion = self._inversion(job, number, self._pictures(job, before, number))
            module = inversion.module(job)
            inversion.fit(job, module, {}, inverting)
            vectors = {name: own.detach().cpu() for name, own in _vectors(module).items()}
            for index in range(len(job.concepts)):
                text = self._stand_ins(job, index)[number - 1]
                found[text] = {name: own[index] for name, own in vectors.items()}
        for name, weight in weights.items():
            weight.data.copy_(original[name])
        adapter.weights_changed()
        if job.trainer.is_global_zero:
            write_safetensors(self._file(job), _flat(found))
        job.trainer.strategy.barrier()
        return self._read(job)

    def _read(self, job: Job) -> Found:
        """Return what a search of these options has found, or nothing if none has run."""
        if not self._file(job).is_file():
            return {}
        tensors = read_safetensors(self._file(job), "the result of a search")
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            text, _, segment = key.rpartition(".")
            found.setdefault(text, {})[segment] = tensor
        return found

    def _file(self, job: Job) -> Path:
        return job.cache / "stereo" / f"{self._searched(job)}.safetensors"

    def _searched(self, job: Job) -> str:
        """Return a hash that identifies the search: what it reads, and its options."""
        options = {
            name: getattr(self, name)
            for name in (
                *("variant", "batch_size", "rounds", "round_iterations", "round_lr", "round_eta", "initial"),
                *("inversion_steps", "inversion_lr", "inversion_batch_size", "levels", "weight_decay"),
            )
        }
        marks = {kind: each.fingerprint for kind, each in self._before(job).items()}
        kinds = [concept.kind for concept in job.concepts]  # the sentences of an inversion depend on it
        fit = [job.seed, job.trainer.world_size, job.trainer.gradient_clip_val]
        text = json.dumps([options, marks, kinds, fit], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def _before(self, job: Job) -> dict[str, Teachers]:
        """Return the caches of all that is sampled before any weight changes: rounds' points, pictures."""
        walks = {
            f"round {number}": self._round(job, number, {}).sources(job)["erase"].plan
            for number in range(1, self.rounds + 1)
        }
        own = self.erasable(job)
        for index in range(len(job.concepts)):
            prompts = [prompt for prompt, text in own.items() if text.concept == index]
            walks[self._named(job, index)] = picture_walks(
                f"pictures {index}",
                prompts,
                self.rounds * self.pictures,
                num_steps=self.num_steps,
                guidance_scale=self.picture_guidance_scale,
                seed=job.seed,
            )
        return {kind: teachers_of(plan, job.cache, job.generator) for kind, plan in walks.items()}

    def _pictures(self, job: Job, before: Mapping[str, Teachers], number: int) -> list[Tensor]:
        """Return the latents of each concept's pictures of a round."""
        part = slice((number - 1) * self.pictures, number * self.pictures)
        return [
            finished(before[self._named(job, index)], job.adapter)[part] for index in range(len(job.concepts))
        ]

    def _round(self, job: Job, number: int, found: Found) -> _Round:
        own = self.erasable(job)
        read = {prompt: prompt for prompt in own}
        if number > 1:
            read = {prompt: self._stand_ins(job, own[prompt].concept)[number - 2] for prompt in own}
        shared = (
            *("prompts", "guide", "variant", "batch_size", "draws", "num_steps", "guidance_scale"),
            *("first_step", "last_step", "weight_decay", "gradient_checkpointing"),
        )
        return _Round(
            iterations=self.round_iterations,
            lr=self.round_lr,
            eta=self.round_eta,
            number=number,
            read=read,
            found=found,
            initial=self.initial,
            **{name: getattr(self, name) for name in shared},
        )

    def _inversion(self, job: Job, number: int, pictures: Sequence[Tensor]) -> _Inversion:
        return _Inversion(
            iterations=self.inversion_steps,
            lr=self.inversion_lr,
            weight_decay=self.weight_decay,
            gradient_checkpointing=self.gradient_checkpointing,
            number=number,
            slots=[
                slots_of(job.adapter, training_sentences(concept.kind), self.initial, 1, "method")
                for concept in job.concepts
            ],
            begin=initial_vectors(job.adapter, self.initial, 1, "method"),
            pictures=pictures,
            batch_size=self.inversion_batch_size,
            levels=self.levels,
        )

    @staticmethod
    def _named(job: Job, index: int) -> str:
        return f"pictures of {job.concepts[index].name}"

    def _stand_ins(self, job: Job, index: int) -> list[str]:
        """Return the texts that stand for the embeddings of a concept, round by round."""
        return [f"<{job.concepts[index].name} {number}>" for number in range(1, self.rounds + 1)]


def _named_by(term: str, concepts: Sequence[Concept]) -> tuple[int, Concept]:
    """Return the first concept that a term or wording names, with its index."""
    return next((i, concept) for i, concept in enumerate(concepts) if term in concept.all_names)


def _flat(found: Found) -> dict[str, Tensor]:
    return {f"{text}.{segment}": own for text, by in found.items() for segment, own in by.items()}


def _parts(number: int) -> tuple[str, str]:
    """Return the names of a round's two fits."""
    return f"round-{number}-erasing", f"round-{number}-inversion"
