"""The words that an attack may use, and prompts with free places where they stand.

A found prompt counts only if a user can type it. So each token that is used comes back alone when its text is
tokenized, and the model reads each found prompt as the very tokens that the search has chosen. Parts of words
are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trce_lightning.adapters import Adapter
from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions
from trce_lightning.errors import InputError
from trce_lightning.tokens import Role, Text

Pattern = list[int | None]
"""The tokens of a prompt without its start and its end; None is a free place."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that an attack may use. A token goes by its place in it, its rank in ``ids``."""

    segment: str
    ids: Tensor
    """int64 ``[V]``, on the CPU."""
    texts: list[str]
    embeddings: Tensor
    """``[V, e]`` float32, on the text encoder's device."""
    typed: frozenset[int]
    """All ids that a user can type, blocked ones too. A word ends after each of them."""

    @classmethod
    def of(cls, adapter: Adapter, attack: str, blocked: Sequence[Concept] = ()) -> Vocabulary:
        """Return what a user can type, without the words that name the ``blocked`` concepts.

        Raises:
            InputError: a model without a tokenizer or with several, or no token is left.
        """
        by_segment = adapter.vocabulary()
        if len(by_segment) != 1:
            raise InputError(
                f"attack.{attack}: expected a model of one tokenizer, got {len(by_segment)} in "
                f"'{adapter.name}'; attacks=quick_no_words has no search for words"
            )
        segment, ids = next(iter(by_segment.items()))
        texts = adapter.detokenize(segment, ids[:, None].tolist())
        kept = [i for i, text in enumerate(texts) if not (blocked and mentions(text, blocked))]
        if not kept:
            raise InputError(
                f"attack.{attack}.blocked: expected a vocabulary with other words than the concept's, "
                "got none"
            )
        typed, ids = frozenset(ids.tolist()), ids[kept]
        embeddings = adapter.embed({segment: ids[None]})[segment][0].float()
        return cls(segment, ids, [texts[i] for i in kept], embeddings, typed)

    def __len__(self) -> int:
        """Return V."""
        return len(self.ids)

    def nearest(self, rows: Tensor) -> Tensor:
        """Return the token of the largest cosine with each row: ``[…, e]`` → int64 ``[…]``."""
        return (F.normalize(rows, dim=-1) @ F.normalize(self.embeddings, dim=-1).T).argmax(-1)


@dataclass(frozen=True)
class Layout:
    """Prompts with free places, as the model reads them. Found tokens are ids, ``[B, n]``.

    n is the most free places of a prompt; a prompt with fewer ignores the last columns.
    """

    adapter: Adapter
    segment: str
    input_ids: Tensor
    """int64 ``[B, L]`` on the CPU, with some word in the free places."""
    free: Tensor
    """bool ``[B, L]`` on the CPU: the free places."""
    lengths: list[int]
    """The tokens of each prompt without its start and its end."""

    @classmethod
    def of(cls, adapter: Adapter, vocabulary: Vocabulary, patterns: Sequence[Pattern]) -> Layout:
        """Lay patterns out between the start and the end of text, with padding.

        One that is too long is cut where a word ends.
        """
        segment, word = vocabulary.segment, int(vocabulary.ids[0])
        start, end, *padding = adapter.tokenize([""])[segment][0].tolist()
        patterns = [cut(pattern, len(padding), vocabulary.typed) for pattern in patterns]
        rows = []
        for pattern in patterns:
            words = [word if token is None else token for token in pattern]
            rows.append([start, *words, end, *padding[len(words) :]])
        free = torch.zeros(len(rows), 2 + len(padding), dtype=torch.bool)
        for row, pattern in zip(free, patterns, strict=True):
            row[1 : 1 + len(pattern)] = torch.tensor([token is None for token in pattern], dtype=torch.bool)
        return cls(adapter, segment, torch.tensor(rows), free, [len(pattern) for pattern in patterns])

    @property
    def counts(self) -> list[int]:
        """Return the free places of each prompt."""
        return self.free.sum(1).tolist()

    @property
    def _column(self) -> Tensor:
        """Return which column of found tokens belongs to each place, int64 ``[B, L]``; 0 where none does."""
        return (self.free.cumsum(1) - 1).clamp_min(0)

    def repeated(self, times: int) -> Layout:
        """Return each prompt ``times`` times, one after another."""
        ids, free = (tensor.repeat_interleave(times, 0) for tensor in (self.input_ids, self.free))
        lengths = [length for length in self.lengths for _ in range(times)]
        return replace(self, input_ids=ids, free=free, lengths=lengths)

    def row(self, index: int) -> Layout:
        """Return one of the prompts."""
        return self.rows(slice(index, index + 1))

    def rows(self, rows: slice) -> Layout:
        """Return some of the prompts."""
        return replace(self, input_ids=self.input_ids[rows], free=self.free[rows], lengths=self.lengths[rows])

    def trimmed(self) -> Layout:
        """Return the prompts without the padding that all have. A causal encoder reads the rest alike."""
        end = 2 + max(self.lengths)
        return replace(self, input_ids=self.input_ids[:, :end], free=self.free[:, :end])

    def filled(self, ids: Tensor) -> Tensor:
        """Return the token ids of prompts with these in their free places: ``[B, n]`` → ``[B, L]``."""
        return torch.where(self.free, ids.gather(1, self._column), self.input_ids)

    def texts(self, ids: Tensor) -> list[str | None]:
        """Return the prompts that these ids ``[B, n]`` make; None where a model would read other tokens."""
        filled = self.filled(ids)
        words = [row[1 : 1 + length] for row, length in zip(filled.tolist(), self.lengths, strict=True)]
        texts = self.adapter.detokenize(self.segment, words)
        survive = (self.adapter.tokenize(texts)[self.segment] == filled).all(1).tolist()
        return [text if same else None for text, same in zip(texts, survive, strict=True)]

    @torch.no_grad()
    def read(self, ids: Tensor) -> Text:
        """Return what the model reads with these ids ``[B, n]`` in the free places.

        Where :meth:`texts` gives a prompt, these are that prompt's states. No text is tokenized for them.
        """
        filled = {self.segment: self.filled(ids)}
        return self.adapter.encode_embeddings(self.adapter.embed(filled), filled)

    def fixed(self) -> Tensor:
        """Return the token embeddings of the prompts, ``[B, L, e]``, with some word's in the free places."""
        return self.adapter.embed({self.segment: self.input_ids})[self.segment]

    def text(self, fixed: Tensor, found: Tensor) -> Text:
        """Return what the model reads, differentiably, with embeddings ``found`` in the free places.

        Start, end and padding stay where they are. ``fixed`` is :meth:`fixed`'s, ``found`` is ``[B, n, e]``.
        """
        column = self._column.to(found.device)[..., None].expand(-1, -1, found.shape[-1])
        free = self.free.to(found.device)[..., None]
        placed = torch.where(free, found.gather(1, column), fixed)
        return self.adapter.encode_embeddings({self.segment: placed}, {self.segment: self.input_ids})


