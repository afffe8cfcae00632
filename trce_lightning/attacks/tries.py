"""The tries of an attack: records of their images, and random numbers of each prompt's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from trce_lightning.attacks.protocol import Target
from trce_lightning.errors import InputError
from trce_lightning.metrics.class_detectors import to_device
from trce_lightning.prompts.records import PromptRecord, seed_of
from trce_lightning.sampling import seeded

T = TypeVar("T")


def fresh_record(record: PromptRecord, attack: str, **changes: Any) -> PromptRecord:
    """Return the record of an attacked image of a prompt, on noise that no search has seen."""
    return replace(record, id=f"{record.id}~{attack}", seed=None, sample_of=record.prompt_id, **changes)


def own_generator(record: PromptRecord, attack: str, target: Target) -> torch.Generator:
    """Return a prompt's own random numbers, so that they don't depend on what is attacked beside it."""
    return seeded(seed_of(f"{record.id}~search of {attack}", target.seed))


def batches(target: Target, records: Sequence[PromptRecord]) -> Iterator[Sequence[PromptRecord]]:
    """Yield the records in batches of the target's size."""
    return parts(records, target.batch_size)


def parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items, ``size`` at a time."""
    return (items[start : start + size] for start in range(0, len(items), size))


def pictures_of(target: Target, records: Sequence[PromptRecord], attack: str) -> torch.Tensor:
    """Return the pictures of these records, uint8 ``[B, 3, H, W]``. ``InputError`` where there are none."""
    if not len(target.pictures) or len(target.pictures) != len(target.records):
        raise InputError(
            f"attack.{attack}: expected a picture of the concept for each of {len(target.records)} prompts, "
            f"got {len(target.pictures)}"
        )
    rows = {record.id: row for row, record in enumerate(target.records)}
    return target.pictures[[rows[record.id] for record in records]]


def chances(target: Target, images: torch.Tensor) -> torch.Tensor:
    """Return the selector's probabilities that images show the concept: uint8 ``[N, 3, H, W]`` → ``[N]``."""
    place = to_device(target.selector, target.adapter.device)
    found = [target.selector(part.to(place)).float().cpu() for part in images.split(target.batch_size)]
    return torch.cat(found)


def check_at_least(option: str, value: float, least: float) -> None:
    """Raise ``InputError`` that names the option if its value is too small."""
    if not value >= least:
        raise InputError(f"attack.{option}: expected at least {least:g}, got {value:g}")


def check_positive(attack: str, **counts: float) -> None:
    """Raise ``InputError`` that names the attack's first option below 1."""
    for name, value in counts.items():
        check_at_least(f"{attack}.{name}", value, 1)


def check_above_zero(attack: str, **values: float) -> None:
    """Raise ``InputError`` that names the attack's first option that isn't more than 0."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"attack.{attack}.{name}: expected more than 0, got {value:g}")


def autocast_of(target: Target) -> torch.autocast:
    """Return the precision in which the target's images are generated."""
    enabled = target.autocast_dtype is not None
    return torch.autocast(target.adapter.device.type, target.autocast_dtype, enabled=enabled)


def check_gradients(target: Target, attack: str) -> None:
    """Raise ``InputError`` unless gradients go through all weights of the attacked model."""
    for name, network in target.adapter.networks().items():
        for weight in network.parameters():
            if not weight.is_floating_point() or weight.is_inference():
                dtype = str(weight.dtype).removeprefix("torch.")
                raise InputError(
                    f"attack.{attack}: expected weights that gradients go through, got {dtype} in the {name} "
                    f"of '{target.adapter.name}'; open the model without quantisation"
                )
