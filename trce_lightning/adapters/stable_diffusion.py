"""The adapter of Stable Diffusion 1.x and 2.x.

Their denoiser is a UNet2DConditionModel that reads the raw states of a causal text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, StableDiffusionPipeline

from trce_lightning.adapters.clip_text import Tokens
from trce_lightning.adapters.single_file import TEXT, UNET, VAE
from trce_lightning.adapters.unet import SEGMENT, UNetAdapter
from trce_lightning.tokens import Text


class StableDiffusionAdapter(UNetAdapter):
    """The :class:`~.protocol.Adapter` of Stable Diffusion: text states, predictions, projections, images."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    file_prefixes: ClassVar[tuple[str, ...]] = (UNET, VAE, TEXT)
    # The safety checker would blacken images that are to be scored.
    unused: ClassVar[Mapping[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }

    def __init__(
        self, pipeline: DiffusionPipeline, name: str | None = None, *, resolution: int | None = None
    ) -> None:
        """Take a pipeline's networks; see :class:`.PipelineAdapter`. ``InputError`` if they don't fit."""
        super().__init__(pipeline, name, resolution=resolution)
        self.tokenizer, self.text_encoder = self.texts[0].tokenizer, self.texts[0].encoder

    def _text(self, tokens: Sequence[Tokens]) -> Text:
        """Return the last states of the one encoder, after its final norm."""
        states = self.texts[0].outputs(tokens[0], masked=True)[0].float()
        return Text({SEGMENT: states}, {SEGMENT: self._roles(tokens).to(states.device)})
