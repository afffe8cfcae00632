"""Stage 1 on a model. It encodes prompts, sums statistics, solves for T, and edits the model's weights."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from trce_lightning.adapters import Adapter, Entry, Stream
from trce_lightning.adapters.stored import StoredNetwork
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
from trce_lightning.config.schema import MATRICES, STREAMS, TextualConfig
from trce_lightning.errors import InputError
from trce_lightning.runtime.ranks import Rank, on_each_rank
from trce_lightning.runtime.storage import read_safetensors, reading, write_safetensors
from trce_lightning.tokens import Role, Text, position_mask

log = logging.getLogger(__name__)
ENCODE_BATCH = 32
"""The number of prompts that are encoded together."""
CONTEXT, POOLED = STREAMS
"""The streams of an adapter: the states of a text's positions, and its one pooled vector."""
Pairs = dict[str, tuple[Tensor, Tensor]]
"""The malicious and the safe states by concept, ``[n, d]`` each."""
T5 = "t5"
"""The segment of an encoder that isn't causal. Its EoT hasn't a causal encoder's summary of the prompt."""
ENDINGS = {"key": "to_k", "value": "to_v"}
"""The ends of the entries' names by the kind of their matrix."""


@dataclass(frozen=True)
class TextualStatistics:
    """The statistics that the edit of a stream is solved from."""

    states: Pairs
    """The states that pair."""
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
    stream: str = CONTEXT
    """The name of the stream."""
    further: tuple[TextualStatistics, ...] = ()
    """The statistics of the other streams."""

    @property
    def pairs(self) -> dict[str, PairStatistics]:
        """Return the pair statistics by concept."""
        return {name: pair_statistics(*states) for name, states in self.states.items()}

    def solve(self, config: TextualConfig) -> Edit:
        """Return T over all concepts, after ``adversarial_rounds`` answers to it.

        Further streams are solved by themselves.

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
        return replace(
            edit,
            matrices=tuple(config.matrices),
            keyless_distance=distance,
            stream=self.stream,
            further=tuple(part.solve(config) for part in self.further),
        )

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


def edited_streams(adapter: Adapter, config: TextualConfig) -> dict[str, Stream]:
    """Return the model's streams that ``textual.streams`` names. If there are none, raise ``InputError``."""
    every = adapter.streams()
    streams = {name: stream for name, stream in every.items() if name in config.streams}
    if not streams:
        raise InputError(
            f"textual.streams: expected one of {', '.join(every)}, which '{adapter.name}' reads, got "
            f"{', '.join(config.streams)}"
        )
    return streams


def textual_statistics(
    adapter: Adapter, concepts: Sequence[Concept], kept: Mapping[str, Kept], config: TextualConfig
) -> TextualStatistics:
    """Return the statistics of every concept's pairs and of the states to keep, by stream.

    K is the weighted mean of four means:

    - every position of the padded kept prompts, with weight 1;
    - their first EoT, which the pairs move, with ``keep_eot_weight``;
    - every position of the empty prompt, with ``empty_prompt_weight``;
    - the EoT of the safe prompts, with ``safe_weight``.

    If the model has none of the streams that ``textual.streams`` names, raise ``InputError``.
    """
    streams = edited_streams(adapter, config)
    pairs = prompt_pairs(concepts)
    t5 = config.t5_positions if any(T5 in stream.segments for stream in streams.values()) else ()
    states: dict[str, Pairs] = {name: {} for name in streams}
    for concept, rows in pairs.items():
        encoded = _encode_each(adapter, rows, config.positions, t5)
        for name, stream in streams.items():
            states[name][concept] = _paired(stream, encoded, positions_of(name, config.positions), t5)
    # Zeros as the text of no prompt at all are kept by every T. The empty prompt as a text can be asked for.
    empty = adapter.encode([""])
    spans = _spans(adapter, streams, pairs.values()) if config.form == "projection" else {}
    first, *further = [
        _statistics(name, stream, states[name], kept[name], empty, spans.get(name), config)
        for name, stream in streams.items()
    ]
    return replace(first, further=tuple(further))


