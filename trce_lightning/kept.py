"""What an edit must keep: second moments of prompts' states, summed once per text encoder by all ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.closed_form import KeepStatistics, keep_statistics, merge_keep
from trce_lightning.ranks import on_each_rank
from trce_lightning.storage import write_safetensors
from trce_lightning.tokens import position_mask

ENCODE_BATCH = 32


class Kept(NamedTuple):
    """Means over the padded prompts' positions: ``every`` one, and their first EoT."""

    every: KeepStatistics
    eot: KeepStatistics


def kept_statistics(
    adapter: StableDiffusionAdapter, prompts: Sequence[str], cache: Path | None = None
) -> Kept:
    """Both means with weight 1, from ``cache`` if the same encoder has seen the same prompts.

    Raises:
        ValueError: no prompts.
    """
    _check(prompts)
    file = _file(adapter, prompts, cache) if cache else None
    if file and file.exists():
        means = load_file(file)
    else:
        means = {name: part.k for name, part in _encode(adapter, prompts).items()}
        if file:
            write_safetensors(file, means)
    return Kept(*(KeepStatistics(means[name], 1.0) for name in Kept._fields))


def encode_kept(
    trainer: pl.Trainer, adapter: StableDiffusionAdapter, prompts: Sequence[str], cache: Path
) -> None:
    """Let every rank encode a share of the prompts, where ``cache`` lacks their means.

    Raises:
        ValueError: no prompts.
    """
    _check(prompts)
    file = _file(adapter, prompts, cache)
    if file.exists():
        return

    def encode(rank: pl.LightningModule) -> None:
        adapter.text_encoder.to(rank.device)
        share = prompts[rank.global_rank :: trainer.world_size]
        parts = _encode(adapter, share, shown=rank.global_rank == 0)
        means = {name: _over_ranks(part, rank) for name, part in parts.items()}
        if rank.global_rank == 0:
            write_safetensors(file, means)

    on_each_rank(trainer, encode)
    trainer.strategy.barrier()


def _check(prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError("textual.keep_prompts: expected at least one prompt to keep, got none")


def _file(adapter: StableDiffusionAdapter, prompts: Sequence[str], cache: Path) -> Path:
    text = "\n".join([adapter.text_fingerprint(), *prompts])
    return cache / f"kept-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.safetensors"


def _encode(
    adapter: StableDiffusionAdapter, prompts: Sequence[str], *, shown: bool = True
) -> dict[str, KeepStatistics]:
    """Means over these prompts, weighted by their states; of weight 0 without prompts."""
    d = next(iter(adapter.text_projections().values())).in_features
    nothing = KeepStatistics(torch.zeros(d, d, dtype=torch.float64), 0.0)
    parts: dict[str, list[KeepStatistics]] = {name: [] for name in Kept._fields}
    batches = range(0, len(prompts), ENCODE_BATCH)
    for start in tqdm(batches, "encoding prompts to keep", leave=False, disable=not shown):
        text = adapter.encode(prompts[start : start + ENCODE_BATCH])
        ends = position_mask(text.input_ids, adapter.tokenizer.eos_token_id, ["eot"])
        parts["every"].append(keep_statistics(text.states.flatten(0, 1)))
        parts["eot"].append(keep_statistics(text.states[ends]))
    return {name: merge_keep(found) if found else nothing for name, found in parts.items()}


def _over_ranks(part: KeepStatistics, rank: pl.LightningModule) -> Tensor:
    """K of all ranks' prompts, [d, d] float64."""
    if rank.trainer.world_size == 1:
        return part.k
    weighted = torch.cat([(part.k * part.weight).flatten(), torch.tensor([part.weight], dtype=torch.float64)])
    total = rank.trainer.strategy.reduce(weighted.to(rank.device), reduce_op="sum").cpu()
    return (total[:-1] / total[-1]).view_as(part.k)
