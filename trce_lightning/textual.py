"""Stage 1 on a model. It encodes prompts, sums statistics, solves for T, and edits the model's weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from trce_lightning.adapters import Adapter, Stream
from trce_lightning.closed_form import (
    Edit,
    KeepStatistics,
    PairStatistics,
    Readers,
    SingularError,
    adversarial_answer,
    answered_pairs,
    apply_edits,
    keep_statistics,
    keyless_distance,
    mean_pairs,
    merge_keep,
    pair_statistics,
    readers,
    solve_edit,
    solve_null_space,
    solve_projection,
    sum_statistics,
)
from trce_lightning.concepts import Concept, PromptPair, prompt_pairs
from trce_lightning.config.schema import MATRICES, TextualConfig
from trce_lightning.errors import InputError
from trce_lightning.runtime.ranks import Rank, on_each_rank
from trce_lightning.runtime.storage import read_safetensors, reading, write_safetensors
from trce_lightning.tokens import Role, Text, position_mask

log = logging.getLogger(__name__)
ENCODE_BATCH = 32
"""The number of prompts that are encoded together."""
CONTEXT = "context"
"""The stream of an adapter that stage 1 edits."""
ENDINGS = {"key": "to_k", "value": "to_v"}
"""The ends of the entries' names by the kind of their matrix."""


@dataclass(frozen=True)
class TextualStatistics:
    """The statistics that stage 1 is solved from."""

    states: dict[str, tuple[Tensor, Tensor]]
    """The malicious and the safe states by concept, ``[n, d]`` each."""
    keep: KeepStatistics
    """The mean over the kept states."""
    empty: Tensor
    """The states of the empty prompt, ``[n, d]``."""
    span: Tensor | None = None
    """Σ over concepts of the second moment of malicious states at all positions after the SoT, ``[d, d]``.

    It is None for forms that don't need it.
    """
    readers: Readers | None = None
    """The matrices that read states. It is None if only their inputs are needed."""

    @property
    def pairs(self) -> dict[str, PairStatistics]:
        """Return the pair statistics by concept."""
        return {name: pair_statistics(*states) for name, states in self.states.items()}

    def solve(self, config: TextualConfig) -> Edit:
        """Return T over all concepts, after ``adversarial_rounds`` answers to it.

        Each round adds the pairs of R e_m and e_s, where R e_m is the best answer to the last T, see
        :func:`~.closed_form.adversarial_answer`. All rounds weigh the same.

        Raises:
            InputError: T is not determined, or an option leaves nothing to edit.
        """
        asked = sum_statistics(list(self.states.values()))
        rounds = [asked]
        edit = self._solve_once(asked, config)
        for _ in range(config.adversarial_rounds):
            assert self.readers is not None
            answer = adversarial_answer(edit.transform, self.readers, ridge=config.adversarial_ridge)
            rounds.append(answered_pairs(asked, answer))
            edit = self._solve_once(mean_pairs(rounds), config)
        distance = None
        if self.readers is not None:
            distance = keyless_distance(edit.transform, self.readers, asked.m)
            log.info("stage 1: no text state undoes %.2g %% of the edit's effect", 100 * distance)
        return replace(edit, matrices=tuple(config.matrices), keyless_distance=distance)

    def _solve_once(self, pairs: PairStatistics, config: TextualConfig) -> Edit:
        try:
            if config.form == "null_space":
                return solve_null_space(
                    pairs,
                    self.keep,
                    self.empty,
                    share=config.null_space_share,
                    ridge=config.null_space_ridge,
                )
            if config.form == "projection":
                assert self.span is not None
                return solve_projection(
                    pairs,
                    self.keep,
                    self.span,
                    eta=config.eta,
                    ridge=config.ridge,
                    share=config.projection_share,
                    span_ridge=config.projection_ridge,
                )
            return solve_edit(pairs, self.keep, eta=config.eta, ridge=config.ridge)
        except SingularError as error:
            raise InputError(f"textual.ridge: expected a system that can be solved, got: {error}") from error
        except ValueError as error:
            raise InputError(f"textual.form={config.form}: {error}") from error


