"""MACE, mass concept erasure (arXiv 2403.06135): a closed-form step, a LoRA for each term, and their fusion.

1. The words around a term must not hint at it. With e at the positions of a sentence that it shares with the
   sentence of the safe counterpart, and e' at the same positions of the latter,

       W₁ = argmin_W' Σ ‖W' e − W e'‖² + η Σ_k ‖W' e_k − W e_k‖² + λ ‖W' − W‖².

   The term's own tokens aren't among these positions. W factors out, so W₁ = W T.
2. For each term i, a LoRA W₁ + u_i v_iᵀ of K and V lowers the attention that pictures of the term pay to it:

       min Σ_layers ‖A[pixels of the term, tokens of the term]‖_F

   A are the attention maps at pictures of the original with noise at random levels.
3. One W* acts like each LoRA on the states e of its term's own sentences:

       W* = argmin_W' Σ_i Σ_e ‖W' e − (W₁ + u_i v_iᵀ) e‖² + η_f Σ_k ‖W' e_k − W e_k‖² + λ ‖W' − W₁‖²
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from trce_lightning.adapters import Adapter, Entry
from trce_lightning.adapters.attention import attention_maps, cross_attention
from trce_lightning.attacks.inpainting import subject_box
from trce_lightning.attacks.objectives import noised
from trce_lightning.concepts import Concept, PromptPair, prompt_pairs
from trce_lightning.config.schema import Count, NonNegative, OneOf
from trce_lightning.erasers.linear import (
    CONTEXT,
    EDIT,
    Moments,
    apply_transform,
    divided,
    kept_moment,
    moments,
    read_weights,
    solved,
    write_weights,
)
from trce_lightning.erasers.protocol import Ahead, Cost, Erased, Job
from trce_lightning.erasers.teachers import Teachers, finished, latent_numbers, picture_walks, teachers_of
from trce_lightning.erasers.texts import GUIDES, prompt_states
from trce_lightning.erasers.tuning import TEACHERS, TRAINING, Batch, PictureEraser, Tuning
from trce_lightning.errors import InputError
from trce_lightning.metrics.factories import made_by
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import seeded
from trce_lightning.tokens import Role

FUSION = "fusion"
BOX, WHOLE = "box", "whole"
"""The box of what differs from the picture's background, or the whole picture."""
ENDS = ("none", "first", "all")
"""The positions behind the prompt whose attention is lowered too: none, the first EoT, or padding as well."""
IMPORTANCE = (0.05, 200, 400)
"""The slope and the two centres of the density of timesteps."""


@runtime_checkable
class Segmenter(Protocol):
    """A function that marks what pictures show."""

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return True at the pixels of each picture's term, uint8 ``[P, 3, H, W]`` → bool ``[P, H, W]``."""


def importance(timesteps: Tensor) -> Tensor:
    """Return the density σ(s (t − a)) − σ(s (t − b)) of timesteps. :data:`IMPORTANCE` has s, a and b."""
    slope, low, high = IMPORTANCE
    t = timesteps.double()
    return torch.sigmoid(slope * (t - low)) - torch.sigmoid(slope * (t - high))


