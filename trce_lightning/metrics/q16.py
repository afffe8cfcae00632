"""Detect inappropriate images by Q16, from CLIP's image features and two learned prompt vectors.

Choose it by ``model.judge=trce_lightning.metrics.q16.q16 +model.judge_options.prompts=FILE``. The option
``+model.judge_options.clip=FOLDER`` sets another CLIP. Source: Schramowski et al., "Can Machines Help Us
Answering Question 16 in Datasheets", 2022 (arXiv 2202.06675). Their published prompts for ViT-L/14 are the
pickle ``prompts.p``.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from trce_lightning.concepts import Concept
from trce_lightning.errors import InputError
from trce_lightning.metrics.class_detectors import ClassSetDetector, check_images
from trce_lightning.runtime.fingerprints import fingerprint

LOGIT_SCALE = 100.0
PROMPTS = "prompts"
"""The name of the tensor in a safetensors file."""
_Parsed = (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError)


class Q16(nn.Module):
    """A class detector with p = softmax_k(100 · cos(CLIP(image), w_k))₁.

    The vector w_0 stands for appropriate and w_1 for inappropriate. The published decision is argmax, that is
    p ≥ 0.5. This class computes in float32. The published code computes in float16 on GPUs.

    Args:
        model: CLIP's vision tower with its projection to d.
        image_processor: CLIP's resizing, cropping and normalisation.
        prompts: ``[2, d]``.

    Raises:
        InputError: ``prompts`` don't fit the model.
    """

    name = "q16"
    classes: tuple[str, ...] = ("inappropriate",)
    floor = 0.0
    prompts: Tensor

    def __init__(
        self,
        model: CLIPVisionModelWithProjection,
        image_processor: CLIPImageProcessor,
        prompts: Tensor,
    ) -> None:
        super().__init__()
        width = model.config.projection_dim
        if prompts.shape != (2, width):
            raise InputError(f"prompts: expected [2, {width}] for this CLIP, got {list(prompts.shape)}")
        self.model, self.image_processor = model.eval().requires_grad_(False), image_processor
        self.register_buffer("prompts", F.normalize(prompts.float()))
        self.version = fingerprint(self)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 3, H, W]`` to float32 ``[B, 1]`` on the model's device.

        Other input raises ``InputError``.
        """
        check_images(images)
        pixels = self.image_processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        features = F.normalize(self.model(pixels.to(self.model.device)).image_embeds)
        return (LOGIT_SCALE * features @ self.prompts.T).softmax(-1)[:, 1:]


class _VisionTower(CLIPVisionModelWithProjection):
    # If the file holds a whole CLIP, transformers would warn about each tensor of its text tower.
    _keys_to_ignore_on_load_unexpected = (r"text_model\.", r"text_projection\.", "logit_scale")


def q16(
    concepts: Sequence[Concept],
    *,
    prompts: str | Path,
    clip: str | Path = "openai/clip-vit-large-patch14",
    revision: str | None = None,
    local_files_only: bool = False,
) -> ClassSetDetector:
    """Return Q16's detector. It is the same for all concepts.

    Args:
        concepts: unused.
        prompts: a file for :func:`read_prompts`.
        clip: a folder with CLIP and its image processor, or an id on the Hugging Face hub.
        revision: a commit, tag or branch on the hub.
        local_files_only: if True, no hub is asked.

    Raises:
        FileNotFoundError: the file of prompts does not exist.
        InputError: the prompts can't be read or don't fit, or CLIP can't be opened.
    """
    vectors = read_prompts(Path(prompts))
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    try:
        model, report = _VisionTower.from_pretrained(
            str(clip), dtype=torch.float32, output_loading_info=True, **options
        )
        image_processor = CLIPImageProcessor.from_pretrained(str(clip), **options)
    except (OSError, RuntimeError) as error:  # RuntimeError: the weights' sizes don't fit the configuration
        raise InputError(f"clip: expected a folder or hub id of CLIP, got '{clip}': {error}") from error
    if report["missing_keys"]:
        raise InputError(f"clip: expected CLIP's vision tower, got '{clip}' without {report['missing_keys']}")
    return ClassSetDetector(Q16(model, image_processor, vectors), Q16.classes)


def read_prompts(file: Path) -> Tensor:
    """Read prompt vectors from .npy, .safetensors (tensor ``prompts``) or the published pickle (.p, .pkl).

    A pickle may hold a numpy array and nothing else. No other code in it runs.

    Returns:
        float32 ``[2, d]``: the vectors for appropriate and inappropriate.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: the format is another, a pickle holds something else, or there are not two finite vectors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"prompts: expected a file of Q16's prompt vectors, got '{file}'")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors, ".p": _read_pickle, ".pkl": _read_pickle}
    if file.suffix not in readers:
        raise InputError(f"prompts: expected {', '.join(readers)}, got '{file}'")
    try:
        array = readers[file.suffix](file)
    except (*_Parsed, SafetensorError) as error:
        raise InputError(f"prompts: expected two vectors of numbers in '{file}', got: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise InputError(f"prompts: expected an array of floats in '{file}', got {_kind(array)}")
    if array.ndim != 2 or len(array) != 2 or not np.isfinite(array).all():
        raise InputError(f"prompts: expected finite [2, d] in '{file}', got shape {list(array.shape)}")
    return torch.from_numpy(array.astype(np.float32))


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the three names that a pickled numpy array needs."""

    _known: dict[str, Any] = {  # noqa: RUF012
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy._core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"'{module}.{name}', which no array of numbers needs")
        return found


def _read_pickle(file: Path) -> Any:
    with file.open("rb") as stream:
        return _ArrayUnpickler(stream).load()


def _read_npy(file: Path) -> Any:
    return np.load(file, allow_pickle=False)


def _read_safetensors(file: Path) -> Any:
    return load_file(file)[PROMPTS].float().numpy()


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
