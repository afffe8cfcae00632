"""The table of ``docs/models.md``: what opens, drawn by this project and by diffusers, and what is refused.

``PYTHONPATH=. python tests/model_table.py`` writes it anew; ``test_model_table.py`` checks each of its rows.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from conftest import WIDTH, build_tiny_pipeline
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor, SlicedAttnProcessor
from published_models import pipeline_of
from safetensors.torch import load_file, save_file
from tiny_flow import T5_LENGTH, build, build_sd3
from tiny_sdxl import POOLED, SIZE_WIDTH, build_tiny_sdxl
from transformers import CLIPTextModelWithProjection

from benchmarks.report import refresh
from trce_lightning.adapters import Adapter, adapter_of, load_adapter
from trce_lightning.adapters.schedule import DEFAULTS
from trce_lightning.adapters.single_file import original_state
from trce_lightning.config.schema import SAMPLERS
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate
from trce_lightning.generation.variation import Variation
from trce_lightning.prompts.records import PromptRecord

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "models"
LEVELS = 1
"""The steps of 255 by which a picture may differ, since the last bits are rounded here and there."""
HEAD = "| configuration | opens | compared with diffusers: largest difference of any pixel, or why not |"
Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline
Source = Pipeline | Path | tuple[Path, Path]
"""A source that is opened: a pipeline in memory, a folder, or a file with its configuration's folder."""


@dataclass(frozen=True)
class Case:
    """A configuration, how it is drawn, and where it is opened from."""

    group: str
    name: str
    make: Callable[[], Pipeline]
    """The pipeline that diffusers draws with, and that is opened where ``store`` doesn't say otherwise."""
    store: Callable[[Pipeline, Path], Source] = lambda pipeline, folder: pipeline
    opens: bool = True
    samplers: tuple[str | None, ...] = (None,)
    guidance: float = 3.0
    steps: tuple[int, ...] = (3,)
    prompt: str = "a gun"
    side: int = 16

    def open(self, folder: Path) -> Adapter:
        """The model as this project reads it."""
        source = self.store(self.make(), folder)
        if isinstance(source, Path):
            return load_adapter(source, resolution=self.side)
        if isinstance(source, tuple):
            return load_adapter(source[0], config=source[1], resolution=self.side)
        resolution = None if self.side == 16 else self.side
        return adapter_of(source, resolution=resolution)

    def difference(self, folder: Path) -> int:
        """Largest difference of a pixel, of 255, over all ways to draw it."""
        adapter, pipeline = self.open(folder), self.make()
        return max(
            int(np.abs(self.drawn_here(adapter, *way) - self.drawn_by_diffusers(pipeline, *way)).max())
            for way in [(sampler, steps) for sampler in self.samplers for steps in self.steps]
        )

    def drawn_here(self, adapter: Adapter, sampler: str | None, steps: int) -> np.ndarray:
        """A picture by this project, ``[H, W, 3]``."""
        (image,) = generate(
            adapter,
            [PromptRecord("1", self.prompt, seed=7)],
            guidance_scale=self.guidance,
            num_steps=steps,
            batch_size=1,
            variation=Variation(scheduler=sampler),
        )
        return image.permute(1, 2, 0).numpy().astype(int)

    def drawn_by_diffusers(self, pipeline: Pipeline, sampler: str | None, steps: int) -> np.ndarray:
        """The same picture by diffusers, whose pipeline is made anew, which corrects its settings."""
        settings = {key: value for key, value in pipeline.scheduler.config.items() if key != DEFAULTS}
        scheduler = getattr(diffusers, sampler or "DDIMScheduler").from_config(settings)
        parts = {**pipeline.components, "scheduler": scheduler}
        if isinstance(pipeline, StableDiffusionXLPipeline):
            zeros = pipeline.config.force_zeros_for_empty_prompt
            settings = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
        else:
            settings = {"requires_safety_checker": False}
        own = type(pipeline)(**parts, **settings)
        own.set_progress_bar_config(disable=True)
        (image,) = own(
            self.prompt,
            height=self.side,
            width=self.side,
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(7)],
            output_type="np",
        ).images
        return (image * 255).round().astype(int)

    def row(self) -> str:
        """Its line of the table."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                difference = self.difference(Path(folder))
            except InputError as error:
                found = "no", str(error).replace(folder, "").replace("|", "\\|")
            else:
                found = "yes", f"at most {LEVELS} of 255" if difference <= LEVELS else f"{difference} of 255"
        return f"| {self.name} | {' | '.join(found)} |"


@cache
def tiny() -> Pipeline:
    """For what neither side changes."""
    return build_tiny_pipeline()


def changed(**parts: Callable[[Any], Any]) -> Callable[[], Pipeline]:
    """The tiny pipeline with parts made anew of what they were."""

    def make() -> Pipeline:
        pipeline = build_tiny_pipeline()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for name, part in parts.items():
                setattr(pipeline, name, part(getattr(pipeline, name)))
        return pipeline

    return make


def applied(change: Callable[[Pipeline], Any]) -> Callable[[], Pipeline]:
    """The tiny pipeline after something was done to it."""

    def make() -> Pipeline:
        pipeline = build_tiny_pipeline()
        change(pipeline)
        return pipeline

    return make


def scheduled(name: str = "DDIMScheduler", **settings: Any) -> Callable[[], Pipeline]:
    """The tiny pipeline with a scheduler of diffusers on Stable Diffusion's noise schedule."""
    noise: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

    def make() -> Pipeline:
        parts = tiny().components
        kind = getattr(diffusers, name)
        known = {key: value for key, value in noise.items() if key in signature(kind).parameters}
        scheduler = kind(**{**known, **settings})
        return StableDiffusionPipeline(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)

    return make


