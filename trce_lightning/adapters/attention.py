"""The attention of a denoiser in a forward pass: its maps, and its precision on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trce_lightning.adapters.protocol import Adapter
from trce_lightning.errors import InputError


def cross_attention(adapter: Adapter, option: str) -> dict[str, Attention]:
    """Return the layers whose keys and values are made of raw text states, by name.

    If the text states are read elsewhere, raise ``InputError`` that names ``option``.
    """
    modules = dict(adapter.denoiser.named_modules())
    names = dict.fromkeys(name.rpartition(".")[0] for name in adapter.streams()["context"].entries)
    layers = {name: modules[name] for name in names}
    if not all(isinstance(layer, Attention) for layer in layers.values()):
        raise InputError(
            f"{option}: expected a denoiser whose cross-attention reads the text states, got "
            f"'{adapter.name}', which reads them elsewhere"
        )
    return {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}


@contextmanager
def attention_maps(layers: dict[str, Attention]) -> Iterator[Callable[[], list[Tensor]]]:
    """Note queries and keys within, and yield a function that returns each layer's map of the last pass.

    A map is softmax(Q Kᵀ / √d), ``[B, heads, queries, positions]``, differentiable. It is computed when the
    function is called, outside of the pass, so that gradient checkpointing of the pass stays possible.
    """
    seen: dict[str, dict[str, Tensor]] = {name: {} for name in layers}

    def noting(name: str, part: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name][part] = output

        return note

    hooks = [
        module.register_forward_hook(noting(name, part))
        for name, layer in layers.items()
        for part, module in (("query", layer.to_q), ("key", layer.to_k))
    ]

    def maps() -> list[Tensor]:
        found = []
        for name, layer in layers.items():
            query, key = (layer.head_to_batch_dim(seen[name][part]) for part in ("query", "key"))
            found.append(layer.get_attention_scores(query, key).unflatten(0, (-1, layer.heads)))
        return found

    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


class AttentionInFloat32(TorchFunctionMode):
    """Within it, softmax(Q Kᵀ / √d) V is computed in float32, also under autocast.

    The backward pass of PyTorch's fused attention takes up to four times as long in bfloat16 as in float32 on
    a CPU. The forward pass takes as long in both.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, and attention in float32."""
        named = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        with torch.autocast("cpu", enabled=False):
            return func(*map(in_float32, args), **{name: in_float32(each) for name, each in named.items()})


def in_float32(value: Any) -> Any:
    """Return a tensor of numbers in float32, and all else as it is. A mask of truth values isn't numbers."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def attention_for_gradients(denoiser: ModelMixin) -> AbstractContextManager[Any]:
    """Return the context of a forward pass whose backward pass is fast.

    It changes nothing on a GPU, where no gradient is asked for, without autocast, or with gradient
    checkpointing, which would compute attention again outside of the context.
    """
    helps = (
        denoiser.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.is_grad_enabled()
        and not denoiser.is_gradient_checkpointing
    )
    return AttentionInFloat32() if helps else nullcontext()
