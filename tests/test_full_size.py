"""Whole Stable Diffusion 1.x and 2.x networks in memory, random weights: both stages, and every way out.

Takes up to 8 GB of memory and 10 GB of disk.
"""

import gc
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from formulas import EditByHand, erase_by_both_stages, worst_edit
from published_models import KEYS_AND_VALUES, QUERIES, VERSIONS, pipeline_of

from trce_lightning.export import card_facts, save_delta, save_pipeline, save_single_file

pytestmark = pytest.mark.slow
RESOLUTION = 128  # pixels, for speed; the networks are those of 512 and 768


def digests(pipeline: StableDiffusionPipeline) -> dict[str, str]:
    """A hash of every tensor, since two pipelines at once would fill the memory."""
    return {
        f"{network}.{name}": hashlib.blake2b(
            tensor.contiguous().view(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for network in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipeline, network).state_dict().items()
    }


def images(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    return pipeline("a gun", num_inference_steps=2, output_type="np", generator=generator, **size).images


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: pytest keeps the folders of its last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_whole_network_through_both_stages_and_every_export(version: str, folder: Path) -> None:
    pipeline = pipeline_of(version)
    before = digests(pipeline)
    edited = {name: pipeline.unet.state_dict()[name].clone() for name in KEYS_AND_VALUES}
    by_hand = EditByHand(pipeline)
    module, losses, worst = erase_by_both_stages(pipeline, folder, resolution=RESOLUTION, dtype=torch.float32)
    assert worst < 1e-3
    assert losses.found == pytest.approx(losses.by_hand, rel=1e-4)
    assert losses.with_gradient == QUERIES
    assert worst_edit(by_hand, edited, pipeline.unet.state_dict()) < 1e-4
    after = digests(pipeline)
    differing = {name for name, digest in after.items() if digest != before[name]}
    assert differing == {f"unet.{name}" for name in KEYS_AND_VALUES | QUERIES} and len(differing) == 64

    drawn = images(pipeline)
    save_pipeline(folder / "erased", module.adapter, card_facts("base", ["weapons"], "TRCE", "", 64))
    save_single_file(folder / "erased.safetensors", module.adapter, "base", "0123")
    save_delta(folder / "delta.safetensors", module.changed_tensors(), "base", "0123")
    assert (folder / "delta.safetensors").stat().st_size < 220e6
    del pipeline, module, losses
    gc.collect()

    opened = StableDiffusionPipeline.from_pretrained(folder / "erased")
    assert digests(opened) == after
    np.testing.assert_allclose(images(opened), drawn, atol=1e-4)
    del opened
    gc.collect()
    single = StableDiffusionPipeline.from_single_file(
        str(folder / "erased.safetensors"), config=str(folder / "erased")
    )
    assert digests(single) == after
