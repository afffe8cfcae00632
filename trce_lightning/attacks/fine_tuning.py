"""Fine-tuning as an attack: train the denoiser for a while, keep the differences, and give the weights back.

The attacks of the door "weights" share this. Weights are trained in place. One copy of what changes is kept
meanwhile, and afterwards the model is bit for bit what it was, also if an exception ends the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.objectives import Noised, denoising_loss, noised
from trce_lightning.attacks.protocol import Progress, Target
from trce_lightning.errors import InputError
from trce_lightning.tokens import Text

MAX_NORM = 1.0
"""The norm that the gradient of a step is clipped to."""
STORED = torch.bfloat16
"""The type of stored differences: three digits of each, in half the memory of the weights."""


@dataclass(frozen=True)
class Lesson:
    """The latents of k pictures, ``[k, C, H, W]``, and the captions of each."""

    latents: Tensor
    text: Text

    def __len__(self) -> int:
        """Return k."""
        return len(self.latents)

    def rows(self, chosen: slice) -> Lesson:
        """Return some of the pictures with their captions."""
        return Lesson(self.latents[chosen], self.text.rows(chosen))


@dataclass(frozen=True)
class Training:
    """The options of a training by AdamW without weight decay.

    Each step draws ``batch_size`` pictures, and for each a noise level, uniformly from those of a sampling
    run of ``levels`` steps. ``at_once`` rows go through the denoiser together.
    """

    steps: int
    batch_size: int
    learning_rate: float
    levels: int
    at_once: int
    autocast_dtype: torch.dtype | None


def training_of(
    target: Target, *, steps: int, batch_size: int, learning_rate: float, levels: int
) -> Training:
    """Return a training with these options, in parts that fit the target's memory."""
    at_once = min(batch_size, target.batch_size)
    return Training(steps, batch_size, learning_rate, levels, at_once, target.autocast_dtype)


def check_trainable(option: str, adapter: Adapter) -> None:
    """Raise ``InputError`` naming ``option`` unless the denoiser's weights can take small steps."""
    for name, parameter in adapter.denoiser.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"{option}: expected weights that can be trained, in float32, got {parameter.dtype} in "
                f"{name}; set model.dtype=float32, without quantisation"
            )


def fine_tuned(
    adapter: Adapter,
    lesson: Lesson,
    parameters: Iterable[nn.Parameter],
    training: Training,
    generator: torch.Generator,
    progress: Progress,
) -> Iterator[float]:
    """Minimise E ‖ε_θ(z_t, t, text) − goal‖² over ``parameters``; yield the loss before each step, after it.

    The parameters hold the weights after n steps when the n-th loss is yielded.
    """
    trained = [parameter.requires_grad_() for parameter in parameters]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    for _ in range(training.steps):
        with torch.enable_grad():
            loss = _accumulate(adapter, lesson, training, generator, progress)
        nn.utils.clip_grad_norm_(trained, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        adapter.weights_changed()
        yield loss


def _accumulate(
    adapter: Adapter, lesson: Lesson, training: Training, generator: torch.Generator, progress: Progress
) -> float:
    """Add the gradient of a batch's mean loss, and return that loss."""
    total = 0.0
    rows = drawn_rows(lesson, training.batch_size, generator)
    for part in losses(adapter, lesson, rows, training, generator):
        loss = part.sum() / training.batch_size
        loss.backward()
        total += float(loss.detach())
        progress(len(part))
    return total


def drawn_rows(lesson: Lesson, count: int, generator: torch.Generator) -> Tensor:
    """Return indices of ``count`` pictures of a lesson, drawn with replacement."""
    return torch.randint(len(lesson), (count,), generator=generator)


def losses(
    adapter: Adapter, lesson: Lesson, rows: Tensor, training: Training, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield the denoising losses of pictures at random noise levels, differentiable, ``at_once`` in a part.

    The noise doesn't depend on the parts.
    """
    levels = torch.randint(training.levels, (len(rows),), generator=generator)
    rows = rows.to(lesson.latents.device)
    noisy = noised(adapter, lesson.latents[rows], levels, training.levels, generator)
    for part in torch.arange(len(rows), device=rows.device).split(training.at_once):
        few = Noised(*(tensor[part] for tensor in noisy))
        with torch.autocast(
            adapter.device.type, training.autocast_dtype, training.autocast_dtype is not None
        ):
            loss = denoising_loss(adapter, few, lesson.text.rows(rows[part]))
        yield loss


@contextmanager
def restored(adapter: Adapter, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Let parameters of the model change within, and yield the copy that they get back afterwards."""
    copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    with adapter.other_weights():
        try:
            yield copies
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(copies[name])
                    parameter.requires_grad_(trained[name])
                    parameter.grad = None


def differences(parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return θ − θ₀ of each parameter as :data:`STORED`, on the CPU."""
    return {
        name: (parameter.detach() - before[name]).to("cpu", STORED) for name, parameter in parameters.items()
    }


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def moved(
    adapter: Adapter, changes: Callable[[], Mapping[str, Tensor]]
) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which the denoiser has θ + Δ; ``changes`` gives Δ by parameter name."""

    @contextmanager
    def within() -> Iterator[None]:
        by_name, every = changes(), dict(adapter.denoiser.named_parameters())
        with restored(adapter, {name: every[name] for name in by_name}) as copies:
            with torch.no_grad():
                for name, change in by_name.items():
                    every[name].add_(change.to(copies[name]))
            adapter.weights_changed()
            yield

    return within
