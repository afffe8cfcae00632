"""The part that the adapters of transformer denoisers with flow matching share: SD3 and FLUX.1.

Their denoiser reads text in two places, and stage 1 edits both: ``context_embedder`` reads the sequence of
text states, ``time_text_embed.text_embedder.linear_1`` the pooled vector. Both are linear maps of raw states.
So with W T in them, the whole network on (E, P) is the original on (E Tᵀ, P Tₚᵀ). Their biases stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from trce_lightning.adapters.attention import attention_for_gradients
from trce_lightning.adapters.base import PipelineAdapter, settings_of
from trce_lightning.adapters.clip_text import ClipText, Tokens
from trce_lightning.adapters.finite import not_finite, weights_not_finite
from trce_lightning.adapters.protocol import Entry, Stream
from trce_lightning.adapters.refusals import AUTOENCODERS, refuse_other_tokens, refuse_unusable_weights
from trce_lightning.adapters.schedule import flow_levels, flow_of, flow_scheduler
from trce_lightning.adapters.t5_text import T5Text
from trce_lightning.errors import InputError
from trce_lightning.sampling import Schedule
from trce_lightning.tokens import Role, Text

CLIP, T5, POOLED = "clip", "t5", "pooled"
"""The segments of text."""
CONTEXT, POOLED_ENTRY = "context_embedder", "time_text_embed.text_embedder.linear_1"
"""The names of the denoiser's linear maps that read the text states and the pooled vector."""
LONGEST = 512
"""The largest number of T5's tokens that diffusers' pipelines take."""


