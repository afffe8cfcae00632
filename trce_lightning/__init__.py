"""Erase a concept from a text-to-image diffusion model (TRCE, arXiv 2503.07389).

The import of the package loads no torch. `erase` and `Concept` are loaded at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trce_lightning.api import erase
    from trce_lightning.concepts import Concept

__version__ = "0.1.0"
__all__ = ["Concept", "__version__", "erase"]

_HOMES = {"Concept": "trce_lightning.concepts", "erase": "trce_lightning.api"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