def attention_loss(maps: Sequence[Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """Return Σ_layers ‖A[pixels, tokens]‖_F of each row, ``[B]`` float32.

    Args:
        maps: attention of square grids of queries, ``[B, heads, queries, L]`` each.
        pixels: True at the term's pixels, bool ``[B, H, W]``. A query counts if its cell has one of them.
        tokens: True at the term's positions, bool ``[B, L]``.
    """
    total = torch.zeros(len(pixels), device=pixels.device)
    for attention in maps:
        side = round(attention.shape[2] ** 0.5)
        assert side * side == attention.shape[2]
        cells = adaptive_max_pool2d(pixels[:, None].float(), side).flatten(2)
        chosen = cells[..., None] * tokens[:, None, None].float()
        total = total + torch.linalg.vector_norm((attention.float() * chosen).flatten(1), dim=1)
    return total


def shared_positions(ids: Tensor, other: Tensor, roles: Tensor, other_roles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of a sentence and of another in which both have the same, int64 ``[n]`` twice.

    These are their common beginning, their common end with the first EoT, and the padding behind it as far as
    both have some. ``ids`` and ``other`` are token ids ``[L]``, with their roles.
    """
    (ends, other_ends) = (int((own == Role.EOT).nonzero()[0]) for own in (roles, other_roles))
    least = min(ends, other_ends)
    first = 0
    while first < least and ids[first] == other[first]:
        first += 1
    last = 0
    while last < least - first and ids[ends - 1 - last] == other[other_ends - 1 - last]:
        last += 1
    behind = min(len(ids) - ends, len(other) - other_ends)
    beginning, end = torch.arange(first), torch.arange(-last, behind)
    return torch.cat([beginning, ends + end]), torch.cat([beginning, other_ends + end])


def fused(
    weights: Mapping[str, Tensor],
    loras: Mapping[str, tuple[Tensor, Tensor]],
    of_terms: Sequence[Tensor],
    originals: Mapping[str, Tensor],
    kept: Tensor,
    ridge: float,
) -> dict[str, Tensor]:
    """Return W* of each map, the minimiser of the third step, ``[d_out, d]`` float64.

    Args:
        weights: W₁, ``[d_out, d]`` float64.
        loras: v ``[terms, d]`` and u ``[terms, d_out]`` of each map.
        of_terms: M_i = Σ e eᵀ over the states of each term's sentences, ``[d, d]``.
        originals: W.
        kept: η_f Σ e_k e_kᵀ.
        ridge: λ.
    """
    every = torch.stack(list(of_terms)).sum(0)
    numerators = []
    for name, weight in weights.items():
        down, up = loras[name]
        moved = torch.stack([v @ moment for v, moment in zip(down, of_terms, strict=True)])
        numerators.append(weight @ every + up.mT @ moved + originals[name] @ kept + ridge * weight)
    identity = torch.eye(len(every), dtype=torch.float64)
    solutions = divided(numerators, every + kept + ridge * identity, ridge)
    return dict(zip(weights, solutions, strict=True))


class Term(NamedTuple):
    """A term with its wordings, which one LoRA erases."""

    name: str
    pairs: tuple[PromptPair, ...]


def terms_of(concepts: Sequence[Concept]) -> list[Term]:
    """Return all terms of concepts that are erased together, with their sentences."""
    pairs = prompt_pairs(concepts)
    terms = [
        Term(term, tuple(pair for pair in pairs[concept.name] if pair.term in concept.names(term)))
        for concept in concepts
        for term in concept.terms
    ]
    return [term for term in terms if term.pairs]


class TermLoras(nn.Module):
    """A rank-1 LoRA of every map for each term: W e ← W e + u_i (v_i · e) in rows of term i.

    At first they do nothing, because u is zero.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], terms: int, seed: int) -> None:
        super().__init__()
        generator = seeded(seed_of("term LoRAs", seed))
        self.names = list(layers)
        self.rows = torch.arange(0)
        """The term of each row of the next pass, int64 ``[B]``."""
        self.down, self.up, self.hooks = nn.ParameterList(), nn.ParameterList(), []
        for layer in layers.values():
            bound = layer.in_features**-0.5
            self.down.append(
                torch.empty(terms, layer.in_features).uniform_(-bound, bound, generator=generator)
            )
            self.up.append(torch.zeros(terms, layer.out_features))
            add = partial(self._added, self.down[-1], self.up[-1])
            self.hooks.append(layer.register_forward_hook(add))

    def _added(
        self, down: Tensor, up: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        strength = torch.einsum("bld,bd->bl", inputs[0].to(down), down[self.rows])
        return output + (strength[..., None] * up[self.rows][:, None]).to(output)

    def take_off(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Remove the LoRAs from the network, and return v and u of each map, float64 on the CPU."""
        for hook in self.hooks:
            hook.remove()
        pairs = zip(self.down, self.up, strict=True)
        found = [(down.detach().cpu().double(), up.detach().cpu().double()) for down, up in pairs]
        return dict(zip(self.names, found, strict=True))


class Pictures(NamedTuple):
    """Pictures of the terms, those of a term in a row of each tensor."""

    z_0: Tensor
    """Their latents, ``[terms, P, C, H, W]``."""
    prompts: list[list[str]]
    pixels: Tensor
    """True at what the term's attention must avoid, bool ``[terms, P, H, W]``."""
    tokens: Tensor
    """True at the term's positions in the prompt, bool ``[terms, P, L]``."""

    def rows(self, terms: Tensor, chosen: Tensor) -> tuple[Tensor, list[str], Tensor, Tensor]:
        """Return latents, prompts, pixels and tokens of some pictures. Indices are int64 ``[B]`` each."""
        prompts = [self.prompts[i][j] for i, j in zip(terms.tolist(), chosen.tolist(), strict=True)]
        return self.z_0[terms, chosen], prompts, self.pixels[terms, chosen], self.tokens[terms, chosen]


class Avoiding(Tuning):
    """The LoRAs in training, with the pictures that they are trained on."""

    def __init__(self, eraser: MACE, job: Job, pictures: Pictures) -> None:
        layers = {name: entry.module for name, entry in readers(job.adapter).items()}
        loras = TermLoras(layers, len(pictures.prompts), job.seed)
        super().__init__(eraser, job.adapter, {}, loras, job.seed)
        self.pictures, self.layers = pictures, cross_attention(job.adapter, "method=mace")

    @property
    def loras(self) -> TermLoras:
        """Return the LoRAs."""
        assert isinstance(self.extra, TermLoras)
        return self.extra


def readers(adapter: Adapter) -> dict[str, Entry]:
    """Return the maps that read text states and nothing else, by name. If others do, raise ``InputError``."""
    stream = adapter.streams()[CONTEXT]
    for name, entry in stream.entries.items():
        if entry.module.in_features != stream.width:
            raise InputError(
                f"method=mace: expected maps that read text states alone, got {name} in '{adapter.name}'"
            )
    return stream.entries


@dataclass(kw_only=True)
class MACE(PictureEraser):
    """Edit the words around each term, train a LoRA for each term, and fuse them.

    Args:
        guide: what takes a term's place in its sentences: its safe ``counterpart``, or ``empty`` for ∅.
        keep_scale: η of the first step.
        fuse_keep_scale: η_f of the fusion.
        ridge: λ of both.
        pictures: pictures of each term.
        masks: the pixels of a term: the ``box`` of what differs from the picture's background, the ``whole``
            picture, or the dotted name of a class or function that makes a :class:`Segmenter`.
        threshold: the least difference from the background in a channel, out of 1, for ``masks=box``.
        ends: which positions behind a prompt count as the term's too, one of :data:`ENDS`.
        weighted: timesteps are drawn by :func:`importance`, and not evenly.
    """

    guide: Annotated[str, OneOf(GUIDES)] = "counterpart"
    keep_scale: NonNegative = 0.43
    fuse_keep_scale: NonNegative = 0.43
    ridge: NonNegative = 0.0
    pictures: Count = 8
    masks: str = BOX
    threshold: Annotated[float, Interval(gt=0, lt=1)] = 0.15
    ends: Annotated[str, OneOf(ENDS)] = "all"
    weighted: bool = False
    name: ClassVar[str] = "mace"
    title: ClassVar[str] = "MACE (arXiv 2403.06135)"

    @property
    def evaluations_per_step(self) -> int:
        """Return the evaluations of a step for one term."""
        return self.batch_size

    def terms(self, job: Job) -> list[Term]:
        """Return the terms with their sentences, beside those of their counterparts or ∅."""
        terms = terms_of(job.concepts)
        if self.guide == "counterpart":
            return terms
        return [Term(name, tuple(pair._replace(safe="") for pair in pairs)) for name, pairs in terms]

    def walks(self, job: Job) -> Teachers:
        """Return the cache of the original's pictures: some sentences of each term, each with one picture."""
        prompts = [prompt for term in self.terms(job) for prompt in self.pictured(term, job.seed)]
        plan = picture_walks(
            "mace",
            prompts,
            len(prompts),
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            seed=job.seed,
        )
        return teachers_of(plan, job.cache, job.generator)

    def pictured(self, term: Term, seed: int) -> list[str]:
        """Return the sentences of a term's pictures. If there are fewer sentences, they repeat."""
        generator = seeded(seed_of(f"pictures of {term.name}", seed))
        order = torch.randperm(len(term.pairs), generator=generator).tolist()
        return [term.pairs[order[i % len(order)]].malicious for i in range(self.pictures)]

    def ahead(self, job: Job) -> Ahead:
        """Return the evaluations of the pictures that are not cached, and those of training."""
        if self.batch_size % (world_size := job.trainer.world_size):
            raise InputError(
                f"method.batch_size: expected a multiple of the {world_size} processes, got {self.batch_size}"
            )
        cross_attention(job.adapter, "method=mace")
        self.segmenter()
        work, walks, terms = super().ahead(job), self.walks(job), len(self.terms(job))
        layers = [entry.module for entry in readers(job.adapter).values()]
        trainable = terms * sum(layer.in_features + layer.out_features for layer in layers)
        parts = {
            TEACHERS: Cost(forward=walks.evaluations),
            TRAINING: Cost(backward=terms * work.parts[TRAINING].backward),
        }
        stored = walks.plan.stored_bytes(latent_numbers(job.adapter))
        return Ahead(parts, trainable, stored, self.bytes_per_number * trainable)

    def erase(self, job: Job) -> Erased:
        """Sample pictures, edit the words around the terms, train the LoRAs, and fuse them."""
        with job.part(TEACHERS):
            self.walks(job).sample(job.trainer, job.adapter, self.encoder(job.adapter))
        pictures, stream = self.seen(job), job.adapter.streams()[CONTEXT]
        originals = read_weights(stream)
        with job.part(EDIT):
            kept = kept_moment(job, stream.segments, "prompts")
            around = self.around(job).plus(Moments(self.keep_scale * kept, self.keep_scale * kept))
            apply_transform(job.adapter, stream, solved(around, self.ridge))
        module = Avoiding(self, job, pictures)
        self.fit(job, module, {}, TRAINING)
        with job.part(FUSION):
            loras, weights = module.loras.take_off(), read_weights(stream)
            of_terms = [states.mT @ states for states in self.own_states(job)]
            kept = self.fuse_keep_scale * kept
            edited = fused(weights, loras, of_terms, originals, kept, self.ridge)
            return write_weights(job.adapter, stream, edited)

    def around(self, job: Job) -> Moments:
        """Return the sums of the first step over the words around all terms."""
        adapter, stream = job.adapter, job.adapter.streams()[CONTEXT]
        states: list[Tensor] = []
        targets: list[Tensor] = []
        for pair in (pair for term in self.terms(job) for pair in term.pairs):
            texts = [adapter.encode([prompt]) for prompt in (pair.malicious, pair.safe)]
            ids = [adapter.tokenize([prompt]) for prompt in (pair.malicious, pair.safe)]
            for name in stream.segments:
                own = [each[name][0].cpu() for each in ids]
                places = shared_positions(*own, *(text.roles[name][0].cpu() for text in texts))
                for rows, text, place in zip((states, targets), texts, places, strict=True):
                    rows.append(text.states[name][0].cpu()[place])
        return moments(torch.cat(states), torch.cat(targets))

    def own_states(self, job: Job) -> list[Tensor]:
        """Return the states of each term's sentences at all positions, ``[n, d]`` float64."""
        segments = job.adapter.streams()[CONTEXT].segments
        return [
            prompt_states(job.adapter, segments, [pair.malicious for pair in term.pairs], "all")
            for term in self.terms(job)
        ]

    def segmenter(self) -> Segmenter:
        """Return what marks the terms' pixels."""
        if self.masks == BOX:
            return lambda pictures, prompts: boxes(pictures, self.threshold)
        if self.masks == WHOLE:
            return lambda pictures, prompts: torch.ones_like(pictures[:, 0], dtype=torch.bool)
        return made_by("method.masks", self.masks, Segmenter)  # type: ignore[type-abstract]

    def seen(self, job: Job) -> Pictures:
        """Return the sampled pictures with what the LoRAs are to avoid."""
        adapter, walks, terms = job.adapter, self.walks(job), self.terms(job)
        latents: dict[str, list[Tensor]] = {}
        for walk, z_0 in zip(walks.plan.walks, finished(walks, adapter), strict=True):
            latents.setdefault(walk.prompt, []).append(z_0)
        prompts = [self.pictured(term, job.seed) for term in terms]
        z_0 = torch.stack([latents[prompt].pop() for row in prompts for prompt in row])
        every = [prompt for row in prompts for prompt in row]
        pixels = self.segmenter()(adapter.decode(z_0.to(adapter.device)).cpu(), every)
        if pixels.shape != (len(every), adapter.side, adapter.side) or pixels.dtype != torch.bool:
            raise InputError(
                f"method.masks: expected masks of bool {[len(every), adapter.side, adapter.side]}, got "
                f"{pixels.dtype} {[*pixels.shape]}"
            )
        named = {pair.malicious: pair.term for term in terms for pair in term.pairs}
        shape = (len(terms), self.pictures)
        tokens = self.tokens(adapter, every, [named[prompt] for prompt in every])
        return Pictures(
            z_0.unflatten(0, shape), prompts, pixels.unflatten(0, shape), tokens.unflatten(0, shape)
        )

    def tokens(self, adapter: Adapter, prompts: Sequence[str], terms: Sequence[str]) -> Tensor:
        """Return True at the positions of each prompt that count as its term's, bool ``[B, L]``."""
        text, spelt = adapter.encode(prompts), adapter.mentions(prompts, terms, trimmed=False)
        first = {"none": len(Role), "first": Role.EOT, "all": Role.EOT}[self.ends]
        last = Role.PADDING if self.ends == "all" else Role.EOT
        segments = adapter.streams()[CONTEXT].segments
        parts = [
            spelt[name] | ((first <= roles) & (roles <= last))
            for name, roles in ((name, text.roles[name].cpu()) for name in segments)
        ]
        return torch.cat(parts, dim=1)

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the attention of noised pictures to their own terms, summed over layers."""
        assert isinstance(module, Avoiding)
        adapter, pictures = module.adapter, module.pictures
        generator = module.generator(batch["step"], "pictures")
        count = self.batch_size // module.trainer.world_size
        terms = torch.arange(len(pictures.prompts)).repeat_interleave(count)
        chosen = torch.randint(self.pictures, terms.shape, generator=generator)
        level = torch.randint(self.levels, terms.shape, generator=generator)
        if self.weighted:
            density = importance(adapter.schedule(self.levels).timesteps)
            level = torch.multinomial(density, len(terms), replacement=True, generator=generator)
        z_0, prompts, pixels, tokens = pictures.rows(terms, chosen)
        seen = noised(adapter, z_0.to(module.device), level, self.levels, generator)
        module.loras.rows = terms.to(module.device)
        with attention_maps(module.layers) as maps:
            predicted = adapter.predict(seen.z_t, seen.timestep, module.text(prompts))
            loss = attention_loss(maps(), pixels.to(module.device), tokens.to(module.device))
        # No map comes after the last layer's values, but several processes want a gradient of every LoRA.
        return {"attention": loss.mean() + 0.0 * predicted.mean()}


def boxes(pictures: Tensor, threshold: float) -> Tensor:
    """Return True in the box of what differs from each picture's background, bool ``[P, H, W]``.

    In a picture in which nothing stands out, all is True. Pictures are uint8 ``[P, 3, H, W]``.
    """
    masks = torch.zeros_like(pictures[:, 0], dtype=torch.bool)
    for mask, picture in zip(masks, pictures, strict=True):
        box = subject_box(picture, threshold)
        if box is None:
            mask[:] = True
        else:
            mask[box.top : box.bottom, box.left : box.right] = True
    return masks
