"""One file per model family: the only place that knows diffusers' module names."""

from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter, load_adapter

__all__ = ["StableDiffusionAdapter", "load_adapter"]
