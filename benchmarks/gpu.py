"""Measures on a GPU what a run on Stable Diffusion takes, and what options gain.

Networks have random weights and are made on the device. Weights are float32 and passes autocast to bfloat16,
as in a run, unless a row says otherwise. A row's *plain* is the same without the option that it names.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import lightning
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_families, networks, processes
from benchmarks.fitting import Fit, StepsInTurns
from benchmarks.report import Row, Section
from benchmarks.timing import device_seconds, seconds
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.cli import config_folder
from trce_lightning.concepts import Concept, load_concept, prompt_pairs
from trce_lightning.config.schema import TextualConfig, TrainerConfig, TrajectoryConfig
from trce_lightning.data.plan import draw_plan
from trce_lightning.data.trajectories import sample_missing, shards
from trce_lightning.generation.loop import generate
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.prompts.keep import keep_prompts
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.textual import CONTEXT, apply_edit_, kept_statistics, textual_statistics

log = logging.getLogger(__name__)
SECONDS = 240.0
"""The limit of the whole benchmark: sections that would end later are left out."""
LEFT_OUT = "left out"
"""The beginning of such a section's note."""
COMPILED_TOLERANCE = 0.2
"""The largest relative difference of a compiled network in bfloat16, which rounds in other places."""
Inputs = tuple[tuple[Tensor, ...], dict[str, object]]


def full_pipeline(device: str) -> StableDiffusionPipeline:
    """Make Stable Diffusion 1.4's networks, the decoder too."""
    return networks.pipeline(autoencoder=networks.decoder, device=device)


def full_xl(device: str) -> UNet2DConditionModel:
    """Make Stable Diffusion XL's denoiser."""
    torch.manual_seed(0)
    with torch.device(device):
        return networks.xl_unet()


@dataclass(frozen=True)
class Sizes:
    """The sizes of what is measured. The defaults are Stable Diffusion's; tests take small ones."""

    pipeline: Callable[[str], StableDiffusionPipeline] = full_pipeline
    xl: Callable[[str], UNet2DConditionModel] = full_xl
    concept: Concept = field(
        default_factory=lambda: load_concept(config_folder() / "concept" / "sexual.yaml")
    )
    kept: int = 256
    shard: int = 16
    trajectory_steps: int = 50
    training_batches: tuple[int, ...] = (1, 4, 8)
    training_steps: int = 8
    image_batches: tuple[int, ...] = (1, 8)
    image_steps: int = 20
    denoiser_batch: int = 16
    xl_side: int = networks.XL_LATENT_SIDE
    xl_batches: tuple[int, ...] = (1, 4)
    families: Mapping[str, gpu_families.FamilySize] = field(default_factory=lambda: gpu_families.FAMILIES)
    repeats: int = 3
    matrix: int = 8192


class Bench:
    """A device, what is measured on it, and the networks that sections share."""

    def __init__(self, device: str = "cuda", sizes: Sizes | None = None) -> None:
        self.device, self.sizes = torch.device(device), sizes or Sizes()
        accelerator = "gpu" if self.device.type == "cuda" else "cpu"
        self.place = TrainerConfig(
            accelerator=accelerator, devices=1, precision="bf16-mixed", enable_progress_bar=False
        )

    @cached_property
    def adapter(self) -> StableDiffusionAdapter:
        """Stable Diffusion 1.4 on the device. Training and rounding change its random weights a little."""
        adapter = StableDiffusionAdapter(self.sizes.pipeline(str(self.device)))
        return adapter.to(self.device)

    def free(self) -> None:
        """Let go of Stable Diffusion 1.4. The next section that needs it makes it anew."""
        self.__dict__.pop("adapter", None)
        self.forget_peak()

    @property
    def pixels(self) -> str:
        """Return how large its images are."""
        return f"{self.adapter.side} px"

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the median of a few calls on the device."""
        return device_seconds(function, self.device, self.sizes.repeats)

    def second_call(self, function: Callable[[], object]) -> float:
        """Return the seconds of the second call, for what takes long."""
        return device_seconds(function, self.device, 1, warm_up=1)

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
        """Return the context in which a run in bf16-mixed evaluates its networks."""
        return torch.autocast(self.device.type, dtype)

    def forget_peak(self) -> None:
        """Free what is held by nothing, and start the peak anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            processes.forget_peak()

    def peak_gb(self) -> float:
        """Return the most that was allocated since :meth:`forget_peak`; on a CPU, by the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return processes.peak_gb()

    def denoiser_inputs(self, count: int) -> Inputs:
        """Return random latents, timesteps and text states for Stable Diffusion 1.4's denoiser."""
        adapter = self.adapter
        z_t = torch.randn(count, *adapter.latent_shape, device=self.device)
        timestep = torch.full((count,), 500, device=self.device)
        states = torch.randn(
            count, networks.TOKENS, adapter.denoiser.config.cross_attention_dim, device=self.device
        )
        return (z_t, timestep, states), {}

    def xl_inputs(self, unet: UNet2DConditionModel, count: int) -> Inputs:
        """Return those for Stable Diffusion XL's denoiser, with the pooled text and the sizes."""
        z_t = torch.randn(count, 4, self.sizes.xl_side, self.sizes.xl_side, device=self.device)
        timestep = torch.full((count,), 500, device=self.device)
        states = torch.randn(count, networks.TOKENS, networks.XL_WIDTH, device=self.device)
        side = 8.0 * self.sizes.xl_side
        added = {
            "text_embeds": torch.randn(count, networks.XL_POOLED_WIDTH, device=self.device),
            "time_ids": torch.tensor([[side, side, 0, 0, side, side]], device=self.device).expand(count, -1),
        }
        return (z_t, timestep, states), {"added_cond_kwargs": added}


