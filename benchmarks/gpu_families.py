"""Measures SDXL, SD3 and FLUX.1 dev at full size on a GPU, and a step of hardened TRCE at SD 1.4's size.

All networks are made on the device in bfloat16 with random weights, T5-XXL's among them. Only what trains is
float32, as in a run with `model.dtype=bfloat16`. T5's token ids are those of a small vocabulary.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from benchmarks import networks
from benchmarks.eraser_memory import KEPT, job_of
from benchmarks.fitting import Fit
from benchmarks.networks import CLIP_G, CLIP_L, clip
from benchmarks.report import Row
from benchmarks.timing import synchronize
from trce_lightning.adapters import Adapter
from trce_lightning.adapters.loading import adapter_of
from trce_lightning.config.schema import TextualConfig, TrajectoryConfig
from trce_lightning.emoji.siblings import load_t5_tokenizer, siblings_folder, xl_scheduler
from trce_lightning.erasers.hardened import Hardened
from trce_lightning.generation.loop import generate
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.textual import apply_edit_, kept_statistics, textual_statistics

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
"""The options of Stable Diffusion 3 Medium's denoiser."""


@dataclass(frozen=True)
class FamilySize:
    """The sizes of a family that is measured.

    Args:
        pipeline: makes it on a device.
        steps: the sampling steps of an image.
        prompts: the prompts to keep that stage 1 encodes. It encodes as many pairs at most.
        guided: whether an image takes two evaluations a step.
        whole: whether a training step fits onto a card of 80 GB without gradient checkpointing.
        resolution: the side of images in pixels. None means the model's own.
    """

    pipeline: Callable[[str], DiffusionPipeline]
    steps: int
    prompts: int = 64
    guided: bool = True
    whole: bool = True
    resolution: int | None = None


@contextmanager
def made_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Make networks on a device and in a type, without a copy in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def t5_xxl() -> T5EncoderModel:
    """Make T5-XXL's encoder, 4,762 M parameters."""
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **T5_XXL)).eval()