def textual_statistics(
    adapter: Adapter, concepts: Sequence[Concept], kept: Kept, config: TextualConfig
) -> TextualStatistics:
    """Return the statistics of every concept's pairs and of the states to keep.

    K is the weighted mean of four means:

    - every position of the padded kept prompts, with weight 1;
    - their first EoT, which the pairs move, with ``keep_eot_weight``;
    - every position of the empty prompt, with ``empty_prompt_weight``;
    - the EoT of the safe prompts, with ``safe_weight``.
    """
    stream = adapter.streams()[CONTEXT]
    pairs = prompt_pairs(concepts)
    states = {name: pair_states(adapter, stream, rows, config.positions) for name, rows in pairs.items()}
    empty = _all_states(adapter.empty(), stream)
    parts = [
        (1.0, kept.every),
        (config.keep_eot_weight, kept.eot),
        (config.empty_prompt_weight, keep_statistics(empty)),
        (config.safe_weight, keep_statistics(torch.cat([safe for _, safe in states.values()]))),
    ]
    weighted = [KeepStatistics(part.k, weight) for weight, part in parts if weight > 0]
    span = None
    if config.form == "projection":
        span = torch.stack([_span(adapter, stream, rows) for rows in pairs.values()]).sum(0)
    read_by = readers_of(stream, config.matrices) if _needs_readers(config) else None
    return TextualStatistics(states, merge_keep(weighted), empty, span, read_by)


def _span(adapter: Adapter, stream: Stream, pairs: Sequence[PromptPair]) -> Tensor:
    """Return the second moment of malicious states at all positions after the SoT, ``[d, d]`` float64."""
    parts = []
    for start in range(0, len(pairs), ENCODE_BATCH):
        text = adapter.encode([pair.malicious for pair in pairs[start : start + ENCODE_BATCH]])
        chosen = [text.states[name][text.roles[name] != Role.SOT] for name in stream.segments]
        parts.append(keep_statistics(torch.cat(chosen)))
    return merge_keep(parts).k


def readers_of(stream: Stream, matrices: Sequence[str]) -> Readers:
    """Return the moments of the matrices that an edit of ``matrices`` replaces, and of the others."""
    edited = _weights(stream, matrices)
    others = {name: weight for name, weight in _weights(stream, MATRICES).items() if name not in edited}
    return readers(edited.values(), others.values(), stream.width)


def _needs_readers(config: TextualConfig) -> bool:
    """Return False if T has a key, so that no distance is to be told, and no adversary answers."""
    has_key = config.form == "ridge" and set(config.matrices) == set(MATRICES)
    return config.adversarial_rounds > 0 or not has_key


def _weights(stream: Stream, matrices: Sequence[str]) -> dict[str, Tensor]:
    """Return the columns that read the text states, by entry, of the matrices that an edit replaces.

    An entry that is neither a key nor a value projection is always among them.
    """
    left = tuple(ENDINGS[kind] for kind in MATRICES if kind not in matrices)
    return {
        name: entry.module.weight.data[:, entry.first : entry.first + stream.width]
        for name, entry in stream.entries.items()
        if not name.endswith(left)
    }