def _statistics(
    name: str,
    stream: Stream,
    states: Pairs,
    kept: Kept,
    empty: Text,
    span: Tensor | None,
    config: TextualConfig,
) -> TextualStatistics:
    """Return the statistics of one stream."""
    nothing = _all_states(empty, stream)
    parts = [
        (1.0, kept.every),
        (config.keep_eot_weight, kept.eot),
        (config.empty_prompt_weight, keep_statistics(nothing)),
        (config.safe_weight, keep_statistics(torch.cat([safe for _, safe in states.values()]))),
    ]
    weighted = [KeepStatistics(part.k, weight) for weight, part in parts if weight > 0]
    read_by = readers_of(stream, config.matrices) if _needs_readers(config) else None
    return TextualStatistics(states, merge_keep(weighted), nothing, span, read_by, stream=name)


def positions_of(stream: str, positions: Sequence[str]) -> Sequence[str]:
    """Return the positions of a stream whose states pair. The pooled vector pairs whatever is named."""
    return ("eot",) if stream == POOLED else positions


def _spans(
    adapter: Adapter, streams: Mapping[str, Stream], concepts: Iterable[Sequence[PromptPair]]
) -> dict[str, Tensor]:
    """Return Σ over concepts of the second moment of malicious states at all positions after the SoT.

    They are ``[d, d]`` float64, by stream.
    """
    sums: dict[str, list[Tensor]] = {name: [] for name in streams}
    for pairs in concepts:
        parts: dict[str, list[KeepStatistics]] = {name: [] for name in streams}
        for start in range(0, len(pairs), ENCODE_BATCH):
            text = adapter.encode([pair.malicious for pair in pairs[start : start + ENCODE_BATCH]])
            for name, stream in streams.items():
                chosen = [
                    _states(text, part, stream)[text.roles[part] != Role.SOT] for part in stream.segments
                ]
                parts[name].append(keep_statistics(torch.cat(chosen)))
        for name, own in parts.items():
            sums[name].append(merge_keep(own).k)
    return {name: torch.stack(moments).sum(0) for name, moments in sums.items()}


def _states(text: Text, segment: str, stream: Stream) -> Tensor:
    """Return the states of a segment as the stream's entries read them, ``[B, L, d]``, in the stream's scale.

    Narrower states than d have zeros after them.
    """
    own = text.states[segment] * stream.scales.get(segment, 1.0)
    missing = stream.width - own.shape[-1]
    return F.pad(own, (0, missing)) if missing else own


def readers_of(stream: Stream, matrices: Sequence[str]) -> Readers:
    """Return the moments of the matrices that an edit of ``matrices`` replaces, and of the others."""
    edited = edited_entries(stream, matrices)
    others = {name: entry for name, entry in stream.entries.items() if name not in edited}
    width = stream.width
    return readers(_columns(edited.values(), width), _columns(others.values(), width), width)


def _needs_readers(config: TextualConfig) -> bool:
    """Return False if T has a key, so that no distance is to be told, and no adversary answers."""
    has_key = config.form == "ridge" and set(config.matrices) == set(MATRICES)
    return config.adversarial_rounds > 0 or not has_key


def edited_entries(stream: Stream, matrices: Sequence[str]) -> dict[str, Entry]:
    """Return the entries, by name, that an edit of ``matrices`` replaces.

    An entry that is neither a key nor a value projection is always among them.
    """
    left = tuple(ENDINGS[kind] for kind in MATRICES if kind not in matrices)
    return {name: entry for name, entry in stream.entries.items() if not name.endswith(left)}


def _columns(entries: Iterable[Entry], width: int) -> Iterator[Tensor]:
    """Yield the columns of each W that read the text states, ``[d_out, d]``."""
    for entry in entries:
        yield entry.module.weight.data[:, entry.first : entry.first + width]


