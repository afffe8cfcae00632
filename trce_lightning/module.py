"""TRCE as a LightningModule. ``setup`` applies stage 1, and the training step is stage 2."""

from __future__ import annotations

import importlib
import logging
import math
from functools import partial
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.finite import loss_not_finite
from trce_lightning.closed_form import Edit
from trce_lightning.config.schema import OptimizerConfig, TrajectoryConfig
from trce_lightning.data.datamodule import Batch, TrajectoryDataModule
from trce_lightning.errors import InputError
from trce_lightning.losses import (
    guided_prediction,
    hinge_active_fraction,
    needed_displacement,
    preserve_loss,
    pull_loss,
    relative_hinge,
    squared_distance,
    steering_hinge,
)
from trce_lightning.textual import apply_edit_
from trce_lightning.tokens import Text

log = logging.getLogger(__name__)


def _bitsandbytes() -> ModuleType:
    """Return bitsandbytes' optimizers. If its native library doesn't load, raise ``InputError``."""
    try:
        return importlib.import_module("bitsandbytes.optim")
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"optimizer.name: expected bitsandbytes, which 8-bit states need, to load, got: {error}; or adamw"
        ) from error


def cosine_factor(step: int, steps: int) -> float:
    """Return (1 + cos(π step / steps)) / 2, the share of the learning rate at a step from 0 to ``steps``."""
    return (1 + math.cos(math.pi * step / steps)) / 2


