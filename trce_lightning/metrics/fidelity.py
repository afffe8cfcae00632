"""How good images still are: FID against real images, and CLIP score against their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal import CLIPScore
from transformers import BatchFeature, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from trce_lightning.adapters.stable_diffusion import fingerprint
from trce_lightning.emoji.judge import Judge
from trce_lightning.storage import write_safetensors

REAL_STATES = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


class JudgeFeatures(nn.Module):
    """The judge's pooled features as FID's feature network, in float32 whatever the surrounding precision."""

    num_features = Judge.num_features

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge.eval()

    def forward(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, 64, 64]`` → float32 ``[B, 256]``."""
        with torch.autocast(images.device.type, enabled=False):
            return self.judge.features(images)


def judge_fid(judge: Judge) -> FrechetInceptionDistance:
    """FID = ‖μ_r − μ‖² + tr(Σ_r + Σ − 2 (Σ_r Σ)^½) on the judge's features, on a scale of its own."""
    return _float32(FrechetInceptionDistance(feature=JudgeFeatures(judge), reset_real_features=False))


def inception_fid(weights: Path) -> FrechetInceptionDistance:
    """FID on Inception's 2048 features, its torch-fidelity weights read from a local file.

    Raises:
        FileNotFoundError: no such file. Nothing is downloaded.
        ModuleNotFoundError: torch-fidelity is not installed.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"FID: expected a file of Inception weights, got '{weights}'")
    return _float32(
        FrechetInceptionDistance(
            feature=2048, reset_real_features=False, feature_extractor_weights_path=str(weights)
        )
    )


def _float32(metric: FrechetInceptionDistance) -> FrechetInceptionDistance:
    # torchmetrics sets it in update, which a rank whose share is empty never calls.
    metric.orig_dtype = torch.float32
    return metric


def save_real_statistics(metric: FrechetInceptionDistance, file: Path) -> None:
    """Write count, sum and second moments of the real images' features, with the network's fingerprint."""
    states = {name: getattr(metric, name).detach().cpu() for name in REAL_STATES}
    write_safetensors(file, states, {"feature_network": fingerprint(metric.inception)})


def load_real_statistics(metric: FrechetInceptionDistance, file: Path) -> None:
    """Give ``metric`` the real images' statistics; every rank of a distributed run loads the same.

    They survive ``reset`` and are not summed over ranks; don't update with further real images.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or of another feature network.
    """
    if not file.is_file():
        raise FileNotFoundError(f"FID: expected a file of real images' statistics, got '{file}'")
    expected = fingerprint(metric.inception)
    try:
        with safe_open(file, "pt") as statistics:
            found = (statistics.metadata() or {}).get("feature_network")
            states = {name: statistics.get_tensor(name) for name in REAL_STATES}
    except SafetensorError as error:
        raise ValueError(f"{file}: expected statistics of real images, got: {error}") from error
    if found != expected:
        raise ValueError(f"{file}: expected statistics of feature network {expected}, got {found}")
    for name, state in states.items():
        metric.add_state(name, state.to(metric.device), dist_reduce_fx=_same_on_every_rank)


def _same_on_every_rank(states: Tensor) -> Tensor:
    return states[0]


class Clip(NamedTuple):
    """A CLIP model with what turns texts and images into its input."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    image_processor: CLIPImageProcessor

    def tokenize(self, texts: Sequence[str]) -> BatchFeature:
        """Token ids and mask, padded to the longest text; long ones are cut, their end of text is kept."""
        config: Any = self.model.config.text_config
        return self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            return_tensors="pt",
            max_length=min(config.max_position_embeddings, self.tokenizer.model_max_length),
        )

    def pixels(self, images: Tensor | Sequence[Tensor]) -> BatchFeature:
        """Normalised pixel values of uint8 images ``[3, H, W]``. ``ValueError`` when they are not uint8."""
        if any(image.dtype != torch.uint8 for image in images):
            raise ValueError(f"CLIP: expected uint8 images in [0, 255], got {images[0].dtype}")
        return self.image_processor(images=list(images), return_tensors="pt")


def load_clip(folder: Path) -> Clip:
    """Open a folder with CLIPModel, CLIPTokenizer and CLIPImageProcessor, float32 and frozen. Asks no hub.

    ``FileNotFoundError`` when the folder lacks one of them.
    """
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"CLIP: expected a folder with {name}, got '{folder}'")
    model = CLIPModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    return Clip(
        model.requires_grad_(False).eval(),
        CLIPTokenizer.from_pretrained(str(folder), local_files_only=True),
        CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True),
    )


class _Projections(nn.Module):
    """What torchmetrics calls on a model: transformers 5 returns the projections inside an output object."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


class RawClipScore(CLIPScore):
    """Mean of 100 · cos(CLIP(image), CLIP(prompt)) over uint8 images and prompts, in [−100, 100].

    Below zero too, where torchmetrics reports zero. Long prompts are cut by the tokenizer, which keeps the
    end of text that CLIP pools at.
    """

    def __init__(self, clip: Clip, **kwargs: Any) -> None:
        def process(
            text: list[str] | None = None, images: list[Tensor] | None = None, **_: Any
        ) -> BatchFeature:
            return clip.pixels(images) if images is not None else clip.tokenize(text or [])

        parts: tuple[Any, Any] = (_Projections(clip.model.requires_grad_(False).eval()), process)
        super().__init__(model_name_or_path=lambda: parts, **kwargs)

    def compute(self) -> Tensor:
        """Scalar; ``ValueError`` without images."""
        if not self.n_samples:
            raise ValueError("CLIP score: expected at least one image, got none")
        return self.score / self.n_samples
