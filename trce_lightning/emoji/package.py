"""Trained parts → the folder that ships with the package, and opening what ships."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.unet import build_scheduler
from trce_lightning.errors import InputError
from trce_lightning.metrics.fidelity import Clip, judge_fid, save_real_statistics
from trce_lightning.storage import read_safetensors

INSTALL_AGAIN = "install trce-lightning again"


def weights_folder() -> Path:
    """The embedded model: a pipeline folder, with CLIP's vision half, judge and real statistics beside."""
    return Path(__file__).parent / "weights"


def check_embedded(unet: UNet2DConditionModel) -> None:
    """``InputError`` unless the denoiser has the embedded one's shape: what judges it fits no other."""
    expected = UNet2DConditionModel.load_config(weights_folder() / "unet")
    names = ("sample_size", "cross_attention_dim")
    if any(unet.config[name] != expected[name] for name in names):
        got = ", ".join(f"{name} {unet.config[name]}" for name in names)
        raise InputError(
            f"model=emoji: expected the embedded model or an edit of it, got a network of {got}; "
            "name its own family, such as model=sd15"
        )


def assemble(source: Path, unet: UNet2DConditionModel, text_encoder: str) -> StableDiffusionPipeline:
    """The pipeline of ``unet``, that text encoder and the other trained parts in ``source``."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(source / "vae"),
        unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(source / text_encoder),
        tokenizer=CLIPTokenizer.from_pretrained(source / "clip"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(source: Path, target: Path, real_images: torch.Tensor) -> None:
    """Assemble the pipeline in float16, the vision half of CLIP, the judge and the real images' statistics.

    Args:
        source: folder of the trained parts.
        target: what :func:`weights_folder` names.
        real_images: uint8 ``[N, 3, 64, 64]`` benign composites that FID compares with.
    """
    target.mkdir(parents=True, exist_ok=True)
    pipeline = assemble(source, UNet2DConditionModel.from_pretrained(source / "unet"), "text_encoder")
    pipeline.to(torch.float16).save_pretrained(target)
    clip = CLIPModel.from_pretrained(source / "clip")
    # The text half is the pipeline's text encoder.
    half = {
        name: tensor.half()
        for name, tensor in clip.state_dict().items()
        if not name.startswith("text_model.")
    }
    (target / "clip").mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in half.items()}, target / "clip" / "vision.safetensors"
    )
    clip.config.save_pretrained(target / "clip")
    CLIPImageProcessor.from_pretrained(source / "clip").save_pretrained(target / "clip")
    judge = load_file(source / "judge.safetensors")
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in judge.items()},
        target / "judge.safetensors",
    )
    fid = judge_fid(load_judge(target))
    for rows in real_images.split(256):
        fid.update(rows, real=True)
    save_real_statistics(fid, target / "real_statistics.safetensors")


def load_judge(folder: Path) -> Judge:
    """The judge, frozen."""
    judge = Judge()
    judge.load_state_dict(
        read_safetensors(folder / "judge.safetensors", "the judge's weights", INSTALL_AGAIN)
    )
    return judge.requires_grad_(False).eval()


def load_embedded_clip(folder: Path) -> Clip:
    """The model's own CLIP pair: the shipped vision half and the pipeline's text encoder and tokenizer."""
    clip = CLIPModel(CLIPConfig.from_pretrained(folder / "clip"))
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    clip.text_model.load_state_dict(text.state_dict())
    rest = {
        name: tensor.float()
        for name, tensor in read_safetensors(
            folder / "clip" / "vision.safetensors", "CLIP's vision half", INSTALL_AGAIN
        ).items()
    }
    missing = clip.load_state_dict(rest, strict=False).missing_keys
    assert all(name.startswith("text_model.") for name in missing)
    return Clip(
        clip.requires_grad_(False).eval(),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPImageProcessor.from_pretrained(folder / "clip"),
    )
