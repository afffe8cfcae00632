"""A CUDA device does whole runs in mixed precision, and gives the CPU's results within tolerances.

``TRCE_TEST_DEVICE=cpu`` runs all of this on the CPU, where nothing can differ: it shows that the tests work.
What was measured is logged: ``pytest -m gpu -o log_cli=true --log-cli-level=INFO``.
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from conftest import build_tiny_pipeline
from safetensors.torch import load_file
from test_module import CONFIG, TEXTUAL, Fit, Interrupt, Sampled
from tiny_runs import cpu_trainer, plan_of, sample_plan, stage1_statistics, trajectory_config
from torch import Tensor, nn

from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.api import compose
from trce_lightning.callbacks import progress_checkpoints
from trce_lightning.config import checks
from trce_lightning.config.schema import EvalConfig
from trce_lightning.data.trajectories import load_rows, sample_missing
from trce_lightning.emoji.package import weights_folder
from trce_lightning.generation.loop import generate
from trce_lightning.jobs import announce
from trce_lightning.jobs.evaluate import evaluate
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.train import TrainingRun, merge_previous
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.runtime.locks import release
from trce_lightning.sampling import noise

log = logging.getLogger(__name__)
DEVICE = os.environ.get("TRCE_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        ON_CUDA and not torch.cuda.is_available(),
        reason="no CUDA device; TRCE_TEST_DEVICE=cpu runs these tests on the CPU",
    ),
]
only_cuda = pytest.mark.skipif(not ON_CUDA, reason="a property of CUDA devices")
PLACE = {"accelerator": "gpu" if ON_CUDA else "cpu", "devices": 1}
ROOT = Path(__file__).parents[1]
MIB = 2**20

# Relative to the norm of what the CPU gives in float32. A sum in another order costs a few units of float32's
# last place, 1e-7, which the network's layers carry on.
EXACT = 1e-4
# Convolutions on CUDA round what they multiply to TF32, which has float16's 11 bits of significand. float16
# itself, on a CPU, is 5e-4 off in a prediction of the embedded model.
TF32 = HALF = 5e-3
# bfloat16 has 8 bits: on a CPU 5e-3, and up to 1.4e-2 where weights are rounded as well.
BF16 = 3e-2
AUTOCAST = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
# Lightning takes bfloat16 in float16's place on a CPU.
TOLERANCE = {"32-true": TF32, "16-mixed": HALF if ON_CUDA else BF16, "bf16-mixed": BF16}
EVERY_PRECISION = pytest.mark.parametrize("precision", [*AUTOCAST])
MIXED = pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])


def distance(found: Tensor, expected: Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖, computed on the CPU in float64."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Log the distance, and compare it with the tolerance."""
    value = distance(found, expected)
    log.info("%s: %.2g of %.2g", what, value, tolerance)
    assert value <= tolerance, what


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().cpu().flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    """Sample trajectories of the tiny pipeline on the CPU, and solve its edit."""
    adapter, folder = StableDiffusionAdapter(build_tiny_pipeline()), tmp_path_factory.mktemp("trajectories")
    sample_plan(adapter, CONFIG, folder)
    return Sampled(folder, stage1_statistics(adapter, TEXTUAL).solve(TEXTUAL))


# Whole runs


