"""The attention maps of a denoiser's cross-attention in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

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
