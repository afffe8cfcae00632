"""Measure image quality: FID against real images, and CLIP score against the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import BatchFeature, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from trce_lightning.errors import InputError
from trce_lightning.runtime.fingerprints import fingerprint
from trce_lightning.runtime.network import check_hub
from trce_lightning.runtime.storage import reading, write_safetensors

SECOND_MOMENTS = "real_features_cov_sum"
REAL_STATES = ("real_features_sum", SECOND_MOMENTS, "real_features_num_samples")


def feature_fid(features: nn.Module) -> FrechetInceptionDistance:
    """Return FID = ‖μ_r − μ‖² + tr(Σ_r + Σ − 2 (Σ_r Σ)^½) on the features of a network.

    Args:
        features: maps uint8 ``[B, 3, H, W]`` to float32 ``[B, num_features]`` and has an attribute
            ``num_features``.
    """
    return _float32(FrechetInceptionDistance(feature=features, reset_real_features=False))


def inception_fid(weights: Path) -> FrechetInceptionDistance:
    """Return FID on Inception's 2048 features, with torch-fidelity's weights from a local file.

    Raises:
        FileNotFoundError: the file does not exist. Nothing is downloaded.
        InputError: the file holds other weights, or torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"model.inception: expected a file of Inception weights, got '{weights}'")
    if find_spec("torch_fidelity") is None:
        raise InputError(
            "model.inception: expected torch-fidelity to be installed: pip install 'trce-lightning[fid]'"
        )
    try:
        _check_tensors(weights)
        metric = FrechetInceptionDistance(
            feature=2048, reset_real_features=False, feature_extractor_weights_path=str(weights)
        )
    except (UnpicklingError, RuntimeError) as error:
        raise InputError(
            f"model.inception: expected torch-fidelity's weights, got '{weights}': {error}"
        ) from error
    return _float32(metric)


def _check_tensors(file: Path) -> None:
    """Raise ``UnpicklingError`` unless the file holds a dictionary that loads without running code."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (AttributeError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:  # no tensors
        raise UnpicklingError(f"no file of tensors ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UnpicklingError(f"a {type(content).__name__} in place of a dictionary")


def _float32(metric: FrechetInceptionDistance) -> FrechetInceptionDistance:
    # torchmetrics sets orig_dtype in update. A rank without images never calls update.
    metric.orig_dtype = torch.float32
    return metric


def save_real_statistics(metric: FrechetInceptionDistance, file: Path) -> None:
    """Write count, sum and second moments of the real images' features, with the network's fingerprint.

    The second moments are symmetric, ``[d, d]``. The file has their upper triangle, ``[d (d + 1) / 2]``.
    """
    states = {name: getattr(metric, name).detach().cpu() for name in REAL_STATES}
    states[SECOND_MOMENTS] = upper_triangle(states[SECOND_MOMENTS])
    write_safetensors(file, states, {"feature_network": fingerprint(metric.inception)})


def upper_triangle(matrix: Tensor) -> Tensor:
    """Return the entries on and above the diagonal, row by row: ``[d, d]`` → ``[d (d + 1) / 2]``."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def symmetric(triangle: Tensor, size: int) -> Tensor:
    """Return the symmetric matrix ``[size, size]`` of an upper triangle."""
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_zeros(size, size)
    matrix[rows, columns] = matrix[columns, rows] = triangle
    return matrix


def load_real_statistics(metric: FrechetInceptionDistance, file: Path) -> None:
    """Give ``metric`` the real images' statistics. Every rank of a distributed run loads the same file.

    The statistics survive ``reset`` and are not summed over ranks. Don't update ``metric`` with more real
    images.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: the file is unreadable or belongs to another feature network.
    """
    if not file.is_file():
        raise FileNotFoundError(f"FID: expected a file of real images' statistics, got '{file}'")
    expected = fingerprint(metric.inception)
    remedy = "delete it: those of a folder of pictures are made again"
    with reading(file, "statistics of real images", remedy), safe_open(file, "pt") as statistics:
        found = (statistics.metadata() or {}).get("feature_network")
        states = {name: statistics.get_tensor(name) for name in REAL_STATES}
        if states[SECOND_MOMENTS].ndim == 1:  # files of earlier versions have the whole matrix
            size = len(states["real_features_sum"])
            states[SECOND_MOMENTS] = symmetric(states[SECOND_MOMENTS], size)
    if found != expected:
        raise InputError(f"{file}: expected statistics of feature network {expected}, got {found}; {remedy}")
    for name, state in states.items():
        metric.add_state(name, state.to(metric.device), dist_reduce_fx=_same_on_every_rank)


def _same_on_every_rank(states: Tensor) -> Tensor:
    return states[0]


class Clip(NamedTuple):
    """A CLIP model with the tokenizer and the image processor that prepare its input."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    image_processor: CLIPImageProcessor

    def tokenize(self, texts: Sequence[str]) -> BatchFeature:
        """Return token ids and mask, padded to the longest text.

        A long text is cut, and its end token stays.
        """
        config: Any = self.model.config.text_config
        return self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            return_tensors="pt",
            max_length=min(config.max_position_embeddings, self.tokenizer.model_max_length),
        )

    def pixels(self, images: Tensor | Sequence[Tensor]) -> BatchFeature:
        """Return normalised pixel values of images ``[3, H, W]``; ``InputError`` unless they are uint8."""
        if any(image.dtype != torch.uint8 for image in images):
            raise InputError(f"CLIP: expected uint8 images in [0, 255], got {images[0].dtype}")
        return self.image_processor(images=list(images), return_tensors="pt")

    @torch.no_grad()
    def scores(self, images: Tensor | Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Return 100 · cos(CLIP(image), CLIP(text)) of each pair, ``[B]`` in [−100, 100].

        The score may be negative. torchmetrics reports zero then. The tokenizer cuts long texts and keeps the
        end token, at which CLIP pools.
        """
        device = self.model.device
        pixels = self.pixels([image.cpu() for image in images]).to(device)
        image = self.model.get_image_features(**pixels).pooler_output
        text = self.model.get_text_features(**self.tokenize(texts).to(device)).pooler_output
        return 100 * torch.cosine_similarity(image, text)


def load_clip(source: str | Path) -> Clip:
    """Open CLIPModel, CLIPTokenizer and CLIPImageProcessor, in float32 and frozen.

    Args:
        source: a local folder, or a hub id ``owner/name``. If it is a folder, no hub is asked.

    Raises:
        FileNotFoundError: the folder lacks one of the three.
        InputError: the hub can't be reached or has no such model, or a file is damaged or of another kind.
    """
    folder = Path(source)
    is_local = isinstance(source, Path) or folder.exists() or str(source).count("/") != 1
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json") if is_local else ():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"model.clip: expected a folder with {name}, got '{folder}'")
    if not is_local:
        check_hub()
    try:
        model = CLIPModel.from_pretrained(str(source), local_files_only=is_local, dtype=torch.float32)
        return Clip(
            model.requires_grad_(False).eval(),
            CLIPTokenizer.from_pretrained(str(source), local_files_only=is_local),
            CLIPImageProcessor.from_pretrained(str(source), local_files_only=is_local),
        )
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        raise InputError(
            f"model.clip: expected a folder or hub id of CLIP, got '{source}': {error}"
        ) from error
