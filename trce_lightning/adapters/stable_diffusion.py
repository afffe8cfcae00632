"""The adapter of Stable Diffusion 1.x and 2.x.

Their denoiser is a UNet2DConditionModel that reads the raw states of a causal text encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import BatchEncoding

from trce_lightning.adapters.finite import Finite, check_finite, not_finite
from trce_lightning.adapters.protocol import Entry, Stream
from trce_lightning.adapters.refusals import refuse_what_the_method_does_not_fit
from trce_lightning.adapters.schedule import check_placed, ddim_of, scheduler_like
from trce_lightning.adapters.single_file import original_state
from trce_lightning.errors import InputError
from trce_lightning.runtime.fingerprints import fingerprint
from trce_lightning.sampling import Schedule, ddim_schedule
from trce_lightning.tokens import Role, Text, roles_of, trim_length

PIXELS_AT_ONCE = 8 * 512**2
"""The pixels that go through the autoencoder together. An image of 512 px takes about 0.6 GB, by estimate."""
SEGMENT = "clip"
"""The one segment of text that these models read."""


class StableDiffusionAdapter:
    """The :class:`~.protocol.Adapter` of Stable Diffusion: text states, predictions, projections, images.

    ``network_evaluations`` counts one for each latent × prompt pair that the denoiser has evaluated.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, *, resolution: int | None = None, name: str | None = None
    ) -> None:
        """Take a pipeline's networks. Messages call it ``name``; None means the place it was opened from."""
        refuse_what_the_method_does_not_fit(pipeline)
        self.pipeline = pipeline
        self.name = str(name or pipeline.name_or_path or "the pipeline in memory")  # diffusers keeps a Path
        self.denoiser: UNet2DConditionModel = pipeline.unet
        self.tokenizer, self.text_encoder, self.vae = pipeline.tokenizer, pipeline.text_encoder, pipeline.vae
        self.ddim = ddim_of(pipeline.scheduler)
        side = resolution or _latent_side(self.denoiser) * pipeline.vae_scale_factor
        if side % pipeline.vae_scale_factor:
            raise InputError(
                f"model.resolution: expected a multiple of {pipeline.vae_scale_factor} pixels, got {side}"
            )
        latent_side = side // pipeline.vae_scale_factor
        self.latent_shape = (self.denoiser.config.in_channels, latent_side, latent_side)
        self.network_evaluations = 0
        self.guided = True
        self._hashes: _Hashes | None = None
        for network in self.networks().values():
            network.requires_grad_(False).eval()

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
        return {"unet": self.denoiser, "text_encoder": self.text_encoder, "vae": self.vae}

    def to(self, device: torch.device | str) -> StableDiffusionAdapter:
        """Move all networks to ``device``."""
        self.pipeline.to(device)
        return self

    @contextmanager
    def encoding_on(self, device: torch.device | str) -> Iterator[None]:
        """Keep the text encoder on ``device`` within, and move it back afterwards."""
        home = self.text_encoder.device
        self.text_encoder.to(device)
        try:
            yield
        finally:
            self.text_encoder.to(home)

    def to_channels_last(self) -> StableDiffusionAdapter:
        """Lay denoiser and decoder out as NHWC. This changes only speed and last bits."""
        for network in (self.denoiser, self.vae):
            network.to(memory_format=torch.channels_last)
        return self

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids, padded and cut to the model's length, int64 ``[B, L]`` on the CPU."""
        return {SEGMENT: self._tokens(prompts).input_ids}

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
        """Return the prompts as diffusers reads them.

        If a textual inversion has several vectors, it becomes its tokens ``<x> <x>_1 …``.
        """
        added = self.tokenizer.added_tokens_encoder
        if any(f"{token}_1" in added for token in added):
            return self.pipeline.maybe_convert_prompt(list(prompts), self.tokenizer)
        return list(prompts)

    def _token_ids(
        self, prompts: Sequence[str], *, special: bool = True, cut: bool = False
    ) -> list[list[int]]:
        """Return the token ids of each prompt without padding.

        ``special`` adds the start and end tokens. ``cut`` cuts to the model's length.
        """
        return self.tokenizer(
            self.written_out(prompts), add_special_tokens=special, truncation=cut, verbose=False
        ).input_ids

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens of a prompt the model can read, including the start and end tokens."""
        return int(self.tokenizer.model_max_length)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt the model reads, including the start and end tokens."""
        return [len(ids) for ids in self._token_ids(prompts, cut=True)]

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts of which the model reads only the beginning."""
        if not prompts:
            return []
        return [
            prompt
            for prompt, ids in zip(prompts, self._token_ids(prompts), strict=True)
            if len(ids) > self.prompt_tokens
        ]

    def fits(self, prompt: str) -> bool:
        """Return whether the model reads the whole prompt."""
        return not self.cut([prompt])

    def vocabulary(self) -> dict[str, Tensor]:
        """Return the token ids that a user can type, int64 ``[V]`` on the CPU.

        Each comes back alone when its text is tokenized. Parts of words don't. Special tokens don't count.
        """
        return {SEGMENT: self._typed_ids}

    @cached_property
    def _typed_ids(self) -> Tensor:
        known = self.text_encoder.get_input_embeddings().num_embeddings
        special = set(self.tokenizer.all_special_ids)
        ids = [i for i in range(min(len(self.tokenizer), known)) if i not in special]
        read = self._token_ids(self.detokenize(SEGMENT, [[i] for i in ids]), special=False)
        return torch.tensor([i for i, back in zip(ids, read, strict=True) if back == [i]])

    def detokenize(self, segment: str, words: Sequence[Sequence[int]]) -> list[str]:
        """Return the prompts that token ids spell, without the start's, the end's and padding."""
        assert segment == SEGMENT
        rows = [list(row) for row in words]
        return self.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False) if rows else []

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Text:
        """Return prompts as the denoiser reads them.

        ``trimmed`` cuts the positions after the longest prompt's EoT. In a causal encoder no position sees a
        later one, so the other states stay unchanged.
        """
        tokens = self._tokens(prompts)
        length = trim_length(tokens.input_ids, self.tokenizer.eos_token_id) if trimmed else None
        input_ids, mask = tokens.input_ids[:, :length], tokens.attention_mask[:, :length]
        text = self._text(input_ids, mask)
        if not text.states[SEGMENT].isfinite().all():
            row = int(text.states[SEGMENT].isfinite().all(-1).all(-1).int().argmin())
            raise not_finite(self.name, f"the text states of '{prompts[row]}'", self.text_encoder)
        return text

    @torch.no_grad()
    def embed(self, input_ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return token embeddings, ``[B, L]`` → ``[B, L, e]``, without gradients."""
        embedding = self.text_encoder.get_input_embeddings()
        return {SEGMENT: embedding(input_ids[SEGMENT].to(self.text_encoder.device))}

    def encode_embeddings(self, embeddings: Mapping[str, Tensor], input_ids: Mapping[str, Tensor]) -> Text:
        """Return the text of token embeddings ``[B, L, e]``. It carries gradients.

        The states are those of :meth:`encode`. ``input_ids`` give the roles of the positions, and the mask
        for an encoder that reads a mask.
        """
        given = embeddings[SEGMENT].to(self.text_encoder.device, self.text_encoder.dtype)
        mask = roles_of(input_ids[SEGMENT], self.tokenizer.eos_token_id) < Role.PADDING
        # The encoder accepts only ids, so a hook replaces the embeddings that it looks up.
        hook = self.text_encoder.get_input_embeddings().register_forward_hook(lambda *_: given)
        try:
            return self._text(input_ids[SEGMENT], mask.long())
        finally:
            hook.remove()

    def _text(self, input_ids: Tensor, attention_mask: Tensor) -> Text:
        device = self.text_encoder.device
        options = {}
        if getattr(self.text_encoder.config, "use_attention_mask", False):
            options["attention_mask"] = attention_mask.to(device)
        # Lightning's hooks autocast in some places and not in others. The states must not depend on that.
        with torch.autocast(device.type, enabled=False):
            states = self.text_encoder(input_ids.to(device), **options)[0].float()
        roles = roles_of(input_ids, self.tokenizer.eos_token_id).to(device)
        return Text({SEGMENT: states}, {SEGMENT: roles})

    def empty(self) -> Text:
        """Return ∅, the states of the empty prompt, B = 1."""
        return self.encode([""])

    def mentions(self, prompts: Sequence[str], terms: Sequence[str], *, trimmed: bool) -> dict[str, Tensor]:
        """Return True at the tokens of each prompt that spell its term, bool ``[B, L]``.

        If a term isn't found, its row is False.
        """
        input_ids = self._tokens(prompts).input_ids
        if trimmed:
            input_ids = input_ids[:, : trim_length(input_ids, self.tokenizer.eos_token_id)]
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, ids in enumerate(self._token_ids(terms, special=False)):
            word = torch.tensor(ids)
            if len(word) > input_ids.shape[1]:
                continue
            windows = input_ids[row].unfold(0, len(word), 1)
            for start in (windows == word).all(1).nonzero().flatten().tolist():
                mask[row, start : start + len(word)] = True
        return {SEGMENT: mask}

    def predict(self, z_t: Tensor, timestep: Tensor | int, text: Text) -> Tensor:
        """Return the denoiser's output for latents ``[B, C, H, W]``, float32."""
        self.network_evaluations += len(z_t)
        dtype = self.denoiser.dtype
        states = text.states[SEGMENT].to(dtype)
        return self.denoiser(z_t.to(dtype), timestep, encoder_hidden_states=states).sample.float()

    def schedule(self, num_steps: int) -> Schedule:
        """Return the noise levels of DDIM with the model's own spacing.

        If the model has fewer timesteps than ``num_steps``, raise ``InputError``.
        """
        alphas_cumprod = self.ddim.alphas_cumprod
        if not 1 <= num_steps <= len(alphas_cumprod):
            raise InputError(
                f"num_inference_steps: expected from 1 to {len(alphas_cumprod)} steps, got {num_steps}"
            )
        self.ddim.set_timesteps(num_steps)
        timesteps = check_placed(self.ddim.timesteps.cpu(), len(alphas_cumprod), num_steps)
        config = self.ddim.config
        return ddim_schedule(
            alphas_cumprod, timesteps, config.prediction_type, set_alpha_to_one=config.set_alpha_to_one
        )

    def scheduler(
        self, name: str, num_steps: int, timestep_spacing: str | None, device: torch.device | str = "cpu"
    ) -> Any:
        """Return diffusers' scheduler of class ``name`` on the model's schedule; see :mod:`.schedule`."""
        return scheduler_like(self.ddim, name, num_steps, timestep_spacing, device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents, uint8 RGB ``[B, 3, H, W]``.

        They are rounded as in diffusers' image processor. If latents or pixels are not finite, raise
        ``InputError``: their bytes would be black.
        """
        finite = Finite(self.name)
        finite.see("the latents that are decoded", latents, self.denoiser)
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
        """Return the latents, float32, of images, uint8 RGB ``[B, 3, H, W]``.

        They are the scaled means of the autoencoder's posterior.
        """
        pixels = (images.float() / 127.5 - 1).to(self.vae.device, self.vae.dtype)
        parts = [self.vae.encode(part) for part in pixels.split(self._images_at_once)]
        # An AutoencoderTiny has no posterior.
        means = [part.latent_dist.mean if "latent_dist" in part else part.latents for part in parts]
        latents = torch.cat(means).float() * self.vae.config.scaling_factor
        return check_finite(
            self.name, "the latents that the autoencoder makes of a picture", latents, self.vae
        )

    def streams(self) -> dict[str, Stream]:
        """Return every cross-attention K and V: bias-free ``[d_out, d]`` maps of raw text states."""
        entries = {
            f"{name}.{part}": Entry(getattr(module, part))
            for name, module in self.denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
            for part in ("to_k", "to_v")
        }
        return {"context": Stream((SEGMENT,), self.text_encoder.config.hidden_size, entries)}

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

    def original_state(self) -> dict[str, Tensor]:
        """Return all tensors under one-file checkpoints' names; see :func:`.single_file.original_state`."""
        return original_state(self.pipeline)

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
        """Return a hash of text encoder and tokenizer, which determine the states of a prompt."""
        vocabulary = hashlib.blake2b(repr(sorted(self.tokenizer.get_vocab().items())).encode(), digest_size=8)
        return self._fingerprint_of("text_encoder") + vocabulary.hexdigest()

    def fingerprint(self) -> str:
        """Return a hash of the whole generator: denoiser, text encoder, decoder, schedule and resolution."""
        parts = [self._fingerprint_of("unet"), self.text_fingerprint(), self._fingerprint_of("vae")]
        # Keys with an underscore are diffusers' own record, whose order differs between processes.
        schedule = sorted(str(item) for item in self.ddim.config.items() if not item[0].startswith("_"))
        parts.append(repr((self.latent_shape, schedule)))
        return hashlib.blake2b("".join(parts).encode(), digest_size=8).hexdigest()


_Versions = tuple[tuple[str, torch.dtype, int], ...]
_Hashes = dict[str, tuple[_Versions, str]]
"""The state of each network's tensors when it was hashed, and the hash, by the network's name."""


def _versions(network: nn.Module) -> _Versions:
    """Return names, types and torch's counts of changes. A move to another device is not a change."""
    tensors = network.state_dict(keep_vars=True).items()
    return tuple(
        (name, tensor.dtype, 0 if tensor.is_inference() else tensor._version) for name, tensor in tensors
    )


def _latent_side(unet: UNet2DConditionModel) -> int:
    """Return the side of the latents that the denoiser was made for. It is a number, or two equal ones."""
    size = unet.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or [])
    if len(sides) != 1:
        raise InputError(
            f"model.resolution: expected pixels of a side, since the model's own sample_size is {size} and "
            "pictures are square"
        )
    return sides.pop()
