"""TRCE in a real Trainer on the CPU: the loss by hand, what changes, resuming, precision, processes."""

import copy
import math
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from conftest import build_tiny_pipeline
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file, save_file
from tiny_runs import (
    cpu_trainer,
    one_thread,
    plan_of,
    sample_plan,
    stage1_statistics,
    trajectory_config,
)
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.callbacks import EpochEvaluation, RanksAgree, SaveBeforeScoring, progress_checkpoints
from trce_lightning.closed_form import Edit
from trce_lightning.config.schema import OptimizerConfig, TextualConfig, TrajectoryConfig
from trce_lightning.data.datamodule import Batch, TrajectoryDataModule
from trce_lightning.data.trajectories import load_rows
from trce_lightning.errors import InputError
from trce_lightning.module import TRCE

CONFIG = trajectory_config()
SAMPLED = trajectory_config(kept_per_malicious=1, num_kept=5)
"""The numbers that the shared trajectories are sampled for."""
TEXTUAL = TextualConfig(eta=0.1)


@dataclass(frozen=True)
class Sampled:
    """Trajectories of the tiny pipeline, and the edit for it."""

    folder: Path
    edit: Edit


@pytest.fixture(scope="module")
def sampled(tiny_adapter: StableDiffusionAdapter, tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    folder = tmp_path_factory.mktemp("trajectories")
    sample_plan(tiny_adapter, SAMPLED, folder)
    return Sampled(folder, stage1_statistics(tiny_adapter, TEXTUAL).solve(TEXTUAL))


class Record(pl.Callback):
    """Losses and batches of every step, and the epochs' means."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class SaveChanged(pl.Callback):
    """Each process writes the tensors that it ends with, and the last epoch's mean losses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in pl_module.changed_tensors().items()}
        save_file(tensors, self.folder / f"rank{trainer.global_rank}.safetensors")
        means = {name: value for name, value in trainer.callback_metrics.items() if name.endswith("_epoch")}
        save_file(means, self.folder / f"means{trainer.global_rank}.safetensors")


class Interrupt(pl.Callback):
    """Stops the fit in the second epoch, after a step: by an exception, or as SLURM would, by SIGTERM."""

    def __init__(self, batch_index: int = 0, sigterm: bool = False) -> None:
        self.batch_index, self.sigterm = batch_index, sigterm

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_index: int) -> None:
        if self.sigterm and trainer.current_epoch == 1 and batch_index == self.batch_index:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if not self.sigterm and trainer.current_epoch == 1 and batch_index == self.batch_index:
            raise RuntimeError("interrupted")


