"""What an edit must keep: second moments of prompts' states, summed once per text encoder by all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.closed_form import KeepStatistics, keep_statistics, merge_keep
from trce_lightning.errors import InputError
from trce_lightning.ranks import Rank, on_each_rank
from trce_lightning.storage import read_safetensors, reading, write_safetensors
from trce_lightning.tokens import position_mask

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
