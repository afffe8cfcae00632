"""The texts that a method erases, with what takes their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.concepts import Concept, PromptPair, prompt_pairs
from trce_lightning.concepts.naming import mentions
from trce_lightning.errors import InputError
from trce_lightning.textual import ENCODE_BATCH
from trce_lightning.tokens import Role

PROMPTS = ("names", "sentences")
"""The concept's terms and their wordings alone, or in the sentences of its templates."""
GUIDES = ("empty", "counterpart")
"""The text in an erased one's place: the empty prompt, or the same with the safe counterpart."""
POSITIONS = ("last", "from_last", "all")
"""The last content token, all positions from there to the end of the padding, or all positions."""
AFTER_START = "after_start"
"""All positions but the start of text, whose state is the same in every text."""


def erased_pairs(concepts: Sequence[Concept], prompts: str, guide: str) -> list[PromptPair]:
    """Return each text to erase beside its guide text, for concepts that are erased together.

    ``prompts`` is one of :data:`PROMPTS`, and ``guide`` one of :data:`GUIDES`. No guide names any of the
    concepts. If a concept is left without pairs, raise ``InputError``.
    """
    sentences = prompt_pairs(concepts)  # checks the concepts too
    pairs = [pair for rows in sentences.values() for pair in rows]
    if prompts == "names":
        pairs = [
            PromptPair(name, counterpart, name)
            for concept in concepts
            for term, counterpart in concept.terms.items()
            for name in concept.names(term)
            if guide == "empty" or not mentions(counterpart, concepts)
        ]
    if not pairs:
        raise InputError("concept: expected a text to erase with a guide that names no concept, got none")
    if guide == "empty":
        pairs = [pair._replace(safe="") for pair in pairs]
    return list(dict.fromkeys(pairs))


def paired_states(
    adapter: Adapter, segments: Sequence[str], pairs: Sequence[PromptPair], positions: str
) -> tuple[Tensor, Tensor]:
    """Return the states of texts to erase and those of their guides, ``[n, d]`` each, row by row.

    ``positions`` is one of :data:`POSITIONS` or :data:`AFTER_START`. "last" pairs the two texts' last content
    tokens; that of the empty text is its SoT. "from_last" pairs the positions from there on, in order, as far
    as both texts have positions. The other two pair equal positions.
    """
    erased: list[Tensor] = []
    guides: list[Tensor] = []
    for pair in pairs:
        text, guide = adapter.encode([pair.malicious]), adapter.encode([pair.safe])
        for segment in segments:
            states, guide_states = text.states[segment][0], guide.states[segment][0]
            first, guide_first, count = 0, 0, len(states)
            if positions == AFTER_START:
                first = guide_first = int(text.roles[segment][0, 0] == Role.SOT)
                count -= first
            elif positions != "all":
                first, guide_first = _last_content(text.roles[segment]), _last_content(guide.roles[segment])
                count = 1 if positions == "last" else len(states) - max(first, guide_first)
            erased.append(states[first : first + count])
            guides.append(guide_states[guide_first : guide_first + count])
    return torch.cat(erased), torch.cat(guides)


def _last_content(roles: Tensor) -> int:
    """Return the position before the first EoT. ``roles`` is ``[1, L]``. A pooled segment has only one."""
    ends = (roles[0] == Role.EOT).nonzero().flatten()
    return max(0, int(ends[0]) - 1)


def prompt_states(
    adapter: Adapter, segments: Sequence[str], prompts: Sequence[str], positions: str
) -> Tensor:
    """Return states of prompts, ``[n, d]`` float64 on the CPU.

    ``positions`` is "last" for the last content token of each, "content" for all positions up to the first
    EoT, or "all".
    """
    found: list[Tensor] = []
    for start in range(0, len(prompts), ENCODE_BATCH):
        text = adapter.encode(prompts[start : start + ENCODE_BATCH])
        for segment in segments:
            states, roles = text.states[segment].cpu(), text.roles[segment].cpu()
            if positions == "last":
                rows = torch.arange(len(states))
                chosen = states[rows, [_last_content(row[None]) for row in roles]]
            else:
                chosen = states[(roles < Role.PADDING) | (positions == "all")]
            found.append(chosen.double())
    return torch.cat(found)