def ceilings(bench: Bench) -> Iterator[Row]:
    """Measure what the device can do at most: a large product, and a large copy."""
    side = bench.sizes.matrix
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    taken = bench.seconds(lambda: [a @ b for _ in range(10)]) / 10
    yield Row(
        f"product of {side}×{side} matrices in bfloat16", 2 * side**3 / taken / 1e12, "TFLOP/s", rate=True
    )
    source = torch.randn(4 * side, side, device=bench.device)
    target = torch.empty_like(source)
    taken = bench.seconds(lambda: [target.copy_(source) for _ in range(10)]) / 10
    yield Row("copy, bytes read and written", 2 * source.nbytes / taken / 1e12, "TB/s", rate=True)


def textual(bench: Bench) -> Iterator[Row]:
    """Measure stage 1: text encoding, the solve and applying T."""
    adapter, concept, config = bench.adapter, bench.sizes.concept, TextualConfig()
    pairs = prompt_pairs([concept])[concept.name]
    prompts = keep_prompts([concept], limit=bench.sizes.kept)
    taken = seconds_of_one(bench, lambda: kept_statistics(adapter, prompts, shown=False))
    yield Row("stage 1: prompts to keep that are encoded, float32", len(prompts) / taken, "/s", rate=True)
    kept = kept_statistics(adapter, prompts, shown=False)
    means = textual_statistics(adapter, [concept], kept, config)
    encoding = bench.seconds(lambda: textual_statistics(adapter, [concept], kept, config))
    yield Row(f"stage 1: encoding {len(pairs)} pairs and their sums, float32", encoding, "s")
    solving = bench.seconds(lambda: means.solve(config))
    yield Row("… solving for T, float64 on the CPU", solving, "s")
    edit, entries = means.solve(config), adapter.streams()[CONTEXT].entries.values()
    before = [entry.module.weight.clone() for entry in entries]
    applying = bench.seconds(lambda: apply_edit_(adapter, edit))
    for entry, weight in zip(entries, before, strict=True):
        entry.module.weight.data.copy_(weight)
    yield Row(f"… W T of {len(before)} matrices, float32 on the CPU", applying, "s")
    yield Row("… in all", encoding + solving + applying, "s")


def seconds_of_one(bench: Bench, function: Callable[[], object]) -> float:
    """Return the seconds of a longer call, which is timed once after two that warm up."""
    return device_seconds(function, bench.device, 1)


