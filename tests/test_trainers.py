"""The Trainer: the precision that ``trainer.precision=auto`` finds on each hardware, and the bar of a fit."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from trce_lightning.callbacks import progress, progress_checkpoints
from trce_lightning.config.schema import TrainerConfig
from trce_lightning.data.trajectories import TrajectorySampler
from trce_lightning.erasers.teachers import _Sampler
from trce_lightning.jobs.trainers import choose_precision, make_trainer
from trce_lightning.runtime.ranks import on_each_rank


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("has_avx512_bf16", "has_amx", "expected"),
    [(False, False, "32-true"), (True, False, "bf16-mixed"), (False, True, "bf16-mixed")],
)
def test_auto_takes_bfloat16_where_a_cpu_has_its_instructions(
    has_avx512_bf16: bool, has_amx: bool, expected: str, accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert choose_precision("auto", accelerator) == expected


@pytest.mark.parametrize(("is_native", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_auto_takes_float16_on_a_gpu_that_only_emulates_bfloat16(
    is_native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: is_native or including_emulation
    )
    assert choose_precision("auto", "gpu") == expected
    assert choose_precision("auto", "cpu") == "32-true"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_what_is_asked_for_is_what_a_run_takes(precision: str) -> None:
    assert choose_precision(precision, "cpu") == precision


class Fit(BoringModel):
    """A fit of 64 steps an epoch that logs a loss, and may end early."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.fails_at:
            raise KeyError("stopped")
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("loss", loss.detach(), prog_bar=True)
        return loss


def fit(model: Fit, folder: Path, shows: bool = True, checkpoint: Path | None = None) -> None:
    config = TrainerConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=shows)
    callbacks: list[pl.Callback] = [*progress_checkpoints(folder, 10.0)]
    trainer = make_trainer(config, folder, epochs=2, callbacks=callbacks)
    trainer.fit(model, model.train_dataloader(), ckpt_path=None if checkpoint is None else str(checkpoint))


def drawn(stderr: str) -> list[int]:
    """The steps at which the bar was drawn."""
    return [int(step) for step in re.findall(r"training:[^\r\n]* (\d+)/128 ", stderr)]


def test_a_fit_has_one_bar_that_continues_where_the_fit_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))
    with pytest.raises(KeyError, match="stopped"):
        fit(Fit(fails_at=70), tmp_path)
    steps = drawn(capfd.readouterr().err)
    assert steps[0] == 0 and max(steps) == 70
    fit(Fit(), tmp_path, checkpoint=tmp_path / "last.ckpt")
    shown = capfd.readouterr().err
    assert drawn(shown)[0] == 64, "the last checkpoint is of the first epoch's end"
    assert drawn(shown)[-1] == 128
    assert "loss=" in shown
    assert "Epoch" not in shown  # a bar of Lightning's


def test_a_log_has_a_few_lines_of_a_fit_not_one_for_each_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=30))  # as TQDM_MININTERVAL=30
    fit(Fit(), tmp_path)
    assert drawn(capfd.readouterr().err) == [0, 128]
    fit(Fit(), tmp_path, shows=False)
    assert capfd.readouterr().err.count("training") == 0


class Sampler(pl.LightningModule):
    """A module whose predictions are files."""

    title = "files"

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_a_sampler_has_a_bar_of_its_files_and_other_predictions_have_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = TrainerConfig(accelerator="cpu", devices=1, precision="32-true")
    trainer, files = make_trainer(config, tmp_path), DataLoader(range(5), batch_size=None)
    trainer.predict(Sampler(), files, return_predictions=False)
    assert re.search(r"files: 100%.* 5/5 \[", capfd.readouterr().err)
    on_each_rank(trainer, lambda _: None)
    assert "it/s" not in (said := capfd.readouterr().err) and "1/1" not in said


@pytest.mark.parametrize("sampler", [TrajectorySampler, _Sampler])
def test_what_is_sampled_for_training_has_a_bar(sampler: type) -> None:
    assert sampler.title