def assigned(name: str = "DDIMScheduler", **settings: Any) -> Callable[[], Pipeline]:
    """The tiny pipeline with a scheduler that was put in afterwards, and stays as it is."""
    return changed(scheduler=lambda old: getattr(diffusers, name)(**settings))


def again(network: Any, **settings: Any) -> Any:
    """A new network with other settings."""
    kept = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return type(network).from_config({**kept, **settings})


def unet(**settings: Any) -> Callable[[], Pipeline]:
    """The tiny pipeline with a denoiser of other settings."""

    def make(old: UNet2DConditionModel) -> UNet2DConditionModel:
        new = again(old, **settings)
        new.conv_out.weight.data *= 4
        return new.eval()

    return changed(unet=make)


# --- schedulers ---------------------------------------------------------------------------------------------

OF_STABLE_DIFFUSION = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def schedulers() -> Iterator[Case]:
    group = "Schedulers"
    for name in (*SAMPLERS, "SASolverScheduler"):
        if name.startswith("KDPM2"):  # slow to make
            make, samplers, drawn = scheduled(num_train_timesteps=100), (name,), "as `model.sampler`"
        elif name in SAMPLERS:
            make = scheduled(name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
            samplers, drawn = (None, name), "drawn by DDIM and by `model.sampler`"
        else:
            make, samplers, drawn = scheduled(name), (None,), "drawn by DDIM"
        yield Case(group, f"`{name}`, {drawn}", make, samplers=samplers)
    for spacing in ("leading", "linspace", "trailing"):
        make = scheduled(timestep_spacing=spacing, **OF_STABLE_DIFFUSION)
        yield Case(group, f"`timestep_spacing={spacing}`", make, steps=(3, 7))
    yield Case(group, "`set_alpha_to_one=False`", scheduled(set_alpha_to_one=False))
    yield Case(group, "`trained_betas`", scheduled(trained_betas=np.linspace(1e-4, 0.02, 1000).tolist()))
    yield Case(group, "`prediction_type=v_prediction`", scheduled(prediction_type="v_prediction"))
    for spacing in ("leading", "trailing"):
        make = scheduled(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing=spacing
        )
        name = f"zero terminal SNR (`rescale_betas_zero_snr`), v-prediction, {spacing}"
        samplers = (None, "EulerDiscreteScheduler", "DDPMScheduler")
        yield Case(group, name, make, samplers=samplers)
    yield Case(
        group,
        "SD-Turbo: `EulerDiscreteScheduler`, trailing, one step without guidance",
        scheduled("EulerDiscreteScheduler", timestep_spacing="trailing"),
        samplers=(None, "EulerDiscreteScheduler"),
        guidance=1.0,
        steps=(1,),
    )
    yield Case(
        group,
        "LCM-LoRA, fused: `LCMScheduler`, three steps without guidance, drawn by DDIM",
        scheduled("LCMScheduler"),
        guidance=1.0,
    )


def other_schedulers() -> Iterator[Case]:
    group = "Schedulers"
    for name in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "IPNDMScheduler"):
        yield Case(group, f"`{name}`", scheduled(name), opens=False)
    flow = scheduled("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True)
    yield Case(group, "`UniPCMultistepScheduler` of flow matching", flow, opens=False)
    sample = scheduled(prediction_type="sample")
    yield Case(group, "`prediction_type=sample`", sample, opens=False)
    zero = scheduled(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    yield Case(group, "zero terminal SNR, prediction of noise", zero, opens=False)
    for option in ("clip_sample", "thresholding"):
        make = assigned(**{"clip_sample": False, option: True})
        yield Case(group, f"`{option}=True`, put into a pipeline in memory", make, opens=False)
    yield Case(
        group,
        "`beta_schedule=sigmoid`",
        scheduled("DDPMScheduler", beta_schedule="sigmoid"),
        opens=False,
    )
    yield Case(
        group,
        "a sampler without zero terminal SNR for a model with it",
        scheduled(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        samplers=("HeunDiscreteScheduler",),
        opens=False,
    )


# --- text ---------------------------------------------------------------------------------------------------


def inverted(vectors: int, *, resized: bool = True) -> Callable[[Pipeline], None]:
    """A textual inversion ``<x>`` as diffusers loads it."""

    def change(pipeline: Pipeline) -> None:
        tokens = ["<x>", *(f"<x>_{i}" for i in range(1, vectors))]
        pipeline.tokenizer.add_tokens(tokens)
        if resized:
            pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
            rows = torch.randn(vectors, WIDTH, generator=torch.Generator().manual_seed(2))
            pipeline.text_encoder.get_input_embeddings().weight.data[-vectors:] = rows

    return change


def masked(pipeline: Pipeline) -> None:
    pipeline.text_encoder.config.use_attention_mask = True


def endless(pipeline: Pipeline) -> None:
    pipeline.tokenizer.model_max_length = int(1e30)


def pooled(pipeline: Pipeline) -> None:
    config = copy.deepcopy(pipeline.text_encoder.config)
    config.projection_dim = WIDTH
    pipeline.text_encoder = CLIPTextModelWithProjection(config)


def texts() -> Iterator[Case]:
    group = "Text"
    for vectors in (1, 3):
        name = "textual inversion of one vector" if vectors == 1 else "textual inversion of three vectors"
        yield Case(group, name, applied(inverted(vectors)), prompt="a <x> gun, <x>")
    yield Case(group, "text encoder with `use_attention_mask`", applied(masked))
    only = applied(inverted(1, resized=False))
    name = "textual inversion in the tokenizer alone, once a prompt has it"
    yield Case(group, name, only, prompt="a <x>", opens=False)
    yield Case(group, "tokenizer without `model_max_length`", applied(endless), opens=False)
    yield Case(group, "`CLIPTextModelWithProjection`", applied(pooled), opens=False)


# --- denoisers and autoencoders -----------------------------------------------------------------------------


def tiny_vae(old: AutoencoderKL) -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def asymmetric_vae(old: AutoencoderKL) -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 16),
        norm_num_groups=4,
    )


def vq_vae(old: AutoencoderKL) -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )


