"""Stage 1 on the files of FLUX.1's and SDXL's denoisers, in full shape, without loading them (Linux).

Weights are random numbers in bfloat16 that repeat, in shards of 10 GB. FLUX.1 and its edited copy take 48 GB
of disk meanwhile. Text encoders have their true widths and one layer each. T is given: they encode nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from benchmarks import networks
from benchmarks.processes import alone, forget_peak, peak_gb
from benchmarks.report import Row
from trce_lightning.adapters import load_stored, stored_pipeline
from trce_lightning.adapters.stored import StoredPipeline
from trce_lightning.closed_form import apply_edits
from trce_lightning.emoji.siblings import load_t5_tokenizer, siblings_folder
from trce_lightning.export import save_stored_delta, save_stored_pipeline
from trce_lightning.runtime.tensor_files import write_one_by_one
from trce_lightning.textual import StoredEdit

log = logging.getLogger(__name__)
SHARD_BYTES = 10_000_000_000
PERIOD = 1_000_003
"""The random numbers after which they repeat. It is prime, so rows of weights differ."""
CARD: Mapping[str, Any] = {"base": "", "concepts": "", "method": "", "table": "", "changed": 0}
LIMIT_GB = 2.0
T5_WIDTH, T5_LENGTH = 4096, 512
FLUX, XL = "FLUX.1", "SD XL"


@dataclass(frozen=True)
class Cost:
    """The seconds of an edit, by the clock and on the CPU, and its process's peak of resident memory."""

    seconds: float
    cpu_seconds: float
    gb: float


def clip(kind: type, width: int, projection: int) -> Any:
    """Return a text encoder of CLIP with one layer and random weights."""
    return networks.clip(
        kind,
        networks.clip_tokenizer(),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        projection_dim=projection,
    )


