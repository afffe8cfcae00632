"""The conversion of Stable Diffusion 1.x, 2.x and XL into one file with the original code's tensor names.

The names are those of the CompVis and Stability AI checkpoints, which other programs load. diffusers reads
them with ``from_single_file`` of their pipelines, but it can't write them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from trce_lightning.errors import InputError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""The prefixes of denoiser and autoencoder."""
TEXT, TEXTS = "cond_stage_model.", "conditioner.embedders."
"""The prefixes of the text encoder of 1.x and 2.x, and of both text encoders of XL."""
CLIP_XL, OPEN_CLIP_XL = f"{TEXTS}0.transformer.text_model.", f"{TEXTS}1.model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
OLD_CLIP = re.compile(r"cond_stage_model\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")
"""The prefix of CLIP in some files of 1.x, which were written without the module ``text_model``."""
OPEN_CLIP_WIDTH = 1024
"""The width of text states by which readers recognise 2.x. Its text encoder has OpenCLIP's names."""
UNKNOWN = "export: expected the parts of Stable Diffusion 1.x, 2.x or XL for single_file, got '{}'"

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    f"{half}{part}": f"{half}{original}"
    for half in ("encoder.", "decoder.")
    for part, original in {
        "conv_in": "conv_in",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.attentions.0": "mid.attn_1",
        "mid_block.resnets.1": "mid.block_2",
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
    }.items()
} | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
_VAE_LAYER = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def original_state(pipeline: Any) -> dict[str, Tensor]:
    """Return all tensors of a pipeline under their original names, on the CPU, in their own dtypes.

    If the original code has no name for a part of a network, raise ``InputError``.
    """
    second = getattr(pipeline, "text_encoder_2", None)
    encoders = [pipeline.text_encoder] if second is None else [pipeline.text_encoder, second]
    state = whole_state(pipeline.unet, pipeline.vae, encoders)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def whole_state(unet: UNet2DConditionModel, vae: AutoencoderKL, encoders: Sequence[Any]) -> dict[str, Tensor]:
    """Return all tensors of the networks under their original names. XL has two text encoders."""
    state = {UNET + name: tensor for name, tensor in unet_state(unet).items()}
    state |= {VAE + name: tensor for name, tensor in vae_state(vae).items()}
    if len(encoders) == 1:
        return state | text_state(encoders[0])
    first, second = encoders
    return state | _clip_state(first, CLIP_XL) | _open_clip_state(second, OPEN_CLIP_XL)


def current_name(name: str) -> str:
    """Return a stored tensor's name with CLIP's usual prefix."""
    return OLD_CLIP.sub(CLIP, name)


def unet_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return the denoiser's tensors. Layers and downsamplers are counted through all blocks."""
    parts, index = dict(_UNET), 0
    for block, module in enumerate(unet.down_blocks):
        for layer in range(len(module.resnets)):
            index += 1
            parts[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{index}.0"
            parts[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{index}.1"
        if module.downsamplers:
            index += 1
            parts[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
    index = -1
    for block, module in enumerate(unet.up_blocks):
        for layer in range(len(module.resnets)):
            index += 1
            parts[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{index}.0"
            parts[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{index}.1"
        place = 2 if hasattr(module, "attentions") else 1
        parts[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{index}.{place}.conv"
    return _renamed(unet, parts, _RESNET)


def vae_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return the autoencoder's tensors.

    The decoder's blocks are counted from the last one. Attention weights are 1×1 convolutions.
    """
    parts, last = dict(_VAE), len(vae.decoder.up_blocks) - 1
    sides = [(f"encoder.down_blocks.{i}", f"encoder.down.{i}") for i in range(len(vae.encoder.down_blocks))]
    sides += [(f"decoder.up_blocks.{i}", f"decoder.up.{last - i}") for i in range(last + 1)]
    for block, original in sides:
        for layer in range(len(vae.get_submodule(block).resnets)):
            parts[f"{block}.resnets.{layer}"] = f"{original}.block.{layer}"
        parts[f"{block}.downsamplers.0.conv"] = f"{original}.downsample.conv"
        parts[f"{block}.upsamplers.0.conv"] = f"{original}.upsample.conv"
    state = _renamed(vae, parts, _VAE_LAYER)
    linear = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")
    return {name: part[..., None, None] if linear.search(name) else part for name, part in state.items()}


def text_state(text_encoder: Any) -> dict[str, Tensor]:
    """Return the tensors of the one text encoder. Names are CLIP's own, or OpenCLIP's for 2.x."""
    if text_encoder.config.hidden_size != OPEN_CLIP_WIDTH:
        return _clip_state(text_encoder, CLIP)
    return _open_clip_state(text_encoder, OPEN_CLIP)


def _clip_state(text_encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in _plain_state(text_encoder).items()}


def _plain_state(text_encoder: nn.Module) -> dict[str, Tensor]:
    # Some versions of transformers put a module text_model around the whole encoder.
    return {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}


def _open_clip_state(text_encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the tensors by OpenCLIP's names. It multiplies by the projection from the right."""
    state = _plain_state(text_encoder)
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "text_projection.weight":
            named[f"{prefix}text_projection"] = tensor.mT
            continue
        if layer is None:
            named[prefix + _lookup(_TEXT, name, name)] = tensor
            continue
        number, part, kind = layer.groups()
        block = f"{prefix}transformer.resblocks.{number}"
        if part == "self_attn.q_proj":
            rows = [state[f"encoder.layers.{number}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            named[f"{block}.attn.in_proj_{kind}"] = torch.cat(rows)
        elif part not in ("self_attn.k_proj", "self_attn.v_proj"):
            named[f"{block}.{_lookup(_TEXT_LAYER, part, name)}.{kind}"] = tensor
    return named


def _renamed(network: nn.Module, parts: Mapping[str, str], layers: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors with the names of their parts replaced, and within these the names of layers."""
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        part = _beginning(parts, name)
        if part is None:
            raise InputError(UNKNOWN.format(name))
        rest = name.removeprefix(f"{part}.")
        layer = _beginning(layers, rest)
        inside = rest if layer is None else f"{layers[layer]}.{rest.removeprefix(f'{layer}.')}"
        state[f"{parts[part]}.{inside}"] = tensor
    return state


def _beginning(names: Mapping[str, str], name: str) -> str | None:
    return next((one for one in names if name.startswith(f"{one}.")), None)


def _lookup(names: Mapping[str, str], part: str, name: str) -> str:
    if part not in names:
        raise InputError(UNKNOWN.format(name))
    return names[part]
