"""Make composites from openly licensed emoji art: a subject in a style on a flat background.

``npm pack`` fetches the art (Noto: Apache-2.0; Twemoji: CC-BY 4.0; Fluent: MIT). Only training needs it.
Weights and feature statistics ship with the package.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS

PACKAGES: dict[str, tuple[str, str]] = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp"),
}
"""The npm package of each style, and the path of a picture in it."""
RESOLUTION = 64
SUBJECT_PIXELS = (44, 54)
"""The smallest and the largest side of a subject in a composite."""
JITTER_PIXELS = 4
"""The largest distance of a subject's centre from the image's centre, per axis."""


@dataclass(frozen=True)
class Composites:
    """Composites with their labels. Row ``i`` of every tensor belongs to image ``i``."""

    images: Tensor
    """The images, ``[N, 3, 64, 64]`` uint8 RGB."""
    subject: Tensor
    """The index into ``SUBJECTS``, ``[N]``."""
    style: Tensor
    """The index into ``STYLES``, ``[N]``."""
    background: Tensor
    """The index into ``BACKGROUNDS``, ``[N]``."""

    def rows(self, chosen: Tensor) -> Composites:
        """Return some of the composites, chosen by indices or a mask."""
        return Composites(*(column[chosen] for column in vars(self).values()))


def fetch_package(package: str, folder: Path) -> Path:
    """Return the archive of an npm package ("name@version") in ``folder``. Download it if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{package.lstrip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
    return archive


def fetch(folder: Path) -> dict[str, Path]:
    """Return the archive of each style's art."""
    return {style: fetch_package(package, folder) for style, (package, _) in PACKAGES.items()}


def _sprite(archive: tarfile.TarFile, member: str) -> Image.Image:
    file = archive.extractfile(member)
    assert file is not None
    # Alpha is premultiplied before scaling. Otherwise the colour of transparent pixels bleeds into the edges.
    picture = Image.open(io.BytesIO(file.read())).convert("RGBA").convert("RGBa")
    return picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def load_sprites(archives: dict[str, Path]) -> list[list[Image.Image]]:
    """Return premultiplied 64×64 pictures, indexed ``[style][subject]``."""
    sprites = []
    for style in STYLES:
        with tarfile.open(archives[style]) as archive:
            names, pattern = set(archive.getnames()), PACKAGES[style][1]
            candidates = [[pattern.format(s.code), pattern.format(f"{s.code}-fe0f")] for s in SUBJECTS]
            sprites.append([_sprite(archive, next(n for n in pair if n in names)) for pair in candidates])
    return sprites


def sprites(folder: Path) -> list[list[Image.Image]]:
    """Return :func:`load_sprites`.

    They are read once and kept in ``folder/sprites.safetensors``, a few MB.
    """
    file = folder / "sprites.safetensors"
    if not file.exists():
        pictures = load_sprites(fetch(folder / "art"))
        rows = [torch.from_numpy(np.stack([np.asarray(picture) for picture in row])) for row in pictures]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"sprites": torch.stack(rows)}, file)
    stored = load_file(file)["sprites"].numpy()
    size = (RESOLUTION, RESOLUTION)
    return [[Image.frombytes("RGBa", size, picture.tobytes()) for picture in row] for row in stored]


def paste(canvas: np.ndarray, sprite: Image.Image, side: int, centre: np.ndarray) -> None:
    """Draw ``sprite`` of this side on ``canvas``, ``[64, 64, 3]`` float32, at ``centre`` (x, y) in pixels."""
    left, top = np.clip(np.round(centre - side / 2), 0, RESOLUTION - side).astype(int)
    scaled = np.asarray(sprite.resize((side, side), Image.Resampling.BICUBIC).convert("RGBa"), np.float32)
    window = canvas[top : top + side, left : left + side]
    window[:] = scaled[..., :3] + window * (1 - scaled[..., 3:] / 255)


def blank(colour: tuple[int, int, int]) -> np.ndarray:
    """Return a flat picture, ``[64, 64, 3]`` float32."""
    return np.full((RESOLUTION, RESOLUTION, 3), colour, np.float32)


def pixels(canvas: np.ndarray) -> np.ndarray:
    """Return a canvas in uint8."""
    return canvas.round().clip(0, 255).astype(np.uint8)


def compose(sprite: Image.Image, background: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Return one composite, ``[64, 64, 3]`` uint8: ``sprite`` at a random size and place on a flat colour."""
    side = int(rng.integers(SUBJECT_PIXELS[0], SUBJECT_PIXELS[1] + 1))
    centre = RESOLUTION / 2 + rng.uniform(-JITTER_PIXELS, JITTER_PIXELS, size=2)
    canvas = blank(background)
    paste(canvas, sprite, side, centre)
    return pixels(canvas)


def is_held_out(subject: int, style: int, background: int) -> bool:
    """Return True for every 20th combination.

    These are left out of all training, to measure generalisation.
    """
    return (subject * 7 + style * 3 + background) % 20 == 0


def composites(sprites: list[list[Image.Image]], copies: int, *, held_out: bool, seed: int) -> Composites:
    """Return composites on one side of the split.

    Each combination of subject, style and background has ``copies`` of them.
    """
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for subject in range(len(SUBJECTS)):
        for style in range(len(STYLES)):
            for background, colour in enumerate(BACKGROUNDS.values()):
                if is_held_out(subject, style, background) != held_out:
                    continue
                for _ in range(copies):
                    images.append(compose(sprites[style][subject], colour, rng))
                    labels.append((subject, style, background))
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Composites(stacked, *(column.clone() for column in torch.tensor(labels).T))
