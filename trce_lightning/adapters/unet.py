"""The parts that adapters of a UNet2DConditionModel share.

Its cross-attention reads the raw states of causal text encoders. They lie side by side in one segment.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor

from trce_lightning.adapters.attention import attention_for_gradients
from trce_lightning.adapters.base import PipelineAdapter, settings_of
from trce_lightning.adapters.clip_text import ClipText, Tokens
from trce_lightning.adapters.finite import not_finite, weights_not_finite
from trce_lightning.adapters.protocol import Entry, Stream
from trce_lightning.adapters.refusals import refuse_other_parts, refuse_what_the_method_does_not_fit
from trce_lightning.adapters.schedule import check_placed, ddim_of, scheduler_like
from trce_lightning.adapters.single_file import original_state
from trce_lightning.errors import InputError
from trce_lightning.sampling import Schedule, ddim_schedule
from trce_lightning.tokens import Text, roles_of

SEGMENT = "clip"
"""The segment of the text encoders' states, and of their common token ids and embeddings."""


class UNetAdapter(PipelineAdapter):
    """The :class:`~.protocol.Adapter` of a pipeline with a UNet2DConditionModel and DDIM's noise schedules.

    Token ids are the first tokenizer's. An embedding holds the embeddings of all encoders side by side.
    """

    addition_embed_type: ClassVar[str | None] = None
    """The kind of a denoiser's further input, as in its config."""

    def __init__(
        self, pipeline: DiffusionPipeline, name: str | None = None, *, resolution: int | None = None
    ) -> None:
        """Take a pipeline's networks; see :class:`.PipelineAdapter`. ``InputError`` if they don't fit."""
        encoders = dict(zip(self.encoder_names, self.tokenizer_names, strict=True))
        refuse_what_the_method_does_not_fit(pipeline, encoders, self.addition_embed_type)
        super().__init__(pipeline, name, resolution=resolution)
        self.texts = [ClipText(pipeline, *names) for names in encoders.items()]
        self.ddim = ddim_of(pipeline.scheduler)

    @classmethod
    def refuse_index(cls, index: Mapping[str, Any], source: str) -> None:
        """Raise ``InputError`` unless the parts that ``model_index.json`` names are those of the family."""
        refuse_other_parts(index, source, cls.encoder_names, cls.tokenizer_names)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids, padded and cut to the model's length, int64 ``[B, L]`` on the CPU."""
        return {SEGMENT: self.texts[0].tokens(prompts).ids}

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens of a prompt the model can read, including the start and end tokens."""
        return self.texts[0].length

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt the model reads, including the start and end tokens."""
        return [len(ids) for ids in self.texts[0].rows(prompts, cut=True)]

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts of which a text encoder reads only the beginning."""
        if not prompts:
            return []
        lengths = zip(*(map(len, text.rows(prompts)) for text in self.texts), strict=True)
        return [prompt for prompt, own in zip(prompts, lengths, strict=True) if max(own) > self.prompt_tokens]

    def fits(self, prompt: str) -> bool:
        """Return whether the model reads the whole prompt."""
        return not self.cut([prompt])

    def vocabulary(self) -> dict[str, Tensor]:
        """Return the token ids that a user can type, int64 ``[V]`` on the CPU.

        Each comes back alone when its text is tokenized, by every tokenizer. Special tokens don't count.
        """
        ids, *others = [text.typed_ids for text in self.texts]
        for other in others:
            ids = ids[torch.isin(ids, other)]
        return {SEGMENT: ids}

    def detokenize(self, segment: str, words: Sequence[Sequence[int]]) -> list[str]:
        """Return the prompts that token ids spell, without the start's, the end's and padding."""
        assert segment == SEGMENT
        return self.texts[0].detokenize(words)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Text:
        """Return prompts as the denoiser reads them.

        ``trimmed`` cuts the positions after the longest prompt's EoT. In a causal encoder no position sees a
        later one, so the other states stay unchanged.
        """
        tokens = [text.tokens(prompts) for text in self.texts]
        if trimmed:
            length = max(text.trim_length(own) for text, own in zip(self.texts, tokens, strict=True))
            tokens = [own.first(length) for own in tokens]
        found = self._text(tokens)
        for states in found.states.values():
            if not states.isfinite().all():
                row = int(states.isfinite().all(-1).all(-1).int().argmin())
                broken = [text.encoder for text in self.texts if weights_not_finite(text.encoder)]
                encoder = next(iter(broken), self.texts[0].encoder)
                raise not_finite(self.name, f"the text states of '{prompts[row]}'", encoder)
        return found

    @torch.no_grad()
    def embed(self, input_ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return token embeddings, ``[B, L]`` → ``[B, L, e]``, without gradients."""
        tokens = self._tokens_of(input_ids[SEGMENT])
        first = self.texts[0].device
        parts = [text.embed(own.ids).to(first) for text, own in zip(self.texts, tokens, strict=True)]
        return {SEGMENT: torch.cat(parts, -1)}

    def encode_embeddings(self, embeddings: Mapping[str, Tensor], input_ids: Mapping[str, Tensor]) -> Text:
        """Return the text of token embeddings ``[B, L, e]``. It carries gradients.

        The states are those of :meth:`encode`. ``input_ids`` give the roles of the positions, the positions
        that encoders pool, and the mask for an encoder that reads a mask.
        """
        given = embeddings[SEGMENT].split([text.embedding_width for text in self.texts], -1)
        with ExitStack() as stack:
            for text, own in zip(self.texts, given, strict=True):
                stack.enter_context(text.embedding(own))
            return self._text(self._tokens_of(input_ids[SEGMENT]))

    def _tokens_of(self, input_ids: Tensor) -> list[Tokens]:
        """Return the tokens of all encoders. Only padding is another in each."""
        return [text.tokens_of(input_ids, padded=text is self.texts[0]) for text in self.texts]

    @abstractmethod
    def _text(self, tokens: Sequence[Tokens]) -> Text:
        """Return what the denoiser reads of tokens, one entry for each encoder."""

    def _roles(self, tokens: Sequence[Tokens]) -> Tensor:
        """Return the roles of positions, int8 ``[B, L]``. The EoT is where the last of the encoders has its.

        At that position all encoders have seen the whole prompt.
        """
        each = [roles_of(own.ids, text.end) for text, own in zip(self.texts, tokens, strict=True)]
        return torch.stack(each).amin(0)

    def empty(self) -> Text:
        """Return ∅, the states of the empty prompt, B = 1."""
        return self.encode([""])

    def mentions(self, prompts: Sequence[str], terms: Sequence[str], *, trimmed: bool) -> dict[str, Tensor]:
        """Return True at the tokens of each prompt that spell its term, bool ``[B, L]``.

        If a term isn't found, its row is False.
        """
        tokens = [text.tokens(prompts) for text in self.texts]
        length = max(text.trim_length(own) for text, own in zip(self.texts, tokens, strict=True))
        ids = tokens[0].first(length if trimmed else None).ids
        return {SEGMENT: self.texts[0].spelt(ids, terms)}

    def predict(self, z_t: Tensor, timestep: Tensor | int, text: Text) -> Tensor:
        """Return the denoiser's output for latents ``[B, C, H, W]``, float32."""
        self.network_evaluations += len(z_t)
        dtype = self.denoiser.dtype
        with attention_for_gradients(self.denoiser):
            output = self.denoiser(
                z_t.to(dtype),
                timestep,
                encoder_hidden_states=text.states[SEGMENT].to(dtype),
                added_cond_kwargs=self._conditions(z_t, text),
            )
        return output.sample.float()

    def _conditions(self, z_t: Tensor, text: Text) -> dict[str, Tensor] | None:
        """Return what the denoiser reads besides latents, timestep and text states."""
        return None

    def schedule(self, num_steps: int) -> Schedule:
        """Return the noise levels of DDIM with the model's own spacing.

        If the model has fewer timesteps than ``num_steps``, raise ``InputError``.
        """
        alphas_cumprod = self.ddim.alphas_cumprod
        if not 1 <= num_steps <= len(alphas_cumprod):
            raise InputError(
                f"num_inference_steps: expected from 1 to {len(alphas_cumprod)} steps, got {num_steps}"
            )
        self.ddim.set_timesteps(num_steps)
        timesteps = check_placed(self.ddim.timesteps.cpu(), len(alphas_cumprod), num_steps)
        config = self.ddim.config
        return ddim_schedule(
            alphas_cumprod, timesteps, config.prediction_type, set_alpha_to_one=config.set_alpha_to_one
        )

    def scheduler(
        self, name: str, num_steps: int, timestep_spacing: str | None, device: torch.device | str = "cpu"
    ) -> Any:
        """Return diffusers' scheduler of class ``name`` on the model's schedule; see :mod:`.schedule`."""
        return scheduler_like(self.ddim, name, num_steps, timestep_spacing, device)

    def streams(self) -> dict[str, Stream]:
        """Return every cross-attention K and V: bias-free ``[d_out, d]`` maps of raw text states."""
        entries = {
            f"{name}.{part}": Entry(getattr(module, part))
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
            for part in ("to_k", "to_v")
        }
        width = sum(text.encoder.config.hidden_size for text in self.texts)
        return {"context": Stream((SEGMENT,), width, entries)}

    def original_state(self) -> dict[str, Tensor]:
        """Return all tensors under one-file checkpoints' names; see :func:`.single_file.original_state`."""
        return original_state(self.pipeline)

    def _settings(self) -> tuple[Any, ...]:
        return (settings_of(self.ddim.config),)
