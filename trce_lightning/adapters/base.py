"""The parts that adapters of all families share: images, places, trainable parameters, hashes of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from trce_lightning.adapters.finite import Finite, check_finite
from trce_lightning.errors import InputError
from trce_lightning.runtime.fingerprints import fingerprint

PIXELS_AT_ONCE = 8 * 512**2
"""The pixels that go through the autoencoder together. An image of 512 px takes about 0.6 GB, by estimate."""


class PipelineAdapter:
    """The part of an :class:`~.protocol.Adapter` that doesn't depend on how a family reads text and steps.

    ``network_evaluations`` counts one for each latent × prompt pair that the denoiser has evaluated.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    """diffusers' class of the pipelines that the adapter takes."""
    denoiser_name: ClassVar[str] = "unet"
    """The denoiser's name in the pipeline."""
    encoder_names: tuple[str, ...] = ("text_encoder",)
    """The names of the pipeline's text encoders that the model has."""
    tokenizer_names: tuple[str, ...] = ("tokenizer",)
    """The names of their tokenizers, in the same order."""
    file_prefixes: ClassVar[tuple[str, ...]] = ()
    """The beginnings of the tensors' names in a checkpoint in one file. It is empty if none can be opened."""
    unused: ClassVar[Mapping[str, Any]] = {}
    """The arguments that open a pipeline without the parts that the method doesn't use."""

    latent_shape: tuple[int, int, int]
    guided: bool = True

    def __init__(
        self, pipeline: DiffusionPipeline, name: str | None = None, *, resolution: int | None = None
    ) -> None:
        """Freeze a pipeline's networks.

        Args:
            pipeline: a pipeline of :attr:`pipeline_class`.
            name: the model's name in messages. None means the place it was opened from.
            resolution: the side of images in pixels. None means the model's own.
        """
        self.pipeline: Any = pipeline
        self.name = str(name or pipeline.name_or_path or "the pipeline in memory")  # diffusers keeps a Path
        self.denoiser: Any = getattr(pipeline, self.denoiser_name)
        self.vae = self.pipeline.vae
        self.latent_shape = self._latent_shape(resolution)
        self.network_evaluations = 0
        self._hashes: _Hashes | None = None
        for network in self.networks().values():
            network.requires_grad_(False).eval()

    @classmethod
    def network_names(cls) -> tuple[str, ...]:
        """Return the names of all networks in the pipeline, the denoiser first."""
        return cls.denoiser_name, *cls.encoder_names, "vae"

    @classmethod
    def refuse_index(cls, index: Mapping[str, Any], source: str) -> None:
        """Raise ``InputError`` unless the parts that ``model_index.json`` names are those of the family."""
        raise NotImplementedError

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """Return ``[C, H, W]`` of latents for images of ``resolution`` pixels."""
        factor = int(self.pipeline.vae_scale_factor)
        side = resolution or latent_side(self.denoiser) * factor
        if side % factor:
            raise InputError(f"model.resolution: expected a multiple of {factor} pixels, got {side}")
        return self.denoiser.config.in_channels, side // factor, side // factor

    @property
    def device(self) -> torch.device:
        """Return the denoiser's device."""
        return self.denoiser.device

    @property
    def side(self) -> int:
        """Return the side of an image in pixels."""
        return self.latent_shape[-1] * self.pipeline.vae_scale_factor

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks by their names in the pipeline."""
        names = (self.denoiser_name, *self.encoder_names, "vae")
        return {name: getattr(self.pipeline, name) for name in names}

    def to(self, device: torch.device | str) -> Self:
        """Move all networks to ``device``."""
        self.pipeline.to(device)
        return self

    @contextmanager
    def encoding_on(self, device: torch.device | str) -> Iterator[None]:
        """Keep the text encoders on ``device`` within, and move them back afterwards."""
        encoders = [getattr(self.pipeline, name) for name in self.encoder_names]
        homes = [encoder.device for encoder in encoders]
        for encoder in encoders:
            encoder.to(device)
        try:
            yield
        finally:
            for encoder, home in zip(encoders, homes, strict=True):
                encoder.to(home)

    def to_channels_last(self) -> Self:
        """Lay denoiser and decoder out as NHWC. This changes only speed and last bits."""
        for network in (self.denoiser, self.vae):
            network.to(memory_format=torch.channels_last)
        return self

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents, uint8 RGB ``[B, 3, H, W]``.

        They are rounded as in diffusers' image processor. If latents or pixels are not finite, raise
        ``InputError``: their bytes would be black.
        """
        finite = Finite(self.name)
        finite.see("the latents that are decoded", latents, self.denoiser)
        with self._autoencoder():
            latents = self._unscaled(latents).to(self.vae.dtype)
            images = torch.cat([self._pixels(part, finite) for part in latents.split(self._images_at_once)])
        finite.check()
        return images

    def _pixels(self, latents: Tensor, finite: Finite) -> Tensor:
        pixels = self.vae.decode(latents).sample.float()
        finite.see("the pixels that the autoencoder decodes", pixels, self.vae)
        return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @property
    def _images_at_once(self) -> int:
        return max(1, PIXELS_AT_ONCE // self.side**2)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents, float32, of images, uint8 RGB ``[B, 3, H, W]``.

        They are the scaled means of the autoencoder's posterior.
        """
        with self._autoencoder():
            pixels = (images.float() / 127.5 - 1).to(self.vae.device, self.vae.dtype)
            parts = [self.vae.encode(part) for part in pixels.split(self._images_at_once)]
        # An AutoencoderTiny has no posterior.
        means = [part.latent_dist.mean if "latent_dist" in part else part.latents for part in parts]
        return check_finite(
            self.name,
            "the latents that the autoencoder makes of a picture",
            self._scaled(torch.cat(means).float()),
            self.vae,
        )

    @contextmanager
    def _autoencoder(self) -> Iterator[None]:
        """Give the autoencoder the precision that it needs, within."""
        yield

    def _scaled(self, means: Tensor) -> Tensor:
        """Return the denoiser's latents from the autoencoder's own."""
        return (means - self._shift) * self.vae.config.scaling_factor

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return the autoencoder's latents from the denoiser's."""
        return latents / self.vae.config.scaling_factor + self._shift

    @property
    def _shift(self) -> float:
        """The number that the pipeline adds to latents before it decodes them."""
        return 0.0

    def trainable(self, pattern: str, option: str = "trajectory.trainable") -> dict[str, nn.Parameter]:
        """Return by name the parameters of the modules whose name matches an fnmatch ``pattern``.

        If there are none, raise ``InputError`` that names the ``option``.
        """
        parameters = {
            name: parameter
            for name, parameter in self.denoiser.named_parameters()
            if fnmatch(name.rpartition(".")[0], pattern)
        }
        if not parameters:
            raise InputError(f"{option}: expected a pattern that matches a module, got '{pattern}'")
        return parameters

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Assume within that no weights change, so that each network is hashed once.

        Outside of this context every fingerprint is computed anew. Code that changes weights within must call
        :meth:`weights_changed`. Changes that torch counts, such as ``load_state_dict``, are noticed without
        the call. Changes through ``.data`` and by fused or 8-bit optimizers are not.
        """
        before = self._hashes
        self._hashes = {} if before is None else before
        try:
            yield
        finally:
            self._hashes = before

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Assume within that the weights are others, which don't change.

        Assume afterwards that the weights are the earlier ones again.
        """
        before = self._hashes
        self._hashes = None if before is None else {}
        try:
            yield
        finally:
            self._hashes = before

    def weights_changed(self) -> None:
        """Forget the hashes that :meth:`unchanged` has kept."""
        if self._hashes is not None:
            self._hashes.clear()

    def _fingerprint_of(self, part: str) -> str:
        network = self.networks()[part]
        if self._hashes is None:
            return fingerprint(network)
        versions = _versions(network)
        if part not in self._hashes or self._hashes[part][0] != versions:
            self._hashes[part] = versions, fingerprint(network)
        return self._hashes[part][1]

    def text_fingerprint(self) -> str:
        """Return a hash of text encoders and tokenizers, which determine the states of a prompt."""
        parts = []
        for encoder, tokenizer in zip(self.encoder_names, self.tokenizer_names, strict=True):
            vocabulary = repr(sorted(getattr(self.pipeline, tokenizer).get_vocab().items()))
            parts.append(self._fingerprint_of(encoder))
            parts.append(hashlib.blake2b(vocabulary.encode(), digest_size=8).hexdigest())
        return "".join(parts)

    def fingerprint(self) -> str:
        """Return a hash of the whole generator: denoiser, text encoders, decoder, schedule and resolution."""
        parts = [self._fingerprint_of(self.denoiser_name), self.text_fingerprint()]
        parts += [self._fingerprint_of("vae"), repr((self.latent_shape, *self._settings()))]
        return hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()

    def _settings(self) -> tuple[Any, ...]:
        """Return all that pictures depend on besides weights, tokenizers and resolution."""
        raise NotImplementedError


_Versions = tuple[tuple[str, torch.dtype, int], ...]
_Hashes = dict[str, tuple[_Versions, str]]
"""The state of each network's tensors when it was hashed, and the hash, by the network's name."""


def settings_of(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of a part of diffusers, in an order of their own."""
    # Keys with an underscore are diffusers' own record, whose order differs between processes.
    return sorted(str(item) for item in config.items() if not item[0].startswith("_"))


def _versions(network: nn.Module) -> _Versions:
    """Return names, types and torch's counts of changes. A move to another device is not a change."""
    tensors = network.state_dict(keep_vars=True).items()
    return tuple(
        (name, tensor.dtype, 0 if tensor.is_inference() else tensor._version) for name, tensor in tensors
    )


def latent_side(denoiser: ModelMixin) -> int:
    """Return the side of the latents that the denoiser was made for. It is a number, or two equal ones."""
    size = denoiser.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or [])
    if len(sides) != 1:
        raise InputError(
            f"model.resolution: expected pixels of a side, since the model's own sample_size is {size} and "
            "pictures are square"
        )
    return sides.pop()
