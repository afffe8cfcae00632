"""The adapter of Stable Diffusion 3 and 3.5.

Their denoiser is an SD3Transformer2DModel (arXiv 2403.03206). It reads one sequence: the rows of two CLIP
encoders side by side, padded with zeros to T5's width, then the rows of T5. So one T edits both segments.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection

from trce_lightning.adapters.flow import CLIP, POOLED, T5, FlowAdapter
from trce_lightning.adapters.refusals import refuse_other_readings
from trce_lightning.errors import InputError
from trce_lightning.tokens import Text


class StableDiffusion3Adapter(FlowAdapter):
    """The :class:`~.protocol.Adapter` of Stable Diffusion 3. It may have no T5, whose rows are zeros then."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    clip_class = CLIPTextModelWithProjection
    t5_name = "text_encoder_3"
    t5_length = 256
    reads_clip_states = True

    @classmethod
    def _needed(cls) -> tuple[str, ...]:
        return tuple(part for part in super()._needed() if not part.endswith("_3"))

    def _refuse_denoiser(self, pipeline: Any) -> None:
        if not isinstance(pipeline.transformer, SD3Transformer2DModel):
            raise InputError(
                "model: expected an SD3Transformer2DModel denoiser, got "
                f"{type(pipeline.transformer).__name__}"
            )
        super()._refuse_denoiser(pipeline)

    def _refuse_encoders(self, pipeline: Any) -> None:
        super()._refuse_encoders(pipeline)
        refuse_other_readings(pipeline.tokenizer, pipeline.tokenizer_2)

    def _context_width(self, pipeline: Any) -> int:
        if pipeline.text_encoder_3 is not None:
            return int(pipeline.text_encoder_3.config.d_model)
        return int(pipeline.transformer.config.joint_attention_dim)

    def _channels(self, pipeline: Any) -> int:
        return int(pipeline.transformer.config.in_channels)

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        config = self.denoiser.config
        shape = super()._latent_shape(resolution)
        side = shape[-1]
        patches, rest = divmod(side, config.patch_size)
        if rest or patches > config.pos_embed_max_size:
            unit = self.pipeline.vae_scale_factor * config.patch_size
            raise InputError(
                f"model.resolution: expected a multiple of {unit} pixels up to "
                f"{unit * config.pos_embed_max_size}, got {side * self.pipeline.vae_scale_factor}"
            )
        return shape

    def _pooled(self, output: Any) -> Tensor:
        return output.text_embeds

    def _flow(self, z_t: Tensor, timesteps: Tensor, text: Text, dtype: torch.dtype) -> Tensor:
        width = self.denoiser.config.joint_attention_dim
        clip = text.states[CLIP].to(dtype)
        clip = pad(clip, (0, width - clip.shape[-1]))
        if T5 in text.states:
            t5 = text.states[T5].to(dtype)
        else:
            t5 = clip.new_zeros(len(clip), self.max_sequence_length, width)
        return self.denoiser(
            hidden_states=z_t,
            timestep=timesteps,
            encoder_hidden_states=torch.cat([clip, t5], 1),
            pooled_projections=text.states[POOLED][:, 0].to(dtype),
        ).sample

    def _set(self, num_steps: int) -> dict[str, Any]:
        config = self.flow.config
        if not config.use_dynamic_shifting:
            return {}
        tokens = (self.latent_shape[-1] // self.denoiser.config.patch_size) ** 2
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        return {"mu": calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)}