def flux() -> DiffusionPipeline:
    """Return FLUX.1 dev without its denoiser."""
    config = T5Config(
        vocab_size=1024, d_model=T5_WIDTH, d_kv=64, d_ff=T5_WIDTH, num_layers=1, num_heads=T5_WIDTH // 64
    )
    vae = networks.small_decoder()
    vae.register_to_config(latent_channels=16, shift_factor=0.1159)
    return FluxPipeline(
        transformer=None,
        vae=vae,
        text_encoder=clip(CLIPTextModel, 768, 768),
        text_encoder_2=T5EncoderModel(config),
        tokenizer=networks.clip_tokenizer(),
        tokenizer_2=load_t5_tokenizer(siblings_folder()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def xl() -> DiffusionPipeline:
    """Return SDXL without its denoiser."""
    return StableDiffusionXLPipeline(
        unet=None,
        vae=networks.small_decoder(),
        text_encoder=clip(CLIPTextModel, 768, 768),
        text_encoder_2=clip(CLIPTextModelWithProjection, 1280, networks.XL_POOLED_WIDTH),
        tokenizer=networks.clip_tokenizer(),
        tokenizer_2=networks.clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


FAMILIES: dict[str, tuple[Callable[[], DiffusionPipeline], str, Callable[[], nn.Module]]] = {
    FLUX: (flux, "transformer", lambda: FluxTransformer2DModel(guidance_embeds=True)),
    XL: (xl, "unet", networks.xl_unet),
}
"""The pipelines by family, with the denoiser's name and shape."""


def write_model(family: str, folder: Path) -> None:
    """Write a pipeline's folder, the denoiser shard by shard."""
    parts, component, denoiser = FAMILIES[family]
    pipeline = parts().to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    with torch.device("meta"):
        network: Any = denoiser()
    index = json.loads((folder / "model_index.json").read_text())
    index[component] = ["diffusers", type(network).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    network.save_config(folder / component)
    write_shards(network, folder / component)


def write_shards(network: nn.Module, folder: Path) -> None:
    """Write random weights of a network on the meta device in shards, one tensor in memory at a time."""
    numbers = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    shards: list[dict[str, torch.Size]] = [{}]
    used = 0
    for name, tensor in network.state_dict().items():
        size = tensor.numel() * torch.bfloat16.itemsize
        if used + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.shape
        used += size

    def tensors(shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            count = shape.numel()
            yield name, numbers.repeat(-(-count // PERIOD))[:count].view(shape)

    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_one_by_one(folder / name, shapes, torch.bfloat16, tensors(shapes), {"format": "pt"})
        weight_map |= dict.fromkeys(shapes, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def given(family: str, folder: Path) -> list[StoredEdit]:
    """Return a T near I for each stream, as if a run on another machine had solved it."""
    widths = {"context": T5_WIDTH, "pooled": 768} if family == FLUX else {"context": 2048, "pooled": 1280}
    adapter, _ = load_stored(folder, max_sequence_length=T5_LENGTH if family == FLUX else None)
    edits = []
    for name, stream in adapter.streams().items():
        assert stream.width == widths[name]
        noise = torch.randn(stream.width, stream.width, generator=torch.Generator().manual_seed(1))
        transform = torch.eye(stream.width, dtype=torch.float64) + noise.double() / stream.width
        columns = {f"{key}.weight": entry.first for key, entry in stream.entries.items()}
        edits.append(StoredEdit(transform, columns))
    return edits


def measured(edit: Callable[[], None]) -> Cost:
    """Return the cost of an edit. The libraries that it needs are in memory already."""
    forget_peak()
    started, used = time.monotonic(), time.process_time()
    edit()
    return Cost(time.monotonic() - started, time.process_time() - used, peak_gb())


def delta(folder: Path, edits: list[StoredEdit]) -> Cost:
    """Write the edited tensors into a file."""
    torch.set_num_threads(1)

    def edit() -> None:
        denoiser = stored_pipeline(folder).denoiser
        save_stored_delta(folder / "delta.safetensors", denoiser, edits, {})

    return measured(edit)


def copy(folder: Path, edits: list[StoredEdit]) -> Cost:
    """Write an edited copy of the whole pipeline, and check one of its tensors."""
    target = folder.with_name("copy")
    cost = measured(lambda: save_stored_pipeline(target, stored_pipeline(folder), edits, CARD))
    check(stored_pipeline(folder), stored_pipeline(target), edits)
    shutil.rmtree(target)
    return cost


def check(before: StoredPipeline, after: StoredPipeline, edits: list[StoredEdit]) -> None:
    """Check that a tensor of each stream is W T, and that files keep their sizes."""
    for edit in edits:
        name, first = next(iter(edit.columns.items()))
        d = len(edit.transform)
        columns = before.denoiser.read(name)[:, first : first + d]
        (expected,) = apply_edits([columns.clone()], edit.transform)
        assert torch.equal(after.denoiser.read(name)[:, first : first + d], expected)
        assert not torch.equal(expected, columns)
    assert [a.stat().st_size for a in before.denoiser.files] == [
        a.stat().st_size for a in after.denoiser.files
    ]


def loaded(folder: Path, edits: list[StoredEdit]) -> Cost:
    """Load SDXL's denoiser in bfloat16 with diffusers, edit it in memory, and save it."""

    @torch.no_grad()
    def edit() -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.bfloat16)
        for own in edits:
            d = len(own.transform)
            for name, first in own.columns.items():
                columns = unet.get_parameter(name)[:, first : first + d]
                (edited,) = apply_edits([columns], own.transform)
                columns.copy_(edited)
        unet.save_pretrained(folder.with_name("loaded"))

    cost = measured(edit)
    shutil.rmtree(folder.with_name("loaded"))
    return cost


def run() -> list[Row]:
    """Measure both families, and delete their files."""
    rows = []
    for family in (XL, FLUX):
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            alone(write_model, family, folder)
            edits = alone(given, family, folder)
            files = stored_pipeline(folder).denoiser.files
            size = sum(file.stat().st_size for file in files) / 1e9
            log.info("%s: %.1f GB in %d files", family, size, len(files))
            loading: Cost | None = alone(loaded, folder, edits) if family == XL else None
            alone_delta, copied = alone(delta, folder, edits), alone(copy, folder, edits)
            what = f"stage 1 on {family}'s files ({size:.1f} GB in bfloat16), T given, edited tensors alone"
            plain = (loading.cpu_seconds, loading.seconds, loading.gb) if loading else (None, None, None)
            rows += [
                Row(f"{what}, CPU time", alone_delta.cpu_seconds, "s"),
                Row("… peak memory", alone_delta.gb, "GB", most=LIMIT_GB),
                Row("… in a copy of all files, CPU time", copied.cpu_seconds, "s", plain[0]),
                Row("… by the clock", copied.seconds, "s", plain[1]),
                Row("… peak memory", copied.gb, "GB", plain[2], most=LIMIT_GB),
            ]
    return rows
