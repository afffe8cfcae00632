"""Weights in 8 bits: as near as they can be, and in half the space of float16."""

import torch

from trce_lightning.emoji.eight_bits import packed, unpacked
from trce_lightning.emoji.training.unet import build_unet


def test_weights_come_back_within_half_a_step_of_their_row() -> None:
    weights = build_unet().state_dict()
    stored = packed(weights)
    again = unpacked(stored)
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        assert again[name].shape == weight.shape and again[name].dtype == torch.float32
        error = (again[name] - weight).abs()
        if weight.ndim < 2:
            assert torch.equal(again[name], weight.half().float())
            continue
        step = weight.flatten(1).abs().amax(1) / 127
        assert (error.flatten(1) <= 0.5001 * step[:, None]).all(), name
    size = sum(tensor.nbytes for tensor in stored.values())
    assert size < 0.53 * sum(2 * weight.numel() for weight in weights.values())


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -0.5]])
    assert torch.allclose(unpacked(packed({"w": weight}))["w"], weight, atol=1 / 127)