def trajectories(bench: Bench) -> Iterator[Row]:
    """Measure sampling by the job's own function, from file to file: what comes once is left out."""
    count, steps = bench.sizes.shard, bench.sizes.trajectory_steps
    config = TrajectoryConfig(
        num_trajectories=count * (1 + bench.sizes.repeats),
        num_steps=steps,
        early_steps=steps // 2,
        unconditional_per_malicious=0,
        shard_size=count,
    )
    plan = draw_plan(bench.sizes.concept.pairs(), config, seed=0)
    bench.forget_peak()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "trajectories")
        sample_missing(make_trainer(bench.place, Path(name)), bench.adapter, plan, folder, count)
        written = [(folder / file).stat().st_mtime_ns / 1e9 for file, _ in shards(plan, count)]
    peak = bench.peak_gb()
    bench.adapter.to(bench.device)
    rates = [
        plan.evaluations_of(rows) / (end - start)
        for (_, rows), start, end in zip(shards(plan, count)[1:], written, written[1:], strict=False)
    ]
    what = f"trajectories at {bench.pixels}, shards of {count}, bf16-mixed: network evaluations"
    yield Row(what, statistics.median(rates), "/s", rate=True)
    yield Row("… peak device memory", peak, "GB")


def fit_config(bench: Bench, rows: int, steps: int, *, checkpointing: bool = False) -> TrajectoryConfig:
    """Return the options of an epoch of one malicious latent and ``rows`` - 1 unconditional ones a batch."""
    return TrajectoryConfig(
        num_trajectories=steps,
        num_unconditional=steps,
        num_steps=max(*bench.sizes.training_batches, 2) - 1,
        early_steps=1,
        batch_size=1,
        unconditional_per_malicious=rows - 1,
        preserve_weight=100.0 if rows > 1 else 0.0,
        epochs=1,
        shard_size=bench.sizes.shard,
        gradient_checkpointing=checkpointing,
    )


def training(bench: Bench) -> Iterator[Row]:
    """Measure steps of Lightning's loop and, in turns, forward and backward alone; then peaks of memory."""
    with tempfile.TemporaryDirectory() as folder:
        largest = fit_config(bench, max(bench.sizes.training_batches), bench.sizes.training_steps)
        fit = Fit(bench.adapter, largest, Path(folder), bench.place)
        for rows in bench.sizes.training_batches:
            steps = StepsInTurns()
            fit.run(steps, config=fit_config(bench, rows, bench.sizes.training_steps))
            plain, ours = steps.medians()
            what = (
                f"training step at {bench.pixels}, {rows} in a batch, bf16-mixed, against forward + backward"
            )
            yield Row(what, ours, "s", plain, most_share=1.15)
            kept = training_memory(bench, fit, rows, checkpointing=False)
            yield Row("… peak device memory", kept, "GB")
        again = training_memory(bench, fit, rows, checkpointing=True)
        yield Row(f"… with gradient checkpointing, {rows} in a batch", again, "GB", kept)
    bench.adapter.to(bench.device)


def training_memory(bench: Bench, fit: Fit, rows: int, *, checkpointing: bool) -> float:
    """Return the allocator's peak of a fit, with the text encoder and the decoder beside it."""
    bench.adapter.to(bench.device)
    bench.forget_peak()
    fit.run(config=fit_config(bench, rows, bench.sizes.training_steps, checkpointing=checkpointing))
    return bench.peak_gb()


def images(bench: Bench) -> Iterator[Row]:
    """Measure our loop, decoder included."""
    for batch in bench.sizes.image_batches:
        bench.forget_peak()
        rate = image_rate(bench, batch, torch.bfloat16)
        steps = f"{bench.sizes.image_steps} steps of DDIM"
        yield Row(
            f"images at {bench.pixels}, {batch} at once, {steps}, guided, bf16 autocast",
            rate,
            "/s",
            rate=True,
        )
        yield Row("… peak device memory", bench.peak_gb(), "GB")


def image_rate(bench: Bench, batch: int, autocast_dtype: torch.dtype | None) -> float:
    """Return how many images are drawn in a second."""
    records = [PromptRecord(id=f"p{number}", prompt=f"a photo of cat {number}") for number in range(batch)]
    draw = partial(
        generate,
        bench.adapter,
        records,
        guidance_scale=7.5,
        num_steps=bench.sizes.image_steps,
        batch_size=batch,
        autocast_dtype=autocast_dtype,
    )
    return batch / bench.seconds(draw)