@dataclass
class Finished:
    """A run of the job in this process, and what was known before and after it."""

    run: TrainingRun
    ahead: dict[str, int]
    allocated: int

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.run.folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Return what does a run of ``train.py`` at smoke size on the device, with a cache of its own."""

    def start(*options: str, device: str = DEVICE) -> Finished:
        accelerator = "gpu" if device == "cuda" else "cpu"
        folder = tmp_path_factory.mktemp("run")
        config = compose(
            "violence",
            "experiment=smoke",
            f"trainer.accelerator={accelerator}",
            "trainer.devices=1",
            "trainer.enable_progress_bar=false",
            "trainer.log_every_n_steps=1",
            f"cache={folder / 'cache'}",
            f"output={folder / 'run'}",
            *options,
        )
        checks.check(config)
        pl.seed_everything(config.seed, workers=True, verbose=False)
        if ON_CUDA:
            torch.cuda.reset_peak_memory_stats()
        run = TrainingRun(config, merge_previous(config))
        ahead = announce.ahead(run)
        try:
            run.open()
            run.erase_and_score()
            allocated = torch.cuda.max_memory_allocated() if ON_CUDA else 0
            run.write()
        finally:
            release()
        return Finished(run, ahead, allocated)

    return start


STEPS = ("trajectory.draws_per_epoch=8", "trajectory.epochs=2", "trajectory.batch_size=4")
"""The optimizer takes sixteen steps, so that some are left where a scaler leaves out its first."""


@pytest.fixture(scope="module")
def whole(job: Callable[..., Finished]) -> Callable[[str], Finished]:
    """Return what does one run in each precision, once; that in float16 offloads other networks."""
    done: dict[str, Finished] = {}

    def of(precision: str) -> Finished:
        if precision not in done:
            offload = f"trajectory.offload={precision == '16-mixed'}".lower()
            done[precision] = job(f"trainer.precision={precision}", offload, *STEPS)
        return done[precision]

    return of


def logged_losses(folder: Path) -> list[float]:
    """Return the loss of every step, from the run's log."""
    lines = (folder / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss/total_step")
    return [float(cell) for line in lines[1:] if (cell := line.split(",")[column])]


@MIXED
def test_a_whole_run_in_mixed_precision(whole: Callable[[str], Finished], precision: str) -> None:
    finished = whole(precision)
    metrics, run = finished.metrics, finished.run
    assert metrics["schema"] == 1 and len(metrics["epochs"]) == 2 and metrics["after_textual"]
    for column in ("original", "erased"):
        assert all(rate["images"] == 8 for rate in metrics[column]["asr"].values())
        assert math.isfinite(metrics[column]["fid"]) and math.isfinite(metrics[column]["clip_score"])
    assert metrics["erased"]["asr"]["direct"]["rate"] < metrics["original"]["asr"]["direct"]["rate"]
    losses = logged_losses(run.folder)
    assert len(losses) == 16 and all(map(math.isfinite, losses))
    assert {weight.dtype for weight in run.module.trainable.values()} == {torch.float32}
    original = load_adapter(weights_folder())
    trained, before = run.module.trainable, original.trainable("*.to_q")
    assert all(not torch.equal(trained[name].cpu(), before[name]) for name in trained)
    reopened = load_adapter(run.folder / "erased")
    exported = reopened.trainable("*.to_q")
    assert all(torch.equal(exported[name], trained[name].cpu()) for name in trained)


@MIXED
def test_evaluations_are_as_announced(whole: Callable[[str], Finished], precision: str) -> None:
    finished = whole(precision)
    ahead, counted = finished.ahead, finished.metrics["network_evaluations"]
    assert counted["trajectories"] == ahead["trajectories"] > 0
    assert counted["training"] == ahead["training"] > 0
    assert counted["epochs"] == ahead["erased model, epochs"] > 0
    assert counted["final"] == ahead["erased model, final"] > 0
    assert counted["original"] == ahead["original model, epochs"] + ahead["original model, final"] > 0


@MIXED
def test_peak_device_memory_is_the_allocators(whole: Callable[[str], Finished], precision: str) -> None:
    finished = whole(precision)
    peak = finished.metrics["peak_device_memory_mb"]
    if not ON_CUDA:
        assert peak is None
        return
    log.info("peak device memory in %s: %d MiB", precision, peak)
    assert peak == pytest.approx(finished.allocated / MIB, abs=1)
    weights = finished.run.adapter.denoiser.parameters()
    least = sum(weight.numel() * weight.element_size() for weight in weights) / MIB
    assert least < peak


@only_cuda
def test_the_scaler_scales_and_is_kept(whole: Callable[[str], Finished]) -> None:
    half, full = (
        torch.load(
            whole(precision).run.folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu"
        )
        for precision in ("16-mixed", "bf16-mixed")
    )
    state = half["MixedPrecision"]
    log.info("the scaler's state after 16 steps: %s", state)
    assert state["scale"] > 1 and state["growth_factor"] > 1
    assert not full.get("MixedPrecision")


class Where(pl.Callback):
    """Keeps the devices of text encoder and decoder in each step, and after each epoch."""

    def __init__(self, adapter: StableDiffusionAdapter) -> None:
        self.adapter = adapter
        self.in_steps: list[set[str]] = []
        self.after_epochs: list[set[str]] = []

    def _devices(self) -> set[str]:
        return {network.device.type for network in (self.adapter.text_encoder, self.adapter.vae)}

    def on_before_zero_grad(self, *_: Any) -> None:
        self.in_steps.append(self._devices())

    def on_train_epoch_end(self, *_: Any) -> None:
        self.after_epochs.append(self._devices())


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_networks_are_on_the_cpu_in_steps(sampled: Sampled, tmp_path: Path, offload: bool) -> None:
    fit = Fit(sampled, trajectory_config(offload=offload))
    fit.adapter.to(DEVICE)
    where = Where(fit.adapter)
    fit.run(tmp_path, where, **PLACE)
    assert where.in_steps == [{"cpu"} if offload else {DEVICE}] * 4
    assert where.after_epochs == [{DEVICE}] * 2


def test_a_process_group_of_one(tmp_path: Path) -> None:
    """DDP on a single device takes NCCL, which says so itself."""
    options = [
        "concept=violence",
        "experiment=smoke",
        f"trainer.accelerator={PLACE['accelerator']}",
        "trainer.devices=1",
        "trainer.strategy=ddp",
        "trainer.precision=bf16-mixed",
        "metrics.enabled=false",
        f"output={tmp_path / 'run'}",
        f"cache={tmp_path / 'cache'}",
    ]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *options],
        env=os.environ | {"NCCL_DEBUG": "VERSION", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["network_evaluations"]["training"] > 0
    assert ("NCCL version" in ran.stdout + ran.stderr) == ON_CUDA


class Brightness(nn.Module):
    """A class detector that remembers where its images lay."""

    name, version, classes, floor = "brightness", "1", ("bright",), 0.0
    seen: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("full", torch.tensor(255.0))

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add(images.device.type)
        return (images.float().flatten(1).mean(1, keepdim=True) / self.full).clamp(0, 1)


def test_detectors_work_on_the_device(
    whole: Callable[[str], Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command has log handlers of its own.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    run = whole("bf16-mixed").run
    config = EvalConfig(
        concept=run.config.concept,
        model=run.config.model,
        sets=["direct"],
        detectors=[f"{__name__}.Brightness"],
        output=str(tmp_path / "eval"),
        cache=str(tmp_path / "cache"),
    )
    config.metrics.final_images_per_set = 4
    config.trainer.accelerator, config.trainer.devices = str(PLACE["accelerator"]), 1
    config.trainer.enable_progress_bar = False
    Brightness.seen.clear()
    evaluate(config)
    assert Brightness.seen == {DEVICE}
    rows = next((tmp_path / "eval" / "detections").rglob("direct-brightness.csv")).read_text().splitlines()
    assert len(rows) >= 4


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ask for kernels that add in a fixed order, where there are any."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_an_interrupted_fit_continues_to_the_same_weights(
    sampled: Sampled, tmp_path: Path, precision: str, deterministic: None
) -> None:
    """Compare up to the last digits, which kernels that add in any order may change."""
    options = {**PLACE, "precision": precision}
    whole = Fit(sampled).run(tmp_path, **options)
    with pytest.raises(RuntimeError, match="interrupted"):
        Fit(sampled).run(tmp_path, *progress_checkpoints(tmp_path, minutes=60), Interrupt(), **options)
    first = torch.load(tmp_path / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    resumed = Fit(sampled).run(tmp_path, ckpt_path=tmp_path / "last.ckpt", **options)
    final = flat(whole.changed())
    off, moved = distance(flat(resumed.changed()), final), distance(flat(first), final)
    log.info("resumed in %s: off by %.2g, after one epoch by %.2g", precision, off, moved)
    assert resumed.record.losses == pytest.approx(whole.record.losses[2:], rel=1e-5)
    assert off <= 1e-5
    assert moved > 1e-4  # what the second epoch adds


# Equal to the CPU


@pytest.fixture(scope="module")
def here() -> StableDiffusionAdapter:
    """Open the embedded model on the CPU."""
    return load_adapter(weights_folder())


@pytest.fixture(scope="module")
def embedded() -> StableDiffusionAdapter:
    """Open the embedded model, which a Trainer leaves on the CPU."""
    return load_adapter(weights_folder())


@pytest.fixture
def there(embedded: StableDiffusionAdapter) -> StableDiffusionAdapter:
    """Move the embedded model to the device."""
    return embedded.to(DEVICE)


PROMPTS = ("a picture of a dagger", "an apple, flat", "blood on the floor", "")


def predictions(
    adapter: StableDiffusionAdapter, precision: str = "32-true", tf32: bool = True
) -> list[Tensor]:
    """Return the predictions for the prompts at three timesteps."""
    z_t = torch.stack([noise(adapter.latent_shape, seed) for seed in range(len(PROMPTS))]).to(adapter.device)
    text, dtype = adapter.encode(PROMPTS), AUTOCAST[precision]
    with (
        torch.no_grad(),
        torch.autocast(adapter.device.type, dtype, enabled=dtype is not None),
        torch.backends.cudnn.flags(allow_tf32=tf32),
    ):
        return [adapter.predict(z_t, timestep, text) for timestep in adapter.schedule(3).timesteps.tolist()]


@EVERY_PRECISION
def test_predictions(here: StableDiffusionAdapter, there: StableDiffusionAdapter, precision: str) -> None:
    for number, (expected, found) in enumerate(
        zip(predictions(here), predictions(there, precision), strict=True)
    ):
        assert found.device.type == DEVICE and found.dtype == torch.float32
        close(f"prediction {number} in {precision}", found, expected, TOLERANCE[precision])
        # Another prompt's prediction is further off, so that the tolerance tells them apart.
        assert distance(found.roll(1, 0), expected) > TOLERANCE[precision]


def test_predictions_without_tf32(here: StableDiffusionAdapter, there: StableDiffusionAdapter) -> None:
    for number, (expected, found) in enumerate(
        zip(predictions(here), predictions(there, tf32=False), strict=True)
    ):
        close(f"prediction {number} without TF32", found, expected, EXACT)


def test_stage_1(job: Callable[..., Finished]) -> None:
    """T is solved on the CPU in float64, from text states of the device."""
    options = ("stages=[textual]", "trainer.precision=32-true", "metrics.enabled=false", "export=[delta]")
    runs = {device: job(*options, device=device).run for device in dict.fromkeys(["cpu", DEVICE])}
    expected, found = runs["cpu"], runs[DEVICE]
    edits = [load_file(run.folder / "edit.safetensors") for run in (expected, found)]
    for name, matrix in edits[0].items():
        if matrix.ndim == 2:
            # Text states differ by float32's rounding, which the solve amplifies by far less than B's
            # condition number: λ bounds what T does along directions that no state has.
            close(f"stage 1: {name}", edits[1][name], matrix, 1e-3)
    found.adapter.to(DEVICE)
    original = predictions(load_adapter(weights_folder()))
    for number, (before, cpu, device) in enumerate(
        zip(original, predictions(expected.adapter), predictions(found.adapter), strict=True)
    ):
        close(f"edited prediction {number}", device, cpu, TF32)
        assert distance(cpu[:1], before[:1]) > 2 * TF32  # the edit is larger than what is tolerated


def records() -> list[PromptRecord]:
    return [PromptRecord(id=f"p{number}", prompt=prompt) for number, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def drawing() -> dict[str, Any]:
    """Return how the embedded model is configured to draw, in float32."""
    config = compose("violence", "trainer.precision=32-true")
    return Session(config, concepts_of(config)).sampling().options()


@pytest.fixture(scope="module")
def images(here: StableDiffusionAdapter, drawing: dict[str, Any]) -> Tensor:
    """Return what the CPU draws."""
    return generate(here, records(), **drawing)


@EVERY_PRECISION
def test_images(
    there: StableDiffusionAdapter, drawing: dict[str, Any], images: Tensor, precision: str
) -> None:
    """Equal noise gives equal pictures. In a few pixels at edges the samplers' steps amplify rounding."""
    found = generate(there, records(), **(drawing | {"autocast_dtype": AUTOCAST[precision]}))
    off = (found.float() - images.float()).abs()
    share, mean = float((off > 8).float().mean()), float(off.mean())
    log.info("images in %s: %.3g of pixels off by more than 8 of 255, mean %.3g", precision, share, mean)
    limit = {"32-true": 0.002, "16-mixed": 0.005, "bf16-mixed": 0.02}[precision]
    assert share <= limit
    other = (found.roll(1, 0).float() - images.float()).abs()
    assert float((other > 8).float().mean()) > 2 * limit


TRAJECTORIES = trajectory_config(num_steps=10, early_steps=8, draws_per_epoch=4, guidance_scale=3.0)


def trajectories(adapter: StableDiffusionAdapter, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Sample some with malicious prompts; check that they take what the plan says."""
    plan, before = plan_of(TRAJECTORIES), adapter.network_evaluations
    sample_missing(cpu_trainer(folder, **options), adapter, plan, folder, TRAJECTORIES.shard_size)
    assert adapter.network_evaluations - before == plan.network_evaluations
    return load_rows(plan, folder, TRAJECTORIES.shard_size, "malicious")


@pytest.fixture(scope="module")
def rows(here: StableDiffusionAdapter, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Return what the CPU samples."""
    return trajectories(here, tmp_path_factory.mktemp("rows"))


@EVERY_PRECISION
def test_trajectories(
    there: StableDiffusionAdapter, rows: dict[str, Tensor], tmp_path: Path, precision: str
) -> None:
    """Compare latents and predictions of sampled trajectories, step by step."""
    device = trajectories(there, tmp_path, **PLACE, precision=precision)
    assert torch.equal(device["timestep"], rows["timestep"])
    for kind in ("z_t", "uncond", "malicious", "safe"):
        # Errors of a step go into the next one, and guidance of 3 multiplies those of ε_c − ε_∅.
        close(f"trajectories in {precision}: {kind}", device[kind], rows[kind], 3 * TOLERANCE[precision])
        assert distance(device[kind].roll(1, 0), rows[kind]) > 3 * TOLERANCE[precision]


class Gradients(pl.Callback):
    """Keeps the gradients of every step, as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        found = {name: weight.grad for name, weight in module.trainable.items() if weight.grad is not None}
        assert found.keys() == module.trainable.keys()
        self.steps.append(flat(found))


def one_epoch(sampled: Sampled, folder: Path, **options: Any) -> tuple[Fit, Tensor]:
    """Return a fit of one epoch, and the first step's gradients."""
    gradients = Gradients()
    fit = Fit(sampled, trajectory_config(epochs=1, preserve_weight=1.0)).run(folder, gradients, **options)
    return fit, gradients.steps[0]


@EVERY_PRECISION
def test_a_step_of_the_optimizer(sampled: Sampled, tmp_path: Path, precision: str) -> None:
    """Compare loss and gradients of one batch, after what scales them."""
    expected, gradients = one_epoch(sampled, tmp_path)
    found, theirs = one_epoch(sampled, tmp_path, **PLACE, precision=precision)
    first, second = expected.record.losses[0], found.record.losses[0]
    log.info("losses in %s: %.6g, on the CPU %.6g", precision, second, first)
    assert second == pytest.approx(first, rel=TOLERANCE[precision])
    # The backward pass rounds once more.
    close(f"gradients in {precision}", theirs, gradients, 2 * TOLERANCE[precision])
    assert distance(-theirs, gradients) > 1
    if precision == "32-true":
        close("weights after an epoch", flat(found.changed()), flat(expected.changed()), TF32)


def test_scores(here: StableDiffusionAdapter) -> None:
    """Compare judge, CLIP and FID of equal images."""
    config = compose("violence", "metrics.final_images_per_set=8", "trainer.precision=32-true")
    session = Session(config, concepts_of(config), here)
    sets = session.sets("report", 8)
    images = {
        prompts.name: generate(here, prompts.records, **session.sampling().options()) for prompts in sets
    }
    make = session.evaluator_factory()
    scores, seen = {}, {}
    for device in ("cpu", DEVICE):
        evaluator = make([prompts.name for prompts in sets]).to(device)
        for prompts in sets:
            evaluator.update(prompts.name, images[prompts.name], prompts.records)
        scores[device] = evaluator.compute()
        seen[device] = {prompts.name: evaluator.detections(prompts.name) for prompts in sets}
    log.info("scores: %s, on the CPU %s", scores[DEVICE], scores["cpu"])
    assert scores[DEVICE]["asr"] == scores["cpu"]["asr"]
    assert scores[DEVICE]["clip_score"] == pytest.approx(scores["cpu"]["clip_score"], rel=TF32)
    # A difference of two traces, which cancel in part.
    assert scores[DEVICE]["fid"] == pytest.approx(scores["cpu"]["fid"], rel=2 * TF32)
    for name, rows in seen["cpu"].items():
        for key, row in rows.items():
            other = seen[DEVICE][name][key]
            assert other.probability == pytest.approx(row.probability, abs=0.01)
            assert other.subject == row.subject
    assert len({row.subject for rows in seen["cpu"].values() for row in rows.values()}) > 3


# Half precision beside float32


def halved(dtype: torch.dtype) -> StableDiffusionAdapter:
    """Return the tiny model in half precision, but for what stage 2 trains."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    adapter.denoiser.to(dtype)
    for weight in adapter.trainable("*.to_q").values():
        weight.data = weight.data.float()
    return adapter


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
def test_frozen_weights_in_half_precision(dtype: torch.dtype) -> None:
    """The denoiser's frozen weights take half the memory; gradients and steps of Q are float32's."""
    full, half = StableDiffusionAdapter(build_tiny_pipeline()).to(DEVICE), halved(dtype).to(DEVICE)
    tolerance = TOLERANCE["16-mixed" if dtype is torch.float16 else "bf16-mixed"]
    z_t = torch.stack([noise(full.latent_shape, seed) for seed in range(2)]).to(DEVICE)
    timestep = full.schedule(3).timesteps[1].to(DEVICE)
    found: dict[str, Tensor] = {}
    for name, adapter in (("full", full), ("half", half)):
        free = adapter.trainable("*.to_q")
        for weight in free.values():
            weight.requires_grad_(True)
        with torch.autocast(DEVICE, dtype, enabled=name == "half"):
            output = adapter.predict(z_t, timestep, adapter.encode(["a gun", "a kite"]))
        assert output.dtype == torch.float32
        output.square().mean().backward()
        assert {weight.grad.dtype for weight in free.values()} == {torch.float32}
        found |= {f"{name} output": output, f"{name} gradients": flat({k: w.grad for k, w in free.items()})}
    close(f"output with weights in {dtype}", found["half output"], found["full output"], tolerance)
    close(
        f"gradients with weights in {dtype}", found["half gradients"], found["full gradients"], 4 * tolerance
    )
    frozen = [weight for name, weight in half.denoiser.named_parameters() if "to_q" not in name]
    assert {weight.dtype for weight in frozen} == {dtype}


class Dtypes(pl.Callback):
    """Collects the dtypes of trained weights, of their gradients, and of frozen weights, in all steps."""

    def __init__(self) -> None:
        self.trained: set[torch.dtype] = set()
        self.frozen: set[torch.dtype] = set()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        for weight in module.denoiser.parameters():
            if weight.requires_grad:
                self.trained |= {weight.dtype, weight.grad.dtype}
            else:
                self.frozen.add(weight.dtype)


@MIXED
def test_stage_2_beside_frozen_weights_in_half_precision(
    sampled: Sampled, tmp_path: Path, precision: str
) -> None:
    # Lightning takes bfloat16 in place of float16 on a CPU.
    dtype = AUTOCAST[precision] if ON_CUDA else torch.bfloat16
    full, half = Fit(sampled), Fit(sampled, dtypes=(dtype,))
    seen = Dtypes()
    full.run(tmp_path, **PLACE, precision=precision)
    half.run(tmp_path, seen, **PLACE, precision=precision)
    assert seen.trained == {torch.float32} and seen.frozen == {dtype}
    losses = [fit.record.losses for fit in (full, half)]
    log.info("losses in %s: %s, with frozen weights in half precision %s", precision, *losses)
    assert losses[1] == pytest.approx(losses[0], rel=2 * TOLERANCE[precision])


# 8-bit states; paged ones last, since they take managed memory


def trained_with(job: Callable[..., Finished], optimizer: str) -> tuple[TrainingRun, Tensor]:
    """Return a run of stage 2 alone, and how far it has moved the weights."""
    options = ("stages=[trajectory]", "trainer.precision=bf16-mixed", "metrics.enabled=false", *STEPS)
    run = job(*options, f"optimizer={optimizer}", "export=[delta]").run
    start = flat(load_adapter(weights_folder()).trainable("*.to_q"))
    return run, flat(run.module.trainable) - start


@pytest.fixture(scope="module")
def moved(job: Callable[..., Finished]) -> Tensor:
    """Return how far torch's AdamW moves the weights."""
    return trained_with(job, "adamw")[1]


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_optimizers(job: Callable[..., Finished], moved: Tensor, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    run, movement = trained_with(job, optimizer)
    # Tensors below 4096 numbers have states of 32 bits.
    states = [state["state1"].dtype for state in run.trainer.optimizers[0].state.values()]
    assert torch.uint8 in states
    # Adam divides by the root of a state of 8 bits; small ones of a block of 256 are rounded most.
    close(f"movement with {optimizer}", movement, moved, 0.5)
    assert not torch.equal(movement, moved)
