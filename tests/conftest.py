"""A Stable Diffusion of random weights that is small enough for every test, and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # spinning threads make small matrices slow on a busy machine

import logging
import string
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from browser import page as page
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.emoji.training.clip import tokenizer_of
from trce_lightning.jobs import runs
from trce_lightning.tokens import Text

LONG_FILES = (
    "test_whole_run.py",
    "test_leaderboard.py",
    "test_signals.py",
    "test_attacks_job.py",
    "test_embedded.py",
    "test_siblings.py",
    "test_tune.py",
    "test_benchmarks.py",
)
"""The files that take longest. They begin first, so that none runs on alone when the others are done."""
MAX_LENGTH = 32
WIDTH = 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of :data:`LONG_FILES` first, and leave the others in their order."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def build_tiny_tokenizer() -> CLIPTokenizer:
    """One token a printable character, inside a word and at its end."""
    characters = [c for c in string.printable if not c.isspace()]
    tokens = [*characters, *(f"{c}</w>" for c in characters)]
    return tokenizer_of(tokens, [], MAX_LENGTH)


def build_tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A StableDiffusionPipeline for 16×16 pixels, the same random weights each time."""
    tokenizer = build_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(tiny_text_config(tokenizer, WIDTH))
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        # At its initial size the prediction hardly depends on the prompt, and tests could not tell.
        unet.conv_out.weight.data *= 4
        vae = build_tiny_vae()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_text_config(tokenizer: CLIPTokenizer, width: int, **options: int) -> CLIPTextConfig:
    """Two layers of the tokenizer's vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def build_tiny_vae(**options: Any) -> AutoencoderKL:
    """An autoencoder that halves the side."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        **options,
    )


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """DDIM with the published noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def text_of(states: torch.Tensor) -> Text:
    """Text of these states ``[B, L, d]``; a denoiser looks at no role."""
    return Text({"clip": states}, {"clip": torch.zeros(states.shape[:2], dtype=torch.int8)})


def entries_of(adapter: StableDiffusionAdapter) -> dict[str, torch.nn.Linear]:
    """The layers that stage 1 edits, by name."""
    return {name: entry.module for name, entry in adapter.streams()["context"].entries.items()}


@pytest.fixture(autouse=True)
def cpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide bfloat16 instructions, so that ``trainer.precision=auto`` is the same on all machines.

    Tests that start processes name the precision.
    """
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture(autouse=True)
def no_handler_stays() -> Iterator[None]:
    """A run adds its log file to the root logger, and libraries add what writes to this test's stderr."""
    before = list(logging.getLogger().handlers)
    yield
    for handler in set(logging.getLogger().handlers) - set(before):
        logging.getLogger().removeHandler(handler)
        handler.close()


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a folder sets a variable."""
    monkeypatch.setenv(runs.FOLDER_VARIABLE, "")
    monkeypatch.delenv(runs.FOLDER_VARIABLE)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def tiny_pipeline() -> StableDiffusionPipeline:
    """A pipeline of the test's own, which it may edit."""
    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_adapter() -> StableDiffusionAdapter:
    """Shared by all tests: its weights must stay as they are."""
    return StableDiffusionAdapter(build_tiny_pipeline())
