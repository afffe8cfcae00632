"""Closed-form edits of the maps that read text states, as one matrix: every W becomes W T.

If an edit's target for a state e is W e' with the original W, then W factors out of the least-squares
problem, and one T serves all maps. So the method's algebra is that of d×d matrices in float64, whatever the
number of layers, and biases never enter a target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter, Stream
from trce_lightning.closed_form import apply_edits
from trce_lightning.config.schema import OneOf
from trce_lightning.erasers.protocol import Ahead, Erased, Job, denoiser_name
from trce_lightning.erasers.texts import GUIDES, POSITIONS, PROMPTS, erased_pairs, paired_states
from trce_lightning.errors import InputError
from trce_lightning.textual import cached_kept

CONTEXT = "context"
"""The stream of an adapter that these methods edit."""
EDIT = "edit"
KEPT = ("none", "empty", "prompts")
"""The states to keep: none, every position of the empty prompt, or those of all prompts to keep too."""
MAPS = ("k", "v", "kv")
"""The maps that are edited: keys, values, or both."""
NAMED = {"k": "to_k", "v": "to_v"}


class Moments(NamedTuple):
    """The sums of a least-squares problem, ``[d, d]`` float64: S = Σ e' eᵀ and M = Σ e eᵀ."""

    s: Tensor
    m: Tensor

    def plus(self, other: Moments) -> Moments:
        """Return the sums over both sets of states."""
        return Moments(self.s + other.s, self.m + other.m)


def moments(states: Tensor, targets: Tensor, scale: float = 1.0) -> Moments:
    """Return the sums over rows: states e and targets e', ``[n, d]`` each, weighted by ``scale``."""
    e, target = states.detach().cpu().double(), targets.detach().cpu().double()
    return Moments(scale * target.mT @ e, scale * e.mT @ e)


def solved(every: Moments, ridge: float) -> Tensor:
    """Return T = (S + λ I)(M + λ I)⁻¹, ``[d, d]``, the minimiser of Σ ‖W T e − W e'‖² + λ ‖W T − W‖².

    This holds for every W of full column rank, and for each W the edited W T is a minimiser.
    """
    identity = torch.eye(every.m.shape[0], dtype=torch.float64)
    return divided([every.s + ridge * identity], every.m + ridge * identity, ridge)[0]


def divided(numerators: Sequence[Tensor], gram_matrix: Tensor, ridge: float) -> list[Tensor]:
    """Return N M⁻¹ for each N, ``[r, d]`` float64. M is ``[d, d]`` and contains ``ridge``.

    If M has no Cholesky factor, raise ``InputError``.
    """
    factor, failed = torch.linalg.cholesky_ex(gram_matrix)
    if failed:
        raise InputError(
            f"method.ridge: expected a system that can be solved, got {ridge}; give a larger one"
        )
    return [torch.cholesky_solve(each.mT, factor).mT.contiguous() for each in numerators]


def edited_stream(adapter: Adapter, maps: str) -> Stream:
    """Return the context stream with the entries that ``maps`` names.

    If the model has none of these, reads the text by maps that are neither keys nor values, or has segments
    of several widths, raise ``InputError``.
    """
    stream = adapter.streams()[CONTEXT]
    empty = adapter.empty()
    widths = {name: empty.states[name].shape[-1] for name in stream.segments}
    if len(set(widths.values())) > 1:
        raise InputError(
            f"method: expected text states of one width, got {widths} in '{adapter.name}'; stage 1 of "
            "method=trce edits such a model"
        )
    if maps == "kv":
        return stream
    wanted = {NAMED[part] for part in maps}
    chosen = {name: entry for name, entry in stream.entries.items() if name.rpartition(".")[2] in wanted}
    if not chosen:
        raise InputError(
            f"method.maps: expected kv on '{adapter.name}', whose text is read by other maps than keys and "
            f"values, got {maps}"
        )
    return stream._replace(entries=chosen)


def read_weights(stream: Stream) -> dict[str, Tensor]:
    """Return the columns of each map that read the states, ``[d_out, d]``, as float64 on the CPU, by name."""
    return {
        name: entry.module.weight.detach()[:, entry.first : entry.first + stream.width].cpu().double()
        for name, entry in stream.entries.items()
    }


