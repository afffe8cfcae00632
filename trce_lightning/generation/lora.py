"""A LoRA on top of a pipeline, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError


@dataclass(frozen=True)
class Lora:
    """A file or folder of LoRA weights in a format that diffusers reads, and their scale."""

    path: str
    scale: float = 1.0


@contextmanager
def lora_applied(adapter: Adapter, lora: Lora | None) -> Iterator[None]:
    """Has W + scale · BA in place of W where ``lora`` says so; afterwards the model is what it was.

    ``InputError`` when the weights fit the model in no place, or don't fit it.
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
