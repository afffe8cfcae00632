"""Prompts that are longer than what a model reads: it reads their beginnings, and says nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from trce_lightning.adapters.protocol import Adapter
from trce_lightning.concepts import PromptPair
from trce_lightning.errors import InputError

log = logging.getLogger(__name__)


def warn_of_cut(adapter: Adapter, prompts: Sequence[str], of: str) -> None:
    """Log how many of the prompts the model reads in part alone; ``of`` says whose they are."""
    if cut := len(adapter.cut(prompts)):
        log.warning(
            "%d of %d prompts of %s are longer than the %d tokens that the model reads; they are cut",
            cut,
            len(prompts),
            of,
            adapter.prompt_tokens,
        )


def check_pairs(adapter: Adapter, pairs: Mapping[str, Sequence[PromptPair]]) -> None:
    """Refuse pairs that the model can't learn from, and log how many prompts it reads in part alone.

    Raises:
        InputError: what the model reads of a prompt ends before its term does, or is the same in both.
    """
    for name, rows in pairs.items():
        malicious, safe = [row.malicious for row in rows], [row.safe for row in rows]
        cut = set(adapter.cut(malicious))
        for row in rows:
            if row.malicious in cut and adapter.cut([_up_to_term(row)]):
                raise InputError(
                    f"concept.{name}: expected terms within the {adapter.prompt_tokens} tokens of a prompt "
                    f"that the model reads, got {row.term!r} after them or across their end in "
                    f"{row.malicious!r}; shorten the term or the template"
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
