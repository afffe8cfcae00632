"""CLIP's tokenizer and text encoder as diffusers' pipelines use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from trce_lightning.errors import InputError
from trce_lightning.tokens import roles_of, trim_length


class Tokens(NamedTuple):
    """Prompts as one tokenizer reads them, padded and cut to its length."""

    ids: Tensor
    """int64 ``[B, L]`` on the CPU."""
    mask: Tensor
    """1 up to the first EoT and 0 at padding, int64 ``[B, L]``."""

    def first(self, length: int | None) -> Tokens:
        """Return the first ``length`` positions, or all."""
        return Tokens(self.ids[:, :length], self.mask[:, :length])


class ClipText:
    """A text encoder of CLIP, which is causal, with its tokenizer."""

    def __init__(self, pipeline: Any, encoder: str, tokenizer: str) -> None:
        """Take both from the pipeline by their names in it."""
        self.pipeline, self.name = pipeline, encoder
        self.tokenizer, self.encoder = getattr(pipeline, tokenizer), getattr(pipeline, encoder)

    @property
    def length(self) -> int:
        """Return how many tokens of a prompt are read, including the start and end tokens."""
        return int(self.tokenizer.model_max_length)

    @property
    def device(self) -> torch.device:
        """Return the encoder's device."""
        return self.encoder.device

    def tokens(self, prompts: Sequence[str]) -> Tokens:
        """Return the prompts' tokens. If a token has no embedding, raise ``InputError``."""
        tokens: BatchEncoding = self.tokenizer(
            self.written_out(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        last = int(tokens.input_ids.max())
        if last >= self.known:
            raise InputError(
                f"model: expected embeddings for every token, got {self.known} and none for "
                f"{self.tokenizer.convert_ids_to_tokens(last)!r}; load the textual inversion into tokenizer "
                "and text encoder"
            )
        return Tokens(tokens.input_ids, tokens.attention_mask)

    def tokens_of(self, ids: Tensor, *, padded: bool = True) -> Tokens:
        """Return tokens of ids ``[B, L]``.

        If they are not ``padded`` by this tokenizer but by another one, its own padding replaces the other's.
        """
        ends = (ids == self.end).int()
        padding = ends.cumsum(1) > ends
        own = ids if padded else ids.masked_fill(padding, self.tokenizer.pad_token_id)
        return Tokens(own, (~padding).long())

    @property
    def embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings that the encoder looks up."""
        return self.encoder.get_input_embeddings()

    @property
    def known(self) -> int:
        """Return the number of tokens that have an embedding."""
        return self.embeddings.num_embeddings

    @property
    def end(self) -> int:
        """Return the EoT's id. A text encoder's config may have another number under that name."""
        return int(self.tokenizer.eos_token_id)

    def written_out(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts as diffusers reads them.

        If a textual inversion has several vectors, it becomes its tokens ``<x> <x>_1 …``. SD3 reads none.
        """
        added = self.tokenizer.added_tokens_encoder
        reads = hasattr(self.pipeline, "maybe_convert_prompt")
        if reads and any(f"{token}_1" in added for token in added):
            return self.pipeline.maybe_convert_prompt(list(prompts), self.tokenizer)
        return list(prompts)

    def rows(self, prompts: Sequence[str], *, special: bool = True, cut: bool = False) -> list[list[int]]:
        """Return the token ids of each prompt without padding.

        ``special`` adds the start and end tokens. ``cut`` cuts to the model's length.
        """
        length = {"max_length": self.length} if cut else {}
        return self.tokenizer(
            self.written_out(prompts), add_special_tokens=special, truncation=cut, verbose=False, **length
        ).input_ids

    def roles(self, ids: Tensor) -> Tensor:
        """Return the role of every position, ``[B, L]`` → int8 ``[B, L]``."""
        return roles_of(ids, self.end)

    def trim_length(self, tokens: Tokens) -> int:
        """Return the number of positions up to the last prompt's EoT."""
        return trim_length(tokens.ids, self.end)

    @cached_property
    def typed_ids(self) -> Tensor:
        """The token ids that a user can type, int64 ``[V]`` on the CPU.

        Each comes back alone when its text is tokenized. Parts of words don't. Special tokens don't count.
        """
        special = set(self.tokenizer.all_special_ids)
        ids = [i for i in range(min(len(self.tokenizer), self.known)) if i not in special]
        read = self.rows(self.detokenize([[i] for i in ids]), special=False)
        return torch.tensor([i for i, back in zip(ids, read, strict=True) if back == [i]])

    def detokenize(self, words: Sequence[Sequence[int]]) -> list[str]:
        """Return the prompts that token ids spell, without the start's, the end's and padding."""
        rows = [list(row) for row in words]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False) if rows else []

    def spelt(self, ids: Tensor, terms: Sequence[str]) -> Tensor:
        """Return True at the tokens of each row that spell its term, bool ``[B, L]``."""
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, term in enumerate(self.rows(terms, special=False)):
            word = torch.tensor(term)
            if len(word) > ids.shape[1]:
                continue
            windows = ids[row].unfold(0, len(word), 1)
            for start in (windows == word).all(1).nonzero().flatten().tolist():
                mask[row, start : start + len(word)] = True
        return mask

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return token embeddings, ``[B, L]`` → ``[B, L, e]``, without gradients."""
        return self.embeddings(ids.to(self.device))

    @property
    def embedding_width(self) -> int:
        """Return the width e of a token's embedding."""
        return self.embeddings.embedding_dim

    @contextmanager
    def embedding(self, given: Tensor) -> Iterator[None]:
        """Let the encoder read embeddings ``[B, L, e]`` within, whatever its token ids."""
        given = given.to(self.device, self.encoder.dtype)
        # The encoder accepts only ids, so a hook replaces the embeddings that it looks up.
        hook = self.embeddings.register_forward_hook(lambda *_: given)
        try:
            yield
        finally:
            hook.remove()

    def outputs(self, tokens: Tokens, *, masked: bool = False, **options: Any) -> Any:
        """Return the encoder's output. ``masked`` hides padding, if the encoder's config says so."""
        if masked and getattr(self.encoder.config, "use_attention_mask", False):
            options["attention_mask"] = tokens.mask.to(self.device)
        # Lightning's hooks autocast in some places and not in others. The states must not depend on that.
        with torch.autocast(self.device.type, enabled=False):
            return self.encoder(tokens.ids.to(self.device), **options)
