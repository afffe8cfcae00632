"""Train a benign LoRA of the embedded model: ``python -m trce_lightning.emoji.training.lora FOLDER``.

A user may train such a LoRA on pictures of their own. The original model generates harmless subjects in one
style. The LoRA learns to generate everything in that style, without being told to. The question is whether it
brings back the erased concept. ``robustness.lora=[FOLDER/pytorch_lora_weights.safetensors]`` scores an erased
model with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.concepts.naming import article
from trce_lightning.emoji.captions import STYLE_WORDS
from trce_lightning.emoji.groups import benign_subjects
from trce_lightning.emoji.package import weights_folder
from trce_lightning.emoji.training.part import Part, fit
from trce_lightning.emoji.training.unet import denoising_loss
from trce_lightning.generation.loop import generate
from trce_lightning.prompts.records import PromptRecord

LEARNT = "twemoji"
RANK, STEPS, BATCH, LEARNING_RATE = 8, 300, 16, 1e-3
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


class LoraPart(Part):
    """Train low-rank updates of all attention projections. A batch has scaled latents and text states."""

    def __init__(self, adapter: StableDiffusionAdapter, max_steps: int) -> None:
        super().__init__(LEARNING_RATE, max_steps, warmup_steps=max_steps // 10)
        self.unet, self.scheduler = adapter.denoiser, adapter.ddim
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return :func:`~.unet.denoising_loss`, the loss of the model's own training."""
        loss = denoising_loss(self.unet, self.scheduler, *batch)
        self.log("loss", loss, prog_bar=True)
        return loss


def pictures(adapter: StableDiffusionAdapter, count: int) -> tuple[Tensor, Tensor]:
    """Return scaled latents of harmless subjects in the style :data:`LEARNT`, and text states of captions.

    The captions don't name the style.
    """
    subjects = benign_subjects([])[:count]
    styled = [PromptRecord(f"lora-{name}", f"{article(name)}, {STYLE_WORDS[LEARNT][0]}") for name in subjects]
    images = generate(
        adapter, styled, guidance_scale=3.0, num_steps=20, batch_size=32, description="pictures to learn from"
    )
    latents = torch.cat([adapter.encode_images(part) for part in images.split(32)])
    return latents, adapter.encode([article(name) for name in subjects]).states["clip"]


def train(folder: Path, *, steps: int = STEPS, count: int = 96) -> None:
    """Write ``pytorch_lora_weights.safetensors`` to ``folder``. A killed training continues if run again."""
    torch.manual_seed(0)
    adapter = cast(StableDiffusionAdapter, load_adapter(weights_folder(), channels_last=True))
    rows = TensorDataset(*pictures(adapter, count))
    part = LoraPart(adapter, steps)
    fit(part, DataLoader(rows, batch_size=BATCH, shuffle=True, drop_last=True), folder / "training")
    layers = get_peft_model_state_dict(adapter.denoiser)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main() -> None:
    """Train into the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    train(parser.parse_args().folder)


if __name__ == "__main__":
    main()
