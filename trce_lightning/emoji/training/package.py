"""Write the trained parts into the folder that ships with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.judge import judge_fid
from trce_lightning.emoji.package import load_judge
from trce_lightning.emoji.training.unet import build_scheduler
from trce_lightning.metrics.fidelity import save_real_statistics


def assemble(source: Path, unet: UNet2DConditionModel, text_encoder: str) -> StableDiffusionPipeline:
    """Return the pipeline of ``unet``, that text encoder and the other trained parts in ``source``."""
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
    """Write the pipeline in float16, CLIP's vision half, the judge and the real images' statistics.

    Args:
        source: the folder of the trained parts.
        target: the folder that :func:`weights_folder` returns.
        real_images: uint8 ``[N, 3, 64, 64]``, the benign composites that FID compares with.
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
