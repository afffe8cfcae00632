"""Checks that the outputs of a model's networks are finite. They run once per batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trce_lightning.errors import InputError


class Finite:
    """The flags of one batch: one for each part and step says whether its values are finite.

    The flags stay on the device. :meth:`check` reads all of them together, so that no step waits for a GPU.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.seen: list[tuple[str, nn.Module | None, Tensor]] = []

    def see(self, what: str, values: Tensor, network: nn.Module | None = None) -> None:
        """Remember whether ``values`` are finite.

        Args:
            what: the name of the values in a message, with their step if there are several.
            values: the values, of any shape.
            network: the network that has made the values, or None if it was no network.
        """
        self.seen.append((what, network, values.isfinite().all()))

    def check(self) -> None:
        """Raise ``InputError`` that names the first values that were not finite, and forget all flags."""
        seen, self.seen = self.seen, []
        if not seen:
            return
        finite = torch.stack([flag for *_, flag in seen]).tolist()
        for (what, network, _), is_finite in zip(seen, finite, strict=True):
            if not is_finite:
                raise not_finite(self.model, what, network)


def check_finite(model: str, what: str, values: Tensor, network: nn.Module | None = None) -> Tensor:
    """Return ``values``. Raise ``InputError`` unless they are finite. For arguments see :class:`Finite`."""
    finite = Finite(model)
    finite.see(what, values, network)
    finite.check()
    return values


def not_finite(model: str, what: str, network: nn.Module | None) -> InputError:
    """Return the error that says which part of ``model`` has failed and what the user can try."""
    return InputError(
        f"model: expected finite numbers of '{model}', got NaN or infinity in {what}; {_advice(network)}"
    )


def loss_not_finite(
    model: str,
    loss: float,
    step: int,
    predictions: Iterable[Tensor],
    denoiser: nn.Module,
    *,
    lr: tuple[str, float],
    other: tuple[str, float],
) -> InputError:
    """Return the error that says what to change.

    Before the optimizer's first step, the learning rate can't be the cause.

    Args:
        model: the model's name.
        loss: the loss.
        step: the number of optimizer steps so far.
        predictions: the denoiser's outputs in this step.
        denoiser: the network in training.
        lr: the option of the learning rate, with its value.
        other: an option that can make a loss of finite predictions infinite, with its value.
    """
    if step > 0:
        option, value = lr
        return InputError(
            f"{option}: expected finite losses, got {loss} at step {step} with {value}; lower it, or set "
            "trainer.precision=32-true"
        )
    when = "before the optimizer's first step"
    if not all(prediction.isfinite().all() for prediction in predictions):
        return not_finite(model, f"the denoiser's output {when}", denoiser)
    option, value = other
    return InputError(
        f"{option}: expected finite losses, got {loss} {when}, of predictions and cached trajectories that "
        f"are finite, with {value}; lower it"
    )


def _advice(network: nn.Module | None) -> str:
    if network is None:
        return (
            "its noise schedule doesn't fit this sampler: see its scheduler_config.json, or try another "
            "model.sampler"
        )
    if broken := weights_not_finite(network):
        return (
            f"{len(broken)} of its tensors hold them, such as {broken[0]}: the file is damaged, or its "
            "training has failed; get another"
        )
    weight = next(network.parameters())
    if weight.dtype == torch.float16:
        return "float16 ends at 65504: try model.dtype=float32, or bfloat16"
    device = weight.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return "float16 ends at 65504: try trainer.precision=32-true"
    return (
        "its weights are finite, but too large for this input; try model.dtype=float32 and "
        "trainer.precision=32-true"
    )


def weights_not_finite(network: nn.Module) -> list[str]:
    """Return the names of a network's tensors that hold NaN or infinity."""
    tensors = network.state_dict().items()
    return [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
