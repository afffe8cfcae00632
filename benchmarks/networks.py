"""Stable Diffusion 1.4's networks with random weights: true shapes and tokens, and nothing to download."""

from __future__ import annotations

import gzip
import importlib.util
from itertools import chain
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trce_lightning.emoji.training.clip import tokenizer_of
from trce_lightning.emoji.training.unet import build_scheduler

LATENT_SIDE = 64
LARGEST_BATCH = 2
"""One malicious and one unconditional latent at 512 px: what training holds in 14 GB."""
TOKENS = 77
VOCABULARY = 49408


def unet() -> UNet2DConditionModel:
    """The denoiser of 859.5 M parameters."""
    return UNet2DConditionModel(sample_size=LATENT_SIDE, cross_attention_dim=768).eval()


def text_encoder(tokenizer: CLIPTokenizer | None = None) -> CLIPTextModel:
    """CLIP ViT-L/14's text encoder, 123.1 M parameters."""
    tokens = tokenizer or clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
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


def pipeline(denoiser: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """All of it; the decoder alone is a small one, which neither stage evaluates."""
    torch.manual_seed(0)
    tokens = clip_tokenizer()
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
