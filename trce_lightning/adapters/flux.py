"""The adapter of FLUX.1: dev, schnell, and what is made of them.

Their denoiser is a FluxTransformer2DModel. It reads the states of T5, a pooled vector of CLIP, and packed
latents: each 2×2 patch is one token. FLUX.1 is distilled from guided sampling, so no step evaluates ∅. dev
reads the guidance scale as one more input, schnell has none. Classifier-free guidance on top of that ("true
CFG") isn't used.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextModel

from trce_lightning.adapters.flow import POOLED, T5, FlowAdapter
from trce_lightning.errors import InputError
from trce_lightning.tokens import Text

PATCH = 2
"""The side of the patch of latents that is one token."""
TIMESTEPS = 1000
"""The timestep of pure noise. The denoiser reads timesteps in units of it."""


class FluxAdapter(FlowAdapter):
    """The :class:`~.protocol.Adapter` of FLUX.1. Every evaluation has the same embedded guidance scale."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")
    clip_class = CLIPTextModel
    t5_name = "text_encoder_2"
    t5_length = 512
    reads_clip_states = False
    guided = False

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        name: str | None = None,
        *,
        resolution: int | None = None,
        max_sequence_length: int | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Take a pipeline's networks; see :class:`.FlowAdapter`.

        ``guidance_scale`` is embedded if the denoiser reads one. None means the pipeline's own, 3.5.
        """
        super().__init__(pipeline, name, resolution=resolution, max_sequence_length=max_sequence_length)
        embeds = self.denoiser.config.guidance_embeds
        self.guidance_scale = (3.5 if guidance_scale is None else guidance_scale) if embeds else None

    def _refuse_denoiser(self, pipeline: Any) -> None:
        if not isinstance(pipeline.transformer, FluxTransformer2DModel):
            raise InputError(
                "model: expected a FluxTransformer2DModel denoiser, got "
                f"{type(pipeline.transformer).__name__}"
            )
        super()._refuse_denoiser(pipeline)

    def _context_width(self, pipeline: Any) -> int:
        return int(pipeline.text_encoder_2.config.d_model)

    def _channels(self, pipeline: Any) -> int:
        return int(pipeline.transformer.config.in_channels) // PATCH**2

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        factor = self.pipeline.vae_scale_factor
        side = resolution or self.pipeline.default_sample_size * factor
        if side % (PATCH * factor):
            raise InputError(f"model.resolution: expected a multiple of {PATCH * factor} pixels, got {side}")
        return self._channels(self.pipeline), side // factor, side // factor

    def _pooled(self, output: Any) -> Tensor:
        return output.pooler_output

    def _flow(self, z_t: Tensor, timesteps: Tensor, text: Text, dtype: torch.dtype) -> Tensor:
        states = text.states[T5].to(dtype)
        guidance = None
        if self.guidance_scale is not None:
            guidance = torch.full((len(z_t),), self.guidance_scale, device=z_t.device)
        output = self.denoiser(
            hidden_states=packed(z_t),
            timestep=timesteps.to(dtype) / TIMESTEPS,
            guidance=guidance,
            pooled_projections=text.states[POOLED][:, 0].to(dtype),
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=_places(z_t.shape[-1] // PATCH, z_t),
        ).sample
        return unpacked(output, z_t.shape[-1])

    def _set(self, num_steps: int) -> dict[str, Any]:
        config = self.flow.config
        tokens = (self.latent_shape[-1] // PATCH) ** 2
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        return {
            "sigmas": np.linspace(1.0, 1 / num_steps, num_steps),
            "mu": calculate_shift(tokens, *lengths, config.base_shift, config.max_shift),
        }

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.guidance_scale)


def packed(latents: Tensor) -> Tensor:
    """Return the tokens of latents: ``[B, C, H, W]`` → ``[B, H W / 4, 4 C]``, row by row."""
    return pixel_unshuffle(latents, PATCH).flatten(2).mT


def unpacked(tokens: Tensor, side: int) -> Tensor:
    """Return the latents of tokens: ``[B, side² / 4, 4 C]`` → ``[B, C, side, side]``."""
    return pixel_shuffle(tokens.mT.unflatten(2, (side // PATCH, side // PATCH)), PATCH)


def _places(side: int, like: Tensor) -> Tensor:
    """Return the place (0, row, column) of each token of ``side``² ones, ``[side², 3]``."""
    grid = torch.cartesian_prod(*(torch.arange(count) for count in (1, side, side)))
    return grid.to(like)