class FlowAdapter(PipelineAdapter):
    """The part of an :class:`~.protocol.Adapter` that SD3 and FLUX.1 share.

    CLIP encoders and a T5 encode text. Token ids of the segment "clip" are the first tokenizer's, and its
    embeddings those of all CLIP encoders side by side.
    """

    denoiser_name = "transformer"
    # No part of the pipelines draws without them.
    unused: ClassVar[Mapping[str, Any]] = {"image_encoder": None, "feature_extractor": None}
    clip_class: ClassVar[type[CLIPTextModel | CLIPTextModelWithProjection]]
    """The class of the CLIP encoders."""
    t5_name: ClassVar[str]
    """T5's name in the pipeline."""
    t5_length: ClassVar[int]
    """T5's padded length in the pipeline, if no other is asked for."""
    reads_clip_states: ClassVar[bool]
    """True if the denoiser reads the states of CLIP, and not only its pooled vector."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        name: str | None = None,
        *,
        resolution: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        """Take a pipeline's networks.

        Args:
            pipeline: a pipeline of :attr:`pipeline_class`.
            name: the model's name in messages. None means the place it was opened from.
            resolution: the side of images in pixels. None means the model's own.
            max_sequence_length: T5's padded length in tokens, on which all its states depend. None means the
                pipeline's own.
        """
        self.max_sequence_length = max_sequence_length or self.t5_length
        if not 1 <= self.max_sequence_length <= LONGEST:
            raise InputError(
                f"model.max_sequence_length: expected from 1 to {LONGEST} tokens, got "
                f"{self.max_sequence_length}"
            )
        parts = zip(type(self).encoder_names, type(self).tokenizer_names, strict=True)
        present = [names for names in parts if getattr(pipeline, names[0], None) is not None]
        self.encoder_names = tuple(encoder for encoder, _ in present)
        self.tokenizer_names = tuple(tokenizer for _, tokenizer in present)
        self._refuse(pipeline)
        self.flow = flow_of(getattr(pipeline, "scheduler", None))
        super().__init__(pipeline, name, resolution=resolution)
        self.clips = [ClipText(pipeline, *names) for names in present if names[0] != self.t5_name]
        t5 = [
            T5Text(pipeline, *names, self.max_sequence_length)
            for names in present
            if names[0] == self.t5_name
        ]
        self.t5 = t5[0] if t5 else None

    # --- text -----------------------------------------------------------------------------------------------

    @cached_property
    def _texts(self) -> dict[str, ClipText]:
        """Return the encoder whose token ids a segment has."""
        return {CLIP: self.clips[0]} if self.t5 is None else {CLIP: self.clips[0], T5: self.t5}

    @property
    def _longest(self) -> ClipText:
        """Return the encoder that reads most of a prompt."""
        return self.t5 or self.clips[0]

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens of a prompt the model can read: those of T5, if there is one."""
        return self._longest.length

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt the model reads, including the start and end tokens."""
        return [len(ids) for ids in self._longest.rows(prompts, cut=True)] if prompts else []

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts of which the model reads only the beginning.

        The model reads the whole of a prompt if its T5 does. CLIP may read only the beginning then.
        """
        if not prompts:
            return []
        rows = zip(prompts, self._longest.rows(prompts), strict=True)
        return [prompt for prompt, ids in rows if len(ids) > self.prompt_tokens]

    def fits(self, prompt: str) -> bool:
        """Return whether the model reads the whole prompt."""
        return not self.cut([prompt])

    def _tokens(self, prompts: Sequence[str], *, trimmed: bool) -> dict[str, Tokens]:
        tokens = {name: text.tokens(prompts) for name, text in self._texts.items()}
        if trimmed:
            tokens = {name: own.first(self._texts[name].trim_length(own)) for name, own in tokens.items()}
        return tokens

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids of "clip" and "t5", padded and cut, int64 ``[B, L]`` on the CPU."""
        return {name: own.ids for name, own in self._tokens(prompts, trimmed=False).items()}

    def vocabulary(self) -> dict[str, Tensor]:
        """Return the token ids that a user can type, by segment, int64 ``[V]`` on the CPU.

        Each comes back alone when its text is tokenized. Special tokens don't count.
        """
        return {name: text.typed_ids for name, text in self._texts.items()}

    def detokenize(self, segment: str, words: Sequence[Sequence[int]]) -> list[str]:
        """Return the prompts that token ids of a segment spell, without start, end and padding."""
        return self._texts[segment].detokenize(words)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Text:
        """Return prompts as the denoiser reads them.

        ``trimmed`` cuts CLIP's positions after the longest prompt's EoT. T5 sees its padding, so that its
        segment stays whole.
        """
        text = self._text({name: own.ids for name, own in self._tokens(prompts, trimmed=trimmed).items()})
        for states in text.states.values():
            if not states.isfinite().all():
                row = int(states.isfinite().all(-1).all(-1).int().argmin())
                encoders = [own.encoder for own in (*self.clips, *([self.t5] if self.t5 else []))]
                broken = [encoder for encoder in encoders if weights_not_finite(encoder)]
                encoder = next(iter(broken), encoders[-1])
                raise not_finite(self.name, f"the text states of '{prompts[row]}'", encoder)
        return text

    @torch.no_grad()
    def embed(self, input_ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return token embeddings of the given segments, ``[B, L]`` → ``[B, L, e]``, without gradients."""
        found = {}
        if CLIP in input_ids:
            tokens = self._tokens_of_clips(input_ids[CLIP])
            of_clips = [clip.embed(own.ids) for clip, own in zip(self.clips, tokens, strict=True)]
            found[CLIP] = torch.cat(of_clips, -1)
        if self.t5 is not None and T5 in input_ids:
            found[T5] = self.t5.embed(input_ids[T5])
        return found

    def encode_embeddings(self, embeddings: Mapping[str, Tensor], input_ids: Mapping[str, Tensor]) -> Text:
        """Return the text of token embeddings ``[B, L, e]`` by segment. It carries gradients.

        ``input_ids`` give the roles of the positions, and the position that CLIP pools.
        """
        given = embeddings[CLIP].split([clip.embedding_width for clip in self.clips], -1)
        with ExitStack() as stack:
            for clip, own in zip(self.clips, given, strict=True):
                stack.enter_context(clip.embedding(own))
            if self.t5 is not None:
                stack.enter_context(self.t5.embedding(embeddings[T5]))
            return self._text(input_ids)

    def _tokens_of_clips(self, ids: Tensor) -> list[Tokens]:
        """Return the tokens of each CLIP encoder. Only padding is another in each."""
        return [clip.tokens_of(ids, padded=clip is self.clips[0]) for clip in self.clips]

    def _text(self, ids: Mapping[str, Tensor]) -> Text:
        states, roles = {}, {}
        tokens = self._tokens_of_clips(ids[CLIP])
        outputs = [
            clip.outputs(own, output_hidden_states=self.reads_clip_states)
            for clip, own in zip(self.clips, tokens, strict=True)
        ]
        if self.reads_clip_states:
            states[CLIP] = torch.cat([output.hidden_states[-2].float() for output in outputs], -1)
            roles[CLIP] = self.clips[0].roles(ids[CLIP])
        if self.t5 is not None:
            own = Tokens(ids[T5], torch.ones_like(ids[T5]))
            states[T5], roles[T5] = self.t5.states(own), self.t5.roles(ids[T5])
        states[POOLED] = torch.cat([self._pooled(output).float() for output in outputs], -1)[:, None]
        roles[POOLED] = torch.full((len(ids[CLIP]), 1), int(Role.EOT), dtype=torch.int8)
        return Text(states, {name: own.to(states[name].device) for name, own in roles.items()})

    @abstractmethod
    def _pooled(self, output: Any) -> Tensor:
        """Return the pooled vectors of a CLIP encoder's output, ``[B, d]``."""

    def empty(self) -> Text:
        """Return ∅, the text of the empty prompt, B = 1."""
        return self.encode([""])

    def mentions(self, prompts: Sequence[str], terms: Sequence[str], *, trimmed: bool) -> dict[str, Tensor]:
        """Return True at the tokens of each prompt that spell its term, bool ``[B, L]`` by segment.

        If a term isn't found, its row is False. The pooled vector is no token.
        """
        tokens = self._tokens(prompts, trimmed=trimmed)
        found = {name: self._texts[name].spelt(own.ids, terms) for name, own in tokens.items()}
        return {**found, POOLED: torch.zeros(len(prompts), 1, dtype=torch.bool)}

    # --- the denoiser ---------------------------------------------------------------------------------------

    def streams(self) -> dict[str, Stream]:
        """Return "context", which reads the sequence of text states, and "pooled", both with their bias."""
        segments = ((CLIP,) if self.reads_clip_states else ()) + ((T5,) if self.t5 else ())
        return {
            "context": self._stream(CONTEXT, segments),
            "pooled": self._stream(POOLED_ENTRY, (POOLED,)),
        }

    def _stream(self, name: str, segments: tuple[str, ...]) -> Stream:
        module = self.denoiser.get_submodule(name)
        scales = {segment: self._scales[segment] for segment in segments}
        return Stream(segments, module.in_features, {name: Entry(module)}, scales)

    @cached_property
    def _scales(self) -> dict[str, float]:
        """Return one over the root mean square of the empty prompt's states after the SoT, by segment.

        The penultimate states of CLIP, those of T5 and pooled vectors differ in size.
        """
        empty = self.empty()
        return {
            name: 1 / float(states[empty.roles[name] != Role.SOT].square().mean().sqrt())
            for name, states in empty.states.items()
        }

    def predict(self, z_t: Tensor, timestep: Tensor | int, text: Text) -> Tensor:
        """Return the flow ε − z_0 that the denoiser predicts, ``[B, C, H, W]`` float32."""
        self.network_evaluations += len(z_t)
        dtype = self.denoiser.dtype
        steps = torch.as_tensor(timestep, device=z_t.device).expand(len(z_t))
        with attention_for_gradients(self.denoiser):
            return self._flow(z_t.to(dtype), steps, text, dtype).float()

    @abstractmethod
    def _flow(self, z_t: Tensor, timesteps: Tensor, text: Text, dtype: torch.dtype) -> Tensor:
        """Return the denoiser's output for timesteps ``[B]``, ``[B, C, H, W]``, from inputs in its type."""

    # --- steps and images -----------------------------------------------------------------------------------

    @abstractmethod
    def _set(self, num_steps: int) -> dict[str, Any]:
        """Return what the pipeline gives to ``set_timesteps`` besides the number of steps."""

    def schedule(self, num_steps: int) -> Schedule:
        """Return the noise levels of the pipeline's own steps at this resolution.

        If the model has fewer timesteps than ``num_steps``, raise ``InputError``.
        """
        return flow_levels(self.flow, num_steps, self._set(num_steps))

    def scheduler(
        self, name: str, num_steps: int, timestep_spacing: str | None, device: torch.device | str = "cpu"
    ) -> Any:
        """Return diffusers' scheduler of class ``name`` on the model's flow; see :mod:`.schedule`."""
        return flow_scheduler(self.flow, name, num_steps, timestep_spacing, self._set(num_steps), device)

    def _scaled(self, means: Tensor) -> Tensor:
        return (means - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _settings(self) -> tuple[Any, ...]:
        return (settings_of(self.flow.config),)

    def text_fingerprint(self) -> str:
        """Return a hash of text encoders and tokenizers, and T5's padded length."""
        return f"{super().text_fingerprint()}{self.max_sequence_length if self.t5 else ''}"

    def original_state(self) -> dict[str, Tensor]:
        """Raise ``InputError``: single files of these models hold Q, K and V as one tensor."""
        raise InputError(
            "export: expected pipeline or delta, got single_file; single files of a "
            f"{self.pipeline_class.__name__} hold Q, K and V as one tensor"
        )

    # --- refusals -------------------------------------------------------------------------------------------

    @classmethod
    def refuse_index(cls, index: Mapping[str, Any], source: str) -> None:
        """Raise ``InputError`` unless the parts that ``model_index.json`` names are those of the family."""
        classes = {part: (index.get(part) or [None, None])[1] for part in cls._needed()}
        for part, found in classes.items():
            if found is None:
                raise InputError(f"model: expected a pipeline with a {part}, got none in '{source}'")
        if classes["vae"] not in AUTOENCODERS:
            raise InputError(
                f"model: expected a vae of {', '.join(AUTOENCODERS)}, got {classes['vae']} in '{source}'"
            )
        for part in cls.encoder_names:
            library = (index.get(part) or [None])[0]
            if library not in ("transformers", None):
                raise InputError(
                    f"model: expected a {part} of the library transformers, got {library} in '{source}'; "
                    "code that comes with a model is never run"
                )

    @classmethod
    def _needed(cls) -> tuple[str, ...]:
        """Return the names of the parts without which nothing can be drawn."""
        return cls.denoiser_name, "vae", "scheduler", *cls.encoder_names, *cls.tokenizer_names

    def _refuse(self, pipeline: Any) -> None:
        """Raise ``InputError`` with the reason if the method doesn't fit, or a part would not be used."""
        refuse_unusable_weights(pipeline, self.network_names())
        for part in self._needed():
            if getattr(pipeline, part, None) is None:
                raise InputError(f"model: expected a pipeline with a {part}, got none")
        self._refuse_encoders(pipeline)
        self._refuse_denoiser(pipeline)
        self._refuse_autoencoder(pipeline)

    def _refuse_encoders(self, pipeline: Any) -> None:
        for encoder_name, tokenizer_name in zip(self.encoder_names, self.tokenizer_names, strict=True):
            encoder, tokenizer = getattr(pipeline, encoder_name), getattr(pipeline, tokenizer_name)
            kind = T5EncoderModel if encoder_name == self.t5_name else self.clip_class
            if not isinstance(encoder, kind):
                raise InputError(
                    f"model: expected a {encoder_name} of {kind.__name__}, got {type(encoder).__name__}"
                )
            if encoder_name != self.t5_name:
                refuse_other_tokens(encoder, tokenizer)
            elif tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id]:
                raise InputError(
                    f"model: expected a {tokenizer_name} that puts an end after a text, got "
                    f"{tokenizer.convert_ids_to_tokens(tokenizer('a').input_ids)} for 'a'"
                )

    def _refuse_denoiser(self, pipeline: Any) -> None:
        transformer = pipeline.transformer
        if any(getattr(transformer, name, None) is not None for name in ("encoder_hid_proj", "image_proj")):
            raise InputError(
                "model: expected a denoiser of latents, timestep and text alone, got one that reads a "
                "picture (IP-Adapter); call unload_ip_adapter() first"
            )
        if any(getattr(module, "fused_projections", False) for module in transformer.modules()):
            raise InputError("model: expected separate Q, K and V; call unfuse_qkv_projections() first")
        widths = {
            CONTEXT: self._context_width(pipeline),
            POOLED_ENTRY: sum(
                getattr(pipeline, name).config.projection_dim
                if self.clip_class is CLIPTextModelWithProjection
                else getattr(pipeline, name).config.hidden_size
                for name in self.encoder_names
                if name != self.t5_name
            ),
        }
        for name, width in widths.items():
            layer = transformer.get_submodule(name)
            if type(layer) is not nn.Linear or layer.in_features != width:
                raise InputError(
                    f"model: expected {name} to be a plain linear layer on text of width {width}, got {layer}"
                )

    @abstractmethod
    def _context_width(self, pipeline: Any) -> int:
        """Return the width of the text states that the denoiser should read in sequence."""

    def _refuse_autoencoder(self, pipeline: Any) -> None:
        vae, channels = pipeline.vae, self._channels(pipeline)
        if type(vae).__name__ not in AUTOENCODERS:
            raise InputError(f"model: expected a vae of {', '.join(AUTOENCODERS)}, got {type(vae).__name__}")
        if vae.config.latent_channels != channels:
            raise InputError(
                f"model: expected a denoiser of {vae.config.latent_channels} latent channels, got "
                f"{channels}; inpainting, editing and the like have no adapter"
            )
        for setting in ("scaling_factor", "shift_factor"):
            if not isinstance(vae.config.get(setting), int | float):
                raise InputError(
                    f"model: expected a number as the vae's {setting}, got {vae.config.get(setting)}"
                )

    @abstractmethod
    def _channels(self, pipeline: Any) -> int:
        """Return how many channels latents have."""
