"""Model families: loading, checking and converting models.

Only this package knows the names of diffusers' modules.
"""

from trce_lightning.adapters.loading import adapter_of, load_adapter, load_stored, stored_pipeline
from trce_lightning.adapters.protocol import Adapter, Entry, Stream
from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter

__all__ = [
    "Adapter",
    "Entry",
    "StableDiffusionAdapter",
    "Stream",
    "adapter_of",
    "load_adapter",
    "load_stored",
    "stored_pipeline",
]