@dataclass
class Fit:
    """One fit of a fresh tiny pipeline on the sampled trajectories."""

    sampled: Sampled
    config: TrajectoryConfig = field(default_factory=lambda: CONFIG)
    lr: float = 1e-3
    optimizer: str = "adamw"
    schedule: str = "constant"
    edited: bool = True
    dtypes: tuple[torch.dtype, ...] = ()
    """The weights are rounded to these one after another; none: float32."""

    def __post_init__(self) -> None:
        pipeline = build_tiny_pipeline()
        for dtype in self.dtypes:
            pipeline.to(dtype)
        self.adapter = StableDiffusionAdapter(pipeline)
        edit = self.sampled.edit if self.edited else None
        self.module = TRCE(
            self.adapter, edit, self.config, OptimizerConfig(self.optimizer, self.lr, self.schedule)
        )
        self.record = Record()

    def run(
        self, folder: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None, **options: Any
    ) -> "Fit":
        """Fit all epochs of the configuration."""
        trainer = cpu_trainer(
            folder, epochs=self.config.epochs, callbacks=(self.record, *callbacks), **options
        )
        data = TrajectoryDataModule(self.adapter, plan_of(SAMPLED), self.sampled.folder, self.config, seed=0)
        trainer.fit(self.module, data, ckpt_path=ckpt_path)
        return self

    def changed(self) -> dict[str, Tensor]:
        """The tensors that may differ from the original's, cloned."""
        return {name: tensor.clone() for name, tensor in self.module.changed_tensors().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    """Equal names, and values bit by bit or within a tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"atol": 0.0, "rtol": 0.0}))


@torch.no_grad()
def loss_by_hand(
    sampled: Sampled, config: TrajectoryConfig, batch: Batch, *, first_step: bool = False
) -> float:
    """The loss of a batch before any step, row by row, in float64."""
    pipeline = build_tiny_pipeline()
    unet = copy.deepcopy(pipeline.unet).double().eval()
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.copy_(module.weight @ sampled.edit.transform)
    empty = pipeline.encode_prompt("", "cpu", 1, False)[0].double()
    states = batch["malicious_text"].states["clip"].double()
    tensors = {name: values for name, values in batch.items() if isinstance(values, Tensor)}
    rows = {name: v.double() if v.is_floating_point() else v for name, v in tensors.items()}

    def eps(kind: str, row: int, states: Tensor) -> Tensor:
        return unet(rows[f"{kind}_z_t"][row][None], rows[f"{kind}_timestep"][row], states).sample[0]

    def hinge(row: int, states: Tensor) -> float:
        uncond = rows["malicious_uncond"][row]
        f_safe = uncond + config.beta * (rows["malicious_safe"][row] - uncond)
        f_unsafe = uncond + config.beta * (rows["malicious_malicious"][row] - uncond)
        prediction = eps("malicious", row, states)
        distances = [((prediction - target) ** 2).mean().item() for target in (f_safe, f_unsafe)]
        unit = ((f_safe - f_unsafe) ** 2).mean().item() if config.relative_hinge else 1.0
        return max((distances[0] - distances[1]) / unit + config.margin, 0.0)

    erase, uncond, pull = [], [], []
    for row in range(len(rows["malicious_z_t"])):
        own = states[row][None]
        erase.append(hinge(row, own))
        uncond.append(hinge(row, empty) if first_step or rows["malicious_step_index"][row] > 0 else 0.0)
        pull.append(((eps("malicious", row, own) - rows["malicious_safe"][row]) ** 2).mean().item())
    preserve = [
        ((eps("unconditional", row, empty) - rows["unconditional_uncond"][row]) ** 2).mean().item()
        for row in range(len(rows["unconditional_z_t"]))
    ]
    keep = [
        (
            (eps("kept", row, batch["kept_text"].states["clip"][row][None].double()) - rows["kept_kept"][row])
            ** 2
        )
        .mean()
        .item()
        for row in range(len(rows.get("kept_z_t", ())))
    ]
    unit = distance_by_hand(sampled, config) if config.relative_distances else 1.0
    terms = (
        (1.0, erase),
        (config.uncond_hinge_weight, uncond),
        (config.preserve_weight / unit, preserve),
        *([(config.keep_weight / unit, keep)] if keep else []),
        (config.pull_weight / unit, pull),
    )
    return math.fsum(weight * sum(values) / len(values) for weight, values in terms)


def distance_by_hand(sampled: Sampled, config: TrajectoryConfig) -> float:
    """The mean squared distance of the safe and the malicious prediction over all cached points."""
    rows = load_rows(plan_of(SAMPLED), sampled.folder, config.shard_size, "malicious")
    pairs = zip(rows["safe"].double(), rows["malicious"].double(), strict=True)
    distances = [((safe - malicious) ** 2).mean().item() for safe, malicious in pairs]
    return sum(distances) / len(distances)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kept_per_malicious": 1, "num_kept": 5, "keep_weight": 70.0},
        {"relative_hinge": True, "uncond_hinge_weight": 0.7, "batch_size": 8},
        {"relative_distances": True, "kept_per_malicious": 1, "num_kept": 5, "pull_weight": 3.0},
        {"uncond_hinge_weight": 0.7, "pull_weight": 30.0, "preserve_weight": 50.0, "batch_size": 8},
    ],
)
def test_the_loss_by_hand(sampled: Sampled, tmp_path: Path, options: dict[str, Any]) -> None:
    """The second case has every term, and rows of the first step, which the ∅ hinge leaves out."""
    config = trajectory_config(**options, epochs=1)
    record = Fit(sampled, config).run(tmp_path).record
    assert record.losses[0] == pytest.approx(loss_by_hand(sampled, config, record.batches[0]), rel=1e-4)
    if config.uncond_hinge_weight:
        assert 0 in record.batches[0]["malicious_step_index"]
        with_first = loss_by_hand(sampled, config, record.batches[0], first_step=True)
        assert record.losses[0] != pytest.approx(with_first, rel=1e-3)
    # A later loss is of changed weights.
    if len(record.losses) > 1:
        assert record.losses[1] != pytest.approx(loss_by_hand(sampled, config, record.batches[1]), rel=1e-4)


def test_relative_distances_need_prompts_that_differ(sampled: Sampled, tmp_path: Path) -> None:
    config = trajectory_config(relative_distances=True)
    fit = Fit(sampled, config)
    data = TrajectoryDataModule(fit.adapter, plan_of(SAMPLED), sampled.folder, config, seed=0)
    data.setup("fit")
    data.malicious["safe"] = data.malicious["malicious"]
    with pytest.raises(InputError, match=r"trajectory\.relative_distances: expected predictions that differ"):
        cpu_trainer(tmp_path, epochs=1).fit(fit.module, data)


def test_only_queries_train_and_k_v_are_w_t(sampled: Sampled, tmp_path: Path) -> None:
    fit = Fit(sampled).run(tmp_path)
    original = build_tiny_pipeline().unet.state_dict()
    for name, tensor in fit.adapter.denoiser.state_dict().items():
        if name.endswith(".to_q.weight"):
            assert not torch.equal(tensor, original[name]), name
        elif name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            torch.testing.assert_close(tensor, (original[name].double() @ sampled.edit.transform).float())
        else:
            assert torch.equal(tensor, original[name]), name
    free = {name for name, parameter in fit.adapter.denoiser.named_parameters() if parameter.requires_grad}
    assert free == set(fit.module.trainable)


class Gradients(pl.Callback):
    """The first step's gradients, and the precisions of what trains and of what doesn't."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.dtypes: set[tuple[bool, torch.dtype]] = set()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trained = pl_module.trainable
        self.first = self.first or {name: p.grad.clone() for name, p in trained.items()}
        self.dtypes |= {(name in trained, p.dtype) for name, p in pl_module.denoiser.named_parameters()}


def test_q_trains_in_float32_beside_frozen_half_precision(sampled: Sampled, tmp_path: Path) -> None:
    """Its gradients are as near to full precision's as those of mixed precision with float32 weights are."""
    half = Fit(sampled, dtypes=(torch.bfloat16,))
    seen = {name: Gradients() for name in ("half", "mixed", "exact")}
    half.run(tmp_path / "half", seen["half"], precision="bf16-mixed")
    for name, precision in (("mixed", "bf16-mixed"), ("exact", "32-true")):
        fit = Fit(sampled, dtypes=(torch.bfloat16, torch.float32))
        fit.run(tmp_path / name, seen[name], precision=precision)
    assert seen["half"].dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert {dtype for _, dtype in seen["mixed"].dtypes} == {torch.float32}
    flat = {name: torch.cat([g.flatten() for g in rows.first.values()]) for name, rows in seen.items()}
    alike = {name: float(torch.cosine_similarity(flat[name], flat["exact"], dim=0)) for name in flat}
    assert alike["half"] > max(alike["mixed"] - 0.1, 0.7), alike
    # Afterwards all is in half precision again, and differs from what it was.
    state = half.adapter.denoiser.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    original = build_tiny_pipeline().to(torch.bfloat16).unet.state_dict()
    assert all(not torch.equal(state[name], original[name]) for name in half.module.trainable)


def test_stage_1_is_applied_once(sampled: Sampled) -> None:
    fit = Fit(sampled)
    fit.module.setup("fit")
    once = fit.changed()
    fit.module.setup("validate")
    assert_same(fit.changed(), once)


def test_losses_fall_on_few_points(sampled: Sampled, tmp_path: Path) -> None:
    """Each fit serves the same eight points in its two epochs."""
    fit = Fit(sampled, trajectory_config(preserve_weight=1.0, margin=0.2), lr=3e-2, edited=False)
    for _ in range(5):
        fit.run(tmp_path)
    first, *_, last = (fit.record.epochs[start : start + 2] for start in range(0, 10, 2))
    names = ("loss/total", "loss/erase", "hinge/active_fraction", "hinge/needed_displacement")
    for name in names:
        before, after = (math.fsum(epoch[f"{name}_epoch"] for epoch in epochs) for epochs in (first, last))
        assert 0 <= after < 0.5 * before, name


@pytest.mark.parametrize("edited", [True, False])
def test_a_checkpoint_holds_changed_tensors_alone(sampled: Sampled, tmp_path: Path, edited: bool) -> None:
    fit = Fit(sampled, edited=edited).run(tmp_path, *progress_checkpoints(tmp_path, minutes=60))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    endings = (".to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight") if edited else (".to_q.weight",)
    names = {
        f"denoiser.{name}" for name, _ in fit.adapter.denoiser.named_parameters() if name.endswith(endings)
    }
    assert set(state) == names
    assert_same({name.removeprefix("denoiser."): tensor for name, tensor in state.items()}, fit.changed())


def test_sigterm_within_an_accumulated_gradient_saves_nothing(sampled: Sampled, tmp_path: Path) -> None:
    config = trajectory_config(batch_size=2)
    checkpoints = progress_checkpoints(tmp_path, minutes=1e9)
    with pytest.raises(SIGTERMException):
        Fit(sampled, config).run(tmp_path, Interrupt(0, True), *checkpoints, accumulate_grad_batches=2)
    resumed = Fit(sampled, config).run(tmp_path, ckpt_path=tmp_path / "last.ckpt", accumulate_grad_batches=2)
    assert len(resumed.record.losses) == 4  # the whole second epoch


def test_a_fit_goes_on_after_an_epoch_that_was_not_scored(sampled: Sampled, tmp_path: Path) -> None:
    class Scoring(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            raise RuntimeError("killed while scoring")

    whole = Fit(sampled).run(tmp_path)
    with pytest.raises(RuntimeError, match="while scoring"):
        Fit(sampled).run(tmp_path, SaveBeforeScoring(tmp_path), Scoring())
    resumed = Fit(sampled).run(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.record.losses == whole.record.losses[2:]
    assert_same(resumed.changed(), whole.changed())


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_that_was_not_scored_is_scored_when_the_fit_goes_on(
    sampled: Sampled, tmp_path: Path, epoch: int
) -> None:
    """After the last epoch as well, where nothing is left to train."""
    scored: list[str] = []

    def scorer(title: str, rank: int, world_size: int) -> tuple[dict[str, float], dict[str, Any]]:
        if title == f"epoch {epoch}" and title not in scored:
            scored.append(title)
            raise RuntimeError("killed while scoring")
        scored.append(title)
        return {"fid": float(len(scored))}, {}

    def fit(**options: Any) -> EpochEvaluation:
        evaluation = EpochEvaluation(scorer)  # type: ignore[arg-type]
        callbacks = (SaveBeforeScoring(tmp_path), evaluation, *progress_checkpoints(tmp_path, minutes=60))
        Fit(sampled).run(tmp_path, *callbacks, **options)
        return evaluation

    with pytest.raises(RuntimeError, match="while scoring"):
        fit()
    evaluation = fit(ckpt_path=tmp_path / "last.ckpt")
    assert scored == ["after stage 1", *(["epoch 1"] * (3 - epoch)), *(["epoch 2"] * epoch)]
    assert len(evaluation.epochs) == 2
    assert len(fit(ckpt_path=tmp_path / "last.ckpt").epochs) == 2, "nothing is scored twice"


@pytest.mark.parametrize("sigterm", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_fit_goes_on_in_the_middle_of_an_epoch(
    sampled: Sampled, tmp_path: Path, sigterm: bool, accumulate: int, schedule: str
) -> None:
    """Eight steps in two epochs; stopped after the sixth, where the fifth or the sixth was saved last."""
    config = trajectory_config(batch_size=2)
    options = {"accumulate_grad_batches": accumulate}
    whole = Fit(sampled, config, schedule=schedule).run(tmp_path, **options)
    assert len(whole.record.losses) == 8
    checkpoints = progress_checkpoints(tmp_path, minutes=1e9 if sigterm else 1e-9)
    stopped = Fit(sampled, config, schedule=schedule)
    with pytest.raises(SIGTERMException if sigterm else RuntimeError):
        stopped.run(tmp_path, Interrupt(1, sigterm), *checkpoints, **options)
    assert [path.name for path in tmp_path.glob("*last*")] == ["last.ckpt"]
    resumed = Fit(sampled, config, schedule=schedule)
    resumed.run(tmp_path, ckpt_path=tmp_path / "last.ckpt", **options)
    done = 6 if sigterm else 5 if accumulate == 1 else 4
    assert resumed.record.losses == whole.record.losses[done:]
    assert_same(resumed.changed(), whole.changed())


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", "constant"), ("adamw", "cosine"), ("adamw8bit", "constant")]
)
def test_an_interrupted_fit_continues_to_the_same_weights(
    sampled: Sampled, tmp_path: Path, optimizer: str, schedule: str
) -> None:
    whole = Fit(sampled, optimizer=optimizer, schedule=schedule).run(tmp_path)
    broken = Fit(sampled, optimizer=optimizer, schedule=schedule)
    with pytest.raises(RuntimeError, match="interrupted"):
        broken.run(tmp_path, *progress_checkpoints(tmp_path, minutes=60), Interrupt())
    after_one_epoch = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    resumed = Fit(sampled, optimizer=optimizer, schedule=schedule)
    resumed.run(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed.changed(), whole.changed())
    assert resumed.record.losses == whole.record.losses[2:]
    assert any(
        not torch.equal(after_one_epoch[f"denoiser.{name}"], tensor)
        for name, tensor in whole.changed().items()
    )


def test_the_learning_rate_falls_to_zero_by_half_a_cosine(sampled: Sampled, tmp_path: Path) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            self.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    for schedule in ("constant", "cosine"):
        rates = Rates()
        fit = Fit(sampled, schedule=schedule).run(tmp_path, rates)
        steps = len(fit.record.losses)
        shares = [
            1.0 if schedule == "constant" else math.cos(math.pi * step / steps / 2) ** 2
            for step in range(steps)
        ]
        assert steps > 3 and rates.found == pytest.approx([fit.lr * share for share in shares])


def test_a_checkpoint_of_another_run_is_refused(sampled: Sampled, tmp_path: Path) -> None:
    Fit(sampled, edited=False).run(tmp_path, *progress_checkpoints(tmp_path, minutes=60))
    with pytest.raises(ValueError, match=r"checkpoint: expected .* fresh=true"):
        Fit(sampled).run(tmp_path, ckpt_path=tmp_path / "last.ckpt")


def test_a_loss_that_is_not_finite_is_refused_with_advice(sampled: Sampled, tmp_path: Path) -> None:
    fit = Fit(sampled, lr=1e37)
    with pytest.raises(
        ValueError, match=r"optimizer\.lr: expected finite losses, got nan at step 1 with 1e\+37; lower"
    ):
        fit.run(tmp_path, *progress_checkpoints(tmp_path, minutes=60))
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_eight_bit_optimizers(sampled: Sampled, tmp_path: Path, name: str) -> None:
    optimizers = pytest.importorskip("bitsandbytes.optim")
    fit, torch_fit = (Fit(sampled, trajectory_config(epochs=1), optimizer=which) for which in (name, "adamw"))
    classes = {"adamw8bit": optimizers.AdamW8bit, "paged_adamw8bit": optimizers.PagedAdamW8bit}
    assert isinstance(fit.module.configure_optimizers(), classes[name])
    found, expected = fit.run(tmp_path).changed(), torch_fit.run(tmp_path).changed()
    assert_same(found, expected, atol=2e-4, rtol=0.0)
    assert any(not torch.equal(found[name], expected[name]) for name in found)


def test_a_bitsandbytes_that_does_not_load_is_named_by_the_option(
    sampled: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # Python's way to say that there is none
    module = Fit(sampled, optimizer="adamw8bit").module
    with pytest.raises(InputError, match=r"optimizer\.name: expected bitsandbytes.* or adamw"):
        module.configure_optimizers()


def test_bf16_mixed_keeps_float32_weights_and_losses(sampled: Sampled, tmp_path: Path) -> None:
    # The preserve loss of bfloat16's rounding alone outweighs that of this small change.
    config = trajectory_config(epochs=1, preserve_weight=0.0)
    full, mixed = (
        Fit(sampled, config).run(tmp_path, precision=precision) for precision in ("32-true", "bf16-mixed")
    )
    assert {tensor.dtype for tensor in mixed.changed().values()} == {torch.float32}
    assert mixed.record.losses == pytest.approx(full.record.losses, rel=0.05)
    assert mixed.record.losses != full.record.losses


class CountForwards(pl.Callback):
    """How often parts of the pipeline ran in each step, and where offloaded parts were sent."""

    def __init__(self, fit: "Fit") -> None:
        adapter = fit.adapter
        self.calls = {"block": 0, "text": 0}
        self.steps: list[dict[str, int]] = []
        self.modes: set[bool] = set()
        adapter.denoiser.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: self._count("block"))
        adapter.text_encoder.register_forward_hook(lambda *_: self._count("text"))

    def _count(self, part: str) -> None:
        self.calls[part] += 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.calls = dict.fromkeys(self.calls, 0)
        self.modes.add(pl_module.denoiser.training)

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.calls.copy())


def test_gradient_checkpointing_computes_twice_and_changes_nothing(sampled: Sampled, tmp_path: Path) -> None:
    kept = Fit(sampled)
    counts = CountForwards(kept)
    kept.run(tmp_path, counts)
    recomputed = Fit(sampled, trajectory_config(gradient_checkpointing=True))
    twice = CountForwards(recomputed)
    recomputed.run(tmp_path, twice)
    assert [step["block"] for step in counts.steps] == [1] * 4
    assert [step["block"] for step in twice.steps] == [2] * 4
    # In evaluation mode, so that no dropout differs between the two.
    assert counts.modes == twice.modes == {False}
    assert_same(recomputed.changed(), kept.changed(), atol=1e-6, rtol=1e-5)
    assert not recomputed.adapter.denoiser.is_gradient_checkpointing


class WhereTo(pl.Callback):
    """Return where the text encoder and the decoder were last sent, in each step and after each epoch."""

    def __init__(self, fit: "Fit", monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: dict[str, str] = {}
        self.in_steps: list[dict[str, str]] = []
        self.after_epochs: list[dict[str, str]] = []
        for name, network in (("text", fit.adapter.text_encoder), ("vae", fit.adapter.vae)):
            monkeypatch.setattr(network, "to", self._recorded(name, network.to))

    def _recorded(self, name: str, move: Any) -> Any:
        def to(*args: Any, **kwargs: Any) -> Any:
            self.sent[name] = "the CPU" if args == ("cpu",) else "the device"
            return move(*args, **kwargs)

        return to

    def on_train_batch_start(self, *_: Any) -> None:
        self.in_steps.append(self.sent.copy())

    def on_train_epoch_end(self, *_: Any) -> None:
        self.after_epochs.append(self.sent.copy())


def test_offloaded_networks_are_away_in_steps_and_back_after_each_epoch(
    sampled: Sampled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU is the only device of this test, so what counts is where the networks are sent."""
    kept = Fit(sampled).run(tmp_path)
    config = trajectory_config(offload=True, uncond_hinge_weight=0.0)
    offloaded = Fit(sampled, config)
    where, counts = WhereTo(offloaded, monkeypatch), CountForwards(offloaded)
    offloaded.run(tmp_path, where, counts)
    assert where.in_steps == [{"text": "the CPU", "vae": "the CPU"}] * 4
    assert where.after_epochs == [{"text": "the device", "vae": "the device"}] * 2
    assert [step["text"] for step in counts.steps] == [0] * 4
    assert_same(offloaded.changed(), kept.changed())


def test_two_processes_train_as_one_does(sampled: Sampled, tmp_path: Path) -> None:
    # The ∅ hinge leaves rows of the first step out: a rank may have none left.
    config = trajectory_config(uncond_hinge_weight=0.5)
    alone = Fit(sampled, config).run(tmp_path)
    with one_thread():
        Fit(sampled, config).run(tmp_path, SaveChanged(tmp_path), devices=2, strategy="ddp_fork")
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert_same(first, second)
    assert_same(first, alone.changed(), atol=2e-5, rtol=1e-4)
    for rank in (0, 1):
        means = load_file(tmp_path / f"means{rank}.safetensors")
        assert {"loss/erase_epoch", "loss/erase_uncond_epoch", "loss/preserve_epoch"} <= means.keys()
        for name, mean in means.items():
            assert float(mean) == pytest.approx(alone.record.epochs[-1][name], rel=1e-3), name
    untrained = Fit(sampled)
    untrained.module.setup("fit")
    moved = [
        (first[name] - tensor).abs().max() for name, tensor in untrained.changed().items() if "to_q" in name
    ]
    assert min(moved) > 1e-3


class Drift(pl.Callback):
    """Changes one number on the second process."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 1:
            next(iter(module.trainable.values())).data[0, 0] += 1e-6


def test_processes_that_drift_apart_are_found(sampled: Sampled, tmp_path: Path) -> None:
    processes = {"devices": 2, "strategy": "ddp_fork"}
    with one_thread():
        Fit(sampled).run(tmp_path, RanksAgree(), **processes)
        with pytest.raises(Exception, match=r"epoch 2: expected the same weights on all 2.* on rank 1"):
            Fit(sampled).run(tmp_path, Drift(), RanksAgree(), **processes)


def test_accumulation_and_clipping_reach_the_trainer(sampled: Sampled, tmp_path: Path) -> None:
    plain = Fit(sampled).run(tmp_path)
    clipped = Fit(sampled).run(tmp_path, gradient_clip_val=1e-12)
    assert plain.module.global_step == 4
    assert clipped.module.global_step == 4
    assert Fit(sampled).run(tmp_path, accumulate_grad_batches=2).module.global_step == 2
    # AdamW's eps is far above such gradients: the steps vanish.
    original = build_tiny_pipeline().unet.state_dict()
    for name in clipped.module.trainable:
        torch.testing.assert_close(clipped.changed()[name], original[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [3, 4, 5])
def test_training_takes_the_planned_evaluations(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, batch_size: int
) -> None:
    """The points that fill the last batch count as well, and each of them has ∅ only after the first step."""
    config = trajectory_config(uncond_hinge_weight=0.5, batch_size=batch_size)
    plan = sample_plan(tiny_adapter, config, tmp_path)
    drawn = [step_index for row in plan.malicious for step_index in row.step_indices]
    assert 0 in drawn and len(set(drawn)) > 1
    module = TRCE(tiny_adapter, None, config, OptimizerConfig())
    data = TrajectoryDataModule(tiny_adapter, plan, tmp_path, config, seed=0)
    before = tiny_adapter.network_evaluations
    cpu_trainer(tmp_path, epochs=config.epochs).fit(module, data)
    assert tiny_adapter.network_evaluations - before == plan.training_evaluations(config, seed=0)
