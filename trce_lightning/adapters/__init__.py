"""Model families: the only place that knows diffusers' module names, and what loads, refuses and converts."""

from trce_lightning.adapters.loading import load_adapter
from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter, TextStates

__all__ = ["StableDiffusionAdapter", "TextStates", "load_adapter"]
