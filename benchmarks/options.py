"""The effects of layouts, attention kernels, compilation and 8-bit optimizer states on this machine.

``ours`` is with the option, ``plain`` without.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import networks
from benchmarks.processes import alone
from benchmarks.report import Row
from benchmarks.timing import in_turns, seconds
from trce_lightning.adapters import load_adapter
from trce_lightning.adapters.attention import AttentionInFloat32
from trce_lightning.emoji.package import weights_folder

log = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Relative difference of the gradients with and without an option."""
TRAINABLE = 24_780_800
REPEATS = 5
HALF_TOLERANCE = 0.1
"""The same in bfloat16."""


class Step:
    """Forward and backward of one network on one batch, Q alone free."""

    def __init__(self, unet: UNet2DConditionModel, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        self.unet = unet
        self.network: Callable[..., Any] = unet
        self.inputs = inputs
        unet.requires_grad_(False)
        self.free = [value for name, value in unet.named_parameters() if name.endswith("to_q.weight")]
        for parameter in self.free:
            parameter.requires_grad_(True)

    def __call__(self) -> Tensor:
        """Return all gradients, flat."""
        (output,) = self.network(*self.inputs, return_dict=False)
        gradients = torch.autograd.grad(output.square().mean(), self.free)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def explicit(self) -> Tensor:
        """Return the gradients with the attention matrix formed; the default takes a fused kernel."""
        with sdpa_kernel(SDPBackend.MATH):
            return self()

    def in_half_precision(self, attention: AbstractContextManager[Any]) -> Tensor:
        """Return the gradients under autocast, with attention computed in a context."""
        with torch.autocast("cpu", torch.bfloat16), attention:
            return self()

    def recomputed(self) -> Tensor:
        """Return the gradients with gradient checkpointing."""
        self.unet.enable_gradient_checkpointing()
        gradients = self()
        self.unet.disable_gradient_checkpointing()
        return gradients


def layout_and_attention(name: str) -> list[Row]:
    """Measure channels last, explicit attention and gradient checkpointing."""
    unet, inputs = network_and_inputs(name)
    plain, other = Step(unet, inputs), copy.deepcopy(unet).to(memory_format=torch.channels_last)
    last = Step(other, (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]))
    times = compare({"plain": plain, "last": last, "explicit": plain.explicit, "again": plain.recomputed})
    return [
        Row(f"forward + backward, {name}: channels_last", times["last"], "s", times["plain"]),
        Row(f"… {name}: the fused attention kernel (default)", times["plain"], "s", times["explicit"]),
        Row(f"… {name}: gradient checkpointing", times["again"], "s", times["plain"]),
    ]


def half_precision(name: str) -> list[Row]:
    """Measure attention in float32 where all else is in bfloat16."""
    step = Step(*network_and_inputs(name))
    functions = {
        "plain": lambda: step.in_half_precision(nullcontext()),
        "ours": lambda: step.in_half_precision(AttentionInFloat32()),
    }
    times = compare(functions, HALF_TOLERANCE)
    what = f"forward + backward in bfloat16, {name}: attention in float32 (default)"
    return [Row(what, times["ours"], "s", times["plain"])]


def compilation(name: str) -> list[Row]:
    """Measure torch.compile, and how long it takes."""
    unet, inputs = network_and_inputs(name)
    plain, compiled = Step(unet, inputs), Step(copy.deepcopy(unet), inputs)
    compiled.network = torch.compile(compiled.network, dynamic=False)
    first = seconds(compiled)
    times = compare({"plain": plain, "compiled": compiled})
    return [
        Row(f"… {name}: torch.compile", times["compiled"], "s", times["plain"]),
        Row("… and compiling, once for each batch size", first, "s"),
    ]


def network_and_inputs(name: str) -> tuple[UNet2DConditionModel, tuple[Tensor, Tensor, Tensor]]:
    """Return the embedded model with 48 latents, or Stable Diffusion's denoiser with two small ones."""
    torch.manual_seed(0)
    if name == "embedded model":
        adapter = load_adapter(weights_folder())
        unet, rows, side = adapter.denoiser, 48, adapter.latent_shape[1]
        states = adapter.empty().states["clip"]
    else:
        unet, rows, side, states = networks.unet(), 2, 16, torch.randn(1, networks.TOKENS, 768)
    z_t = torch.randn(rows, unet.config.in_channels, side, side)
    return unet, (z_t, torch.full((rows,), 500), states.expand(rows, -1, -1))


def compare(functions: Mapping[str, Callable[[], Tensor]], tolerance: float = TOLERANCE) -> dict[str, float]:
    """Return median seconds, after a check that all give the gradients of "plain"."""
    expected = functions["plain"]()
    for name, function in functions.items():
        difference = ((function() - expected).norm() / expected.norm()).item()
        log.info("options: %s differs by %.2g", name, difference)
        assert difference <= tolerance, f"{name}: expected equal gradients, got a difference of {difference}"
    return in_turns(functions, REPEATS)


def optimizers() -> list[Row]:
    """Measure torch's AdamW and the 8-bit one of bitsandbytes, on as many parameters as Q has."""
    import bitsandbytes  # not at the top: its library is loaded where it is measured alone

    steps: dict[str, torch.optim.Optimizer] = {}
    for name, kind in (("plain", torch.optim.AdamW), ("ours", bitsandbytes.optim.AdamW8bit)):
        parameter = torch.nn.Parameter(torch.randn(TRAINABLE))
        parameter.grad = torch.randn(TRAINABLE)
        steps[name] = kind([parameter], lr=1e-5)
        steps[name].step()
    times = in_turns({name: optimizer.step for name, optimizer in steps.items()}, REPEATS)
    size = {name: state_bytes(optimizer) / 1e6 for name, optimizer in steps.items()}
    return [
        Row("optimizer step, 24.8 M parameters: 8-bit AdamW", times["ours"], "s", times["plain"]),
        Row("… its states", size["ours"], "MB", size["plain"]),
    ]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of all state tensors."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, Tensor))


def run() -> list[Row]:
    """Measure each option in a process of its own."""
    rows = alone(layout_and_attention, "embedded model")
    rows += alone(layout_and_attention, "SD 1.4 at 16×16 latents")
    rows += alone(half_precision, "embedded model")
    return [*rows, *alone(compilation, "embedded model"), *alone(optimizers)]
