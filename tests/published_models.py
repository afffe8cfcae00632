"""Stable Diffusion 1.x and 2.x from their published configurations, with random weights, whole or small.

A small twin has the same blocks, names and widths of text states, and few channels.
"""

import string
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.training import clip

VERSIONS = ("sd1", "sd2")
WIDTH = {"sd1": 768, "sd2": 1024}
PREDICTION = {"sd1": "epsilon", "sd2": "v_prediction"}
UNET: dict[str, dict[str, Any]] = {
    "sd1": {"sample_size": 64, "attention_head_dim": 8},
    "sd2": {"sample_size": 96, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}
TEXT: dict[str, dict[str, Any]] = {
    "sd1": {
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    # The last of OpenCLIP's 24 layers is left out, so that the last hidden state is its penultimate.
    "sd2": {
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
SMALL_UNET: dict[str, dict[str, Any]] = {
    "sd1": {"attention_head_dim": 4},
    "sd2": {"attention_head_dim": (1, 2, 2, 4)},
}
SMALL = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8}
BLOCKS = (
    *(f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)),
)
"""The 16 places of a transformer block."""
KEYS_AND_VALUES = {
    f"{block}.transformer_blocks.0.attn2.to_{part}.weight" for block in BLOCKS for part in "kv"
}
QUERIES = {f"{block}.transformer_blocks.0.attn{number}.to_q.weight" for block in BLOCKS for number in (1, 2)}


def tokenizer_of(version: str) -> CLIPTokenizer:
    """One token a printable character, "!" the first as in CLIP; 2.x pads with it, 1.x with EoT."""
    characters = ["!", *(c for c in string.printable if not c.isspace() and c != "!")]
    tokens = [*characters, *(f"{c}</w>" for c in characters)]
    return clip.tokenizer_of(tokens, [], 77, pad_token={"sd1": clip.END, "sd2": "!"}[version])


def unet_of(version: str, *, small: bool = False) -> UNet2DConditionModel:
    """The denoiser."""
    options = {
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "cross_attention_dim": WIDTH[version],
    } | UNET[version]
    return UNet2DConditionModel(**(options | (SMALL | SMALL_UNET[version] if small else {})))


def text_encoder_of(version: str, *, small: bool = False) -> CLIPTextModel:
    """The text encoder; its numbers of special tokens are the published ones, not the tokenizer's."""
    options = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1} | TEXT[version]
    if small:
        options |= {"vocab_size": 200, "num_hidden_layers": 2, "intermediate_size": 64}
    return CLIPTextModel(CLIPTextConfig(hidden_size=WIDTH[version], max_position_embeddings=77, **options))


def vae_of(*, small: bool = False) -> AutoencoderKL:
    """The autoencoder, the same in 1.x and 2.x."""
    options = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        **(options | (SMALL if small else {})),
    )


def scheduler_of(version: str) -> DDIMScheduler:
    """Return it with the published noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=PREDICTION[version],
    )


def pipeline_of(
    version: str, *, small: bool = False, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """All of it, the same random weights each time."""
    with torch.device("meta"):
        unet, text_encoder, vae = (
            unet_of(version, small=small),
            text_encoder_of(version, small=small),
            vae_of(small=small),
        )
    for network in (unet, text_encoder, vae):
        fill_(network.to(dtype).to_empty(device="cpu"))
    # At its usual size a random network's prediction hardly depends on the prompt.
    unet.conv_out.weight.data *= 4
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer_of(version),
        unet=unet,
        scheduler=scheduler_of(version),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fill_(network: nn.Module) -> None:
    """Random weights of variance 1 / fan-in from one short block of noise, since drawing 860 M takes long."""
    # A prime length, so that no row of a matrix repeats another; twice, to begin anywhere.
    length = 1_000_003
    noise = torch.randn(length, generator=torch.Generator().manual_seed(0)).repeat(2)
    for index, (name, parameter) in enumerate(network.named_parameters()):
        if name.endswith("bias"):
            parameter.data.zero_()
        elif parameter.ndim == 1:
            parameter.data.fill_(1)
        else:
            scale = parameter[0].numel() ** -0.5
            start = 12_345 * index % length
            for chunk in parameter.data.view(-1).split(length):
                chunk.copy_(noise[start : start + len(chunk)]).mul_(scale)
    for name, buffer in network.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(77)[None])


def states_of(pipeline: StableDiffusionPipeline, prompt: str) -> tuple[Tensor, int]:
    """Text states of the padded prompt as diffusers has them, ``[77, d]`` float64, and where its EoT is."""
    with torch.no_grad():
        states = pipeline.encode_prompt(prompt, "cpu", 1, False)[0][0]
    ids = pipeline.tokenizer(prompt, padding="max_length", truncation=True, max_length=77).input_ids
    return states.double(), ids.index(pipeline.tokenizer.eos_token_id)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> Iterator[str]:
    """Names of tensors that differ."""
    assert before.keys() == after.keys()
    yield from (name for name, tensor in before.items() if not torch.equal(tensor, after[name]))
