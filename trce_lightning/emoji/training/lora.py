"""A benign LoRA of the embedded model, trained by ``python -m trce_lightning.emoji.training.lora FOLDER``.

``robustness.lora=[FOLDER/pytorch_lora_weights.safetensors]`` scores an erased model with it
on top. It is what a user would train on pictures of their own: the original model draws harmless subjects in
one style, and learns to draw all that it is asked for in that style. Does it bring back what was erased?
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
    """Low-rank updates of all attention projections; batches are scaled latents and text states."""

    def __init__(self, adapter: StableDiffusionAdapter, max_steps: int) -> None:
        super().__init__(LEARNING_RATE, max_steps, warmup_steps=max_steps // 10)
        self.unet, self.scheduler = adapter.denoiser, adapter.ddim
        self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """:func:`~.unet.denoising_loss`, on which the model itself was trained."""
        loss = denoising_loss(self.unet, self.scheduler, *batch)
        self.log("loss", loss, prog_bar=True)
        return loss


def pictures(adapter: StableDiffusionAdapter, count: int) -> tuple[Tensor, Tensor]:
    """Scaled latents of harmless subjects in :data:`LEARNT`, and states of captions that don't name it."""
    subjects = benign_subjects([])[:count]
    styled = [PromptRecord(f"lora-{name}", f"{article(name)}, {STYLE_WORDS[LEARNT][0]}") for name in subjects]
    images = generate(
        adapter, styled, guidance_scale=3.0, num_steps=20, batch_size=32, description="pictures to learn from"
    )
    latents = torch.cat([adapter.encode_images(part) for part in images.split(32)])
    return latents, adapter.encode([article(name) for name in subjects]).states["clip"]


def train(folder: Path, *, steps: int = STEPS, count: int = 96) -> None:
    """Leave ``pytorch_lora_weights.safetensors`` in ``folder``; a training killed after minutes goes on."""
    torch.manual_seed(0)
    adapter = load_adapter(weights_folder(), channels_last=True)
    rows = TensorDataset(*pictures(adapter, count))
    part = LoraPart(adapter, steps)
    fit(part, DataLoader(rows, batch_size=BATCH, shuffle=True, drop_last=True), folder / "training")
    layers = get_peft_model_state_dict(adapter.denoiser)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main() -> None:
    """Parse the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    train(parser.parse_args().folder)


if __name__ == "__main__":
    main()