def kl_vae(**settings: Any) -> Callable[[AutoencoderKL], AutoencoderKL]:
    return lambda old: again(old, **settings)


def custom_processor(pipeline: Pipeline) -> None:
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.processor = CustomDiffusionAttnProcessor(hidden_size=32, cross_attention_dim=WIDTH)


def networks() -> Iterator[Case]:
    group = "Denoisers and autoencoders"
    yield Case(group, "`sample_size` as two equal numbers", unet(sample_size=[8, 8]))
    yield Case(group, "`use_linear_projection`", unet(use_linear_projection=True))
    yield Case(group, "`enable_freeu`", applied(lambda pipeline: pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4)))
    sliced = applied(lambda pipeline: pipeline.unet.set_attn_processor(SlicedAttnProcessor(1)))
    yield Case(group, "`SlicedAttnProcessor`", sliced)
    yield Case(group, "`AutoencoderTiny`", changed(vae=tiny_vae))
    yield Case(group, "`AsymmetricAutoencoderKL`", changed(vae=asymmetric_vae))
    shifted = kl_vae(shift_factor=0.5, latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    yield Case(
        group, "`shift_factor`, `latents_mean`, which diffusers' pipeline ignores", changed(vae=shifted)
    )
    plain = kl_vae(use_quant_conv=False, use_post_quant_conv=False)
    yield Case(group, "`use_post_quant_conv=False`", changed(vae=plain))
    for settings, name in (
        ({"time_cond_proj_dim": 8}, "`time_cond_proj_dim` (a distilled LCM)"),
        ({"num_class_embeds": 3}, "`num_class_embeds`"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, "`addition_embed_type=text`"),
        ({"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj"}, "`encoder_hid_dim_type`"),
        ({"out_channels": 8}, "`out_channels=8` (predicted variances)"),
        ({"in_channels": 9}, "`in_channels=9` (inpainting)"),
        ({"sample_size": [8, 16]}, "`sample_size` of another height than width"),
    ):
        yield Case(group, name, unet(**settings), opens=False)
    yield Case(group, "`CustomDiffusionAttnProcessor`", applied(custom_processor), opens=False)
    yield Case(group, "`VQModel`", changed(vae=vq_vae), opens=False)


# --- in memory ----------------------------------------------------------------------------------------------


def in_inference_mode() -> Pipeline:
    with torch.inference_mode():
        return build_tiny_pipeline()


def cast_by_layers(pipeline: Pipeline) -> None:
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def quantized(pipeline: Pipeline) -> None:
    projection = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    projection.weight = torch.nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)


