"""The protocol of a model family: all that the method knows of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from trce_lightning.sampling import Schedule
from trce_lightning.tokens import Text


class Entry(NamedTuple):
    """A linear map that reads raw text states: columns ``first : first + d`` of its weight become W T.

    Its bias, where it has one, stays.
    """

    module: nn.Linear
    first: int = 0


class Stream(NamedTuple):
    """The text states that one matrix T edits, and where they enter the denoiser."""

    segments: tuple[str, ...]
    """Segments of :class:`Text` whose states T is solved from."""
    width: int
    """d: T is ``[d, d]``."""
    entries: dict[str, Entry]
    """The maps that read these states, by module name in the denoiser."""


class Adapter(Protocol):
    """A pipeline as the method sees it: text, predictions, what can be edited and trained, images.

    Latents are ``[B, C, H, W]`` as :attr:`latent_shape` says; families that pack them do so in
    :meth:`predict`. Images are uint8 RGB ``[B, 3, side, side]``. A batch of prompts is a
    :class:`~trce_lightning.tokens.Text`.
    """

    name: str
    """The model's name in messages."""
    pipeline: DiffusionPipeline
    latent_shape: tuple[int, int, int]
    """``[C, H, W]`` of a latent."""
    network_evaluations: int
    """Latent × prompt pairs that the denoiser has seen so far."""
    guided: bool
    """False for models whose sampling never evaluates ∅ (guidance-distilled ones)."""

    @property
    def denoiser(self) -> ModelMixin:
        """Return the network that stage 1 edits and stage 2 trains."""

    @property
    def device(self) -> torch.device:
        """Return where the denoiser lies."""

    @property
    def side(self) -> int:
        """Return the pixels of an image's side."""

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens of a prompt the model reads, with the start's and the end's."""

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks by the pipeline's names, the denoiser among them."""

    def to(self, device: torch.device | str) -> Adapter:
        """Move all networks."""

    def to_channels_last(self) -> Adapter:
        """Lay denoiser and decoder out as NHWC, which changes speed and last bits alone."""

    def encoding_on(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Keep the text encoders on ``device`` within; afterwards they are where they were."""

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids by segment, padded and cut to the model's length, int64 ``[B, L]`` on the CPU."""

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt the model reads, the start's and the end's among them."""

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts of which the model reads only the beginning."""

    def fits(self, prompt: str) -> bool:
        """Return whether the model reads the whole prompt."""

    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Text:
        """Return prompts as the denoiser reads them, without gradients.

        ``trimmed`` cuts what follows the longest prompt's EoT from causal segments, whose states up to there
        stay the same.
        """

    def embed(self, input_ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return token embeddings by segment, ``[B, L]`` → ``[B, L, e]``, without gradients."""

    def encode_embeddings(self, embeddings: Mapping[str, Tensor], input_ids: Mapping[str, Tensor]) -> Text:
        """Do what :meth:`encode` does, differentiably, from token embeddings ``[B, L, e]`` by segment.

        ``input_ids`` give the roles of the positions, and where an encoder pools.
        """

    def empty(self) -> Text:
        """Return ∅, the text that guidance leads away from when no negative prompt is given; B is 1."""

    def mentions(self, prompts: Sequence[str], terms: Sequence[str], *, trimmed: bool) -> dict[str, Tensor]:
        """Return where each prompt's tokens spell its term, bool ``[B, L]`` by segment.

        L is that of :meth:`encode`. All is False where a term isn't found.
        """

    def streams(self) -> dict[str, Stream]:
        """Return what stage 1 edits: "context" and, where there is one, "pooled"."""

    def trainable(self, pattern: str) -> dict[str, nn.Parameter]:
        """Return the denoiser's parameters whose module name matches an fnmatch ``pattern``, by name."""

    def predict(self, z_t: Tensor, timestep: Tensor | int, text: Text) -> Tensor:
        """Return the denoiser's output, ``[B, C, H, W]`` float32, in the space that the schedule names."""

    def schedule(self, num_steps: int) -> Schedule:
        """Return the levels of a deterministic sampling run with the model's own spacing.

        ``InputError`` unless the model has room for ``num_steps``.
        """

    def scheduler(
        self, name: str, num_steps: int, timestep_spacing: str | None, device: torch.device | str = "cpu"
    ) -> Any:
        """Return diffusers' scheduler of that class on the model's noise schedule, its timesteps set.

        ``InputError`` when that class can't draw by this schedule or can't take that many steps.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents of images, float32."""

    def unchanged(self) -> AbstractContextManager[None]:
        """Take the weights for unchanged within: each network is hashed once."""

    def other_weights(self) -> AbstractContextManager[None]:
        """Take the weights for others within; afterwards they are what they were."""

    def weights_changed(self) -> None:
        """Forget the hashes that :meth:`unchanged` has kept."""

    def text_fingerprint(self) -> str:
        """Return what identifies text encoders and tokenizers."""

    def fingerprint(self) -> str:
        """Return what identifies the whole generator, weights, schedule and resolution."""

    def original_state(self) -> dict[str, Tensor]:
        """Return all tensors under the names of one-file checkpoints. ``InputError`` where there are none."""