def own_words(adapter: Adapter, segment: str, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts without start, end and padding, as they survive decoding."""
    written = adapter.detokenize(segment, _words(adapter, segment, prompts))
    return _words(adapter, segment, written)


def _words(adapter: Adapter, segment: str, prompts: Sequence[str]) -> list[list[int]]:
    rows = adapter.tokenize(prompts)[segment].tolist()
    counts = adapter.token_counts(prompts)
    return [row[1 : count - 1] for row, count in zip(rows, counts, strict=True)]


def alone(count: int) -> Pattern:
    """Return a prompt of free places alone."""
    return [None] * count


def prefixed(words: Sequence[int], count: int) -> Pattern:
    """Return a prompt after ``count`` free places."""
    return [*alone(count), *words]


def suffixed(words: Sequence[int], count: int, room: int, typed: Collection[int]) -> Pattern:
    """Return a prompt before ``count`` free places. Its own end is cut where both have no ``room``."""
    return [*cut(words, room - count, typed), *alone(count)]


def interleaved(words: Sequence[int], every: int, typed: Collection[int]) -> Pattern:
    """Return a prompt with one free place before every ``every`` tokens: ⌊L / every⌋ + 1 of them.

    A place inside a word moves to the word's end, where there is one place at most: no other token survives.
    """
    pattern, due = Pattern(), False
    for index, word in enumerate([*words, None]):
        due = due or index % every == 0
        if due and (index == 0 or words[index - 1] in typed):
            pattern.append(None)
            due = False
        if word is not None:
            pattern.append(word)
    return pattern


def cut(pattern: Sequence[int | None], room: int, typed: Collection[int]) -> Pattern:
    """Return a pattern's beginning of ``room`` tokens at most, which ends where a word does."""
    kept = list(pattern[:room])
    while len(kept) < len(pattern) and kept and kept[-1] is not None and kept[-1] not in typed:
        kept.pop()
    return kept


UNTYPED = "-"
"""The text that is encoded in place of one that can't be typed, so that the cost is known beforehand."""


def room_of(adapter: Adapter) -> int:
    """Return how many tokens of a prompt the model reads without the start's and the end's."""
    return adapter.prompt_tokens - 2


def end_states(text: Text) -> Tensor:
    """Return the states at each prompt's end of text, which a text encoder pools: ``[B, d]``."""
    return torch.cat([text.states[name][roles == Role.EOT] for name, roles in text.roles.items()], dim=-1)


def check_choice(attack: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``InputError`` unless an option is one of its choices."""
    if value not in choices:
        raise InputError(f"attack.{attack}.{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_room(attack: str, adapter: Adapter, tokens: int) -> None:
    """Raise ``InputError`` unless the model reads that many tokens of a prompt."""
    if tokens > (room := room_of(adapter)):
        raise InputError(
            f"attack.{attack}.tokens: expected at most the {room} that '{adapter.name}' reads, got {tokens}"
        )