def pair_states(
    adapter: Adapter, stream: Stream, pairs: Sequence[PromptPair], positions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return the malicious and the safe states of ``pairs`` at ``positions``, ``[n, d]`` each.

    They are ordered by segment, position, then pair. SoT pairs with SoT, and the first EoT with the first
    EoT. Padding pairs position by position, if both prompts are padded there. Keywords differ in their number
    of tokens, so each of their tokens pairs with the safe prompt's first EoT. In the segment of T5 it pairs
    with the mean of the counterpart's tokens. Where one of both isn't found, nothing pairs.
    """
    return _paired(stream, _encode_each(adapter, pairs, positions), positions)


def _paired(
    stream: Stream, encoded: Sequence[_Encoded], positions: Sequence[str], t5: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Return :func:`pair_states` of encoded pairs. The positions of T5's segment are ``t5``.

    If the stream has T5's segment, every segment and kind of position weighs the same, however many states it
    has: the n_k states of each of K kinds are scaled by √(n / (K n_k)).
    """
    count = len(encoded) // 2
    kinds = []
    for segment in stream.segments:
        for which in t5 if segment == T5 else positions:
            rows = zip(encoded[:count], encoded[count:], strict=True)
            sources, targets = zip(*(_aligned(stream, segment, which, *row) for row in rows), strict=True)
            kinds.append((torch.cat(sources), torch.cat(targets)))
    if T5 in stream.segments:
        scales = _balance([len(sources) for sources, _ in kinds])
        kinds = [
            (sources * scale, targets * scale)
            for (sources, targets), scale in zip(kinds, scales, strict=True)
        ]
    return torch.cat([sources for sources, _ in kinds]), torch.cat([targets for _, targets in kinds])


def _balance(counts: Sequence[int]) -> list[float]:
    """Return a scale for each part, with which the mean of all states is that of the parts' means."""
    parts = sum(count > 0 for count in counts)
    return [math.sqrt(sum(counts) / (parts * count)) if count else 0.0 for count in counts]


class _Encoded(NamedTuple):
    """One prompt's text, B = 1, and by segment a mask of its term's tokens, bool ``[1, L]``."""

    text: Text
    term: dict[str, Tensor]


def _encode_each(
    adapter: Adapter, pairs: Sequence[PromptPair], positions: Sequence[str], t5: Sequence[str] = ()
) -> list[_Encoded]:
    """Return the encoded malicious prompts, then the safe ones. Prompts of similar length share a batch."""
    prompts = [pair.malicious for pair in pairs] + [pair.safe for pair in pairs]
    terms = [pair.term for pair in pairs] + [_counterpart(pair) for pair in pairs]
    trimmed = "padding" not in positions
    encoded: dict[int, _Encoded] = {}
    for rows in tqdm(batches_by_length(adapter.token_counts(prompts)), "encoding pairs", leave=False):
        chosen = [prompts[row] for row in rows]
        text = adapter.encode(chosen, trimmed=trimmed)
        found: dict[str, Tensor] = {}
        if "keyword" in (*positions, *t5):
            found = adapter.mentions(chosen, [terms[row] for row in rows], trimmed=trimmed)
        for index, row in enumerate(rows):
            own = slice(index, index + 1)
            encoded[row] = _Encoded(text.rows(own), {name: mask[own] for name, mask in found.items()})
    return [encoded[row] for row in range(len(prompts))]


def _counterpart(pair: PromptPair) -> str:
    """Return the words of the safe prompt that stand in the place of the term."""
    before, _, after = pair.malicious.partition(pair.term)
    return pair.safe.removeprefix(before).removesuffix(after)


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return row indices in order of length, in batches of similar length."""
    order = torch.tensor(lengths).argsort(stable=True)
    return [batch.tolist() for batch in order.split(ENCODE_BATCH)]


def _aligned(
    stream: Stream, segment: str, which: str, malicious: _Encoded, safe: _Encoded
) -> tuple[Tensor, Tensor]:
    """Return a malicious prompt's states at one kind of position, and the safe states paired with them."""
    sources, roles = _states(malicious.text, segment, stream), malicious.text.roles[segment]
    targets, safe_roles = _states(safe.text, segment, stream), safe.text.roles[segment]
    mask = position_mask(roles, [which], malicious.term.get(segment))
    if which == "padding":
        mask = mask & position_mask(safe_roles, ["padding"])
        return sources[mask], targets[mask]
    if which == "keyword" and segment == T5:
        words = safe.term[segment].to(targets.device)
        found = int(mask.sum()) if words.any() else 0
        return sources[mask][:found], targets[words].mean(0, keepdim=True).expand(found, -1)
    end = position_mask(safe_roles, ["sot" if which == "sot" else "eot"])
    return sources[mask], targets[end].expand(int(mask.sum()), -1)


def apply_edit_(adapter: Adapter, edit: Edit) -> list[str]:
    """Replace W by W T in place in every edited entry, and return the names of the changed tensors.

    Only the columns that read the text states change; biases stay. Each stream has a T of its own.
    """
    streams, names = adapter.streams(), []
    for own in (edit, *edit.further):
        stream = streams[own.stream]
        entries = edited_entries(stream, own.matrices)
        edits = apply_edits(_columns(entries.values(), stream.width), own.transform)
        for weight, edited in zip(_columns(entries.values(), stream.width), edits, strict=True):
            weight.copy_(edited)
        names += [f"{name}.weight" for name in entries]
    adapter.weights_changed()
    return names


class StoredEdit(NamedTuple):
    """One T with the denoiser's tensors that it edits."""

    transform: Tensor
    columns: Mapping[str, int]
    """The first column that T edits, by the tensor's name."""


def stored_edits(adapter: Adapter, edit: Edit) -> dict[str, StoredEdit]:
    """Return the T of each stream with the tensors that it edits, by the stream's name."""
    streams = adapter.streams()
    return {
        own.stream: StoredEdit(
            own.transform,
            {
                f"{name}.weight": entry.first
                for name, entry in edited_entries(streams[own.stream], own.matrices).items()
            },
        )
        for own in (edit, *edit.further)
    }


def edited_tensors(stored: StoredNetwork, edits: Iterable[StoredEdit]) -> Iterator[tuple[str, Tensor]]:
    """Yield every edited tensor of a network that stays on the disk, by name. One is in memory at a time.

    They are float32, or float64 if they are stored so. If a tensor is missing, has too few columns or is
    quantized, raise ``InputError``.
    """
    for edit in edits:
        yield from _edited(stored, edit)


def _edited(stored: StoredNetwork, edit: StoredEdit) -> Iterator[tuple[str, Tensor]]:
    d, whole = len(edit.transform), list[Tensor]()

    def parts() -> Iterator[Tensor]:
        for name, first in edit.columns.items():
            whole[:] = [_read(stored, name, first + d)]  # the one before is freed
            yield whole[0][:, first : first + d]

    edited = apply_edits(parts(), edit.transform)
    for (name, first), part in zip(edit.columns.items(), edited, strict=True):
        whole[0][:, first : first + d] = part
        yield name, whole[0]


def _read(stored: StoredNetwork, name: str, width: int) -> Tensor:
    shape = stored.shape(name)
    if len(shape) != 2 or shape[1] < width:
        raise InputError(
            f"model.path: expected {name} with {width} columns or more, which the edit reads, got {[*shape]} "
            f"in '{stored.folder}'; this edit belongs to another model"
        )
    return stored.read(name).to(torch.promote_types(stored.dtype(name), torch.float32), copy=True)


class Kept(NamedTuple):
    """The means of e_k e_kᵀ over the states of padded prompts. Their weights count states."""

    every: KeepStatistics
    """The mean over every position."""
    eot: KeepStatistics
    """The mean over the first EoT of each prompt."""


def kept_statistics(adapter: Adapter, prompts: Sequence[str], *, shown: bool = True) -> dict[str, Kept]:
    """Return the means over the states of ``prompts`` by stream. If there are none, they are 0 with weight 0.

    If ``shown`` is True, a progress bar is shown.
    """
    streams = adapter.streams()
    every: dict[str, list[KeepStatistics]] = {name: [] for name in streams}
    eot: dict[str, list[KeepStatistics]] = {name: [] for name in streams}
    batches = range(0, len(prompts), ENCODE_BATCH)
    for start in tqdm(batches, "encoding prompts to keep", leave=False, disable=not shown):
        text = adapter.encode(prompts[start : start + ENCODE_BATCH])
        for name, stream in streams.items():
            every[name].append(keep_statistics(_all_states(text, stream)))
            ends = [
                _states(text, part, stream)[position_mask(text.roles[part], ["eot"])]
                for part in stream.segments
            ]
            eot[name].append(keep_statistics(torch.cat(ends)))
    return {
        name: Kept(_merged(every[name], stream.width), _merged(eot[name], stream.width))
        for name, stream in streams.items()
    }


def _merged(parts: Sequence[KeepStatistics], width: int) -> KeepStatistics:
    """Return the mean of means, or 0 with weight 0 if there are none."""
    if not parts:
        return KeepStatistics(torch.zeros(width, width, dtype=torch.float64), 0.0)
    return merge_keep(parts)


def _all_states(text: Text, stream: Stream) -> Tensor:
    """Return the states of all positions that a stream edits, ``[n, d]``. Its segments weigh the same."""
    parts = [_states(text, segment, stream).flatten(0, 1) for segment in stream.segments]
    scales = _balance([len(part) for part in parts])
    return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])


