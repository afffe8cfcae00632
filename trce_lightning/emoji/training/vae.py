"""Build and train the embedded model's autoencoder: 64×64 images to 4×16×16 latents and back."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from trce_lightning.emoji.judge import to_unit
from trce_lightning.emoji.training.part import Part, native_autocast

KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5


def build_vae() -> AutoencoderKL:
    """Return an autoencoder of factor 4 with four latent channels.

    ``scaling_factor`` is set after training, when the latents' deviation is known.
    """
    return AutoencoderKL(
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=64,
        mid_block_add_attention=False,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return horizontal and vertical first differences, ``[B, C, H, W-1]`` and ``[B, C, H-1, W]``."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


class VaePart(Part):
    """Train reconstruction with L1 + L2 + L1 of the edges + a slight KL to N(0, I)."""

    def __init__(self, max_steps: int, lr: float = 2e-3) -> None:
        super().__init__(lr, max_steps)
        self.vae = build_vae().to(memory_format=torch.channels_last)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the loss. ``batch[0]`` is ``[B, 3, 64, 64]`` uint8."""
        images = to_unit(batch[0]).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample.float()
        error = decoded - images
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
        loss = error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edge
        self.log("psnr", 10 * torch.log10(4 / error.square().mean()), prog_bar=True)
        return loss + KL_WEIGHT * posterior.kl().mean()


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor, batch_size: int = 256) -> Tensor:
    """Return posterior means of uint8 images, unscaled, ``[N, 4, 16, 16]`` float32, on the CPU."""
    parts = []
    for rows in images.split(batch_size):
        with native_autocast(vae.device.type):
            parts.append(vae.encode(to_unit(rows.to(vae.device))).latent_dist.mean.float().cpu())
    return torch.cat(parts)
