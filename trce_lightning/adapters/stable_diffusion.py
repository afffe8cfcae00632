"""Stable Diffusion 1.x and 2.x: a UNet2DConditionModel that reads the raw states of a causal text encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import BatchEncoding

from trce_lightning.adapters.finite import Finite, check_finite, not_finite
from trce_lightning.adapters.refusals import refuse_what_the_method_does_not_fit
from trce_lightning.adapters.schedule import check_placed, ddim_of
from trce_lightning.adapters.single_file import original_state
from trce_lightning.errors import InputError
from trce_lightning.sampling import ddim_step, previous_alpha_bar
from trce_lightning.tokens import trim_length

PIXELS_AT_ONCE = 8 * 512**2
"""Of images that go through the autoencoder together: at 512 px each takes about 0.6 GB, by estimate."""


class TextStates(NamedTuple):
    """What the denoiser attends to, with the tokens that it belongs to."""

    states: Tensor
    """``[B, L, d]`` text-encoder states, float32."""
    input_ids: Tensor
    """``[B, L]`` int64, start of text first, padded after the first end of text."""


class StableDiffusionAdapter:
    """A pipeline as the method sees it: text states, predictions, projections, images.

    ``network_evaluations`` counts one for each latent × prompt that the denoiser has seen.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, *, resolution: int | None = None, name: str | None = None
    ) -> None:
        """Take a pipeline's networks; ``name`` is what messages call it, None is where it was opened from."""
        refuse_what_the_method_does_not_fit(pipeline)
        self.pipeline = pipeline
        self.name = name or pipeline.name_or_path or "the pipeline in memory"
        self.unet: UNet2DConditionModel = pipeline.unet
        self.tokenizer, self.text_encoder, self.vae = pipeline.tokenizer, pipeline.text_encoder, pipeline.vae
        self.scheduler = ddim_of(pipeline.scheduler)
        side = resolution or _latent_side(self.unet) * pipeline.vae_scale_factor
        if side % pipeline.vae_scale_factor:
            raise InputError(
                f"model.resolution: expected a multiple of {pipeline.vae_scale_factor} pixels, got {side}"
            )
        latent_side = side // pipeline.vae_scale_factor
        self.latent_shape = (self.unet.config.in_channels, latent_side, latent_side)
        self.network_evaluations = 0
        self._hashes: _Hashes | None = None
        for network in (self.unet, self.text_encoder, self.vae):
            network.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return self.unet.device

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return self.latent_shape[-1] * self.pipeline.vae_scale_factor

    @property
    def prediction_type(self) -> str:
        """The network's output space: ``epsilon`` or ``v_prediction``."""
        return str(self.scheduler.config.prediction_type)

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of every training timestep, ``[num_train_timesteps]``."""
        return self.scheduler.alphas_cumprod

    def timesteps(self, num_steps: int) -> Tensor:
        """Descending timesteps of a sampling run with the model's own spacing, ``[num_steps]`` int64."""
        self.scheduler.set_timesteps(num_steps)
        return check_placed(self.scheduler.timesteps.cpu(), len(self.alphas_cumprod), num_steps)

    def to(self, device: torch.device | str) -> StableDiffusionAdapter:
        """Move all networks."""
        self.pipeline.to(device)
        return self

    def to_channels_last(self) -> StableDiffusionAdapter:
        """Lay denoiser and decoder out as NHWC, which changes speed and last bits alone."""
        for network in (self.unet, self.vae):
            network.to(memory_format=torch.channels_last)
        return self

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids padded (and truncated) to the model's length, ``[B, L]`` on the CPU."""
        return self._tokens(prompts).input_ids

    def _tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        tokens = self.tokenizer(
            self.written_out(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        last, known = int(tokens.input_ids.max()), self.text_encoder.get_input_embeddings().num_embeddings
        if last >= known:
            raise InputError(
                f"model: expected embeddings for every token, got {known} and none for "
                f"{self.tokenizer.convert_ids_to_tokens(last)!r}; load the textual inversion into tokenizer "
                "and text encoder"
            )
        return tokens

    def written_out(self, prompts: Sequence[str]) -> list[str]:
        """Prompts with a textual inversion of several vectors as its tokens ``<x> <x>_1 …``, as diffusers."""
        added = self.tokenizer.added_tokens_encoder
        if any(f"{token}_1" in added for token in added):
            return self.pipeline.maybe_convert_prompt(list(prompts), self.tokenizer)
        return list(prompts)

    def token_ids(
        self, prompts: Sequence[str], *, special: bool = True, cut: bool = False
    ) -> list[list[int]]:
        """Token ids of each prompt without padding.

        ``special`` has start and end, ``cut`` at most the model's length.
        """
        return self.tokenizer(
            self.written_out(prompts), add_special_tokens=special, truncation=cut, verbose=False
        ).input_ids

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads of a prompt, with the start's and the end's."""
        return int(self.tokenizer.model_max_length)

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts of which the model reads a beginning alone."""
        if not prompts:
            return []
        return [
            prompt
            for prompt, ids in zip(prompts, self.token_ids(prompts), strict=True)
            if len(ids) > self.prompt_tokens
        ]

    def fits(self, prompt: str) -> bool:
        """Whether the model reads the whole prompt."""
        return not self.cut([prompt])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> TextStates:
        """Text states as the denoiser reads them; ``trimmed`` cuts padding after the longest prompt's EoT.

        A causal encoder's EoT doesn't see what follows it, so trimming leaves positions up to EoT unchanged.
        """
        tokens = self._tokens(prompts)
        length = trim_length(tokens.input_ids, self.tokenizer.eos_token_id) if trimmed else None
        input_ids, mask = tokens.input_ids[:, :length], tokens.attention_mask[:, :length]
        device = self.text_encoder.device
        options = {}
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            options["attention_mask"] = mask.to(device)
        # Lightning's hooks autocast in some places and not in others: states would depend on who asks.
        with torch.autocast(device.type, enabled=False):
            states = self.text_encoder(input_ids.to(device), **options)[0].float()
        if not states.isfinite().all():
            row = int(states.isfinite().all(-1).all(-1).int().argmin())
            raise not_finite(self.name, f"the text states of '{prompts[row]}'", self.text_encoder)
        return TextStates(states, input_ids)

    def predict(self, z_t: Tensor, timestep: Tensor | int, states: Tensor) -> Tensor:
        """The denoiser's output for latents ``[B, C, H, W]`` and text states ``[B, L, d]``, float32."""
        self.network_evaluations += len(z_t)
        dtype = self.unet.dtype
        return self.unet(z_t.to(dtype), timestep, encoder_hidden_states=states.to(dtype)).sample.float()

    def step(self, prediction: Tensor, z_t: Tensor, timesteps: Tensor, step_index: int) -> Tensor:
        """The DDIM step from ``timesteps[step_index]`` to the next of ``timesteps``."""
        alpha_bar_t = self.alphas_cumprod[timesteps[step_index]]
        alpha_bar_prev = previous_alpha_bar(
            self.alphas_cumprod, timesteps, step_index, self.scheduler.config.set_alpha_to_one
        )
        return ddim_step(prediction, z_t, alpha_bar_t, alpha_bar_prev, self.prediction_type)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents → uint8 RGB ``[B, 3, H, W]``, rounded as diffusers' image processor does.

        ``InputError`` unless latents and pixels are finite: as bytes they would be black.
        """
        finite = Finite(self.name)
        finite.see("the latents that are decoded", latents, self.unet)
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
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
        """uint8 RGB ``[B, 3, H, W]`` → latents, float32: means of the autoencoder's posterior, scaled."""
        pixels = (images.float() / 127.5 - 1).to(self.vae.device, self.vae.dtype)
        parts = [self.vae.encode(part) for part in pixels.split(self._images_at_once)]
        # An AutoencoderTiny has no posterior.
        means = [part.latent_dist.mean if "latent_dist" in part else part.latents for part in parts]
        latents = torch.cat(means).float() * self.vae.config.scaling_factor
        return check_finite(
            self.name, "the latents that the autoencoder makes of a picture", latents, self.vae
        )

    def text_projections(self) -> dict[str, nn.Linear]:
        """Every cross-attention K and V by name: bias-free, ``[d_out, d]``, fed with raw text states."""
        return {
            f"{name}.{part}": getattr(module, part)
            for name, module in self.unet.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
            for part in ("to_k", "to_v")
        }

    def trainable(self, pattern: str) -> dict[str, nn.Parameter]:
        """Parameters of the modules whose name matches an fnmatch ``pattern``, by parameter name."""
        parameters = {
            name: parameter
            for name, parameter in self.unet.named_parameters()
            if fnmatch(name.rpartition(".")[0], pattern)
        }
        if not parameters:
            raise InputError(
                f"trajectory.trainable: expected a pattern that matches a module, got '{pattern}'"
            )
        return parameters

    def original_state(self) -> dict[str, Tensor]:
        """All tensors under the names of one-file checkpoints; see :func:`.single_file.original_state`."""
        return original_state(self.pipeline)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Within it the weights stay what they are, and each network is hashed once.

        Outside it every fingerprint is made anew. Whoever changes weights within it all the same calls
        :meth:`weights_changed`. Changes that torch counts are noticed anyway, such as ``load_state_dict``;
        those through ``.data`` and of fused or 8-bit optimizers are not.
        """
        before = self._hashes
        self._hashes = {} if before is None else before
        try:
            yield
        finally:
            self._hashes = before

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Within it the weights are others, which stay what they are; afterwards they are what they were."""
        before = self._hashes
        self._hashes = None if before is None else {}
        try:
            yield
        finally:
            self._hashes = before

    def weights_changed(self) -> None:
        """Forget what :meth:`unchanged` has kept."""
        if self._hashes is not None:
            self._hashes.clear()

    def _fingerprint_of(self, part: str) -> str:
        network: nn.Module = getattr(self, part)
        if self._hashes is None:
            return fingerprint(network)
        versions = _versions(network)
        if part not in self._hashes or self._hashes[part][0] != versions:
            self._hashes[part] = versions, fingerprint(network)
        return self._hashes[part][1]

    def text_fingerprint(self) -> str:
        """Identifies text encoder and tokenizer: what states of a prompt depend on."""
        vocabulary = hashlib.blake2b(repr(sorted(self.tokenizer.get_vocab().items())).encode(), digest_size=8)
        return self._fingerprint_of("text_encoder") + vocabulary.hexdigest()

    def fingerprint(self) -> str:
        """Identifies the whole generator: denoiser, text encoder, decoder, schedule and resolution."""
        parts = [self._fingerprint_of("unet"), self.text_fingerprint(), self._fingerprint_of("vae")]
        # Keys with an underscore are diffusers' own record, in an order of its own in each process.
        schedule = sorted(str(item) for item in self.scheduler.config.items() if not item[0].startswith("_"))
        parts.append(repr((self.latent_shape, schedule)))
        return hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()


_Versions = tuple[tuple[str, torch.dtype, int], ...]
_Hashes = dict[str, tuple[_Versions, str]]
"""Of a network by its attribute's name: what its tensors were like when it was hashed, and the hash."""


def _versions(network: nn.Module) -> _Versions:
    """Names, types and torch's counts of changes; a device's change is none."""
    tensors = network.state_dict(keep_vars=True).items()
    return tuple(
        (name, tensor.dtype, 0 if tensor.is_inference() else tensor._version) for name, tensor in tensors
    )


def _latent_side(unet: UNet2DConditionModel) -> int:
    """Side of the latents that the denoiser was made for: a number, or two equal ones."""
    size = unet.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or [])
    if len(sides) != 1:
        raise InputError(
            f"model.resolution: expected pixels of a side, since the model's own sample_size is {size} and "
            "pictures are square"
        )
    return sides.pop()


def fingerprint(network: nn.Module) -> str:
    """Hash of a network's weights by name, 16 hexadecimal digits."""
    return tensors_fingerprint(network.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Hash of tensors by name, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