def image_options(bench: Bench) -> Iterator[Row]:
    """Measure what the memory layout and bfloat16 weights gain; the weights are float32 again afterwards."""
    batch, adapter = bench.sizes.image_batches[-1], bench.adapter
    plain = image_rate(bench, batch, torch.bfloat16)
    adapter.to_channels_last()
    last = image_rate(bench, batch, torch.bfloat16)
    yield Row(f"images, {batch} at once, bf16 autocast: channels_last", last, "/s", plain, rate=True)
    for network in (adapter.denoiser, adapter.vae):
        network.to(memory_format=torch.contiguous_format)
    adapter.pipeline.to(dtype=torch.bfloat16)
    bench.forget_peak()
    half = image_rate(bench, batch, None)
    yield Row(f"images, {batch} at once: weights in bfloat16, against autocast", half, "/s", plain, rate=True)
    yield Row("… peak device memory", bench.peak_gb(), "GB")
    adapter.to_channels_last()
    both = image_rate(bench, batch, None)
    yield Row("… with channels_last as well", both, "/s", plain, rate=True)
    for network in (adapter.denoiser, adapter.vae):
        network.to(memory_format=torch.contiguous_format)
    adapter.pipeline.to(dtype=torch.float32)


class Denoiser:
    """A network with one batch: it runs forward, or forward and backward with Q alone free."""

    def __init__(self, bench: Bench, unet: UNet2DConditionModel, inputs: Inputs) -> None:
        self.bench, self.unet = bench, unet
        self.inputs, self.keywords = inputs
        unet.requires_grad_(False)
        self.free = [value for name, value in unet.named_parameters() if name.endswith("to_q.weight")]

    def _output(self) -> Tensor:
        with self.bench.autocast():
            (output,) = self.unet(*self.inputs, **self.keywords, return_dict=False)
        assert isinstance(output, Tensor)
        return output

    def forward(self) -> Tensor:
        """Return the output, without gradients."""
        with torch.no_grad():
            return self._output()

    def forward_backward(self) -> Tensor:
        """Return the gradients of the mean square, flat."""
        for parameter in self.free:
            parameter.requires_grad_(True)
        gradients = torch.autograd.grad(self._output().float().square().mean(), self.free)
        for parameter in self.free:
            parameter.requires_grad_(False)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def teraflop(self) -> float:
        """Return the operations of one forward pass."""
        with FlopCounterMode(display=False) as counter:
            self.forward()
        return counter.get_total_flops() / 1e12


def denoiser(bench: Bench) -> Iterator[Row]:
    """Measure Stable Diffusion 1.4's denoiser alone, in both memory layouts."""
    count = bench.sizes.denoiser_batch
    network = Denoiser(bench, bench.adapter.denoiser, bench.denoiser_inputs(count))
    forward, both = bench.seconds(network.forward), bench.seconds(network.forward_backward)
    what = f"SD 1.4's denoiser at {bench.pixels}, {count} in a batch, bf16 autocast"
    yield Row(f"{what}: forward", forward, "s")
    yield Row("… operations", network.teraflop() / forward, "TFLOP/s", rate=True)
    yield Row(f"{what}: forward + backward", both, "s")
    with channels_last(network.unet):
        yield Row(f"{what}: forward with channels_last", bench.seconds(network.forward), "s", forward)
        both_last = bench.seconds(network.forward_backward)
        yield Row(f"{what}: forward + backward with channels_last", both_last, "s", both)


@contextmanager
def channels_last(unet: UNet2DConditionModel) -> Iterator[None]:
    """Lay a network out as NHWC for a while."""
    unet.to(memory_format=torch.channels_last)
    yield
    unet.to(memory_format=torch.contiguous_format)


def compiled(bench: Bench, *, blocks: bool, backward: bool) -> Iterator[Row]:
    """Measure torch.compile of the denoiser, of its transformer blocks alone or of all of it."""
    count = bench.sizes.denoiser_batch
    inputs, unet = bench.denoiser_inputs(count), bench.adapter.denoiser
    network = Denoiser(bench, unet, inputs)
    run = network.forward_backward if backward else network.forward
    plain, expected = bench.seconds(run), run().float()
    torch.compiler.reset()
    if blocks:
        unet.compile_repeated_blocks(dynamic=False)
    else:
        unet.compile(dynamic=False)
    try:
        first = seconds(run)
        difference = float((run().float() - expected).norm() / expected.norm())
        log.info("gpu: compiled differs by %.2g", difference)
        assert difference <= COMPILED_TOLERANCE, f"compiled: expected equal results, got {difference}"
        taken = bench.seconds(run)
    finally:
        for module in unet.modules():
            module._compiled_call_impl = None
        torch.compiler.reset()
    part = "of transformer blocks" if blocks else "of all of it"
    passes = "forward + backward" if backward else "forward"
    what = f"SD 1.4's denoiser, {count} in a batch, bf16 autocast, {passes}: torch.compile {part}"
    yield Row(what, taken, "s", plain)
    yield Row("… the first call, which compiles", first, "s")


