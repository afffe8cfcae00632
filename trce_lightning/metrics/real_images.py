"""The real images that FID compares with: a folder of pictures, whose statistics are computed once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from trce_lightning.adapters.stable_diffusion import fingerprint
from trce_lightning.errors import InputError
from trce_lightning.image_folder import read_image
from trce_lightning.metrics.fidelity import load_real_statistics, save_real_statistics

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def load_real(metric: FrechetInceptionDistance, source: Path, cache: Path) -> None:
    """Give ``metric`` the statistics of real images.

    Args:
        metric: FID.
        source: a file of statistics, or a folder: all pictures below it, of any sizes.
        cache: folder where statistics of folders are kept, by the pictures' names, sizes and times.

    Raises:
        FileNotFoundError: no such file or folder.
        InputError: a folder without pictures, an unreadable picture, or statistics of another network.
    """
    name = f"{fingerprint(metric.inception)}{source_fingerprint(source)}.safetensors"
    file = source if source.is_file() else cache / name
    if not file.is_file():
        for picture in tqdm(_pictures(source), desc="real images", unit="image"):
            metric.update(read_image(picture)[None].to(metric.device), real=True)
        save_real_statistics(metric, file)
    load_real_statistics(metric, file)


def source_fingerprint(source: Path) -> str:
    """Identifies real images by the files' names, sizes and times; raises as :func:`load_real` does."""
    files = [source] if source.is_file() else _pictures(source)
    rows = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model.real_images: expected a folder of pictures or a file of their statistics, got '{folder}'"
        )
    pictures = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(pictures) < 2:
        raise InputError(
            f"model.real_images: expected pictures ({', '.join(SUFFIXES)}), got {len(pictures)} in '{folder}'"
        )
    return pictures
