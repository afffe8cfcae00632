"""What the method does not fit: told by a folder's index before anything large is read, and by networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from trce_lightning.errors import InputError

PIPELINE = StableDiffusionPipeline.__name__


def refuse_other_pipelines(index: Mapping[str, Any], source: str) -> None:
    """``InputError`` naming the reason unless a ``model_index.json`` is Stable Diffusion 1.x or 2.x's."""
    name = index.get("_class_name")
    if name == PIPELINE and index.get("unet", [None, None])[1] == UNet2DConditionModel.__name__:
        return
    if "text_encoder_2" in index and "unet" in index:
        reason = "two text encoders have no adapter yet"
    elif "transformer" in index:
        reason = "a transformer with joint attention has no adapter yet"
    elif "unet" in index and "text_encoder" in index:
        reason = "it reads more than latents and the states of one causal text encoder, or other states"
    else:
        reason = "it has no denoiser that reads the states of a text encoder"
    raise InputError(f"model: expected a {PIPELINE}, got {name} in '{source}': {reason}")


def refuse_what_the_method_does_not_fit(pipeline: StableDiffusionPipeline) -> None:
    """``InputError`` naming the reason when an edit of K and V would be wrong or without effect."""
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise InputError(
            "model: expected a UNet2DConditionModel denoiser; joint attention has no adapter yet"
        )
    if getattr(pipeline, "text_encoder_2", None) is not None:
        raise InputError("model: expected one text encoder; two (Stable Diffusion XL) have no adapter yet")
    if unet.encoder_hid_proj is not None:
        raise InputError("model: expected raw text states; a model with encoder_hid_proj has no adapter yet")
    if unet.config.in_channels != pipeline.vae.config.latent_channels:
        raise InputError(
            f"model: expected a denoiser of {pipeline.vae.config.latent_channels} latent channels, got "
            f"{unet.config.in_channels}; inpainting and the like have no adapter yet"
        )
    for network in (unet, pipeline.text_encoder):
        _refuse_unmerged_lora(network)
    _refuse_other_projections(unet, pipeline.text_encoder.config.hidden_size)
    _refuse_unless_causal(pipeline)


def _refuse_unmerged_lora(network: nn.Module) -> None:
    # PEFT's layers, told by what they wrap: PEFT itself need not be installed.
    wrapped = [name for name, module in network.named_modules() if hasattr(module, "base_layer")]
    if wrapped:
        raise InputError(
            f"model: expected plain weights, got {len(wrapped)} layers with LoRA, such as {wrapped[0]}; call "
            "fuse_lora() and unload_lora_weights() first"
        )


def _refuse_other_projections(unet: UNet2DConditionModel, width: int) -> None:
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    if any(module.fused_projections for module in attentions):
        raise InputError("model: expected separate K and V; call unfuse_qkv_projections() first")
    cross = [module for module in attentions if module.is_cross_attention]
    if not cross or any(m.to_k.bias is not None or m.to_k.in_features != width for m in cross):
        raise InputError(f"model: expected bias-free cross-attention on text states of width {width}")


@torch.no_grad()
def _refuse_unless_causal(pipeline: StableDiffusionPipeline) -> None:
    start, end = pipeline.tokenizer.bos_token_id, pipeline.tokenizer.eos_token_id
    device = pipeline.text_encoder.device
    short, other = torch.tensor([[start, end, end]]), torch.tensor([[start, end, start]])
    before, after = (pipeline.text_encoder(ids.to(device))[0][:, :2] for ids in (short, other))
    if not torch.allclose(before, after, atol=1e-3, equal_nan=True):  # NaN has another reason, told later
        raise InputError("model: expected a causal text encoder; this one's end of text sees what follows it")
