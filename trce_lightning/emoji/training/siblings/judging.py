"""Fit the read-out that tells scenes from pictures of one subject, and measure the judge on scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from trce_lightning.emoji.judge import Judge, to_unit
from trce_lightning.emoji.package import weights_folder
from trce_lightning.emoji.scenes import SceneJudge
from trce_lightning.emoji.training.art import sprites
from trce_lightning.emoji.training.scenes import NOTHING, random_labels, render
from trce_lightning.metrics.collateral import BESIDE

RIDGE = 1e-3
"""The weight of the penalty on the read-out's weights, relative to the features' mean energy."""
PICTURES = 1000
"""The pictures of one subject, and the scenes, of the fit. A quarter as many are held out."""


@torch.no_grad()
def fit_scene_judge(folder: Path, judge: Judge) -> tuple[SceneJudge, dict[str, float]]:
    """Return the judge with a fitted read-out, and its accuracy on pictures that nothing was trained on.

    The read-out is the linear map of the judge's features with the least squared distance to +1 for scenes
    and −1 for others, with a ridge penalty. Every picture is there twice: as rendered, and decoded by the
    autoencoder, as generated pictures are.
    """
    images, labels = _pictures(folder, PICTURES, held_out=False)
    features = torch.cat([judge.features(part).double() for part in images.split(256)])
    rows = torch.cat([features, torch.ones(len(features), 1)], 1)
    target = torch.where(labels[:, 1] == NOTHING, -1.0, 1.0).double()
    gram = rows.T @ rows
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram + penalty, rows.T @ target).float()
    scene_judge = SceneJudge(judge).eval()
    scene_judge.scene.weight.copy_(solution[None, :-1])
    scene_judge.scene.bias.copy_(solution[-1:])
    return scene_judge, measure(scene_judge, *_pictures(folder, PICTURES // 4, held_out=True))


@torch.no_grad()
def measure(judge: SceneJudge, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the share of pictures told apart from scenes, and of subjects that are recognised.

    ``labels`` are those of :func:`~trce_lightning.emoji.training.scenes.random_labels`.
    """
    parts = [(judge.is_scene(part), judge(part)) for part in images.split(256)]
    scene = torch.cat([found for found, _ in parts])
    left, right = (torch.cat([seen[name].argmax(-1) for _, seen in parts]) for name in ("subject", BESIDE))
    true = labels[:, 1] != NOTHING
    found = {
        "scene": scene == true,
        "left": (left == labels[:, 0])[true],
        "right": (right == labels[:, 1])[true],
        "both": ((left == labels[:, 0]) & (right == labels[:, 1]))[true],
        "single": (left == labels[:, 0])[~true],
    }
    return {name: rows.float().mean().item() for name, rows in found.items()}


def _pictures(folder: Path, count: int, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Return ``count`` pictures of one subject and as many scenes, rendered and decoded, with labels."""
    labels = random_labels(count, count, held_out=held_out, seed=1)
    images = torch.from_numpy(render(sprites(folder), labels, seed=1))
    vae = AutoencoderKL.from_pretrained(weights_folder() / "vae", torch_dtype=torch.float32)
    decoded = []
    for part in images.split(64):
        unit = vae.decode(vae.encode(to_unit(part)).latent_dist.mean).sample
        decoded.append(((unit + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat([images, *decoded]), torch.from_numpy(labels).repeat(2, 1)
