"""Variations of the usual way to generate an image: sampler, negative prompt, first latent, LoRA."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from trce_lightning.errors import InputError
from trce_lightning.generation.guidance import ClassifierFreeGuidance, Guidance
from trce_lightning.generation.image_folder import MANIFEST, META, load_images
from trce_lightning.generation.lora import Lora
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.runtime.fingerprints import tensors_fingerprint


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


@dataclass(frozen=True, eq=False, repr=False)
class LatentStart:
    """Sampling by this project's DDIM from given latents, in which a region may be kept.

    Args:
        first_step: step index at which sampling begins. At the number of steps no step is taken, and the
            latents are decoded.
        latents: ``[C, H, W]`` by record id, at the noise level of that step; None is noise.
        known: clean latents ``[C, H, W]`` by record id. After each step they replace the region outside the
            mask, with the image's own first noise at the level reached, as diffusers' inpainting does.
        mask: ``[1, H, W]`` by record id, 1 where the model generates.
    """

    first_step: int = 0
    latents: Mapping[str, Tensor] | None = None
    known: Mapping[str, Tensor] | None = None
    mask: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        assert (self.known is None) == (self.mask is None)

    def of(
        self, what: str, records: Sequence[PromptRecord], shape: Sequence[int], device: torch.device
    ) -> Tensor | None:
        """Return ``latents``, ``known`` or ``mask`` of a batch, ``[B, *shape]``; None where there are none.

        ``InputError`` on a record that has none, and on another shape.
        """
        given: Mapping[str, Tensor] | None = getattr(self, what)
        if given is None:
            return None
        for record in records:
            found = tuple(given[record.id].shape) if record.id in given else None
            if found != tuple(shape):
                raise InputError(
                    f"variation.start: expected {what} of shape {list(shape)} for id '{record.id}', got "
                    f"{'none' if found is None else list(found)}"
                )
        return torch.stack([given[record.id] for record in records]).to(device, torch.float32)

    def fingerprint(self) -> str:
        """Return what identifies the latents and the region."""
        parts = {"latents": self.latents, "known": self.known, "mask": self.mask}
        tensors = {f"{part}/{id}": value for part, by in parts.items() for id, value in (by or {}).items()}
        return tensors_fingerprint(tensors)

    def __repr__(self) -> str:
        return f"LatentStart(first_step={self.first_step}, fingerprint={self.fingerprint()!r})"


@dataclass(frozen=True, repr=False)
class NoisyDdim:
    """DDIM with fresh noise in each step: η and the noise's scale by record id.

    η = 0 is the usual sampler and η = 1 that of DDPM; above 1 the noise no longer fits the level.
    """

    settings: Mapping[str, tuple[float, float]]

    def of(self, records: Sequence[PromptRecord]) -> tuple[Tensor, Tensor]:
        """Return η and the scale of each image, ``[B]`` twice. ``InputError`` on a record that has none."""
        for record in records:
            if record.id not in self.settings:
                raise InputError(f"variation.scheduler: expected η and scale for id '{record.id}', got none")
        eta, scale = zip(*(self.settings[record.id] for record in records), strict=True)
        return torch.tensor(eta).float(), torch.tensor(scale).float()

    def __repr__(self) -> str:
        """Return a line that identifies the settings."""
        digest = hashlib.blake2b(repr(sorted(self.settings.items())).encode(), digest_size=8).hexdigest()
        return f"DDIM with noise {digest}"


@dataclass(frozen=True)
class Variation:
    """A way to generate images. The default is DDIM from pure noise, guided away from the empty prompt.

    Its repr identifies stored scores.

    Args:
        scheduler: the class name of a scheduler of diffusers. None means this project's DDIM, and `NoisyDdim`
            gives that noise.
        timestep_spacing: the places of that scheduler's steps. None means the model's own spacing.
        negative_prompt: the text that guidance leads away from.
        start: the pictures or latents to start from. None means pure noise.
        lora: the LoRA that is put on top of the model meanwhile.
        guidance: another rule of guidance than classifier-free. It has no negative prompt.
    """

    scheduler: str | NoisyDdim | None = None
    timestep_spacing: str | None = None
    negative_prompt: str = ""
    start: Start | LatentStart | None = None
    lora: Lora | None = None
    guidance: Guidance | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.guidance is not None and self.negative_prompt:
            raise InputError(
                f"guidance: expected cfg beside a negative prompt, got {self.guidance!r} and "
                f"'{self.negative_prompt}'"
            )

    @property
    def rule(self) -> Guidance:
        """Return the rule of guidance."""
        return self.guidance or ClassifierFreeGuidance(self.negative_prompt)

    @property
    def strength(self) -> float:
        """Return the share of the steps that image-to-image takes, 1 for everything else."""
        return self.start.strength if isinstance(self.start, Start) else 1.0

    @property
    def latent_start(self) -> LatentStart | None:
        """Return the latents to start from, if any are given."""
        return self.start if isinstance(self.start, LatentStart) else None

    def of_set(self, name: str) -> Variation:
        """Return the same with the pictures of one prompt set, where these lie in a folder by set."""
        if not isinstance(self.start, Start) or not self.start.pictures.is_dir():
            return self
        return replace(self, start=replace(self.start, pictures=self.start.pictures / name))

    def meta(self) -> dict[str, Any]:
        """Return this variation's part of an image folder's record. It is empty if nothing differs.

        The LoRA's weights are not in it, because the generator's fingerprint includes them.
        """
        facts: dict[str, Any] = {}
        if self.scheduler is not None:
            facts["scheduler"] = str(self.scheduler)
        if self.timestep_spacing is not None:
            facts["timestep_spacing"] = self.timestep_spacing
        if self.negative_prompt:
            facts["negative_prompt"] = self.negative_prompt
        if isinstance(self.start, LatentStart):
            facts["start"] = repr(self.start)
        elif self.start is not None:
            facts |= {"strength": self.start.strength, "pictures": self.start.fingerprint()}
        if self.lora is not None:
            facts["lora_scale"] = self.lora.scale
        if self.guidance is not None:
            facts["guidance"] = repr(self.guidance)
        return facts