def xl(bench: Bench) -> Iterator[Row]:
    """Measure Stable Diffusion XL's bare denoiser."""
    unet = bench.sizes.xl(str(bench.device))
    pixels = 8 * bench.sizes.xl_side
    for count in bench.sizes.xl_batches:
        network = Denoiser(bench, unet, bench.xl_inputs(unet, count))
        what = f"SD XL's denoiser alone at {pixels} px, {count} in a batch, bf16 autocast"
        bench.forget_peak()
        forward = bench.seconds(network.forward)
        yield Row(f"{what}: forward", forward, "s")
        yield Row("… peak device memory", bench.peak_gb(), "GB")
        yield Row("… operations", network.teraflop() / forward, "TFLOP/s", rate=True)
        bench.forget_peak()
        yield Row(f"{what}: forward + backward", bench.seconds(network.forward_backward), "s")
        yield Row("… peak device memory", bench.peak_gb(), "GB")
    with channels_last(unet):
        last = bench.seconds(network.forward)
        yield Row(f"… {count} in a batch, forward with channels_last", last, "s", forward)
    unet.to(torch.bfloat16)
    network.inputs = tuple(
        part.to(torch.bfloat16) if part.is_floating_point() else part for part in network.inputs
    )
    half = bench.seconds(network.forward)
    yield Row(f"… {count} in a batch, forward with weights in bfloat16", half, "s", forward)


@dataclass(frozen=True)
class Part:
    """A section of the benchmark, and the seconds that it may take at most."""

    name: str
    need: float
    run: Callable[[Bench], Iterator[Row]]


def parts() -> list[Part]:
    """Return all sections: what matters most comes first, what compiles all of a network last."""
    return [
        Part("ceilings", 3, ceilings),
        Part("textual", 15, textual),
        Part("trajectories", 25, trajectories),
        Part("training", 45, training),
        Part("images", 25, images),
        Part("denoiser", 10, denoiser),
        Part("xl", 25, xl),
        Part("compiled blocks, forward", 30, partial(compiled, blocks=True, backward=False)),
        Part("compiled blocks, backward", 40, partial(compiled, blocks=True, backward=True)),
        Part("image options", 25, image_options),
        Part("compiled, forward", 60, partial(compiled, blocks=False, backward=False)),
        Part("compiled, backward", 100, partial(compiled, blocks=False, backward=True)),
        Part("hardened", 30, gpu_families.hardened),
        *(Part(name, 60, partial(gpu_families.family, name=name)) for name in gpu_families.FAMILIES),
    ]


def run(
    bench: Bench, limit: float = SECONDS, chosen: Sequence[Part] | None = None, started: float | None = None
) -> Iterator[Section]:
    """Run the sections that fit into ``limit`` seconds from ``started``; the others are said to be left out.

    A section that fails says so in its place, and the others go on.
    """
    begin = time.monotonic() if started is None else started
    for part in parts() if chosen is None else chosen:
        gone = time.monotonic() - begin
        if gone + part.need > limit:
            yield Section(part.name, note=f"{LEFT_OUT}: {gone:.0f} s of {limit:.0f} were over")
            continue
        rows: list[Row] = []
        try:
            for row in part.run(bench):
                log.info("gpu: %s", " | ".join(row.cells()[:4]))
                rows.append(row)
        except Exception as error:
            log.exception("gpu: %s failed", part.name)
            yield Section(part.name, rows, note=f"failed: {type(error).__name__}: {error}".splitlines()[0])
        else:
            log.info("gpu: %s took %.1f s", part.name, time.monotonic() - begin - gone)
            yield Section(part.name, rows)
        bench.forget_peak()


def card(device: torch.device) -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def versions(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on beside the card."""
    found = {"PyTorch": torch.__version__, "Lightning": lightning.__version__}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        found |= {"cuDNN": str(torch.backends.cudnn.version()), "memory": f"{memory / 1e9:.0f} GB"}
    return found
