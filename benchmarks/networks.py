"""Stable Diffusion 1.4's networks with random weights: true shapes and tokens, and nothing to download."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trce_lightning.emoji.training.clip import tokenizer_of
from trce_lightning.emoji.training.unet import build_scheduler

LATENT_SIDE = 64
LARGEST_BATCH = 2
"""One malicious and one unconditional latent at 512 px: what training holds in 14 GB."""
XL_LATENT_SIDE = 128
XL_WIDTH, XL_POOLED_WIDTH, XL_TIME_WIDTH = 2048, 1280, 256
"""Widths of a text state, of the pooled text, and of each of six numbers on sizes."""
TOKENS = 77
VOCABULARY = 49408
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def unet() -> UNet2DConditionModel:
    """The denoiser of 859.5 M parameters."""
    return UNet2DConditionModel(sample_size=LATENT_SIDE, cross_attention_dim=768).eval()


def xl_unet(channels: tuple[int, int, int] = (320, 640, 1280)) -> UNet2DConditionModel:
    """Stable Diffusion XL's denoiser of 2,567 M parameters; fewer ``channels`` make a small one."""
    return UNet2DConditionModel(
        sample_size=XL_LATENT_SIDE,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=XL_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=XL_TIME_WIDTH,
        projection_class_embeddings_input_dim=XL_POOLED_WIDTH + 6 * XL_TIME_WIDTH,
    ).eval()


def decoder(channels: int = 4, **options: Any) -> AutoencoderKL:
    """The autoencoder of 83.7 M parameters, or one of as many ``channels`` of latents."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **options,
    ).eval()


def small_decoder() -> AutoencoderKL:
    """A small autoencoder of the same latents, for what evaluates none."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def clip(kind: type, tokenizer: CLIPTokenizer, **sizes: int) -> Any:
    """Make a text encoder of CLIP's vocabulary and length, a ``kind`` of transformers'."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    return kind(config).eval()


def text_encoder(tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """CLIP ViT-L/14's text encoder, 123.1 M parameters."""
    encoder = clip(CLIPTextModel, tokenizer or clip_tokenizer(), **CLIP_L)
    assert isinstance(encoder, CLIPTextModel)
    return encoder


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's, padding to 77 as in Stable Diffusion 1.x, from the merges that the package open_clip brings.

    Token ids follow the merges' order: 256 bytes, the bytes that end a word, merged pairs, start and end.
    """
    file = _open_clip() / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    letters = list(bytes_to_unicode().values())
    merges = [tuple(line.split()) for line in lines[1 : 1 + VOCABULARY - 2 * len(letters) - 2]]
    ends = (f"{letter}</w>" for letter in letters)
    tokens = chain(letters, ends, ("".join(pair) for pair in merges))
    return tokenizer_of(tokens, merges, TOKENS)


def _open_clip() -> Path:
    """Its folder; the package itself, which is slow to import, is not run."""
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("benchmarks: expected open-clip-torch, for CLIP's vocabulary, got none")
    return Path(found.submodule_search_locations[0])


def pipeline(
    denoiser: UNet2DConditionModel | None = None,
    *,
    autoencoder: Callable[[], AutoencoderKL] = small_decoder,
    device: str = "cpu",
) -> StableDiffusionPipeline:
    """Make all of it on ``device``, with a small autoencoder unless another is asked for."""
    torch.manual_seed(0)
    tokens = clip_tokenizer()
    with torch.device(device):
        vae, text, network = autoencoder(), text_encoder(tokens), denoiser or unet()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokens,
        unet=network,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
