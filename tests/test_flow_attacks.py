"""Attacks on SD3 and FLUX.1. SD3's text has two segments, and CLIP's states are narrower than T5's."""

import pytest
import torch
from attack_targets import largest_difference, searched, target_of, ways
from test_flow_adapters import opened
from tiny_flow import CLIP_WIDTH, FAMILIES, T5_WIDTH, build

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.inverse_edit import InverseEdit
from trce_lightning.closed_form import Edit
from trce_lightning.generation.loop import generate
from trce_lightning.textual import apply_edit_

OPTIONS = {"guidance_scale": 1.0, "num_steps": 3, "batch_size": 2}


def mixed(first: int, width: int) -> torch.Tensor:
    """T ``[width, width]`` that mixes the first numbers of a state, and the others, each among themselves."""
    generator = torch.Generator().manual_seed(0)
    blocks = [
        torch.eye(size, dtype=torch.float64)
        + 0.3 * torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        for size in (first, width - first)
    ]
    return torch.block_diag(*blocks)


def edited(family: str, first: int) -> Adapter:
    adapter = opened(build(family))
    width = adapter.streams()["context"].width
    apply_edit_(adapter, Edit(mixed(first, width), 1.0, 0.0, 0.0))
    return adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_of_an_edit_fits_each_segment(family: str) -> None:
    """A T that keeps narrow states narrow has an exact key for each width."""
    erased, original = edited(family, 2 * CLIP_WIDTH), opened(build(family))
    target = target_of(erased, original)
    key = searched(InverseEdit(), target)["all"]
    widths = {name: states.shape[-1] for name, states in erased.empty().states.items()}
    read = {segment for stream in erased.streams().values() for segment in stream.segments}
    assert {name: tuple(tensor.shape) for name, tensor in key.tensors.items()} == {
        name: (widths[name],) * 2 for name in read
    }
    if family.startswith("sd3"):
        assert widths["clip"] == 2 * CLIP_WIDTH < widths["t5"] == T5_WIDTH
    way = ways(InverseEdit(), target, {"all": key})[""]
    pictures = generate(original, way.records, **OPTIONS)
    assert largest_difference(generate(way.adapter, way.records, **OPTIONS), pictures) <= 1
    assert largest_difference(generate(erased, way.records, **OPTIONS), pictures) > 1
