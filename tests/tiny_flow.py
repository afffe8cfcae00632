"""Stable Diffusion 3, 3.5 and FLUX.1 of random weights, small enough for every test, for 16×16 pixels."""

import string
from typing import Any

import torch
from conftest import MAX_LENGTH, build_tiny_tokenizer
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_WIDTH, T5_WIDTH, T5_LENGTH, SIDE = 16, 40, 24, 16
FAMILIES = ("sd3", "sd35", "flux_dev", "flux_schnell")


def t5_tokenizer() -> T5TokenizerFast:
    """A Unigram tokenizer with one piece a letter, alone and at the beginning of a word, and some words."""
    words = ["gun", "kite", "axe", "hat", "dog", "red", "sea", "see", "at", "a", "an"]
    pieces = [
        *(f"▁{word}" for word in words),
        "▁",
        *string.ascii_lowercase,
        *(f"▁{c}" for c in string.ascii_lowercase),
    ]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores += [(piece, -1.0 - len(scores) / 1000) for piece in dict.fromkeys(pieces)]
    return T5TokenizerFast(vocab=scores, extra_ids=0)


def clip_encoder(kind: type, tokenizer: Any, **options: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return kind(config).eval()


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config).eval()
    encoder.shared.weight.data.normal_(0, 1)
    return encoder


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIDE,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def second_tokenizer() -> Any:
    """CLIP's tokenizer that pads with "!", as that of the second encoder does."""
    first = build_tiny_tokenizer()
    second = build_tiny_tokenizer()
    second.pad_token = "!"
    assert first.get_vocab() == second.get_vocab() and first.pad_token_id != second.pad_token_id
    return second


def louder(transformer: Any) -> Any:
    """Make the prediction depend on the text, which at the usual initial values it hardly does."""
    transformer.context_embedder.weight.data *= 4
    transformer.time_text_embed.text_embedder.linear_1.weight.data *= 4
    for layer in (transformer.context_embedder, transformer.time_text_embed.text_embedder.linear_1):
        layer.bias.data.normal_(0, 0.3)
    transformer.proj_out.weight.data *= 4
    return transformer.eval()


def build_sd3(*, version: str = "sd3", t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3, or 3.5 with norms of Q and K and a second attention, the same weights each time."""
    newer: dict[str, Any] = (
        {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if version == "sd35" else {}
    )
    first, second, third = build_tiny_tokenizer(), second_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=SIDE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=CLIP_WIDTH + 12,
            pos_embed_max_size=8,
            **newer,
        )
        parts = {
            "transformer": louder(transformer),
            "text_encoder": clip_encoder(CLIPTextModelWithProjection, first, projection_dim=CLIP_WIDTH),
            "text_encoder_2": clip_encoder(CLIPTextModelWithProjection, second, projection_dim=12),
            "text_encoder_3": t5_encoder(third) if t5 else None,
            "vae": autoencoder(),
        }
    pipeline = StableDiffusion3Pipeline(
        **parts,
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_flux(version: str = "flux_dev") -> FluxPipeline:
    """FLUX.1 dev, which reads a guidance scale and shifts by resolution, or schnell, always the same."""
    dev = version == "flux_dev"
    first, second = build_tiny_tokenizer(), t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6),
        )
        parts = {
            "transformer": louder(transformer),
            "text_encoder": clip_encoder(CLIPTextModel, first),
            "text_encoder_2": t5_encoder(second),
            "vae": autoencoder(),
        }
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if dev
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    pipeline = FluxPipeline(**parts, tokenizer=first, tokenizer_2=second, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build(family: str) -> StableDiffusion3Pipeline | FluxPipeline:
    """The pipeline of one of ``FAMILIES``."""
    return build_flux(family) if family.startswith("flux") else build_sd3(version=family)
