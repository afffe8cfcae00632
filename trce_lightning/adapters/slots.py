"""Prompts with free places, which vectors fill instead of a word's token embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trce_lightning.adapters.protocol import Adapter
from trce_lightning.errors import InputError
from trce_lightning.tokens import Text

PLACEHOLDER = "<concept>"
"""The place of the vectors in a prompt."""


@dataclass(frozen=True)
class Slots:
    """Prompts with n free places each."""

    ids: dict[str, Tensor]
    """Token ids by segment, int64 ``[B, L]``. Any id stands in the free places."""
    places: dict[str, Tensor]
    """Positions of the n free places by segment, int64 ``[B, n]``."""

    def rows(self, chosen: Tensor) -> Slots:
        """Return some of the prompts. ``chosen`` holds indices, which may repeat."""
        return Slots(*({name: own[chosen] for name, own in part.items()} for part in (self.ids, self.places)))

    def filled(self, adapter: Adapter, vectors: Mapping[str, Tensor]) -> Text:
        """Return the prompts with embeddings in the free places, differentiable in these.

        The embeddings are ``[n, e]`` for all prompts, or ``[B, n, e]`` for one prompt each, by segment.
        """
        embeddings = {}
        for name, own in adapter.embed(self.ids).items():
            rows = torch.arange(len(own), device=own.device)[:, None]
            values = vectors[name].to(own).expand(len(own), -1, -1)
            embeddings[name] = own.index_put((rows, self.places[name].to(own.device)), values)
        return adapter.encode_embeddings(embeddings, self.ids)


def slots_of(adapter: Adapter, prompts: Sequence[str], word: str, vectors: int, option: str) -> Slots:
    """Return prompts with n = ``vectors`` free places instead of `PLACEHOLDER`.

    Args:
        adapter: the model.
        prompts: sentences that hold the placeholder once.
        word: a word that the tokenizer leaves whole. It finds the place.
        vectors: the number n.
        option: the option that errors name, such as "attack.inversion".

    Raises:
        InputError: a prompt is too long with the vectors, or the model reads no tokens.
    """
    spelt_out = [prompt.replace(PLACEHOLDER, word) for prompt in prompts]
    ids, padding = adapter.tokenize(spelt_out), adapter.tokenize([""])
    if not ids:
        raise InputError(f"{option}: expected a model with a tokenizer, got '{adapter.name}'")
    masks = adapter.mentions(spelt_out, [word] * len(spelt_out), trimmed=False)
    counts, found, places = adapter.token_counts(spelt_out), {}, {}
    for name, rows in ids.items():
        free, firsts = [], []
        for prompt, row, mask, tokens in zip(spelt_out, rows, masks[name], counts, strict=True):
            check_spelt(mask, prompt, word, option)
            own = mask.nonzero().flatten()
            first, behind = int(own[0]), int(own[-1]) + 1
            if tokens + vectors - len(own) > adapter.prompt_tokens:
                raise InputError(
                    f"{option}.vectors: expected a prompt of at most {adapter.prompt_tokens} tokens, got "
                    f"{vectors} vectors in '{prompt}'"
                )
            middle, end = row[first : first + 1].expand(vectors), padding[name][0, -1:].expand(len(own))
            free.append(torch.cat([row[:first], middle, row[behind:], end])[: len(row)])
            firsts.append(first)
        found[name] = torch.stack(free)
        places[name] = torch.tensor(firsts)[:, None] + torch.arange(vectors)
    return Slots(found, places)


def initial_vectors(adapter: Adapter, word: str, vectors: int, option: str) -> dict[str, Tensor]:
    """Return the mean embedding of a word's tokens n = ``vectors`` times, ``[n, e]`` float32 by segment.

    If the tokenizer doesn't leave the word whole, raise ``InputError`` that names ``option``.
    """
    spelt = adapter.mentions([word], [word], trimmed=False)
    embeddings = adapter.embed(adapter.tokenize([word]))
    for name in embeddings:
        check_spelt(spelt[name][0], word, word, option)
    return {
        name: own[0, spelt[name][0].to(own.device)].mean(0).float().repeat(vectors, 1)
        for name, own in embeddings.items()
    }


def check_spelt(mask: Tensor, prompt: str, word: str, option: str) -> None:
    """Raise ``InputError`` unless a mask of the word's tokens, bool ``[L]``, found it in the prompt."""
    if not mask.any():
        raise InputError(
            f"{option}.initial: expected a word that the tokenizer leaves whole in '{prompt}', got '{word}'"
        )