def pair_states(
    adapter: Adapter, stream: Stream, pairs: Sequence[PromptPair], positions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the malicious and the safe states of ``pairs`` at ``positions``, ``[n, d]`` each.

    They are ordered by segment, position, then pair. SoT pairs with SoT, and the first EoT with the first
    EoT. Padding pairs position by position, if both prompts are padded there. Keywords differ in their number
    of tokens, so each of their tokens pairs with the safe prompt's first EoT.
    """
    encoded = _encode_each(adapter, pairs, positions)
    malicious, safe = encoded[: len(pairs)], encoded[len(pairs) :]
    aligned = [
        _aligned(segment, which, *row)
        for segment in stream.segments
        for which in positions
        for row in zip(malicious, safe, strict=True)
    ]
    sources, targets = zip(*aligned, strict=True)
    return torch.cat(sources), torch.cat(targets)


class _Encoded(NamedTuple):
    """One prompt's text, B = 1, and by segment a mask of its term's tokens, bool ``[1, L]``."""

    text: Text
    term: dict[str, Tensor]


def _encode_each(adapter: Adapter, pairs: Sequence[PromptPair], positions: Sequence[str]) -> list[_Encoded]:
    """Return the encoded malicious prompts, then the safe ones. Prompts of similar length share a batch."""
    prompts = [pair.malicious for pair in pairs] + [pair.safe for pair in pairs]
    terms, trimmed = 2 * [pair.term for pair in pairs], "padding" not in positions
    encoded: dict[int, _Encoded] = {}
    for rows in tqdm(batches_by_length(adapter.token_counts(prompts)), "encoding pairs", leave=False):
        chosen = [prompts[row] for row in rows]
        text = adapter.encode(chosen, trimmed=trimmed)
        found: dict[str, Tensor] = {}
        if "keyword" in positions:
            found = adapter.mentions(chosen, [terms[row] for row in rows], trimmed=trimmed)
        for index, row in enumerate(rows):
            own = slice(index, index + 1)
            encoded[row] = _Encoded(text.rows(own), {name: mask[own] for name, mask in found.items()})
    return [encoded[row] for row in range(len(prompts))]


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return row indices in order of length, in batches of similar length."""
    order = torch.tensor(lengths).argsort(stable=True)
    return [batch.tolist() for batch in order.split(ENCODE_BATCH)]


def _aligned(segment: str, which: str, malicious: _Encoded, safe: _Encoded) -> tuple[Tensor, Tensor]:
    """Return a malicious prompt's states at one kind of position, and the safe states paired with them."""
    sources, roles = malicious.text.states[segment], malicious.text.roles[segment]
    targets, safe_roles = safe.text.states[segment], safe.text.roles[segment]
    mask = position_mask(roles, [which], malicious.term.get(segment))
    if which == "padding":
        mask = mask & position_mask(safe_roles, ["padding"])
        return sources[mask], targets[mask]
    end = position_mask(safe_roles, ["sot" if which == "sot" else "eot"])
    return sources[mask], targets[end].expand(int(mask.sum()), -1)


def apply_edit_(adapter: Adapter, edit: Edit) -> list[str]:
    """Replace W by W T in place in the stream's edited entries, and return the names of the changed tensors.

    Only the columns that read the text states change; biases stay.
    """
    weights = _weights(adapter.streams()[CONTEXT], edit.matrices)
    edits = apply_edits(weights.values(), edit.transform)
    for weight, edited in zip(weights.values(), edits, strict=True):
        weight.copy_(edited)
    adapter.weights_changed()
    return [f"{name}.weight" for name in weights]


class Kept(NamedTuple):
    """The means of e_k e_kᵀ over the states of padded prompts. Their weights count states."""

    every: KeepStatistics
    """The mean over every position."""
    eot: KeepStatistics
    """The mean over the first EoT of each prompt."""


def kept_statistics(adapter: Adapter, prompts: Sequence[str], *, shown: bool = True) -> Kept:
    """Return the means over the states of ``prompts``. If there are none, both means are 0 with weight 0.

    If ``shown`` is True, a progress bar is shown.
    """
    stream = adapter.streams()[CONTEXT]
    nothing = KeepStatistics(torch.zeros(stream.width, stream.width, dtype=torch.float64), 0.0)
    every, eot = [], []
    batches = range(0, len(prompts), ENCODE_BATCH)
    for start in tqdm(batches, "encoding prompts to keep", leave=False, disable=not shown):
        text = adapter.encode(prompts[start : start + ENCODE_BATCH])
        every.append(keep_statistics(_all_states(text, stream)))
        ends = [text.states[name][position_mask(text.roles[name], ["eot"])] for name in stream.segments]
        eot.append(keep_statistics(torch.cat(ends)))
    return Kept(*(merge_keep(parts) if parts else nothing for parts in (every, eot)))


def _all_states(text: Text, stream: Stream) -> Tensor:
    """Return the states of all positions that a stream edits, ``[n, d]``."""
    return torch.cat([text.states[name].flatten(0, 1) for name in stream.segments])


def cached_kept(trainer: pl.Trainer, adapter: Adapter, prompts: Sequence[str], cache: Path) -> Kept:
    """Return :func:`kept_statistics` with weights 1, from ``cache`` if it has them for these prompts.

    If it doesn't, every rank encodes a share of the prompts. All ranks must see ``cache``. Text encoders
    return to their device.

    Raises:
        InputError: there are no prompts.
    """
    if not prompts:
        raise InputError("textual.keep_prompts: expected at least one prompt to keep, got none")
    text = "\n".join([adapter.text_fingerprint(), *prompts])
    d = adapter.streams()[CONTEXT].width
    file = cache / f"kept-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"

    def encode(rank: Rank) -> None:
        # Rank 0 decides, because another run may write the file between two ranks' checks.
        if trainer.strategy.broadcast(file.exists()):
            return
        with adapter.encoding_on(rank.device):
            share = kept_statistics(adapter, prompts[rank.index :: rank.world_size], shown=rank.index == 0)
        means = {name: _over_ranks(trainer, rank, part) for name, part in share._asdict().items()}
        if rank.index == 0:
            write_safetensors(file, means)

    on_each_rank(trainer, encode)
    means = read_safetensors(file, "sums of the prompts to keep")
    with reading(file, "sums of the prompts to keep"):
        return Kept(*(KeepStatistics(means[name].view(d, d), 1.0) for name in Kept._fields))


def _over_ranks(trainer: pl.Trainer, rank: Rank, part: KeepStatistics) -> Tensor:
    """Return K over the prompts of all ranks, [d, d] float64."""
    if rank.world_size == 1:
        return part.k
    weighted = torch.cat([(part.k * part.weight).flatten(), torch.tensor([part.weight], dtype=torch.float64)])
    total = trainer.strategy.reduce(weighted.to(rank.device), reduce_op="sum").cpu()
    return (total[:-1] / total[-1]).view_as(part.k)
