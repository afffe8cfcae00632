"""Checks for prompts that are too long. A model reads only their beginnings, without a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from trce_lightning.adapters.protocol import Adapter
from trce_lightning.concepts import PromptPair
from trce_lightning.errors import InputError

log = logging.getLogger(__name__)


def warn_of_cut(adapter: Adapter, prompts: Sequence[str], of: str) -> None:
    """Log how many of the prompts the model reads only in part. ``of`` names their owner in the message."""
    if cut := len(adapter.cut(prompts)):
        log.warning(
            "%d of %d prompts of %s are longer than the %d tokens that the model reads; they are cut",
            cut,
            len(prompts),
            of,
            adapter.prompt_tokens,
        )


def check_pairs(adapter: Adapter, pairs: Mapping[str, Sequence[PromptPair]]) -> None:
    """Refuse pairs that the model can't learn from, and log how many prompts it reads only in part.

    Raises:
        InputError: the model stops reading a prompt before the end of its term, or reads the same tokens in
            both prompts of a pair.
    """
    for name, rows in pairs.items():
        malicious, safe = [row.malicious for row in rows], [row.safe for row in rows]
        cut = set(adapter.cut(malicious))
        for row in rows:
            if row.malicious in cut and adapter.cut([_up_to_term(row)]):
                raise InputError(
                    f"concept.{name}: expected terms within the {adapter.prompt_tokens} tokens of a prompt "
                    f"that the model reads, got {row.term!r} after them or across their end in "
                    f"{row.malicious!r}; shorten the term or the template, or lower scene_templates"
                )
        malicious_ids, safe_ids = adapter.tokenize(malicious), adapter.tokenize(safe)
        for i, row in enumerate(rows):
            if all(ids[i].equal(safe_ids[segment][i]) for segment, ids in malicious_ids.items()):
                raise InputError(
                    f"concept.{name}: expected terms that the model tells from their counterparts, got "
                    f"{row.term!r}: it reads {row.malicious!r} and {row.safe!r} as the same tokens"
                )
        warn_of_cut(adapter, [*malicious, *safe], f"concept {name}'s pairs")


def _up_to_term(pair: PromptPair) -> str:
    return pair.malicious[: pair.malicious.index(pair.term) + len(pair.term)]
