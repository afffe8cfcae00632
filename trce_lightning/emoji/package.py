"""Open the parts of the embedded model that ship with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.eight_bits import unpacked
from trce_lightning.emoji.judge import Judge
from trce_lightning.metrics.fidelity import Clip
from trce_lightning.runtime.storage import read_safetensors

INSTALL_AGAIN = "install trce-lightning again"


def weights_folder() -> Path:
    """Return the embedded model's pipeline folder.

    CLIP's vision half, the judge and the statistics of real images lie beside the pipeline's parts.
    """
    return Path(__file__).parent / "weights"


def never_learnt_file(category: str) -> Path:
    """Return the file of a denoiser that was trained without this category, in 8 bits. It may not exist."""
    return weights_folder() / f"without-{category}.safetensors"


def load_never_learnt(category: str) -> dict[str, Tensor] | None:
    """Return the weights of a denoiser that was trained without this category, if they ship."""
    file = never_learnt_file(category)
    if not file.exists():
        return None
    return unpacked(read_safetensors(file, f"the denoiser without {category}", INSTALL_AGAIN))


def load_judge(folder: Path) -> Judge:
    """Return the judge, frozen."""
    judge = Judge()
    judge.load_state_dict(
        read_safetensors(folder / "judge.safetensors", "the judge's weights", INSTALL_AGAIN)
    )
    return judge.requires_grad_(False).eval()


def load_clip_pair(folder: Path) -> Clip:
    """Return the model's own CLIP pair: the shipped vision half and the pipeline's text encoder."""
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