def clip_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Make the tokenizers of both text encoders. The second one pads with "!"."""
    first, second = networks.clip_tokenizer(), networks.clip_tokenizer()
    second.pad_token = "!"
    return first, second


def full_xl(device: str) -> StableDiffusionXLPipeline:
    """Make Stable Diffusion XL: a denoiser of 2,567 M parameters and both text encoders."""
    tokenizer, second = clip_tokenizers()
    with made_on(device, torch.bfloat16):
        parts = {
            "vae": networks.decoder(shift_factor=0.0),
            "text_encoder": clip(CLIPTextModel, tokenizer, **CLIP_L),
            "text_encoder_2": clip(CLIPTextModelWithProjection, second, **CLIP_G, projection_dim=1280),
            "unet": networks.xl_unet(),
        }
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=second,
        scheduler=xl_scheduler(),
        add_watermarker=False,
    )


def full_sd3(device: str) -> StableDiffusion3Pipeline:
    """Make Stable Diffusion 3 Medium: 2,028 M parameters and three text encoders."""
    tokenizer, second = clip_tokenizers()
    with made_on(device, torch.bfloat16):
        parts = {
            "vae": networks.decoder(16, shift_factor=0.0),
            "text_encoder": clip(CLIPTextModelWithProjection, tokenizer, **CLIP_L, projection_dim=768),
            "text_encoder_2": clip(CLIPTextModelWithProjection, second, **CLIP_G, projection_dim=1280),
            "text_encoder_3": t5_xxl(),
            "transformer": SD3Transformer2DModel(**SD3).eval(),
        }
    return StableDiffusion3Pipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=second,
        tokenizer_3=load_t5_tokenizer(siblings_folder()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def full_flux(device: str) -> FluxPipeline:
    """Make FLUX.1 dev: 11,901 M parameters, CLIP and T5."""
    tokenizer = networks.clip_tokenizer()
    with made_on(device, torch.bfloat16):
        parts = {
            "vae": networks.decoder(16, shift_factor=0.0),
            "text_encoder": clip(CLIPTextModel, tokenizer, **CLIP_L),
            "text_encoder_2": t5_xxl(),
            "transformer": FluxTransformer2DModel(guidance_embeds=True).eval(),
        }
    return FluxPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=load_t5_tokenizer(siblings_folder()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


FAMILIES: dict[str, FamilySize] = {
    "SDXL": FamilySize(full_xl, steps=20),
    "SD3 Medium": FamilySize(full_sd3, steps=20),
    "FLUX.1 dev": FamilySize(full_flux, steps=20, guided=False, whole=False),
}


class StepSeconds(pl.Callback):
    """Takes the time of each training step, data and optimizer among it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note when a step has ended."""
        synchronize(pl_module.device)
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        """Return the median seconds from the end of one step to the end of the next."""
        gaps = [end - begin for begin, end in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps)


def family(bench: Bench, name: str) -> Iterator[Row]:
    """Measure stage 1, a training step of Q and images of a family, each after a call that warms up."""
    size = bench.sizes.families[name]
    bench.free()
    adapter = adapter_of(size.pipeline(str(bench.device)), resolution=size.resolution).to(bench.device)
    pixels = f"{adapter.side} px"
    yield from stage1(bench, adapter, name, size.prompts)
    yield from training(bench, adapter, f"{name} at {pixels}", whole=size.whole)
    adapter.to(bench.device)
    bench.forget_peak()
    taken = bench.second_call(partial(draw, adapter, size))
    how = "guided" if size.guided else "with embedded guidance"
    yield Row(f"{name} at {pixels}: an image, {size.steps} steps, {how}", taken, "s")
    yield Row("… peak device memory", bench.peak_gb(), "GB")


def stage1(bench: Bench, adapter: Adapter, name: str, count: int) -> Iterator[Row]:
    """Measure encoding, the solve and applying T to all streams."""
    concept, config = bench.sizes.concept, TextualConfig()
    prompts = [f"{prompt}, number {number}" for number in range(-(-count // len(KEPT))) for prompt in KEPT]
    bench.forget_peak()
    encode = partial(kept_statistics, adapter, prompts[:count], shown=False)
    taken = bench.second_call(encode)
    yield Row(f"{name}, stage 1: prompts to keep that are encoded", count / taken, "/s", rate=True)
    means = textual_statistics(adapter, [concept], encode(), config)
    solving = bench.second_call(lambda: means.solve(config))
    yield Row("… solving for T, float64 on the CPU", solving, "s")
    edit = means.solve(config)
    entries = [entry for stream in adapter.streams().values() for entry in stream.entries.values()]
    yield Row(f"… W T of {len(entries)} matrices", bench.second_call(lambda: apply_edit_(adapter, edit)), "s")
    yield Row("… peak device memory", bench.peak_gb(), "GB")


def training(bench: Bench, adapter: Adapter, what: str, *, whole: bool) -> Iterator[Row]:
    """Measure a step of stage 2 on Q, of one point, with checkpointing and, if it fits, without."""
    for checkpointing in (True, False) if whole else (True,):
        config = TrajectoryConfig(
            num_trajectories=bench.sizes.training_steps,
            num_unconditional=1,
            num_steps=4,
            early_steps=1,
            batch_size=1,
            unconditional_per_malicious=0,
            preserve_weight=0.0,
            epochs=1,
            shard_size=bench.sizes.training_steps,
            gradient_checkpointing=checkpointing,
        )
        steps = StepSeconds()
        with tempfile.TemporaryDirectory() as folder:
            fit = Fit(adapter, config, Path(folder), bench.place)
            bench.forget_peak()
            fit.run(steps)
        how = "with gradient checkpointing" if checkpointing else "without"
        row = f"{what}: a training step of Q, 1 in a batch, {how}" if checkpointing else f"… {how} it"
        yield Row(row, steps.median(), "s")
        yield Row("… peak device memory", bench.peak_gb(), "GB")


def draw(adapter: Adapter, size: FamilySize) -> None:
    """Draw an image."""
    record = PromptRecord(id="p", prompt="a photo of a cat")
    scale = 5.0 if size.guided else 1.0
    generate(adapter, [record], guidance_scale=scale, num_steps=size.steps, batch_size=1)


def hardened(bench: Bench) -> Iterator[Row]:
    """Measure a step of hardened TRCE at SD 1.4's size with its default points."""
    eraser = Hardened(
        iterations=bench.sizes.training_steps,
        num_steps=8,
        early_steps=6,
        other_from=2,
        concept_runs=8,
        keep_runs=8,
        unconditional_runs=2,
        lr=1e-5,
        gradient_checkpointing=True,
    )
    steps = StepSeconds()
    adapter = bench.adapter.to(bench.device)
    bench.forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        eraser.erase(job_of(adapter, Path(folder), bench.place, steps))
    evaluations = eraser.evaluations_per_step
    what = f"a step of hardened TRCE at {bench.pixels}, {evaluations} network evaluations, all weights train"
    yield Row(what, steps.median(), "s")
    yield Row("… peak device memory", bench.peak_gb(), "GB")
