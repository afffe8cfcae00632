"""Stage 1 on a model: encode prompts, accumulate statistics, solve, edit every cross-attention K and V."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from trce_lightning.adapters import StableDiffusionAdapter, TextStates
from trce_lightning.closed_form import (
    Edit,
    KeepStatistics,
    PairStatistics,
    SingularError,
    apply_edits,
    keep_statistics,
    merge_keep,
    merge_pairs,
    pair_statistics,
    solve_edit,
)
from trce_lightning.concepts import Concept, PromptPair, prompt_pairs
from trce_lightning.config.schema import TextualConfig
from trce_lightning.errors import InputError
from trce_lightning.runtime.ranks import Rank, on_each_rank
from trce_lightning.runtime.storage import read_safetensors, reading, write_safetensors
from trce_lightning.tokens import position_mask


@dataclass(frozen=True)
class TextualStatistics:
    """What stage 1 is solved from: pair statistics by concept, and the kept states' mean."""

    pairs: dict[str, PairStatistics]
    keep: KeepStatistics

    def solve(self, config: TextualConfig) -> Edit:
        """Return T over all concepts. ``InputError`` names ``textual.ridge`` if T is not determined."""
        pairs = merge_pairs(list(self.pairs.values()))
        try:
            return solve_edit(pairs, self.keep, eta=config.eta, ridge=config.ridge)
        except SingularError as error:
            raise InputError(f"textual.ridge: expected a system that can be solved, got: {error}") from error


def textual_statistics(
    adapter: StableDiffusionAdapter,
    concepts: Sequence[Concept],
    kept: Kept,
    config: TextualConfig,
) -> TextualStatistics:
    """Encode every concept's pairs, and put what is to keep together.

    K is the mean over: every position of the padded kept prompts with weight 1, their first EoT (what the
    pairs move) with ``keep_eot_weight``, every position of the empty prompt with ``empty_prompt_weight``, and
    the safe prompts' EoT with ``safe_weight``; each part counts as one mean.
    """
    pairs, safe = {}, []
    for name, rows in prompt_pairs(concepts).items():
        malicious, safe_states = pair_states(adapter, rows, config.positions)
        pairs[name] = pair_statistics(malicious, safe_states)
        safe.append(safe_states)
    parts = [
        (1.0, kept.every),
        (config.keep_eot_weight, kept.eot),
        (config.empty_prompt_weight, keep_statistics(adapter.encode([""]).states[0])),
        (config.safe_weight, keep_statistics(torch.cat(safe))),
    ]
    weighted = [KeepStatistics(part.k, weight) for weight, part in parts if weight > 0]
    return TextualStatistics(pairs, merge_keep(weighted))


