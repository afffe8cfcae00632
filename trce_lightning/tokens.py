"""Positions in a tokenised prompt: start of text (SoT), keyword, first end of text (EoT), padding.

Token positions (`token_index`) count tokens from the SoT at 0. Padding is whatever follows the first EoT, by
position: some tokenizers pad with the EoT itself, others with another token (SD 2.x: "!"). `eos_token_id` is
the tokenizer's; a text encoder's config may hold another number under that name.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

POSITIONS = ("sot", "keyword", "eot", "padding")


def eot_index(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Token index of the first EoT of each prompt: [B, L] → [B] int64. ValueError if a prompt has none."""
    is_eot = input_ids == eos_token_id
    missing = (~is_eot.any(1)).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"every row of input_ids must hold eos_token_id {eos_token_id}, rows {missing} do not"
        )
    return is_eot.int().argmax(1)


def position_mask(
    input_ids: Tensor, eos_token_id: int, which: Sequence[str], keyword_mask: Tensor | None = None
) -> Tensor:
    """True at the positions named by `which`, one or more of `POSITIONS`: [B, L] → bool [B, L].

    "padding" is every position after the first EoT; "keyword" is `keyword_mask` (bool [B, L]). Raises
    ValueError on an unknown or no name, a missing or misshapen `keyword_mask`, and a prompt without EoT.
    """
    if isinstance(which, str) or not which or not set(which) <= set(POSITIONS):
        raise ValueError(f"which must be a list of one or more of {POSITIONS}, got {which!r}")
    token_index = torch.arange(input_ids.shape[1], device=input_ids.device)
    first_eot = eot_index(input_ids, eos_token_id)[:, None]
    masks = {"sot": (token_index == 0).expand(input_ids.shape), "eot": token_index == first_eot}
    masks["padding"] = token_index > first_eot
    if "keyword" in which:
        if keyword_mask is None or keyword_mask.shape != input_ids.shape or keyword_mask.dtype != torch.bool:
            got = None if keyword_mask is None else f"{keyword_mask.dtype} {[*keyword_mask.shape]}"
            raise ValueError(f'"keyword" needs keyword_mask, torch.bool {[*input_ids.shape]}, got {got}')
        masks["keyword"] = keyword_mask.to(input_ids.device)
    return torch.stack([masks[name] for name in which]).any(0)


def trim_length(input_ids: Tensor, eos_token_id: int) -> int:
    """The number of leading positions, in [1, L], that hold every prompt of `input_ids` [B, L] with its EoT.

    A causal text encoder gives the same states up to each EoT when what lies beyond is cut off.
    """
    return int(eot_index(input_ids, eos_token_id).max()) + 1
