"""Refusals of models that the method does not fit.

A folder's index is checked before anything large is read. The networks are checked after loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from torch import nn

from trce_lightning.errors import InputError

AUTOENCODERS = tuple(kind.__name__ for kind in (AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL))
"""The supported autoencoders. Their decoders add no random noise."""
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
"""The attention processors that all compute the same attention."""


def other_pipeline(index: Mapping[str, Any], source: str, known: Sequence[str]) -> InputError:
    """Return the error for an index of another class than the ``known`` ones, with the reason."""
    if "transformer" in index:
        reason = "its transformer has no adapter yet"
    elif "text_encoder_2" in index and "unet" in index:
        reason = "it reads more than latents and the states of its two text encoders"
    elif "unet" in index and "text_encoder" in index:
        reason = "it reads more than latents and the states of one causal text encoder, or other states"
    else:
        reason = "it has no denoiser that reads the states of a text encoder"
    name = index.get("_class_name")
    return InputError(f"model: expected a {' or '.join(known)}, got {name} in '{source}': {reason}")


def refuse_other_parts(
    index: Mapping[str, Any], source: str, encoders: Sequence[str], tokenizers: Sequence[str]
) -> None:
    """Raise ``InputError`` unless ``model_index.json`` names a UNet, and a class for every other part."""
    if (found := _class_of(index, "unet")) != UNet2DConditionModel.__name__:
        raise InputError(
            f"model: expected a unet of {UNet2DConditionModel.__name__}, got {found} in '{source}'"
        )
    if (found := _class_of(index, "vae")) not in AUTOENCODERS:
        raise InputError(f"model: expected a vae of {', '.join(AUTOENCODERS)}, got {found} in '{source}'")
    for part in (*tokenizers, "scheduler"):
        if _class_of(index, part) is None:
            raise InputError(f"model: expected a pipeline with a {part}, got none in '{source}'")
    for encoder in encoders:
        library, *_ = index.get(encoder) or [None]
        if library != "transformers":
            raise InputError(
                f"model: expected a {encoder} of the library transformers, got {library} in '{source}'; "
                "code that comes with a model is never run"
            )


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    return (index.get(part) or [None, None])[1]


def refuse_what_the_method_does_not_fit(
    pipeline: Any, encoders: Mapping[str, str], added: str | None = None
) -> None:
    """Raise ``InputError`` with the reason if an edit of K and V would be wrong or have no effect.

    Also raise it if a part of the model would not be used, so that images differed from its own pipeline's.

    Args:
        pipeline: a pipeline whose denoiser is a UNet.
        encoders: the names of its text encoders with those of their tokenizers.
        added: the ``addition_embed_type`` that the adapter knows. The last encoder must pool a text for it.
    """
    refuse_unusable_weights(pipeline, ("unet", *encoders, "vae"))
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise InputError(f"model: expected a UNet2DConditionModel denoiser; {_other_denoiser(pipeline)}")
    if "text_encoder_2" not in encoders and getattr(pipeline, "text_encoder_2", None) is not None:
        raise InputError("model: expected one text encoder, got two")
    for part in ("vae", *encoders, *encoders.values(), "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise InputError(f"model: expected a pipeline with a {part}, got none")
    _refuse_other_autoencoders(pipeline)
    _refuse_other_conditions(unet, added)
    width = sum(getattr(pipeline, encoder).config.hidden_size for encoder in encoders)
    _refuse_other_attention(unet, width)
    for index, names in enumerate(encoders.items()):
        encoder, tokenizer = (getattr(pipeline, name) for name in names)
        refuse_other_tokens(encoder, tokenizer)
        _refuse_unless_causal(encoder, tokenizer, pools=added is not None and index == len(encoders) - 1)


def _other_denoiser(pipeline: Any) -> str:
    if getattr(pipeline, "transformer", None) is not None:
        return "joint attention has no adapter yet"
    return f"got {type(getattr(pipeline, 'unet', None)).__name__}"


def _refuse_other_autoencoders(pipeline: Any) -> None:
    unet, vae = pipeline.unet.config, pipeline.vae
    if type(vae).__name__ not in AUTOENCODERS:
        raise InputError(
            f"model: expected a vae of {', '.join(AUTOENCODERS)}, got {type(vae).__name__}; one that draws "
            "noise of its own, or has other latents, has no adapter yet"
        )
    if unet.in_channels != vae.config.latent_channels:
        raise InputError(
            f"model: expected a denoiser of {vae.config.latent_channels} latent channels, got "
            f"{unet.in_channels}; inpainting and the like have no adapter yet"
        )
    if unet.out_channels != unet.in_channels:
        raise InputError(
            f"model: expected a denoiser that predicts {unet.in_channels} channels, got {unet.out_channels}; "
            "predicted variances have no adapter yet"
        )


def _refuse_other_conditions(unet: UNet2DConditionModel, added: str | None) -> None:
    """Refuse a denoiser that reads other things than latents, timestep, text states and ``added``."""
    config, hint = unet.config, ""
    if config.time_cond_proj_dim is not None:
        reads = "the guidance scale (time_cond_proj_dim, as of latent consistency models)"
    elif unet.class_embedding is not None:
        reads = "class labels (class_embed_type or num_class_embeds)"
    elif config.addition_embed_type != added:
        reads = f"{'further' if added is None else 'other'} embeddings (addition_embed_type "
        reads += f"{config.addition_embed_type})"
    elif unet.encoder_hid_proj is not None:
        reads = f"projected states or a picture (encoder_hid_proj, {config.encoder_hid_dim_type})"
        hint = "; call unload_ip_adapter() first" if config.encoder_hid_dim_type == "ip_image_proj" else ""
    elif config.dual_cross_attention:
        reads = "two kinds of states in turns (dual_cross_attention)"
    else:
        return
    raise InputError(
        f"model: expected a denoiser of latents, timestep and raw text states alone, got one that reads "
        f"{reads}, which has no adapter yet{hint}"
    )


def _refuse_other_attention(unet: UNet2DConditionModel, width: int) -> None:
    attentions = [module for module in unet.modules() if isinstance(module, Attention)]
    if any(module.fused_projections for module in attentions):
        raise InputError("model: expected separate K and V; call unfuse_qkv_projections() first")
    kinds = {type(module.processor).__name__ for module in attentions} - set(PROCESSORS)
    added = any(module.added_kv_proj_dim is not None for module in attentions)
    if kinds and not added:
        raise InputError(
            f"model: expected the usual attention processors ({', '.join(PROCESSORS)}), got "
            f"{', '.join(sorted(kinds))}, whose K and V may be others; call "
            "pipeline.unet.set_attn_processor(AttnProcessor2_0()) if the model is right without them"
        )
    if added or any(module.norm_cross is not None for module in attentions):
        raise InputError(
            "model: expected K and V of raw text states, got some of normalised ones (cross_attention_norm "
            "or added_kv_proj_dim), which has no adapter yet"
        )
    cross = [module for module in attentions if module.is_cross_attention]
    if not cross or any(m.to_k.bias is not None or m.to_k.in_features != width for m in cross):
        raise InputError(f"model: expected bias-free cross-attention on text states of width {width}")
    if any(type(getattr(m, part)) is not nn.Linear for m in cross for part in ("to_q", "to_k", "to_v")):
        raise InputError("model: expected plain linear layers for Q, K and V, got others")


def refuse_other_tokens(encoder: Any, tokenizer: Any) -> None:
    """Raise ``InputError`` unless a CLIP tokenizer fits its encoder and gives start, text and end."""
    positions = encoder.config.max_position_embeddings
    if tokenizer.model_max_length > positions:
        raise InputError(
            f"model: expected a tokenizer whose model_max_length is at most the text encoder's {positions} "
            f'positions, got {tokenizer.model_max_length:g}; write "model_max_length": {positions} into '
            "tokenizer/tokenizer_config.json, or set pipeline.tokenizer.model_max_length"
        )
    ids = tokenizer("").input_ids
    if not ids or ids[0] != tokenizer.bos_token_id or tokenizer.eos_token_id not in ids[1:]:
        raise InputError(
            "model: expected a tokenizer that puts a start before a text and an end after it, got "
            f"{tokenizer.convert_ids_to_tokens(ids)} for the empty text"
        )
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        raise InputError(
            "model: expected a tokenizer with a vocabulary, got one that reads 'a' and 'b' as the same; its "
            "files (tokenizer.json, or vocab.json and merges.txt) are missing"
        )


SAMPLE = "a photo of 2 cats, in the style of Goya"
"""A text that two tokenizers must read alike."""


def refuse_other_readings(first: Any, second: Any) -> None:
    """Refuse two tokenizers that read one text as other tokens up to its end. Padding may differ.

    Their encoders' states lie side by side, so one position must stand for one token.
    """
    differing = [
        name
        for name in ("model_max_length", "bos_token_id", "eos_token_id")
        if getattr(first, name) != getattr(second, name)
    ]
    if missing := first.get_vocab().items() ^ second.get_vocab().items():
        differing.append(f"their vocabularies, such as {min(missing)[0]!r}")
    if not differing and first(SAMPLE).input_ids != second(SAMPLE).input_ids:
        differing.append(f"the tokens of '{SAMPLE}'")
    if differing:
        raise InputError(
            f"model: expected two tokenizers that read a text as the same tokens, got others in "
            f"{' and '.join(differing)}; load a textual inversion into both tokenizers and text encoders"
        )


def refuse_other_pooled(unet: UNet2DConditionModel, width: int, sizes: int) -> None:
    """Refuse a denoiser that reads something else than a pooled text of ``width`` and so many ``sizes``."""
    found = unet.add_embedding.linear_1.in_features
    each = unet.config.addition_time_embed_dim
    if found != width + sizes * each:
        raise InputError(
            f"model: expected a denoiser that reads a pooled text of width {width} and {sizes} sizes of "
            f"width {each} in add_embedding, got one that reads {found} numbers, such as a refiner"
        )


@torch.no_grad()
def _refuse_unless_causal(encoder: Any, tokenizer: Any, *, pools: bool) -> None:
    """Refuse an encoder whose positions see later ones, or whose first output is not what is read.

    That is one vector for a text if it ``pools``, else the states of every position.
    """
    start, end, device = tokenizer.bos_token_id, tokenizer.eos_token_id, encoder.device
    short, other = torch.tensor([[start, end, end]]), torch.tensor([[start, end, start]])
    outputs = [encoder(ids.to(device)) for ids in (short, other)]
    width = encoder.config.hidden_size
    expected = (1, encoder.config.projection_dim) if pools else (1, 3, width)
    gives = "one vector" if pools else "states of every position"
    if outputs[0][0].shape != expected:
        raise InputError(
            f"model: expected a text encoder that gives {gives} first, got "
            f"{type(encoder).__name__}, whose first output has the shape {[*outputs[0][0].shape]}"
        )
    before, after = (output.last_hidden_state for output in outputs)
    # NaN has another cause, and a later check names it.
    if not torch.allclose(before[:, :2], after[:, :2], atol=1e-3, equal_nan=True):
        raise InputError("model: expected a causal text encoder; this one's end of text sees what follows it")


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_unusable_weights(pipeline: Any, networks: Sequence[str]) -> None:
    """Raise ``InputError`` with a remedy unless all weights are plain tensors in their usual place."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "model: expected a call outside of torch.inference_mode(), which records no gradients"
        )
    for name in networks:
        network = getattr(pipeline, name, None)
        if isinstance(network, nn.Module):
            for reason in _reasons(name, network):
                raise InputError(f"model: {reason}")


