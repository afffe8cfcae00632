"""Compute the statistics of the real images that FID compares with, once per folder of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.distributed as dist
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from trce_lightning.errors import InputError
from trce_lightning.generation.image_folder import image_size, read_image
from trce_lightning.metrics.class_detectors import CPU
from trce_lightning.metrics.fidelity import REAL_STATES, load_real_statistics, save_real_statistics
from trce_lightning.runtime.fingerprints import fingerprint
from trce_lightning.runtime.signals import shared

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PIXELS_AT_ONCE = 32 * 512**2
"""The most pixels that go through the feature network at once."""


def load_real(
    metric: FrechetInceptionDistance, source: Path, cache: Path, device: torch.device = CPU
) -> None:
    """Give ``metric`` the statistics of real images. Every rank calls this and reads a share of the pictures.

    Args:
        metric: FID.
        source: a file of statistics, or a folder. All pictures below the folder count. Their sizes may
            differ.
        cache: a folder for the statistics of folders. The key is the pictures' names, sizes and times.
        device: the device that computes the features of pictures.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        InputError: the folder has no pictures, a picture is unreadable, or the statistics belong to another
            network.
    """
    if source.is_file():
        load_real_statistics(metric, source)
        return
    file = cache / f"{fingerprint(metric.inception)}{source_fingerprint(source)}.safetensors"
    # Rank 0 decides: another run may write the file after one rank has looked for it and before the next.
    if not _decided_by_the_first(file.is_file()):
        metric.to(device)
        _see_pictures(metric, _pictures(source))
        if _rank() == 0:
            save_real_statistics(metric, file)
        if shared():
            dist.barrier()
    load_real_statistics(metric, file)


def _see_pictures(metric: FrechetInceptionDistance, pictures: Sequence[Path]) -> None:
    """Sum the features of all pictures over all ranks.

    The feature network scales each picture by itself, so pictures of one size share a batch.
    """
    world_size = dist.get_world_size() if shared() else 1
    share = pictures[_rank() :: world_size]
    part = f", 1 of {world_size} processes" if world_size > 1 else ""
    with tqdm(total=len(share), desc=f"real images{part}", unit="image", disable=_rank() > 0) as progress:
        for batch in batches_of_one_size(share):
            images = torch.stack([read_image(picture) for picture in batch])
            metric.update(images.to(metric.device), real=True)
            progress.update(len(batch))
    if shared():
        for name in REAL_STATES:
            dist.all_reduce(getattr(metric, name))


def batches_of_one_size(pictures: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield batches of pictures of one size. A batch holds at most :data:`PIXELS_AT_ONCE` pixels."""
    sizes = {picture: image_size(picture) for picture in pictures}
    for (width, height), group in groupby(sorted(pictures, key=sizes.__getitem__), key=sizes.__getitem__):
        yield from batched(group, max(1, PIXELS_AT_ONCE // (width * height)))


def batched(items: Iterable[Path], count: int) -> Iterator[list[Path]]:
    """Yield lists of ``count`` items. The last list may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, count)):
        yield batch


def _rank() -> int:
    return dist.get_rank() if shared() else 0


def _decided_by_the_first(verdict: bool) -> bool:
    if not shared():
        return verdict
    verdicts = [verdict]
    dist.broadcast_object_list(verdicts)
    return verdicts[0]


def source_fingerprint(source: Path) -> str:
    """Return a hash of the real images' file names, sizes and times.

    Errors are those of :func:`load_real`.
    """
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