class TRCE(pl.LightningModule):
    """The erased network.

    If ``edit`` is None, stage 1 is left out, or comes last (:meth:`edit_last`). If the module is not fitted,
    stage 2 is left out. Only the denoiser is a child module: text states come with the batch, and no frozen
    network is evaluated.
    """

    def __init__(
        self,
        adapter: Adapter,
        edit: Edit | None,
        trajectory: TrajectoryConfig,
        optimizer: OptimizerConfig,
    ) -> None:
        super().__init__()
        self.adapter, self.edit = adapter, edit
        self.trajectory, self.optimizer = trajectory, optimizer
        self.denoiser = adapter.denoiser
        self.edited_names: list[str] = []
        self.unit = 1.0
        self.trainable = adapter.trainable(trajectory.trainable)
        self._stored_dtypes = {name: parameter.dtype for name, parameter in self.trainable.items()}
        # Checkpoints hold only the changed tensors.
        self.strict_loading = False

    def apply_stage_1(self) -> None:
        """Edit the denoiser. A second call does nothing."""
        if self.edit is None or self.edited_names:
            return
        self.edited_names = apply_edit_(self.adapter, self.edit)
        log.info("stage 1 edited %d matrices", len(self.edited_names))
        for own in (self.edit, *self.edit.further):
            log.info(
                "stage 1, %s: condition number %.2g, erase residual %.3f, keep residual %.2g",
                own.stream,
                own.condition_number,
                own.erase_residual,
                own.keep_residual,
            )

    def edit_last(self, edit: Edit) -> None:
        """Apply stage 1 after training, to the trained weights."""
        self.edit = edit
        self.apply_stage_1()

    def setup(self, stage: str) -> None:
        """Apply stage 1, and make the parameters of stage 2 trainable.

        They are float32 while they train, whatever the type of the other weights. An optimizer's steps are
        too small for half precision.
        """
        self.apply_stage_1()
        self.denoiser.requires_grad_(False)
        for parameter in self.trainable.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if self.trajectory.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    def on_fit_start(self) -> None:
        """Take the unit of the squared distances from the cached points, if they are relative.

        If both prompts of every pair have the same predictions, raise ``InputError``.
        """
        if not self.trajectory.relative_distances:
            return
        self.unit = self._data().target_distance
        if self.unit == 0:
            raise InputError(
                "trajectory.relative_distances: expected predictions that differ between malicious and safe "
                "prompts, got the same ones"
            )
        log.info("stage 2: mean squared distance of safe and malicious predictions %.3g", self.unit)

    def _data(self) -> TrajectoryDataModule:
        trainer: Any = self.trainer  # Lightning sets datamodule without declaring it
        assert isinstance(trainer.datamodule, TrajectoryDataModule)
        return trainer.datamodule

    def teardown(self, stage: str) -> None:
        """Round the trained parameters to the denoiser's precision."""
        for name, parameter in self.trainable.items():
            parameter.data = parameter.data.to(self._stored_dtypes[name])
        self.adapter.weights_changed()
        if self.trajectory.gradient_checkpointing:
            self.denoiser.disable_gradient_checkpointing()

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """Move the other networks away if an epoch continues in the middle.

        Lightning doesn't call :meth:`on_train_epoch_start` in that case.
        """
        if any(_device_of(network).type != "cpu" for network in self._others()):
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Move the other networks to the CPU if ``offload`` is on. An epoch's steps don't need them."""
        if self.trajectory.offload:
            self._empty_text()
            for network in self._others():
                network.to("cpu")

    def _others(self) -> list[nn.Module]:
        """Return the networks that no training step needs."""
        return [network for network in self.adapter.networks().values() if network is not self.denoiser]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Move all networks back after the epoch's last step, before callbacks generate images.

        If that step has left weights that are not finite, raise ``InputError``.
        """
        self.adapter.weights_changed()
        if not self.trainer.is_last_batch:
            return
        if broken := [name for name, weight in self.trainable.items() if not weight.isfinite().all()]:
            raise InputError(
                f"optimizer.lr: expected finite weights, got NaN or infinity in {len(broken)} tensors, such "
                f"as {broken[0]}, at step {self.global_step} with {self.optimizer.lr}; lower it, or set "
                "trainer.precision=32-true"
            )
        if self.trajectory.offload:
            self.adapter.to(self.device)

    def changed_tensors(self) -> dict[str, Tensor]:
        """Return the edited and the trainable tensors by their name in the denoiser."""
        tensors = dict(self.denoiser.named_parameters())
        return {name: tensors[name].detach() for name in sorted({*self.edited_names, *self.trainable})}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the trainable parameters, and the learning rate's schedule if there is one.

        AdamW is torch's, or bitsandbytes' with 8-bit states.
        """
        optimizer = self._adamw()
        if self.optimizer.schedule == "constant":
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosine_factor, steps=self._steps()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _steps(self) -> int:
        """Return the number of optimizer steps of the fit.

        Lightning's own estimate makes the loader before a checkpoint restores its place in an epoch.
        """
        trainer = self.trainer
        assert trainer.max_epochs is not None
        return -(-self._data().batches_per_epoch // trainer.accumulate_grad_batches) * trainer.max_epochs

    def _adamw(self) -> torch.optim.Optimizer:
        config = self.optimizer
        options: dict[str, Any] = {
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "betas": tuple(config.betas),
        }
        parameters = list(self.trainable.values())
        if config.name == "adamw":
            return torch.optim.AdamW(parameters, **options)
        classes = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
        return getattr(_bitsandbytes(), classes[config.name])(parameters, **options)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch, from one forward pass.

        L = L_erase(ε̂(z_t, c_m)) + w_∅ L_erase(ε̂(z_t, ∅)) + λ_p ‖ε̂(z_u, ∅) − ε(z_u, ∅)‖² / u
            + λ_k ‖ε̂(z_k, c_k) − ε(z_k, c_k)‖² / u + λ_s ‖ε̂(z_t, c_m) − ε(z_t, c_s)‖² / u.

        The paper's loss is the first line with u = 1. The second keeps prompts c_k, and pulls to the safe
        prediction. With ``relative_distances``, u is the mean ‖ε(c_s) − ε(c_m)‖² of the cached points. With
        ``relative_hinge`` too, weights mean the same whether a network predicts noise or a velocity.
        If the loss isn't finite, raise ``InputError``.
        """
        predictions = self._predict(batch)
        terms = self._losses(batch, predictions)
        weights = {
            "erase": 1.0,
            "erase_uncond": self.trajectory.uncond_hinge_weight,
            "preserve": self.trajectory.preserve_weight / self.unit,
            "keep": self.trajectory.keep_weight / self.unit,
            "pull": self.trajectory.pull_weight / self.unit,
        }
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        if not torch.isfinite(loss):
            raise loss_not_finite(
                self.adapter.name,
                float(loss.detach()),
                self.global_step,
                predictions.values(),
                self.denoiser,
                lr=("optimizer.lr", self.optimizer.lr),
                other=("trajectory.beta", self.trajectory.beta),
            )
        logged = {f"loss/{name}": term.detach() for name, term in terms.items()}
        self._log_means({"loss/total": loss.detach(), **logged})
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def _predict(self, batch: Batch) -> dict[str, Tensor]:
        """Return ε̂ of every kind from one forward pass: of (z_t, c_m), (z_t, ∅), (z_u, ∅) and (z_k, c_k).

        (z_t, ∅) is evaluated only for the ∅ hinge.
        """
        empty = self._empty_text()
        every = slice(None)
        inputs: dict[str, tuple[str, slice | Tensor, Text]] = {
            "malicious": ("malicious", every, batch["malicious_text"])
        }
        if self.trajectory.uncond_hinge_weight:
            # At pure noise, malicious and unconditional latents have one distribution. The preserve loss asks
            # for the opposite there.
            later = (batch["malicious_step_index"] > 0).nonzero().flatten()
            inputs["uncond"] = ("malicious", later, empty.expand(len(later)))
        if "unconditional_z_t" in batch and self.trajectory.preserve_weight:
            count = len(batch["unconditional_z_t"])
            inputs["preserve"] = ("unconditional", every, empty.expand(count))
        if "kept_z_t" in batch and self.trajectory.keep_weight:
            inputs["keep"] = ("kept", every, batch["kept_text"])
        z_t = torch.cat([batch[f"{kind}_z_t"][rows] for kind, rows, _ in inputs.values()])
        timestep = torch.cat([batch[f"{kind}_timestep"][rows] for kind, rows, _ in inputs.values()])
        output = self.adapter.predict(z_t, timestep, Text.cat([text for *_, text in inputs.values()]))
        parts = output.split([len(text) for *_, text in inputs.values()])
        return dict(zip(inputs, parts, strict=True))

    def _losses(self, batch: Batch, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        beta, margin = self.trajectory.beta, self.trajectory.margin
        uncond, malicious = batch["malicious_uncond"], batch["malicious_malicious"]
        f_safe = guided_prediction(uncond, batch["malicious_safe"], beta)
        f_unsafe = guided_prediction(uncond, malicious, beta)
        hinge_of = relative_hinge if self.trajectory.relative_hinge else steering_hinge
        hinge = hinge_of(predictions["malicious"], f_safe, f_unsafe, margin)
        unit = squared_distance(f_safe, f_unsafe) if self.trajectory.relative_hinge else 1.0
        displacement = needed_displacement(predictions["malicious"].detach(), f_safe, f_unsafe, margin * unit)
        self._log_means(
            {
                "hinge/active_fraction": hinge_active_fraction(hinge),
                "hinge/needed_displacement": displacement.mean(),
            }
        )
        terms = {"erase": hinge.mean()}
        if "uncond" in predictions:
            later = batch["malicious_step_index"] > 0
            terms["erase_uncond"] = hinge_of(
                predictions["uncond"], f_safe[later], f_unsafe[later], margin
            ).sum() / len(hinge)
        if "preserve" in predictions:
            terms["preserve"] = preserve_loss(predictions["preserve"], batch["unconditional_uncond"]).mean()
        if "keep" in predictions:
            terms["keep"] = preserve_loss(predictions["keep"], batch["kept_kept"]).mean()
        if self.trajectory.pull_weight:
            terms["pull"] = pull_loss(predictions["malicious"], batch["malicious_safe"]).mean()
        return terms

    def _log_means(self, means: dict[str, Tensor]) -> None:
        """Log means over the batch of all ranks as ``…_step``, and means over the epoch as ``…_epoch``.

        The ranks exchange all means of a step together. ``sync_dist`` would exchange each of them alone.
        """
        values = torch.stack(list(means.values()))
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        step = {f"{name}_step": value for name, value in zip(means, values, strict=True)}
        epoch = {f"{name}_epoch": value for name, value in zip(means, values, strict=True)}
        self.log_dict(step, on_step=True, on_epoch=False, batch_size=1)
        self.log_dict(epoch, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def _empty_text(self) -> Text:
        if not hasattr(self, "_empty"):
            self._empty = self.adapter.empty()
        return self._empty.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the changed tensors in the checkpoint."""
        changed = self.changed_tensors()
        checkpoint["state_dict"] = {f"denoiser.{name}": tensor for name, tensor in changed.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ``InputError`` unless the checkpoint holds exactly the tensors that this run changes."""
        expected = {f"denoiser.{name}" for name in self.changed_tensors()}
        found = set(checkpoint["state_dict"])
        if found != expected:
            raise InputError(
                f"checkpoint: expected {len(expected)} changed tensors, got {len(found)}, "
                f"{len(found ^ expected)} of them not the same; use fresh=true"
            )


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
