"""Fit a small network on data that lies on the device, for a number of steps or minutes. The fit resumes.

On a GPU, a step of these networks takes a few milliseconds. So the loop has no loader, and it waits for the
device only when it logs.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trce_lightning.emoji.training.siblings.kernels import KERNELS, Kernels
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import read_safetensors, write_safetensors

log = logging.getLogger(__name__)
LOG_EVERY = 100
DRAWN_STEPS, WARM_UP_STEPS = 16, 3
SAVE_EVERY_SECONDS = 20.0
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
        kernels: how the device computes a step.
    """

    steps: int
    batch_size: int
    lr: float
    minutes: float | None = None
    ema_decay: float = 0.999
    warmup_steps: int = 200
    weight_decay: float = 0.01
    kernels: Kernels = KERNELS["default"]

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the fit that is done, from 0 to 1."""
        share = step / self.steps
        return min(1.0, share if self.minutes is None else max(share, seconds / (60 * self.minutes)))

    def lr_at(self, step: int, progress: float) -> float:
        """Return the learning rate."""
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * cosine * min(1.0, (step + 1) / self.warmup_steps)


Batch = tuple[Tensor, ...]
"""The tensors of a batch. They have the batch's rows in the first dimension."""


def fit(
    network: nn.Module,
    loss_of: Callable[[nn.Module, Batch], Tensor],
    draw: Callable[[int], Batch],
    plan: Fit,
    file: Path,
    keep: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train ``network`` and return the average of its weights, a network like it.

    Args:
        network: on the device that trains.
        loss_of: returns the loss of a batch.
        draw: returns random rows of the data, on the device.
        plan: the fit's length.
        file: the checkpoint, from which a killed fit continues.
        keep: is called with the average so far whenever the checkpoint is written.

    Raises:
        InputError: the loss is not finite, or no time is left.
    """
    if plan.minutes is not None and plan.minutes <= 0:
        raise InputError(f"--minutes: expected some time for {file.stem}, got none")
    training = _Training(network, loss_of, plan)
    cuda = training.device.type == "cuda"
    step, seconds = _resume(file, training)
    # Steps of a resumed fit draw other rows and noise than those before.
    torch.manual_seed(step)
    training.begin()
    started = saved = time.monotonic()
    rows: list[Batch] = []
    with plan.kernels.attending(training.device):
        while (done := plan.progress(step, seconds + time.monotonic() - started)) < 1:
            if not rows:
                # A GPU draws and encodes the rows of several steps at once.
                drawn = draw(plan.batch_size * (DRAWN_STEPS if cuda else 1))
                rows = list(zip(*(column.split(plan.batch_size) for column in drawn), strict=True))
            training.lr.fill_(plan.lr_at(step, done))
            training.weight.fill_(1 - min(plan.ema_decay, (1 + step) / (10 + step)))
            training.step(rows.pop())
            step += 1
            if step % LOG_EVERY == 0:
                _report(file.stem, step, done, training.total, time.monotonic() - started)
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                _save(file, training, step, seconds + time.monotonic() - started)
                saved = time.monotonic()
                if keep is not None:
                    keep(training.average)
    _save(file, training, step, seconds + time.monotonic() - started)
    seconds += time.monotonic() - started
    log.info("%s: %d steps of %d in %.0f s", file.stem, step, plan.batch_size, seconds)
    return training.average


class _Training:
    """A network, its optimizer and the average of its weights. :meth:`step` may be a CUDA graph.

    A graph replays the kernels of a whole step. Launched one by one, they would take several times as long.

    If the device has bfloat16, a copy of the network in bfloat16 computes loss and gradients. The optimizer
    changes the network in float32.
    """

    def __init__(self, network: nn.Module, loss_of: Callable[[nn.Module, Batch], Tensor], plan: Fit) -> None:
        self.parameters = dict(network.named_parameters())
        self.values: list[Tensor] = list(self.parameters.values())
        self.device, self.loss_of = self.values[0].device, loss_of
        self.lr, self.weight, self.total = (torch.zeros((), device=self.device) for _ in range(3))
        self.captured = self.device.type == "cuda" and plan.kernels.captured
        self.optimizer = torch.optim.AdamW(
            self.values,
            lr=self.lr,
            betas=(0.9, 0.99),
            weight_decay=plan.weight_decay,
            fused=True,
            capturable=self.captured,
        )
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.averages: list[Tensor] = list(self.average.parameters())
        self.working = cast_parameters(copy.deepcopy(network), plan.kernels.dtype(self.device)).train()
        self.working_values: list[Tensor] = list(self.working.parameters())
        for value in self.values:
            value.grad = torch.zeros_like(value)
        self.gradients = [value.grad for value in self.values if value.grad is not None]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: Batch = ()
        self.warmed_up = 0

    def begin(self) -> None:
        """Copy the weights into the network that computes. Call it once before the first step."""
        with torch.no_grad():
            torch._foreach_copy_(self.working_values, self.values)

    def step(self, batch: Batch) -> None:
        """Make one step on a batch."""
        if not self.captured or self.warmed_up < WARM_UP_STEPS:
            self.warmed_up += 1
            self._on_side_stream(batch) if self.captured else self._step(batch)
            return
        if self.graph is None:
            self.inputs, self.graph = tuple(column.clone() for column in batch), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step(self.inputs)
        for own, column in zip(self.inputs, batch, strict=True):
            own.copy_(column)
        self.graph.replay()

    def _on_side_stream(self, batch: Batch) -> None:
        """Make a step on a stream of its own, which a capture needs before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(batch)
        torch.cuda.current_stream().wait_stream(side)

    def _step(self, batch: Batch) -> None:
        for value in self.working_values:
            value.grad = None
        loss = self.loss_of(self.working, batch)
        loss.backward()
        with torch.no_grad():
            gradients = [value.grad for value in self.working_values if value.grad is not None]
            assert len(gradients) == len(self.gradients)
            torch._foreach_copy_(self.gradients, gradients)
            nn.utils.clip_grad_norm_(self.values, 1.0, foreach=True)
            self.optimizer.step()
            torch._foreach_copy_(self.working_values, self.values)
            moved = torch._foreach_sub(self.values, self.averages)
            torch._foreach_mul_(moved, self.weight)
            torch._foreach_add_(self.averages, moved)
            self.total += loss


def cast_parameters(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters and return the network. Buffers, such as position embeddings, stay in float32."""
    for value in network.parameters():
        value.data = value.data.to(dtype)
    return network


def _report(name: str, step: int, done: float, total: Tensor, seconds: float) -> None:
    mean = total.item() / LOG_EVERY
    total.zero_()
    log.info("%s: step %d (%.0f %%), loss %.4f, %.0f s", name, step, 100 * done, mean, seconds)
    if not math.isfinite(mean):
        raise InputError(f"{name}: expected a finite loss, got {mean} before step {step}")


def _save(file: Path, training: _Training, step: int, seconds: float) -> None:
    tensors: dict[str, Tensor] = {}
    for (name, value), mean in zip(training.parameters.items(), training.averages, strict=True):
        tensors |= {f"now.{name}": value.detach(), f"average.{name}": mean}
        tensors |= {f"{moment}.{name}": training.optimizer.state[value][moment] for moment in _MOMENTS}
    write_safetensors(file, tensors, {"fit": json.dumps({"step": step, "seconds": seconds})})


@torch.no_grad()
def _resume(file: Path, training: _Training) -> tuple[int, float]:
    """Fill the fit's tensors from its checkpoint, if there is one. Return its steps and its seconds."""
    if not file.exists():
        return 0, 0.0
    tensors = read_safetensors(file, "a checkpoint of a sibling's part")
    with safe_open(file, "pt") as opened:
        state = json.loads(opened.metadata()["fit"])
    for (name, value), mean in zip(training.parameters.items(), training.averages, strict=True):
        value.copy_(tensors[f"now.{name}"])
        mean.copy_(tensors[f"average.{name}"])
        training.optimizer.state[value] = {
            "step": torch.tensor(float(state["step"]), device=value.device),
            **{moment: tensors[f"{moment}.{name}"].to(value.device) for moment in _MOMENTS},
        }
    return state["step"], state["seconds"]
