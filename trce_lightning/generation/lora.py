"""LoRAs that are put on top of a pipeline and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError


@dataclass(frozen=True)
class Lora:
    """The path of a file or folder of LoRA weights in a format that diffusers reads, and their scale."""

    path: str
    scale: float = 1.0


@contextmanager
def lora_applied(adapter: Adapter, lora: Lora | None) -> Iterator[None]:
    """Replace each W that the LoRA changes by W + scale · BA within, and restore the model afterwards.

    If the weights don't fit the model, raise ``InputError``.
    """
    if lora is None:
        yield
        return
    with adapter.other_weights(), _applied(adapter, lora):
        yield


@contextmanager
def _applied(adapter: Adapter, lora: Lora) -> Iterator[None]:
    pipeline = adapter.pipeline
    try:
        pipeline.load_lora_weights(lora.path, adapter_name="lora", local_files_only=True)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        pipeline.unload_lora_weights()
        raise InputError(f"robustness.lora: expected weights that fit, got {lora.path}: {error}") from error
    try:
        if not pipeline.get_active_adapters():
            raise InputError(f"robustness.lora: expected weights for this model, got none in {lora.path}")
        pipeline.set_adapters("lora", lora.scale)
        yield
    finally:
        pipeline.unload_lora_weights()
