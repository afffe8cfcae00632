"""What may differ from the usual way to make an image: sampler, negative prompt, first latent, a LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from trce_lightning.errors import InputError
from trce_lightning.generation.image_folder import MANIFEST, META, load_images
from trce_lightning.generation.lora import Lora
from trce_lightning.prompts.records import PromptRecord


@dataclass(frozen=True)
class Start:
    """Image-to-image: the last share ``strength`` of the steps, from a noised picture.

    ``pictures`` is a folder of images of the same prompts, or one image file for all.
    """

    pictures: Path
    strength: float

    def images(self, records: Sequence[PromptRecord], side: int) -> Tensor:
        """uint8 ``[B, 3, side, side]``; a file's is cut square. Raises like `load_images`."""
        if self.pictures.is_dir():
            return load_images(self.pictures, records)
        try:
            with Image.open(self.pictures) as picture:
                square = ImageOps.fit(picture.convert("RGB"), (side, side))
        except UnidentifiedImageError as error:
            raise InputError(f"robustness.picture: expected an image, got {self.pictures}") from error
        return pil_to_tensor(square).expand(len(records), -1, -1, -1)

    def fingerprint(self) -> str:
        """Identifies the pictures: the file's bytes, or what made the folder's images."""
        folder = self.pictures.is_dir()
        files = [self.pictures / name for name in (META, MANIFEST)] if folder else [self.pictures]
        return hashlib.blake2b(b"\n".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Variation:
    """How images are made, where it isn't by DDIM from noise alone, guided away from the empty prompt.

    Args:
        scheduler: class name of a scheduler of diffusers; None is this project's DDIM.
        timestep_spacing: where that scheduler places its steps; None leaves the model's own spacing.
        negative_prompt: what guidance leads away from.
        start: picture to start from.
        lora: what is put on top of the model meanwhile.
    """

    scheduler: str | None = None
    timestep_spacing: str | None = None
    negative_prompt: str = ""
    start: Start | None = None
    lora: Lora | None = None

    @property
    def strength(self) -> float:
        """Share of the steps that is taken."""
        return 1.0 if self.start is None else self.start.strength

    def of_set(self, name: str) -> Variation:
        """With the pictures of one prompt set, where these lie in a folder by set."""
        if self.start is None or not self.start.pictures.is_dir():
            return self
        return replace(self, start=replace(self.start, pictures=self.start.pictures / name))

    def meta(self) -> dict[str, Any]:
        """Its part of an image folder's record, empty where nothing differs; the LoRA's weights are the
        generator's."""
        facts: dict[str, Any] = {}
        if self.scheduler is not None:
            facts["scheduler"] = self.scheduler
        if self.timestep_spacing is not None:
            facts["timestep_spacing"] = self.timestep_spacing
        if self.negative_prompt:
            facts["negative_prompt"] = self.negative_prompt
        if self.start is not None:
            facts |= {"strength": self.start.strength, "pictures": self.start.fingerprint()}
        if self.lora is not None:
            facts["lora_scale"] = self.lora.scale
        return facts