def pair_states(
    adapter: StableDiffusionAdapter, pairs: Sequence[PromptPair], positions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """States of ``pairs`` at ``positions``, ``[n, d]`` twice: row by row, by position, then pair.

    SoT pairs with SoT and the first EoT with the first EoT. Padding pairs position by position, where both
    prompts are padded. Keywords differ in number of tokens: each pairs with the safe prompt's first EoT.
    """
    prompts = [pair.malicious for pair in pairs] + [pair.safe for pair in pairs]
    texts = _encode_each(adapter, prompts, trimmed="padding" not in positions)
    aligned = [
        _aligned(adapter, which, pair.term, source, target)
        for which in positions
        for pair, source, target in zip(pairs, texts[: len(pairs)], texts[len(pairs) :], strict=True)
    ]
    malicious, safe = zip(*aligned, strict=True)
    return torch.cat(malicious), torch.cat(safe)


def _encode_each(
    adapter: StableDiffusionAdapter, prompts: Sequence[str], *, trimmed: bool
) -> list[TextStates]:
    """Every prompt's states ``[1, L, d]``, encoded together with prompts of like length, to trim most."""
    lengths = [len(ids) for ids in adapter.token_ids(prompts, cut=True)]
    encoded: dict[int, TextStates] = {}
    for rows in tqdm(batches_by_length(lengths), "encoding pairs", leave=False):
        text = adapter.encode([prompts[row] for row in rows], trimmed=trimmed)
        one_by_one = zip(text.states.split(1), text.input_ids.split(1), strict=True)
        encoded |= {row: TextStates(*one) for row, one in zip(rows, one_by_one, strict=True)}
    return [encoded[row] for row in range(len(prompts))]


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row indices in order of length, in batches of like length."""
    order = torch.tensor(lengths).argsort(stable=True)
    return [batch.tolist() for batch in order.split(ENCODE_BATCH)]


def _aligned(
    adapter: StableDiffusionAdapter, which: str, term: str, source: TextStates, target: TextStates
) -> tuple[Tensor, Tensor]:
    """A malicious prompt's states at one kind of position, and the safe prompt's that they pair with."""
    eos_token_id = adapter.tokenizer.eos_token_id
    keyword = keyword_mask(adapter, source.input_ids, [term]) if which == "keyword" else None
    mask = position_mask(source.input_ids, eos_token_id, [which], keyword)
    if which == "padding":
        mask = mask & position_mask(target.input_ids, eos_token_id, ["padding"])
        return source.states[mask], target.states[mask]
    end = position_mask(target.input_ids, eos_token_id, ["sot" if which == "sot" else "eot"])
    return source.states[mask], target.states[end].expand(int(mask.sum()), -1)


def keyword_mask(adapter: StableDiffusionAdapter, input_ids: Tensor, terms: Sequence[str]) -> Tensor:
    """True where a prompt's tokens spell its term, bool ``[B, L]``; all False where the term isn't found."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, ids in enumerate(adapter.token_ids(terms, special=False)):
        word = torch.tensor(ids)
        if len(word) > input_ids.shape[1]:
            continue
        windows = input_ids[row].unfold(0, len(word), 1)
        for start in (windows == word).all(1).nonzero().flatten().tolist():
            mask[row, start : start + len(word)] = True
    return mask


def apply_edit_(adapter: StableDiffusionAdapter, edit: Edit) -> list[str]:
    """Replace W by W T in place for every cross-attention K and V; returns their names."""
    projections = adapter.text_projections()
    weights = [projection.weight.data for projection in projections.values()]
    for weight, edited in zip(weights, apply_edits(weights, edit.transform), strict=True):
        weight.copy_(edited)
    adapter.weights_changed()
    return [f"{name}.weight" for name in projections]


ENCODE_BATCH = 32


class Kept(NamedTuple):
    """Means over the positions of padded prompts, ``every`` one and their first EoT; weights count states."""

    every: KeepStatistics
    eot: KeepStatistics


def kept_statistics(adapter: StableDiffusionAdapter, prompts: Sequence[str], *, shown: bool = True) -> Kept:
    """Encode ``prompts``; without any, both means are 0 with weight 0. ``shown``: with a progress bar."""
    d = _width(adapter)
    nothing = KeepStatistics(torch.zeros(d, d, dtype=torch.float64), 0.0)
    every, eot = [], []
    batches = range(0, len(prompts), ENCODE_BATCH)
    for start in tqdm(batches, "encoding prompts to keep", leave=False, disable=not shown):
        text = adapter.encode(prompts[start : start + ENCODE_BATCH])
        ends = position_mask(text.input_ids, adapter.tokenizer.eos_token_id, ["eot"])
        every.append(keep_statistics(text.states.flatten(0, 1)))
        eot.append(keep_statistics(text.states[ends]))
    return Kept(*(merge_keep(parts) if parts else nothing for parts in (every, eot)))


def cached_kept(
    trainer: pl.Trainer, adapter: StableDiffusionAdapter, prompts: Sequence[str], cache: Path
) -> Kept:
    """:func:`kept_statistics` with weights 1, from ``cache`` if the same encoder has seen the same prompts.

    Else every rank encodes a share. All must see ``cache``. The text encoder stays where it is.

    Raises:
        InputError: no prompts.
    """
    if not prompts:
        raise InputError("textual.keep_prompts: expected at least one prompt to keep, got none")
    text = "\n".join([adapter.text_fingerprint(), *prompts])
    d = _width(adapter)
    file = cache / f"kept-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"

    def encode(rank: Rank) -> None:
        # Rank 0 decides: another run may write the file between two ranks' looks at it.
        if trainer.strategy.broadcast(file.exists()):
            return
        home = adapter.text_encoder.device
        adapter.text_encoder.to(rank.device)
        share = kept_statistics(adapter, prompts[rank.index :: rank.world_size], shown=rank.index == 0)
        adapter.text_encoder.to(home)
        means = {name: _over_ranks(trainer, rank, part) for name, part in share._asdict().items()}
        if rank.index == 0:
            write_safetensors(file, means)

    on_each_rank(trainer, encode)
    means = read_safetensors(file, "sums of the prompts to keep")
    with reading(file, "sums of the prompts to keep"):
        return Kept(*(KeepStatistics(means[name].view(d, d), 1.0) for name in Kept._fields))


def _width(adapter: StableDiffusionAdapter) -> int:
    """Of a text state."""
    return next(iter(adapter.text_projections().values())).in_features


def _over_ranks(trainer: pl.Trainer, rank: Rank, part: KeepStatistics) -> Tensor:
    """K of all ranks' prompts, [d, d] float64."""
    if rank.world_size == 1:
        return part.k
    weighted = torch.cat([(part.k * part.weight).flatten(), torch.tensor([part.weight], dtype=torch.float64)])
    total = trainer.strategy.reduce(weighted.to(rank.device), reduce_op="sum").cpu()
    return (total[:-1] / total[-1]).view_as(part.k)
