"""The weights of a denoiser that a method trains, named by what they read."""

from __future__ import annotations

from torch import nn

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError
from trce_lightning.textual import CONTEXT

KINDS = ("x", "x_strict", "u", "all", "self")
"""Cross-attention; its K and V alone; all else; everything; self-attention."""


def weights_of(adapter: Adapter, kind: str) -> dict[str, nn.Parameter]:
    """Return parameters of the denoiser's linear maps and convolutions by name: one of :data:`KINDS`.

    Cross-attention is every module that holds maps which read raw text states. Self-attention has the same
    class and none of these. If the model has no such modules, raise ``InputError``.
    """
    entries = list(adapter.streams()[CONTEXT].entries)
    cross = {name.rpartition(".")[0] for name in entries}
    if kind in ("x", "u", "self") and "" in cross:
        raise InputError(
            f"method: expected a denoiser whose cross-attention reads the text states, got '{adapter.name}', "
            "which reads them elsewhere too; choose all or x_strict"
        )
    modules = dict(adapter.denoiser.named_modules())
    kinds = {type(modules[name]) for name in cross}
    own = {name for name, module in modules.items() if type(module) in kinds} - cross

    def chosen(name: str) -> bool:
        in_cross = _within(name, cross)
        return {
            "x": in_cross,
            "x_strict": name in entries,
            "u": not in_cross,
            "self": _within(name, own),
            "all": True,
        }[kind]

    return {
        f"{name}.{part}" if name else part: parameter
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.Conv2d) and chosen(name)
        for part, parameter in module.named_parameters(recurse=False)
    }


def _within(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in modules for count in range(1, len(parts) + 1))
