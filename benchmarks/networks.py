"""Stable Diffusion 1.4's networks with random weights: the true shapes, and nothing to download."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.package import weights_folder
from trce_lightning.emoji.unet import build_scheduler

LATENT_SIDE = 64
TOKENS = 77


def unet() -> UNet2DConditionModel:
    """The denoiser of 859.5 M parameters."""
    return UNet2DConditionModel(sample_size=LATENT_SIDE, cross_attention_dim=768).eval()


def text_encoder(tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """CLIP ViT-L/14's text encoder, 123.1 M parameters."""
    tokens = tokenizer or tokenizer_77()
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def tokenizer_77() -> CLIPTokenizer:
    """The embedded model's, padding to 77. Its small vocabulary gives longer prompts than CLIP's would."""
    return CLIPTokenizer.from_pretrained(str(weights_folder() / "tokenizer"), model_max_length=TOKENS)


def pipeline(denoiser: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """All of it; the decoder alone is a small one, which neither stage evaluates."""
    torch.manual_seed(0)
    tokens = tokenizer_77()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
        unet=denoiser or unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