def in_memory() -> Iterator[Case]:
    group = "Pipelines in memory"
    for name, change in (
        ("`enable_sequential_cpu_offload`", lambda p: p.enable_sequential_cpu_offload(device="cpu")),
        ("`enable_model_cpu_offload`", lambda p: p.enable_model_cpu_offload(device="cpu")),
        (
            "`enable_group_offload`",
            lambda p: p.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        ),
        ("`enable_layerwise_casting`", cast_by_layers),
        ("`torch.compile(pipeline.unet)`", lambda p: setattr(p, "unet", torch.compile(p.unet))),
        ("`pipeline.unet.compile()`", lambda p: p.unet.compile()),
        ("quantized weights", quantized),
        ("`fuse_qkv_projections`", lambda p: p.fuse_qkv_projections()),
    ):
        yield Case(group, name, applied(change), opens=False)
    yield Case(group, "made in `torch.inference_mode()`", in_inference_mode, opens=False)


# --- stored forms -------------------------------------------------------------------------------------------

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def stored(
    half: tuple[str, ...] = (),
    *,
    variant: str = "fp16",
    suffix: str = "safetensors",
    sharded: bool = False,
    older: bool = False,
    whole_beside: bool = False,
) -> Callable[[Pipeline, Path], Path]:
    """A folder whose networks ``half`` are stored in half precision under names with ``variant``."""

    def store(pipeline: Pipeline, folder: Path) -> Path:
        pipeline.save_pretrained(folder)
        for name, stem in STEMS.items():
            whole = folder / name / f"{stem}.safetensors"
            state = load_file(whole)
            if name in half:
                state = {
                    key: part.half() if part.is_floating_point() else part for key, part in state.items()
                }
            if not (whole_beside and name in half):
                whole.unlink()
            new = f"pytorch_{stem}" if (suffix == "bin" and name == "text_encoder") else stem
            write(folder / name, new, state, variant if name in half else "", suffix, sharded, older)
        return folder

    return store