def _reasons(name: str, network: nn.Module) -> Iterator[str]:
    modules = dict(network.named_modules())
    if any(_is_compiled(module) for module in modules.values()):
        undo = (
            f"set pipeline.{name} = pipeline.{name}._orig_mod"
            if hasattr(network, "_orig_mod")
            else "open it anew"
        )
        yield f"expected {name} as it is, got it through torch.compile; {undo} first, and compile afterwards"
    if any(hasattr(module, "_hf_hook") for module in modules.values()):
        undo = "reset_device_map" if getattr(network, "hf_device_map", None) else "remove_all_hooks"
        yield (
            f"expected all of {name} in one place, got it offloaded in parts or spread over devices; call "
            f"pipeline.{undo}() first"
        )
    if hooks := _hooks_of_diffusers(modules.values()):
        yield (
            f"expected {name} as it is, got hooks of diffusers in it ({', '.join(sorted(hooks))}: group "
            "offloading, layerwise casting or caching); open the pipeline anew without them"
        )
    wrapped = [part for part, module in modules.items() if hasattr(module, "base_layer")]
    if wrapped:  # PEFT's layers have this attribute; PEFT itself need not be installed
        yield (
            f"expected plain weights, got {len(wrapped)} layers with LoRA, such as {wrapped[0]}; call "
            "fuse_lora() and unload_lora_weights() first"
        )
    yield from _of_parameters(name, network)


def _of_parameters(name: str, network: nn.Module) -> Iterator[str]:
    for parameter_name, parameter in network.named_parameters():
        if parameter.dtype not in DTYPES or type(parameter) is not nn.Parameter:
            yield (
                f"expected plain weights in float32 or half precision, got {parameter.dtype} in {name}, such "
                f"as {parameter_name}; open the pipeline without quantization"
            )
        if parameter.is_inference():
            yield (
                f"expected weights that can be trained, got {name} made in torch.inference_mode(); open the "
                f"pipeline outside of it, or set pipeline.{name} = copy.deepcopy(pipeline.{name}) there"
            )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _hooks_of_diffusers(modules: Any) -> set[str]:
    registries = [module._diffusers_hook for module in modules if hasattr(module, "_diffusers_hook")]
    return {name for registry in registries for name in registry.hooks}
