"""Networks as they lie in memory: where weights can't be edited in place, and what undoes that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from trce_lightning.errors import InputError

NETWORKS = ("unet", "text_encoder", "vae")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def refuse_unusable_weights(pipeline: StableDiffusionPipeline) -> None:
    """``InputError`` that says what undoes it, unless all weights are plain tensors in their usual place."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "model: expected a call outside of torch.inference_mode(), which records no gradients"
        )
    for name in NETWORKS:
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
    if wrapped:  # PEFT's layers, told by what they wrap: PEFT itself need not be installed
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
