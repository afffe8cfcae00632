"""The protocol of a model family. The method uses a model through it only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from trce_lightning.sampling import Schedule
from trce_lightning.tokens import Text


class Entry(NamedTuple):
    """A linear map that reads raw text states. Stage 1 replaces columns ``first : first + d`` of W by W T.

    If the map has a bias, the bias stays.
    """

    module: nn.Linear
    first: int = 0


class Stream(NamedTuple):
    """The text states that one matrix T edits, and the maps that read them in the denoiser."""

    segments: tuple[str, ...]
    """The segments of :class:`Text` from whose states T is solved."""
    width: int
    """The width d of the states. T is ``[d, d]``."""
    entries: dict[str, Entry]
    """The maps that read these states, by module name in the denoiser."""
    scales: Mapping[str, float] = MappingProxyType({})
    """Factors that bring the states of segments to one energy before T is solved, 1 where there is none."""


class Adapter(Protocol):
    """A pipeline as the method sees it: text, predictions, images, and weights to edit and train.

    Latents are ``[B, C, H, W]`` with the :attr:`latent_shape`. A family that packs latents does so in
    :meth:`predict`. Images are uint8 RGB ``[B, 3, side, side]``. A batch of prompts is a
    :class:`~trce_lightning.tokens.Text`.
    """

    name: str
    """The model's name in messages."""
    pipeline: DiffusionPipeline
    latent_shape: tuple[int, int, int]
    """The shape ``[C, H, W]`` of a latent."""
    network_evaluations: int
    """The number of latent × prompt pairs that the denoiser has evaluated so far."""
    guided: bool
    """True if sampling evaluates ∅. It is False for guidance-distilled models."""

    @property
    def denoiser(self) -> ModelMixin:
        """Return the network that stage 1 edits and stage 2 trains."""

    @property
    def device(self) -> torch.device:
        """Return the denoiser's device."""

    @property
    def side(self) -> int:
        """Return the side of an image in pixels."""

    @property
    def prompt_tokens(self) -> int:
        """Return how many tokens of a prompt the model can read, including the start and end tokens."""

    def networks(self) -> dict[str, nn.Module]:
        """Return all networks, including the denoiser, by their names in the pipeline."""

    def to(self, device: torch.device | str) -> Adapter:
        """Move all networks to ``device``."""

    def to_channels_last(self) -> Adapter:
        """Lay denoiser and decoder out as NHWC. This changes only speed and last bits."""

    def encoding_on(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Keep the text encoders on ``device`` within, and move them back afterwards."""

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids by segment, padded and cut to the model's length, int64 ``[B, L]`` on the CPU."""

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens of each prompt the model reads, including the start and end tokens."""

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts of which the model reads only the beginning."""

    def fits(self, prompt: str) -> bool:
        """Return whether the model reads the whole prompt."""

    def vocabulary(self) -> dict[str, Tensor]:
        """Return the token ids that a user can type, by segment, int64 ``[V]`` on the CPU.

        Each comes back alone when its text is tokenized. The start's, the end's and padding's don't count.
        """

    def detokenize(self, segment: str, words: Sequence[Sequence[int]]) -> list[str]:
        """Return the prompts that token ids of a segment spell, without the start's, the end's and padding.

        Not every row of ids survives: tokenizing its prompt may give others.
        """

    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Text:
        """Return prompts as the denoiser reads them, without gradients.

        ``trimmed`` cuts the positions after the longest prompt's EoT from causal segments. The other states
        stay the same.
        """

    def embed(self, input_ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return token embeddings by segment, ``[B, L]`` → ``[B, L, e]``, without gradients."""

    def encode_embeddings(self, embeddings: Mapping[str, Tensor], input_ids: Mapping[str, Tensor]) -> Text:
        """Return the text of token embeddings ``[B, L, e]`` by segment. It carries gradients.

        The states are those of :meth:`encode`. ``input_ids`` give the roles of the positions, and the
        position that an encoder pools.
        """

    def empty(self) -> Text:
        """Return ∅, B = 1. If there is no negative prompt, guidance leads away from ∅."""

    def mentions(self, prompts: Sequence[str], terms: Sequence[str], *, trimmed: bool) -> dict[str, Tensor]:
        """Return True at the tokens of each prompt that spell its term, bool ``[B, L]`` by segment.

        L is that of :meth:`encode`. If a term isn't found, its row is False.
        """

    def streams(self) -> dict[str, Stream]:
        """Return the streams that stage 1 edits: "context" and, if the model has one, "pooled"."""

    def trainable(self, pattern: str, option: str = "trajectory.trainable") -> dict[str, nn.Parameter]:
        """Return the denoiser's parameters by name, if their module's name matches an fnmatch ``pattern``.

        If there are none, raise ``InputError`` that names the ``option``.
        """

    def predict(self, z_t: Tensor, timestep: Tensor | int, text: Text) -> Tensor:
        """Return the denoiser's output, ``[B, C, H, W]`` float32, in the space that the schedule names."""

    def schedule(self, num_steps: int) -> Schedule:
        """Return the noise levels of a deterministic sampling run with the model's own spacing.

        If the model has fewer timesteps than ``num_steps``, raise ``InputError``.
        """

    def scheduler(
        self, name: str, num_steps: int, timestep_spacing: str | None, device: torch.device | str = "cpu"
    ) -> Any:
        """Return diffusers' scheduler of class ``name`` on the model's noise schedule.

        Its timesteps are set. If the class can't sample by this schedule or can't take that many steps, raise
        ``InputError``.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents of images, float32."""

    def unchanged(self) -> AbstractContextManager[None]:
        """Assume within that no weights change, so that each network is hashed once."""

    def other_weights(self) -> AbstractContextManager[None]:
        """Assume within that the weights are others, and afterwards that they are the earlier ones again."""

    def weights_changed(self) -> None:
        """Forget the hashes that :meth:`unchanged` has kept."""

    def text_fingerprint(self) -> str:
        """Return a hash that identifies text encoders and tokenizers."""

    def fingerprint(self) -> str:
        """Return a hash that identifies the whole generator: weights, schedule and resolution."""

    def original_state(self) -> dict[str, Tensor]:
        """Return all tensors under the names of one-file checkpoints.

        If there are no such names for the model, raise ``InputError``.
        """
