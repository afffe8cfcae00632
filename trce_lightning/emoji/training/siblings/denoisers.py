"""Train the siblings' denoisers: each family's text conditions, its loss, and its judged samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from trce_lightning.emoji.siblings import RESOLUTION, TEXT_LENGTH, Family
from trce_lightning.emoji.training.siblings.data import Bank, token_ids
from trce_lightning.emoji.training.siblings.loop import Batch
from trce_lightning.emoji.training.unet import CAPTION_DROPOUT, build_scheduler, denoising_loss

LOGIT_MEAN = 0.3
"""The mean of the noise level's logit. Above 0, levels that decide on the subject come more often."""
GUIDANCE_RANGE = (1.0, 5.0)
"""The guidance scales that FLUX learns to read."""

Predict = Callable[[nn.Module, Tensor, Tensor, "Condition"], Tensor]


@dataclass(frozen=True)
class Condition:
    """A batch's text as a denoiser reads it."""

    states: Tensor
    """The text states, ``[B, L, 320]``."""
    pooled: Tensor
    """The pooled states, ``[B, d]``."""
    guidance: Tensor | None = None
    """The guidance scale that is embedded, ``[B]``, if any."""


class Texts(nn.Module):
    """The frozen text encoders of a sibling. They map token ids to what its pipeline computes."""

    def __init__(self, family: Family, pipeline: DiffusionPipeline) -> None:
        super().__init__()
        self.family, self.tokenizer = family, pipeline.tokenizer
        encoders = [
            getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
        ]
        self.encoders = nn.ModuleList(encoder for encoder in encoders if encoder is not None)
        self.t5_tokenizer = {"sd3": "tokenizer_3", "flux": "tokenizer_2"}.get(family)
        self.t5_tokenizer = None if self.t5_tokenizer is None else getattr(pipeline, self.t5_tokenizer)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, clip_ids: Tensor, t5_ids: Tensor) -> Condition:
        """Return the condition of token ids, ``[B, 32]`` each."""
        first = self.encoders[0](clip_ids, output_hidden_states=True)
        if self.family == "flux":
            return Condition(self.encoders[1](t5_ids).last_hidden_state, first.pooler_output)
        ids = second_ids(clip_ids, self.tokenizer.eos_token_id)
        second = self.encoders[1](ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        if self.family == "xl":
            return Condition(states, second.text_embeds)
        states = torch.cat([states, self.encoders[2](t5_ids).last_hidden_state], 1)
        return Condition(states, torch.cat([first.text_embeds, second.text_embeds], -1))

    def empty(self) -> Condition:
        """Return the condition of ∅ with one row: the empty prompt, or zeros in SDXL."""
        device = next(self.parameters()).device
        tokenizers = (self.tokenizer, self.t5_tokenizer or self.tokenizer)
        condition = self(*(torch.from_numpy(token_ids(each, [""])).to(device) for each in tokenizers))
        if self.family != "xl":
            return condition
        return Condition(torch.zeros_like(condition.states), torch.zeros_like(condition.pooled))


def second_ids(clip_ids: Tensor, end: int) -> Tensor:
    """Return the second CLIP's ids: the first one's with padding of token 0 behind the first ``end``."""
    ends = (clip_ids == end).long()
    return clip_ids.where(ends.cumsum(-1) == ends, 0)


class Drawing:
    """Random rows of the data as a denoiser reads them: scaled latents, text states and pooled states.

    One caption in ten is dropped: the row then has the condition of ∅.
    """

    def __init__(self, texts: Texts, bank: Bank, scaling_factor: float, dtype: torch.dtype) -> None:
        self.texts, self.bank, self.scaling_factor, self.dtype = texts, bank, scaling_factor, dtype
        empty = texts.empty()
        self.empty = Condition(empty.states.to(self.dtype), empty.pooled.to(self.dtype))

    def __call__(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``size`` rows: ``[size, 4, 16, 16]``, ``[size, L, 320]``, ``[size, d]``."""
        latents, _, clip_ids, t5_ids = self.bank.draw(size)
        dropped = torch.rand(size, device=latents.device) < CAPTION_DROPOUT
        half = self.dtype is not torch.float32
        with torch.autocast(latents.device.type, self.dtype if half else None, enabled=half):
            condition = self.texts(clip_ids, t5_ids)
        states = torch.where(dropped[:, None, None], self.empty.states, condition.states)
        pooled = torch.where(dropped[:, None], self.empty.pooled, condition.pooled)
        return latents * self.scaling_factor, states.to(self.dtype), pooled.to(self.dtype)


def initialise(network: nn.Module) -> nn.Module:
    """Set the modulations and the output layer of a transformer to zero, and return it.

    A block then begins as the identity. diffusers leaves this to the training.
    """
    if not isinstance(network, SD3Transformer2DModel | FluxTransformer2DModel):
        return network
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and (".norm" in name or name.startswith(("norm_out", "proj_out"))):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def velocity_of_sd3(network: nn.Module, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Return SD3's velocity, ``[B, 4, 16, 16]``, at levels ``t``, ``[B]`` from 0 to 1."""
    return network(
        hidden_states=z_t.to(condition.states.dtype),
        timestep=1000 * t,
        encoder_hidden_states=condition.states,
        pooled_projections=condition.pooled,
        return_dict=False,
    )[0]


def velocity_of_flux(
    network: nn.Module, z_t: Tensor, t: Tensor, condition: Condition, image_ids: Tensor
) -> Tensor:
    """Return FLUX's velocity, ``[B, 4, 16, 16]``, at levels ``t``, ``[B]`` from 0 to 1."""
    batch, channels, height, width = z_t.shape
    device = z_t.device
    guidance = torch.ones(batch, device=device) if condition.guidance is None else condition.guidance
    packed = network(
        hidden_states=FluxPipeline._pack_latents(
            z_t.to(condition.states.dtype), batch, channels, height, width
        ),
        timestep=t,
        guidance=guidance,
        encoder_hidden_states=condition.states,
        pooled_projections=condition.pooled,
        txt_ids=torch.zeros(condition.states.shape[1], 3, device=device),
        img_ids=image_ids,
        return_dict=False,
    )[0]
    # The last argument is the scale of sizes in pixels over sizes in latents.
    return FluxPipeline._unpack_latents(packed, height, width, 1)


def noised(z_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return z_t = (1 − t) z_0 + t ε, the levels ``t`` (logit-normal, ``[B]``), and the velocity ε − z_0."""
    t = torch.sigmoid(torch.randn(len(z_0), device=z_0.device) + LOGIT_MEAN)
    eps = torch.randn_like(z_0)
    level = t[:, None, None, None]
    return (1 - level) * z_0 + level * eps, t, eps - z_0


def flow_loss(predict: Predict, network: nn.Module, z_0: Tensor, condition: Condition) -> Tensor:
    """Return mean ‖v̂(z_t, t, c) − (ε − z_0)‖² at random levels."""
    z_t, t, velocity = noised(z_0)
    return (predict(network, z_t, t, condition).float() - velocity).square().mean()


def guided_loss(
    predict: Predict,
    teacher: nn.Module,
    network: nn.Module,
    z_0: Tensor,
    condition: Condition,
    empty: Condition,
) -> Tensor:
    """Return mean ‖v̂(z_t, t, c, g) − (v_∅ + g (v_c − v_∅))‖² at random levels and scales.

    v is the velocity of a frozen teacher. This is guidance distillation (arXiv 2210.03142), by which FLUX.1
    dev is guided in one evaluation.
    """
    z_t, t, _ = noised(z_0)
    low, high = GUIDANCE_RANGE
    scale = low + (high - low) * torch.rand(len(z_0), device=z_0.device)
    with torch.no_grad():
        nothing = Condition(
            empty.states.expand_as(condition.states), empty.pooled.expand_as(condition.pooled)
        )
        told = predict(teacher, z_t, t, condition).float()
        untold = predict(teacher, z_t, t, nothing).float()
    target = untold + scale[:, None, None, None] * (told - untold)
    asked = Condition(condition.states, condition.pooled, scale)
    return (predict(network, z_t, t, asked).float() - target).square().mean()


def loss_of(
    family: Family, data: Drawing, teacher: nn.Module | None = None
) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the loss as a function of a network and a batch of ``data``.

    ``teacher`` is FLUX's, in the phase in which it learns guidance.
    """
    empty, device = data.empty, data.bank.labels.device
    if family == "xl":
        return _loss_of_xl(device)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, device, torch.float32)
    predict = velocity_of_sd3 if family == "sd3" else partial(velocity_of_flux, image_ids=image_ids)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        z_0, states, pooled = batch
        condition = Condition(states, pooled)
        if teacher is None:
            return flow_loss(predict, network, z_0, condition)
        return guided_loss(predict, teacher, network, z_0, condition, empty)

    return loss


def _loss_of_xl(device: torch.device) -> Callable[[nn.Module, Batch], Tensor]:
    scheduler = build_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    sizes = torch.tensor([RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION], device=device)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        z_0, states, pooled = batch
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(z_0), -1)}

        def predict(z_t: Tensor, timestep: Tensor, text: Tensor) -> Any:
            return network(z_t.to(text.dtype), timestep, text, added_cond_kwargs=added)

        return denoising_loss(predict, scheduler, z_0, states)

    return loss


SAMPLING: dict[Family, dict[str, Any]] = {
    "xl": {"guidance_scale": 3.0},
    "sd3": {"guidance_scale": 3.0, "max_sequence_length": TEXT_LENGTH},
    "flux": {"guidance_scale": 3.5, "max_sequence_length": TEXT_LENGTH},
}
"""The options with which each pipeline draws."""


@torch.no_grad()
def drawn(
    family: Family,
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    batch_size: int = 256,
) -> Tensor:
    """Return a picture of each prompt, ``[N, 3, 64, 64]`` uint8 on the CPU, by the pipeline's own call."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        pictures = pipeline(
            list(prompts[start : start + batch_size]),
            num_inference_steps=steps,
            height=RESOLUTION,
            width=RESOLUTION,
            generator=torch.Generator().manual_seed(start),
            output_type="pt",
            **SAMPLING[family],
        ).images
        parts.append((255 * pictures.float()).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(parts)
