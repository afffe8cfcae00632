"""Fit a small network on data that lies on the device. The fit has a limit of steps or of minutes, and resumes.

On a GPU, a step of these networks takes a few milliseconds. So the loop has no loader, and it waits for the device
only when it logs.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trce_lightning.emoji.training.part import native_autocast
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import read_safetensors, write_safetensors

log = logging.getLogger(__name__)
LOG_EVERY = 100
SAVE_EVERY_SECONDS = 120.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fit:
    """How long and how a part is trained. The learning rate ends at the limit that is reached first.

    Args:
        steps: the largest number of steps.
        batch_size: the rows of a step.
        lr: the highest learning rate.
        minutes: the largest time on the clock, over all runs of a resumed fit, or None.
        ema_decay: the decay of the weights' average, which is the result.
        warmup_steps: the steps until the learning rate is highest. It then falls to a twentieth by a cosine.
        weight_decay: AdamW's.
        compiled: True to compile the network, which takes minutes and then saves time in every step.
    """

    steps: int
    batch_size: int
    lr: float
    minutes: float | None = None
    ema_decay: float = 0.999
    warmup_steps: int = 200
    weight_decay: float = 0.01
    compiled: bool = False

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the fit that is done, from 0 to 1."""
        share = step / self.steps
        return min(1.0, share if self.minutes is None else max(share, seconds / (60 * self.minutes)))

    def lr_at(self, step: int, progress: float) -> float:
        """Return the learning rate."""
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * cosine * min(1.0, (step + 1) / self.warmup_steps)


def fit(network: nn.Module, loss_of: Callable[[nn.Module, int], Tensor], plan: Fit, file: Path) -> nn.Module:
    """Train ``network`` and return the average of its weights, a network like it.

    Args:
        network: on the device that trains.
        loss_of: returns the loss of one batch from the network and the batch's size.
        plan: the fit's length.
        file: the checkpoint, from which a killed fit continues.

    Raises:
        InputError: the loss is not finite.
    """
    device = next(network.parameters()).device
    parameters = dict(network.named_parameters())
    values = list(parameters.values())
    optimizer = torch.optim.AdamW(
        values, lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    average = copy.deepcopy(network).requires_grad_(False).eval()
    averages = list(average.parameters())
    step, seconds = _resume(file, parameters, averages, optimizer)
    # Steps of a resumed fit draw other rows and noise than those before.
    torch.manual_seed(step)
    network.train()
    if plan.compiled:
        network.compile()
    started = saved = time.monotonic()
    total = torch.zeros((), device=device)
    # On a CPU, the backward pass of flash attention takes several times as long as that of the plain formula.
    with nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH):
        while (done := plan.progress(step, seconds + time.monotonic() - started)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr_at(step, done)
            with native_autocast(device.type):
                loss = loss_of(network, plan.batch_size)
            loss.backward()
            nn.utils.clip_grad_norm_(values, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(plan.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(averages, values, 1 - decay)
                total += loss
            step += 1
            if step % LOG_EVERY == 0:
                _report(file.stem, step, done, total, time.monotonic() - started)
                total.zero_()
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _save(file, parameters, averages, optimizer, step, seconds + time.monotonic() - started)
                saved = time.monotonic()
    seconds += time.monotonic() - started
    log.info("%s: %d steps of %d in %.0f s", file.stem, step, plan.batch_size, seconds)
    _save(file, parameters, averages, optimizer, step, seconds)
    return average


def _report(name: str, step: int, done: float, total: Tensor, seconds: float) -> None:
    mean = total.item() / LOG_EVERY
    log.info("%s: step %d (%.0f %%), loss %.4f, %.0f s", name, step, 100 * done, mean, seconds)
    if not math.isfinite(mean):
        raise InputError(f"{name}: expected a finite loss, got {mean} before step {step}")


def _save(
    file: Path,
    parameters: dict[str, nn.Parameter],
    averages: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    tensors = {}
    for (name, value), mean in zip(parameters.items(), averages, strict=True):
        tensors |= {f"now.{name}": value.detach(), f"average.{name}": mean}
        tensors |= {f"{moment}.{name}": optimizer.state[value][moment] for moment in _MOMENTS}
    write_safetensors(file, tensors, {"fit": json.dumps({"step": step, "seconds": seconds})})


@torch.no_grad()
def _resume(
    file: Path,
    parameters: dict[str, nn.Parameter],
    averages: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    """Fill the fit's tensors from its checkpoint, if there is one. Return its steps and its seconds."""
    if not file.exists():
        return 0, 0.0
    tensors = read_safetensors(file, "a checkpoint of a sibling's part")
    with safe_open(file, "pt") as opened:
        state = json.loads(opened.metadata()["fit"])
    for (name, value), mean in zip(parameters.items(), averages, strict=True):
        value.copy_(tensors[f"now.{name}"])
        mean.copy_(tensors[f"average.{name}"])
        optimizer.state[value] = {
            "step": torch.tensor(float(state["step"]), device=value.device),
            **{moment: tensors[f"{moment}.{name}"].to(value.device) for moment in _MOMENTS},
        }
    return state["step"], state["seconds"]
