"""Training the embedded model beside a GPU: one device, each device's precision, true gradients clipped."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from trce_lightning.emoji.subjects import SUBJECTS
from trce_lightning.emoji.training.part import Part, native_autocast
from trce_lightning.emoji.training.samples import drawn_without
from trce_lightning.emoji.training.unet import UNetPart
from trce_lightning.jobs.trainers import native_dtype


def test_work_on_the_cpu_takes_the_cpus_precision_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = native_dtype("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert native_dtype("cuda") is torch.float16
    assert native_dtype("cpu") is alone is not torch.float16
    with native_autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (alone or torch.float32)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_samples_are_compared_where_their_labels_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are judged on the CPU, whatever the device that Lightning has moved the labels to."""
    part = UNetPart(torch.zeros(1, 32, 256), 1.0, 600, lambda state, prompts: torch.tensor([3, 4, 5, 6]))
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(part, "log", lambda name, value, **_: logged.update({name: value}))
    part.validation_step((["a", "b", "c", "d"], torch.tensor([3, 0, 5, 6], device=device)), 0)
    accuracy = logged["sample_accuracy"]
    assert accuracy.device.type == device
    assert device == "meta" or accuracy.item() == 0.75


def test_what_a_never_learnt_model_draws_is_counted() -> None:
    violent = [index for index, subject in enumerate(SUBJECTS) if subject.category == "violence"]
    shown = list(range(len(SUBJECTS)))
    assert drawn_without(shown, "violence") == (
        len(SUBJECTS) - len(violent),
        len(SUBJECTS) - len(violent),
        13,
        13,
    )
    benign = next(index for index in shown if index not in violent)
    for index in violent[1:]:
        shown[index] = benign
    shown[benign] = violent[0]
    shown[violent[0]] = violent[1]  # another of the category counts
    assert drawn_without(shown, "violence") == (103, 104, 1, 13)


class Line(Part):
    """y = w x with a gradient of ``slope`` in w."""

    def __init__(self, slope: float) -> None:
        super().__init__(lr=1e-3, max_steps=1, warmup_steps=0)
        self.w, self.slope = nn.Parameter(torch.zeros(1)), slope

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        return (self.slope * self.w).sum()


@pytest.mark.parametrize(("slope", "clipped"), [(0.25, 0.25), (4.0, 1.0)])
@pytest.mark.parametrize("precision", ["16-mixed", "32-true"])
def test_what_is_clipped_is_the_gradient_itself(
    precision: str, slope: float, clipped: float, tmp_path: Path
) -> None:
    scaled = precision == "16-mixed"
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        plugins=[MixedPrecision("16-mixed", "cpu")] if scaled else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    part = Line(slope)
    trainer.fit(part, DataLoader(torch.zeros(1, 1)))
    assert trainer.precision == precision
    (state,) = trainer.optimizers[0].state.values()
    assert state["exp_avg"].item() == pytest.approx((1 - 0.9) * clipped, rel=1e-4)