def write(
    folder: Path, stem: str, state: dict, variant: str, suffix: str, sharded: bool, older: bool
) -> None:
    """Weights in one file or in two shards with an index."""
    save = save_file if suffix == "safetensors" else torch.save
    dotted = f".{variant}" if variant else ""
    if not sharded:
        save(state, folder / f"{stem}{dotted}.{suffix}")
        return
    names, weight_map = sorted(state), {}
    for number in (1, 2):
        middle = f"-0000{number}-of-00002"
        file = f"{stem}{middle}{dotted}.{suffix}" if older else f"{stem}{dotted}{middle}.{suffix}"
        part = names[number - 1 :: 2]
        save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(part.numel() * part.element_size() for part in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index{dotted}.json").write_text(json.dumps(index))


def rounded(*half: str) -> Callable[[], Pipeline]:
    """The tiny pipeline with some networks' weights rounded to half precision."""

    @cache
    def make() -> Pipeline:
        pipeline = build_tiny_pipeline()
        for name in half:
            getattr(pipeline, name).half().float()
        return pipeline

    return make


def without(name: str, key: str) -> Callable[[Pipeline, Path], Path]:
    """A folder that lacks some of a network's tensors."""

    def store(pipeline: Pipeline, folder: Path) -> Path:
        pipeline.save_pretrained(folder)
        file = folder / name / f"{STEMS[name]}.safetensors"
        state = load_file(file)
        save_file({k: part for k, part in state.items() if key not in k}, file, {"format": "pt"})
        return folder

    return store


def cut_short(pipeline: Pipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def by_older_names(pipeline: Pipeline, folder: Path) -> Path:
    """Save the pipeline with the names of Stable Diffusion 1.x, which the libraries have given up since."""
    pipeline.save_pretrained(folder)
    attention = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    vae, text_encoder = folder / "vae" / STEMS["vae"], folder / "text_encoder" / STEMS["text_encoder"]
    tensors = {}
    for name, tensor in load_file(vae.with_suffix(".safetensors")).items():
        for new, old in attention.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[name] = tensor
    assert any(".query." in name for name in tensors)
    save_file(tensors, vae.with_suffix(".safetensors"), {"format": "pt"})
    stored_text = load_file(text_encoder.with_suffix(".safetensors")).items()
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in stored_text}
    length = pipeline.text_encoder.config.max_position_embeddings
    tensors["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(tensors, text_encoder.with_suffix(".safetensors"), {"format": "pt"})
    return folder


def folders() -> Iterator[Case]:
    group = "Folders"
    every = tuple(STEMS)
    for name, half, store in (
        ("float32, `.safetensors`", (), stored()),
        ("float32, `.bin`", (), stored(suffix="bin")),
        ("float32, shards of `.safetensors`", (), stored(sharded=True)),
        ("float32, shards of `.bin`", (), stored(suffix="bin", sharded=True)),
        ("half precision, `.fp16.safetensors`", every, stored(every)),
        ("half precision, `.fp16.bin`", every, stored(every, suffix="bin")),
        ("half precision, shards (`.fp16-00001-of-00002.safetensors`)", every, stored(every, sharded=True)),
        (
            "half precision, shards by older names (`-00001-of-00002.fp16.safetensors`)",
            every,
            stored(every, sharded=True, older=True),
        ),
        ("half precision by another name (`.half.safetensors`)", every, stored(every, variant="half")),
        ("older names of autoencoder and text encoder, as published", (), by_older_names),
        ("denoiser alone in half precision", ("unet",), stored(("unet",))),
        ("text encoder alone in half precision", ("text_encoder",), stored(("text_encoder",))),
        ("both, of which float32 is read", (), stored(every, whole_beside=True)),
    ):
        yield Case(group, name, rounded(*half), store)
    yield Case(
        group, "text encoder without its final norm", rounded(), without("text_encoder", "final"), opens=False
    )
    yield Case(group, "denoiser without one tensor", rounded(), without("unet", "conv_in.bias"), opens=False)
    yield Case(group, "vae without its decoder", rounded(), without("vae", "decoder"), opens=False)
    yield Case(group, "a file that is cut short", rounded(), cut_short, opens=False)


# --- single files -------------------------------------------------------------------------------------------


def one_file(
    change: Callable[[dict], dict] = lambda state: state, suffix: str = "safetensors"
) -> Callable[[Pipeline, Path], tuple[Path, Path]]:
    """A checkpoint by the original names, and its configuration's folder, which has no weights."""

    def store(pipeline: Pipeline, folder: Path) -> tuple[Path, Path]:
        pipeline.save_pretrained(folder / "base")
        for file in (folder / "base").rglob("*.safetensors"):
            file.unlink()
        file = folder / f"model.{suffix}"
        save_file(change(original_state(pipeline)), file)
        return file, folder / "base"

    return store


def older_names(state: dict) -> dict:
    prefix = "cond_stage_model.transformer."
    renamed = {name.replace(f"{prefix}text_model.", prefix): part for name, part in state.items()}
    return renamed | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def with_ema(state: dict) -> dict:
    ema = {
        name.replace("model.diffusion_model.", "model_ema.diffusion_model").replace(".", ""): part * 2
        for name, part in state.items()
        if name.startswith("model.")
    }
    return state | ema


@cache
def second() -> Pipeline:
    """Stable Diffusion 2.x, told by the width of its text states."""
    return pipeline_of("sd2", small=True)


def single_files() -> Iterator[Case]:
    group = "Single files"

    def halved(state: dict) -> dict:
        return {name: part.half() for name, part in state.items()}

    def without_norm(state: dict) -> dict:
        return {name: part for name, part in state.items() if "final_layer_norm" not in name}

    yield Case(group, "Stable Diffusion 1.x", tiny, one_file())
    name = "Stable Diffusion 2.x (OpenCLIP's names, v-prediction)"
    yield Case(group, name, second, one_file(), side=32, steps=(2,))
    yield Case(group, "text encoder by older names, without `text_model`", tiny, one_file(older_names))
    name = "half precision, averaged weights beside (`model_ema.*`), which are not read"
    yield Case(group, name, rounded(*STEMS), one_file(lambda state: with_ema(halved(state))))
    yield Case(group, "text encoder without its final norm", tiny, one_file(without_norm), opens=False)
    yield Case(group, "`.ckpt`", tiny, one_file(suffix="ckpt"), opens=False)


# --- Stable Diffusion XL --------------------------------------------------------------------------------


def xl(
    change: Callable[[StableDiffusionXLPipeline], None] = lambda pipeline: None, **settings: Any
) -> Callable[[], Pipeline]:
    """The tiny XL after a change, with some of its scheduler's settings changed."""

    def make() -> Pipeline:
        pipeline = build_tiny_sdxl()
        change(pipeline)
        scheduler = getattr(diffusers, settings.get("name", "DDIMScheduler"))
        others = {key: value for key, value in settings.items() if key != "name"}
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **others)
        return pipeline

    return make


def xl_unet(**settings: Any) -> Callable[[], Pipeline]:
    return xl(lambda pipeline: setattr(pipeline, "unet", again(pipeline.unet, **settings)))


def inverted_twice(pipeline: StableDiffusionXLPipeline) -> None:
    """A textual inversion in both tokenizers and text encoders."""
    for end in ("", "_2"):
        tokenizer, encoder = (getattr(pipeline, f"{part}{end}") for part in ("tokenizer", "text_encoder"))
        tokenizer.add_tokens("<x>")
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        row = torch.randn(encoder.config.hidden_size, generator=torch.Generator().manual_seed(2))
        encoder.get_input_embeddings().weight.data[-1] = row


def standardised(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.vae.register_to_config(latents_mean=[0.5, 0.0, -0.5, 1.0], latents_std=[2.0, 1.0, 0.5, 1.5])


def without_first_encoder(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.text_encoder, pipeline.tokenizer = None, None


def without_zeros(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)


def xl_folder(pipeline: Pipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def xl_models() -> Iterator[Case]:
    group = "Stable Diffusion XL"
    samplers = (None, "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    yield Case(group, "Stable Diffusion XL, from a folder", xl(), xl_folder, samplers=samplers)
    yield Case(group, "`StableDiffusionXLPipeline` in one file", xl(), one_file())
    euler = {"name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    yield Case(
        group,
        "XL-Turbo: `EulerAncestralDiscreteScheduler`, trailing, one to four steps without guidance",
        xl(**euler),
        samplers=(None, "EulerAncestralDiscreteScheduler"),
        guidance=0.0,
        steps=(1, 2, 4),
    )
    yield Case(group, "LCM-LoRA for XL, fused: `LCMScheduler`", xl(name="LCMScheduler"), guidance=1.0)
    yield Case(group, "`force_zeros_for_empty_prompt=False`", xl(without_zeros))
    yield Case(group, "a prompt with `!!`, which both tokenizers read differently", xl(), prompt="a gun!!")
    yield Case(group, "textual inversion in both text encoders", xl(inverted_twice), prompt="a <x> gun")
    yield Case(group, "`latents_mean` and `latents_std`", xl(standardised))
    once = xl(inverted(1, resized=False))
    yield Case(group, "textual inversion in one of the tokenizers", once, opens=False)
    yield Case(group, "one text encoder (XL's refiner)", xl(without_first_encoder), opens=False)
    refiner = xl_unet(projection_class_embeddings_input_dim=POOLED + 5 * SIZE_WIDTH)
    yield Case(group, "five sizes (a refiner's denoiser)", refiner, opens=False)
    name = "`time_cond_proj_dim` for XL (a distilled LCM)"
    yield Case(group, name, xl_unet(time_cond_proj_dim=8), opens=False)


# --- Stable Diffusion 3 and FLUX.1 ----------------------------------------------------------------------


@dataclass(frozen=True)
class FlowCase(Case):
    """A model of flow matching, whose own scheduler draws, with T5's tokens padded to a small length."""

    guidance: float = 3.5

    def open(self, folder: Path) -> Adapter:
        """The model as this project reads it."""
        options: dict[str, Any] = {"resolution": self.side, "max_sequence_length": T5_LENGTH}
        source = self.store(self.make(), folder)
        if isinstance(source, tuple):
            return load_adapter(source[0], config=source[1], **options)
        return load_adapter(source, **options) if isinstance(source, Path) else adapter_of(source, **options)

    def drawn_here(self, adapter: Adapter, sampler: str | None, steps: int) -> np.ndarray:
        """A picture by this project, ``[H, W, 3]``. If guidance is embedded, no step evaluates ∅."""
        scale = self.guidance if adapter.guided else 1.0
        return replace(self, guidance=scale)._drawn(adapter, sampler, steps)

    def _drawn(self, adapter: Adapter, sampler: str | None, steps: int) -> np.ndarray:
        return super().drawn_here(adapter, sampler, steps)

    def drawn_by_diffusers(self, pipeline: Any, sampler: str | None, steps: int) -> np.ndarray:
        """The same picture by diffusers."""
        pipeline.set_progress_bar_config(disable=True)
        (image,) = pipeline(
            self.prompt,
            height=self.side,
            width=self.side,
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            max_sequence_length=T5_LENGTH,
            generator=[torch.Generator().manual_seed(7)],
            output_type="np",
        ).images
        return (image * 255).round().astype(int)


def flow(family: str, change: Callable[[Any], None] = lambda pipeline: None, **settings: Any) -> Any:
    """A tiny pipeline after a change, with some of its scheduler's settings changed."""

    def make() -> Any:
        pipeline = build(family)
        change(pipeline)
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **settings)
        return pipeline

    return make


def flow_folder(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def flow_file(pipeline: Any, folder: Path) -> tuple[Path, Path]:
    """A denoiser in one file, under the original code's names, and its configuration's folder."""
    pipeline.save_pretrained(folder / "base")
    names = ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight")
    save_file(
        {f"model.diffusion_model.{name}": torch.zeros(2, 2) for name in names}, folder / "x.safetensors"
    )
    return folder / "x.safetensors", folder / "base"


def quantized_folder(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    file = folder / "transformer" / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    return folder


def int8_entry(pipeline: Any) -> None:
    layer = pipeline.transformer.context_embedder
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


def with_scheduler(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        pipeline = build("sd3")
        pipeline.scheduler = getattr(diffusers, name)(**settings)
        return pipeline

    return make


def without_shift(pipeline: Any) -> None:
    pipeline.vae.register_to_config(shift_factor=None)


def with_lora(pipeline: Any) -> None:
    layer = pipeline.transformer.transformer_blocks[0].attn
    layer.to_q.base_layer = torch.nn.Linear(2, 2)


def fused(pipeline: Any) -> None:
    pipeline.transformer.fuse_qkv_projections()


def flow_models() -> Iterator[Case]:
    group = "Stable Diffusion 3 and FLUX.1"
    own = (None, "FlowMatchEulerDiscreteScheduler")
    yield FlowCase(group, "Stable Diffusion 3, from a folder", flow("sd3"), flow_folder, samplers=own)
    yield FlowCase(
        group, "Stable Diffusion 3 without T5, from a folder", lambda: build_sd3(t5=False), flow_folder
    )
    yield FlowCase(group, "Stable Diffusion 3.5, from a folder", flow("sd35"), flow_folder)
    yield FlowCase(group, "Stable Diffusion 3 without guidance", flow("sd3"), guidance=1.0)
    yield FlowCase(
        group, "a shift by resolution (`use_dynamic_shifting`)", flow("sd3", use_dynamic_shifting=True)
    )
    yield FlowCase(group, "`use_karras_sigmas` of a flow", flow("sd3", use_karras_sigmas=True))
    yield FlowCase(group, "FLUX.1 dev, from a folder", flow("flux_dev"), flow_folder, samplers=own)
    yield FlowCase(
        group,
        "FLUX.1 schnell, one and four steps",
        flow("flux_schnell"),
        flow_folder,
        steps=(1, 4),
        guidance=0.0,
    )
    stochastic = flow("sd3", stochastic_sampling=True)
    yield FlowCase(group, "`stochastic_sampling=True`", stochastic, opens=False)
    yield FlowCase(group, "`DDIMScheduler` for a flow", with_scheduler("DDIMScheduler"), opens=False)
    heun = with_scheduler("FlowMatchHeunDiscreteScheduler")
    yield FlowCase(group, "`FlowMatchHeunDiscreteScheduler`", heun, opens=False)
    yield FlowCase(group, "a vae without `shift_factor`", flow("flux_dev", without_shift), opens=False)
    yield FlowCase(
        group, "a quantized transformer in a folder", flow("flux_dev"), quantized_folder, opens=False
    )
    yield FlowCase(group, "a quantized transformer in memory", flow("flux_dev", int8_entry), opens=False)
    yield FlowCase(group, "a LoRA in the transformer", flow("flux_dev", with_lora), opens=False)
    yield FlowCase(group, "`fuse_qkv_projections` of a transformer", flow("flux_dev", fused), opens=False)
    yield FlowCase(group, "a transformer in one file", flow("sd3"), flow_file, opens=False)


CASES = (
    *schedulers(),
    *other_schedulers(),
    *texts(),
    *networks(),
    *in_memory(),
    *folders(),
    *single_files(),
    *xl_models(),
    *flow_models(),
)


def table() -> str:
    """All rows by group."""
    lines: list[str] = []
    for group in dict.fromkeys(case.group for case in CASES):
        lines += ["", f"## {group}", "", HEAD, "|---|---|---|"]
        lines += [case.row() for case in CASES if case.group == group]
    return "\n".join(lines)


if __name__ == "__main__":
    refresh(table(), PAGE, MARK)