def write_weights(adapter: Adapter, stream: Stream, edited: dict[str, Tensor]) -> Erased:
    """Put edited columns into the model, and return the changed tensors."""
    for name, entry in stream.entries.items():
        own = entry.module.weight.data[:, entry.first : entry.first + stream.width]
        own.copy_(edited[name].to(own))
    adapter.weights_changed()
    changed = {f"{name}.weight": entry.module.weight.detach() for name, entry in stream.entries.items()}
    return Erased({denoiser_name(adapter): changed})


def apply_transform(adapter: Adapter, stream: Stream, transform: Tensor) -> Erased:
    """Replace W by W T in the stream's entries, and return the changed tensors."""
    parts = {
        name: entry.module.weight.data[:, entry.first : entry.first + stream.width]
        for name, entry in stream.entries.items()
    }
    return write_weights(
        adapter, stream, dict(zip(parts, apply_edits(parts.values(), transform), strict=True))
    )


def gram(stream: Stream) -> Tensor:
    """Return G = Σ WᵀW over the stream's maps, ``[d, d]`` float64."""
    return torch.stack([w.mT @ w for w in read_weights(stream).values()]).sum(0)


@dataclass(kw_only=True)
class ClosedForm(ABC):
    """A method that edits the maps of text states in closed form. It evaluates no denoiser.

    Args:
        prompts: texts to erase: the concept's ``names``, or its ``sentences``.
        guide: what takes the place of an erased text: the ``empty`` prompt, or its safe ``counterpart``.
        positions: the states of these texts: the ``last`` content token, all positions ``from_last`` on, or
            ``all``.
        keep: the states that are kept: ``none``, those of the ``empty`` prompt, or of ``prompts`` too.
        maps: the maps that are edited: keys ``k``, values ``v``, or both ``kv``.
    """

    prompts: Annotated[str, OneOf(PROMPTS)] = "names"
    guide: Annotated[str, OneOf(GUIDES)] = "empty"
    positions: Annotated[str, OneOf(POSITIONS)] = "last"
    keep: Annotated[str, OneOf(KEPT)] = "empty"
    maps: Annotated[str, OneOf(MAPS)] = "kv"
    name: ClassVar[str]
    title: ClassVar[str]

    @property
    def reads_seed(self) -> bool:
        """Return False: no random number enters the algebra."""
        return False

    @abstractmethod
    def edit(self, job: Job, stream: Stream) -> Erased:
        """Solve, edit the model, and return what has changed."""

    def ahead(self, job: Job) -> Ahead:
        """Return no network evaluations, and the numbers of the edited maps."""
        erased_pairs(job.concepts, self.prompts, self.guide)
        stream = edited_stream(job.adapter, self.maps)
        rows = sum(entry.module.out_features for entry in stream.entries.values())
        return Ahead(trainable=rows * stream.width)

    def erase(self, job: Job) -> Erased:
        """Edit the model."""
        with job.part(EDIT):
            return self.edit(job, edited_stream(job.adapter, self.maps))

    def states(self, job: Job, segments: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the states to erase and those of their guides, ``[n, d]`` float64 each."""
        pairs = erased_pairs(job.concepts, self.prompts, self.guide)
        erased, guides = paired_states(job.adapter, segments, pairs, self.positions)
        return erased.cpu().double(), guides.cpu().double()

    def kept(self, job: Job, segments: Sequence[str]) -> Tensor:
        """Return Σ e eᵀ over the states to keep; see :func:`kept_moment`."""
        return kept_moment(job, segments, self.keep)


def kept_moment(job: Job, segments: Sequence[str], keep: str) -> Tensor:
    """Return Σ e eᵀ over the states to keep, ``[d, d]`` float64. ``keep`` is one of :data:`KEPT`.

    A prompt counts as the sum over its positions, and all prompts to keep together as one prompt.
    """
    empty = job.adapter.empty()
    states = torch.cat([empty.states[name][0] for name in segments]).cpu().double()
    total = torch.zeros(states.shape[1], states.shape[1], dtype=torch.float64)
    if keep != "none":
        total = total + states.mT @ states
    if keep == "prompts":
        kept = cached_kept(job.trainer, job.adapter, job.keep_prompts(), job.cache)
        total = total + len(states) * kept[CONTEXT].every.k
    return total