def cached_kept(
    trainer: pl.Trainer, adapter: Adapter, prompts: Sequence[str], cache: Path
) -> dict[str, Kept]:
    """Return :func:`kept_statistics` with weights 1, from ``cache`` if it has them for these prompts.

    If it doesn't, every rank encodes a share of the prompts. All ranks must see ``cache``. Text encoders
    return to their device.

    Raises:
        InputError: there are no prompts.
    """
    if not prompts:
        raise InputError("textual.keep_prompts: expected at least one prompt to keep, got none")
    text = "\n".join([adapter.text_fingerprint(), *prompts])
    streams = adapter.streams()
    file = cache / f"kept-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"

    def encode(rank: Rank) -> None:
        # Rank 0 decides, because another run may write the file between two ranks' checks.
        if trainer.strategy.broadcast(file.exists()):
            return
        with adapter.encoding_on(rank.device):
            share = kept_statistics(adapter, prompts[rank.index :: rank.world_size], shown=rank.index == 0)
        means = {
            _name_of(stream, name): _over_ranks(trainer, rank, part)
            for stream, own in share.items()
            for name, part in own._asdict().items()
        }
        if rank.index == 0:
            write_safetensors(file, means)

    on_each_rank(trainer, encode)
    means = read_safetensors(file, "sums of the prompts to keep")
    with reading(file, "sums of the prompts to keep"):
        return {
            stream: Kept(
                *(
                    KeepStatistics(means[_name_of(stream, name)].view(own.width, own.width), 1.0)
                    for name in Kept._fields
                )
            )
            for stream, own in streams.items()
        }


