"""Variations of the usual way to generate an image: sampler, negative prompt, first latent, LoRA."""

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
    """The start of image-to-image: a noised picture, and the last share ``strength`` of the steps.

    ``pictures`` is a folder of images of the same prompts, or one image file for all prompts.
    """

    pictures: Path
    strength: float

    def images(self, records: Sequence[PromptRecord], side: int) -> Tensor:
        """Return the pictures as uint8 ``[B, 3, side, side]``. Raise the errors of `load_images`.

        The picture of a file is cut to a square.
        """
        if self.pictures.is_dir():
            return load_images(self.pictures, records)
        try:
            with Image.open(self.pictures) as picture:
                square = ImageOps.fit(picture.convert("RGB"), (side, side))
        except UnidentifiedImageError as error:
            raise InputError(f"robustness.picture: expected an image, got {self.pictures}") from error
        return pil_to_tensor(square).expand(len(records), -1, -1, -1)

    def fingerprint(self) -> str:
        """Return a hash of the file's bytes, or of the manifest and settings of the folder's images."""
        folder = self.pictures.is_dir()
        files = [self.pictures / name for name in (META, MANIFEST)] if folder else [self.pictures]
        return hashlib.blake2b(b"\n".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Variation:
    """A way to generate images. The default is DDIM from pure noise, guided away from the empty prompt.

    Args:
        scheduler: the class name of a scheduler of diffusers. None means this project's DDIM.
        timestep_spacing: the places of that scheduler's steps. None means the model's own spacing.
        negative_prompt: the text that guidance leads away from.
        start: the picture to start from. None means pure noise.
        lora: the LoRA that is put on top of the model meanwhile.
    """

    scheduler: str | None = None
    timestep_spacing: str | None = None
    negative_prompt: str = ""
    start: Start | None = None
    lora: Lora | None = None

    @property
    def strength(self) -> float:
        """Return the share of the steps that is taken."""
        return 1.0 if self.start is None else self.start.strength

    def of_set(self, name: str) -> Variation:
        """Return the variation for one prompt set. If pictures lie in a folder, they are the set's own."""
        if self.start is None or not self.start.pictures.is_dir():
            return self
        return replace(self, start=replace(self.start, pictures=self.start.pictures / name))

    def meta(self) -> dict[str, Any]:
        """Return this variation's part of an image folder's record. It is empty if nothing differs.

        The LoRA's weights are not in it, because the generator's fingerprint includes them.
        """
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
