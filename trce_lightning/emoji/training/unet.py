"""Build and train the embedded model's denoiser: 9 M parameters, on 4×16×16 latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.training.part import Part, native_autocast

CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


def build_unet() -> UNet2DConditionModel:
    """Return a network of three levels (16², 8², 4²) with self- and cross-attention on the two lower ones."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


SubjectsOfSamples = Callable[[Mapping[str, Tensor], Sequence[str]], Tensor]
"""A function of a denoiser's state and prompts.

It returns the subject index of each prompt's sample, ``[N]``.
"""


class UNetPart(Part):
    """Train ε-prediction with Min-SNR weights. One caption in ten is replaced by the empty prompt."""

    empty_states: Tensor

    def __init__(
        self,
        empty_states: Tensor,
        scaling_factor: float,
        max_steps: int,
        subjects_of_samples: SubjectsOfSamples,
        lr: float = 1e-3,
    ) -> None:
        super().__init__(lr, max_steps, warmup_steps=300)
        self.subjects_of_samples = subjects_of_samples
        self.unet = build_unet().to(memory_format=torch.channels_last)
        self.unet.compile()
        self.scheduler, self.scaling_factor = build_scheduler(), scaling_factor
        self.register_buffer("empty_states", empty_states, persistent=False)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the loss.

        ``batch`` has unscaled latents ``[B, 4, 16, 16]`` and text states of captions ``[B, K, 32, 256]``.
        """
        latents, bank = batch
        rows = torch.arange(len(latents), device=self.device)
        states = bank[rows, torch.randint(0, bank.shape[1], (len(rows),), device=self.device)]
        dropped = torch.rand(len(rows), 1, 1, device=self.device) < CAPTION_DROPOUT
        states = torch.where(dropped, self.empty_states, states)
        loss = denoising_loss(self.unet, self.scheduler, latents * self.scaling_factor, states)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Sequence[str], Tensor], batch_index: int) -> None:
        """Log the share of prompts whose sample shows the subject that they name."""
        prompts, subject = batch
        shown = self.subjects_of_samples(self.unet.state_dict(), prompts)
        right = shown.to(subject.device) == subject
        self.log("sample_accuracy", right.float().mean(), batch_size=len(prompts), prog_bar=True)


def denoising_loss(
    unet: Callable[[Tensor, Tensor, Tensor], Any], scheduler: DDIMScheduler, z_0: Tensor, states: Tensor
) -> Tensor:
    """Return mean min(SNR, 5)/SNR ‖ε̂(z_t, c, t) − ε‖² at random timesteps (Min-SNR, arXiv 2303.09556).

    ``unet`` maps z_t, timesteps and states to an output of which ``sample`` is ε̂. ``z_0`` are scaled latents
    ``[B, C, H, W]``, and ``states`` are ``[B, L, d]``.
    """
    eps = torch.randn_like(z_0)
    timestep = torch.randint(0, scheduler.config.num_train_timesteps, (len(z_0),), device=z_0.device)
    z_t = scheduler.add_noise(z_0, eps, timestep).contiguous(memory_format=torch.channels_last)
    prediction = unet(z_t, timestep, states).sample.float()
    snr = compute_snr(scheduler, timestep)
    return (snr.clamp(max=MIN_SNR_GAMMA) / snr * (prediction - eps).square().mean((1, 2, 3))).mean()


@torch.no_grad()
def encode_captions(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, texts: Sequence[str]) -> Tensor:
    """Return padded text states ``[N, 32, 256]`` in bfloat16, on the CPU."""
    parts = []
    for start in tqdm(range(0, len(texts), 512), "encoding captions"):
        tokens = tokenizer(
            list(texts[start : start + 512]), padding="max_length", truncation=True, return_tensors="pt"
        )
        with native_autocast(text_encoder.device.type):
            states = text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state
        parts.append(states.bfloat16().cpu())
    return torch.cat(parts)
