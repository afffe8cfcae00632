"""The adapter of Stable Diffusion XL.

Its denoiser reads the penultimate states of two text encoders, side by side, in cross-attention. It also
reads the second encoder's pooled text, together with sizes in pixels, as an addition to the timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from trce_lightning.adapters.clip_text import Tokens
from trce_lightning.adapters.protocol import Entry, Stream
from trce_lightning.adapters.refusals import refuse_other_pooled, refuse_other_readings
from trce_lightning.adapters.single_file import TEXTS, UNET, VAE
from trce_lightning.adapters.unet import SEGMENT, UNetAdapter
from trce_lightning.tokens import Role, Text

POOLED = "pooled"
"""The segment and the stream of the second encoder's pooled text."""


class SDXLAdapter(UNetAdapter):
    """The :class:`~.protocol.Adapter` of Stable Diffusion XL and of models that it was distilled into.

    Pictures are squares, and the denoiser is told their own size, without a crop, as diffusers does.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    encoder_names: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    tokenizer_names: tuple[str, ...] = ("tokenizer", "tokenizer_2")
    file_prefixes: ClassVar[tuple[str, ...]] = (UNET, VAE, TEXTS)
    # A watermark would change images that are to be scored.
    unused: ClassVar[Mapping[str, Any]] = {
        "image_encoder": None,
        "feature_extractor": None,
        "add_watermarker": False,
    }
    addition_embed_type: ClassVar[str | None] = "text_time"

    def __init__(
        self, pipeline: DiffusionPipeline, name: str | None = None, *, resolution: int | None = None
    ) -> None:
        """Take a pipeline's networks; see :class:`.PipelineAdapter`. ``InputError`` if they don't fit."""
        super().__init__(pipeline, name, resolution=resolution)
        refuse_other_readings(*(text.tokenizer for text in self.texts))
        refuse_other_pooled(self.denoiser, self.pooled_width, len(self._sizes()))

    @property
    def pooled_width(self) -> int:
        """Return the width of the pooled text."""
        return int(self.texts[-1].encoder.config.projection_dim)

    def _text(self, tokens: Sequence[Tokens]) -> Text:
        """Return the penultimate states of both encoders side by side, and the last one's pooled text."""
        outputs = [
            text.outputs(own, output_hidden_states=True) for text, own in zip(self.texts, tokens, strict=True)
        ]
        pooled = outputs[-1][0].float()[:, None]
        states = torch.cat([output.hidden_states[-2].float().to(pooled.device) for output in outputs], -1)
        ends = torch.full(pooled.shape[:2], Role.EOT, dtype=torch.int8, device=pooled.device)
        return Text(
            {SEGMENT: states, POOLED: pooled}, {SEGMENT: self._roles(tokens).to(pooled.device), POOLED: ends}
        )

    def empty(self) -> Text:
        """Return ∅, B = 1: zeros if the pipeline says so, else the text of the empty prompt."""
        text = self.encode([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return text
        return Text({name: torch.zeros_like(own) for name, own in text.states.items()}, text.roles)

    def mentions(self, prompts: Sequence[str], terms: Sequence[str], *, trimmed: bool) -> dict[str, Tensor]:
        """Return True at the tokens of each prompt that spell its term, bool ``[B, L]`` by segment.

        If a term isn't found, its row is False. The pooled text spells every term of its prompt.
        """
        masks = super().mentions(prompts, terms, trimmed=trimmed)
        return masks | {POOLED: masks[SEGMENT].any(1, keepdim=True)}

    def _conditions(self, z_t: Tensor, text: Text) -> dict[str, Tensor]:
        """Return what is added to the timestep: the pooled text, and the sizes in pixels."""
        dtype = self.denoiser.dtype
        sizes = torch.tensor(self._sizes(), dtype=dtype, device=z_t.device)
        return {
            "text_embeds": text.states[POOLED][:, 0].to(dtype),
            "time_ids": sizes.expand(len(z_t), -1),
        }

    def _sizes(self) -> list[int]:
        """Return height and width of the picture, its top and left edge, and height and width to draw."""
        return [self.side, self.side, 0, 0, self.side, self.side]

    def streams(self) -> dict[str, Stream]:
        """Return every cross-attention K and V, and the columns that read the pooled text.

        These are the first of ``add_embedding.linear_1``. The others read the sizes.
        """
        entries = {"add_embedding.linear_1": Entry(self.denoiser.add_embedding.linear_1)}
        return super().streams() | {POOLED: Stream((POOLED,), self.pooled_width, entries)}

    @contextmanager
    def _autoencoder(self) -> Iterator[None]:
        """Give the autoencoder float32 within, if its activations exceed half precision."""
        if not getattr(self.vae.config, "force_upcast", False):
            yield
            return
        stored = self.vae.dtype
        nn.Module.to(self.vae, torch.float32)
        try:
            with torch.autocast(self.vae.device.type, enabled=False):
                yield
        finally:
            nn.Module.to(self.vae, stored)

    def _scaled(self, means: Tensor) -> Tensor:
        """Return the denoiser's latents from the autoencoder's own. Some models standardise each channel."""
        if (standard := self._channels(means)) is None:
            return super()._scaled(means)
        mean, std = standard
        return (means - mean) * self.vae.config.scaling_factor / std

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return the autoencoder's latents from the denoiser's."""
        if (standard := self._channels(latents)) is None:
            return super()._unscaled(latents)
        mean, std = standard
        return latents * std / self.vae.config.scaling_factor + mean

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return mean and standard deviation of each channel, ``[C, 1, 1]``, if the autoencoder has both."""
        both = [getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std")]
        if None in both:
            return None
        mean, std = (torch.tensor(values).to(like).view(-1, 1, 1) for values in both)
        return mean, std

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), bool(self.pipeline.config.force_zeros_for_empty_prompt))
