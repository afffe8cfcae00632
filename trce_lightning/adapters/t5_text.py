"""T5's tokenizer and encoder as diffusers' pipelines use them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trce_lightning.adapters.clip_text import ClipText, Tokens
from trce_lightning.tokens import roles_of


class T5Text(ClipText):
    """An encoder of T5 with its tokenizer. It begins without a start token, and its end is ``</s>``.

    It isn't causal, and diffusers gives it no mask. So every state depends on all tokens, on padding and on
    the padded length, and T5 is never trimmed.
    """

    def __init__(self, pipeline: Any, encoder: str, tokenizer: str, length: int) -> None:
        """Take both from the pipeline by their names in it. ``length`` is the padded length in tokens."""
        super().__init__(pipeline, encoder, tokenizer)
        self._length = length

    @property
    def length(self) -> int:
        """Return the padded length in tokens, including the end."""
        return self._length

    @property
    def embeddings(self) -> nn.Embedding:
        """Return the token embeddings that the encoder looks up. They share their weights with ``shared``."""
        return self.encoder.encoder.get_input_embeddings()

    def roles(self, ids: Tensor) -> Tensor:
        """Return the role of every position, ``[B, L]`` → int8 ``[B, L]``."""
        return roles_of(ids, self.end, has_start=False)

    def trim_length(self, tokens: Tokens) -> int:
        """Return the padded length."""
        return self._length

    def states(self, tokens: Tokens) -> Tensor:
        """Return the states of every position, ``[B, L, d]`` float32."""
        return self.outputs(tokens)[0].float()