def keys_of(
    adapter: Adapter, transforms: Mapping[str, Tensor], *, rtol: float | None = None
) -> dict[str, Tensor]:
    """Return by segment the matrix K, ``[w, w]``, for which ‖T [eᵀK, 0]ᵀ − [eᵀ, 0]ᵀ‖ is least.

    ``transforms`` has T by stream, ``[d, d]``. A segment may have narrower states, w ≤ d, with zeros after
    them. So K = ((T_w)⁺)_wᵀ, where T_w has the first w columns of T. If w = d, it is T⁺ᵀ. Singular values
    below ``rtol`` of the largest count as zero. None stands for torch's own share.
    """
    empty, streams, keys = adapter.empty(), adapter.streams(), {}
    for name, transform in transforms.items():
        for segment in streams[name].segments:
            width = empty.states[segment].shape[-1]
            inverse = torch.linalg.pinv(transform[:, :width], rtol=rtol)
            keys[segment] = inverse[:, :width].mT.contiguous()
    return keys


def _name_of(stream: str, name: str) -> str:
    """Return the name of a stored mean."""
    return name if stream == CONTEXT else f"{stream}.{name}"


def _over_ranks(trainer: pl.Trainer, rank: Rank, part: KeepStatistics) -> Tensor:
    """Return K over the prompts of all ranks, [d, d] float64."""
    if rank.world_size == 1:
        return part.k
    weighted = torch.cat([(part.k * part.weight).flatten(), torch.tensor([part.weight], dtype=torch.float64)])
    total = trainer.strategy.reduce(weighted.to(rank.device), reduce_op="sum").cpu()
    return (total[:-1] / total[-1]).view_as(part.k)
