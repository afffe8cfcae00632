"""The prompts to keep: encoded once for an encoder, by several processes as by one."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_runs import KEEP_PROMPTS, cpu_trainer, one_thread
from tiny_sdxl import build_tiny_sdxl

from trce_lightning.adapters import Adapter, StableDiffusionAdapter
from trce_lightning.adapters.sdxl import SDXLAdapter
from trce_lightning.closed_form import keep_statistics
from trce_lightning.runtime.ranks import Rank, on_each_rank
from trce_lightning.textual import cached_kept, kept_statistics


@pytest.mark.parametrize(("prompts", "devices"), [(KEEP_PROMPTS, 2), (KEEP_PROMPTS[:2], 3)])
def test_several_processes_encode_as_one(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path, prompts: Sequence[str], devices: int
) -> None:
    trainer = cpu_trainer(tmp_path, devices=devices, strategy="ddp_fork")
    with one_thread():
        found = cached_kept(trainer, tiny_adapter, prompts, tmp_path / "cache")
    alone, share = (kept_statistics(tiny_adapter, texts) for texts in (prompts, prompts[::devices]))
    for mean, expected, other in zip(*(means["context"] for means in (found, alone, share)), strict=True):
        torch.testing.assert_close(mean.k, expected.k, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(mean.k, other.k, rtol=1e-2)


def test_prompts_are_encoded_once_for_an_encoder(
    tiny_adapter: StableDiffusionAdapter, tiny_pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    trainer, cache = cpu_trainer(tmp_path), tmp_path / "cache"

    def agree(adapter: Adapter, prompts: Sequence[str]) -> bool:
        found = cached_kept(trainer, adapter, prompts, cache)
        expected = kept_statistics(adapter, prompts)
        assert found.keys() == expected.keys() == adapter.streams().keys()
        return all(
            torch.equal(one.k, other.k)
            for name, own in found.items()
            for one, other in zip(own, expected[name], strict=True)
        )

    assert agree(tiny_adapter, KEEP_PROMPTS) and agree(tiny_adapter, KEEP_PROMPTS)
    (file,) = cache.iterdir()
    save_file({name: 2 * mean for name, mean in load_file(file).items()}, file)
    assert not agree(tiny_adapter, KEEP_PROMPTS)  # it is the file that was read
    # Other prompts and another encoder have a file of their own.
    assert agree(tiny_adapter, KEEP_PROMPTS[1:])
    next(tiny_pipeline.text_encoder.parameters()).data += 0.1
    assert agree(StableDiffusionAdapter(tiny_pipeline), KEEP_PROMPTS)
    assert len(list(cache.iterdir())) == 3
    # A model of two streams has the means of both in one file.
    for _ in range(2):
        assert agree(SDXLAdapter(build_tiny_sdxl()), KEEP_PROMPTS)
    (file,) = (file for file in cache.iterdir() if len(load_file(file)) == 4)
    assert set(load_file(file)) == {"every", "eot", "pooled.every", "pooled.eot"}


def test_states_are_those_of_full_precision_whatever_the_trainers(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    trainer = cpu_trainer(tmp_path, precision="bf16-mixed")
    found = cached_kept(trainer, tiny_adapter, KEEP_PROMPTS, tmp_path / "cache")
    every = found["context"].every.k
    assert torch.equal(every, kept_statistics(tiny_adapter, KEEP_PROMPTS)["context"].every.k)
    with torch.autocast("cpu", torch.bfloat16):
        half = tiny_adapter.text_encoder(tiny_adapter.tokenize(KEEP_PROMPTS)["clip"])[0]
    assert not torch.equal(every, keep_statistics(half.flatten(0, 1)).k)


def test_weights_that_move_between_devices_on_a_rank_can_train(tmp_path: Path) -> None:
    """Weights that move in inference mode would take no gradient. Those of a CPU don't move."""
    seen: list[bool] = []
    on_each_rank(cpu_trainer(tmp_path), lambda _: seen.append(torch.is_inference_mode_enabled()))
    assert seen == [False]


def test_each_rank_returns_its_own_result(tmp_path: Path) -> None:
    rank = on_each_rank(cpu_trainer(tmp_path), lambda rank: rank)
    assert rank == Rank(0, 1, torch.device("cpu"))


def test_nothing_to_keep_is_refused(tiny_adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"textual\.keep_prompts: expected at least one"):
        cached_kept(cpu_trainer(tmp_path), tiny_adapter, [], tmp_path)
