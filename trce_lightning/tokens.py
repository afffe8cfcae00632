"""The text input of a denoiser: text states by segment, with a role for each position.

A segment is the output of one text encoder, or of several side by side: "clip", "t5", or "pooled", which has
one position. Token positions (`token_index`) count from the start of text (SoT) at 0. All positions after the
first end of text (EoT) are padding. Some tokenizers pad with the EoT itself, others with another token (SD
2.x: "!"). `eos_token_id` is the tokenizer's. A text encoder's config may have another number under that name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = slice | Tensor | Sequence[int]
POSITIONS = ("sot", "keyword", "eot", "padding")


class Role(IntEnum):
    """The role of a position. T5 has no SoT; its EoT is ``</s>``. A pooled vector is an EoT."""

    SOT, WORD, EOT, PADDING = range(4)


@dataclass(frozen=True)
class Text:
    """A batch of prompts as a denoiser reads them, by segment."""

    states: dict[str, Tensor]
    """The text states, segment → ``[B, L, d]`` float32. L is 1 for a pooled segment."""
    roles: dict[str, Tensor]
    """The roles of the positions, segment → int8 ``[B, L]``."""

    def __post_init__(self) -> None:
        assert self.states.keys() == self.roles.keys()
        assert all(self.states[name].shape[:2] == roles.shape for name, roles in self.roles.items())

    def __len__(self) -> int:
        """Return B, the number of prompts."""
        return len(next(iter(self.states.values())))

    def rows(self, chosen: Rows) -> Text:
        """Return some of the prompts. ``chosen`` is a slice, indices or a mask."""
        return self._each(lambda tensor: tensor[chosen])

    def expand(self, count: int) -> Text:
        """Return one prompt ``count`` times, without copies. B must be 1."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def to(self, device: torch.device | str) -> Text:
        """Return the same text on a device."""
        return self._each(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        """Return the prompts of all ``texts``, in order. The texts must have equal segments and lengths."""
        names = texts[0].states
        return Text(
            {name: torch.cat([text.states[name] for text in texts]) for name in names},
            {name: torch.cat([text.roles[name] for text in texts]) for name in names},
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Text:
        return Text(
            {name: change(states) for name, states in self.states.items()},
            {name: change(roles) for name, roles in self.roles.items()},
        )


def state_rms(text: Text) -> dict[str, Tensor]:
    """Return the root mean square of the states of each position, [B, L, 1] by segment."""
    return {name: states.square().mean(-1, keepdim=True).sqrt() for name, states in text.states.items()}


def within_ball(delta: Tensor, radius: Tensor) -> Tensor:
    """Return `delta` with every |δ_i| cut to `radius`, which broadcasts over it."""
    return torch.maximum(torch.minimum(delta, radius), -radius)


def eot_index(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Return the token index of each prompt's first EoT: [B, L] → [B] int64.

    If a prompt has no EoT, raise ValueError.
    """
    is_eot = input_ids == eos_token_id
    missing = (~is_eot.any(1)).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"every row of input_ids must hold eos_token_id {eos_token_id}, rows {missing} do not"
        )
    return is_eot.int().argmax(1)


def roles_of(input_ids: Tensor, eos_token_id: int, *, has_start: bool = True) -> Tensor:
    """Return the `Role` of every position: [B, L] → int8 [B, L]. With `has_start`, position 0 is the SoT.

    If a prompt has no EoT, raise ValueError.
    """
    token_index = torch.arange(input_ids.shape[1], device=input_ids.device)
    first_eot = eot_index(input_ids, eos_token_id)[:, None]
    roles = torch.full_like(input_ids, Role.WORD, dtype=torch.int8)
    if has_start:
        roles[:, 0] = Role.SOT
    roles[token_index == first_eot] = Role.EOT
    roles[token_index > first_eot] = Role.PADDING
    return roles


def position_mask(roles: Tensor, which: Sequence[str], keyword_mask: Tensor | None = None) -> Tensor:
    """Return True at the positions that `which` names, some of `POSITIONS`: int8 [B, L] → bool [B, L].

    The positions of "keyword" are `keyword_mask` (bool [B, L]); the other names are roles. If there is no
    name or an unknown one, or `keyword_mask` is missing or has another shape, raise ValueError.
    """
    if isinstance(which, str) or not which or not set(which) <= set(POSITIONS):
        raise ValueError(f"which must be a list of one or more of {POSITIONS}, got {which!r}")
    masks = {name.lower(): roles == Role[name] for name in ("SOT", "EOT", "PADDING")}
    if "keyword" in which:
        if keyword_mask is None or keyword_mask.shape != roles.shape or keyword_mask.dtype != torch.bool:
            got = None if keyword_mask is None else f"{keyword_mask.dtype} {[*keyword_mask.shape]}"
            raise ValueError(f'"keyword" needs keyword_mask, torch.bool {[*roles.shape]}, got {got}')
        masks["keyword"] = keyword_mask.to(roles.device)
    return torch.stack([masks[name] for name in which]).any(0)


def trim_length(input_ids: Tensor, eos_token_id: int) -> int:
    """Return the number of leading positions, in [1, L], that hold all prompts [B, L] up to their EoT.

    If the later positions are cut off, a causal text encoder gives the same states up to each EoT.
    """
    return int(eot_index(input_ids, eos_token_id).max()) + 1
