"""Opening the parts of the embedded model that ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.judge import Judge
from trce_lightning.errors import InputError
from trce_lightning.metrics.fidelity import Clip
from trce_lightning.runtime.storage import read_safetensors

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
