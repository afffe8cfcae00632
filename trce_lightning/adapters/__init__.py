"""One file per model family: the only place that knows diffusers' module names."""

from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter, TextStates, load_adapter

__all__ = ["StableDiffusionAdapter", "TextStates", "load_adapter"]
