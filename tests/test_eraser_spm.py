"""SPM: membranes start as nothing, are held at anchors, and are merged and stored exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import TUNED, Harness, batch_of
from safetensors.torch import save_file

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.spm import SPM, anchor_text, membrane_layers


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def spm(**options: Any) -> SPM:
    return SPM(**(TUNED | {"anchors": 2, "warmup": 1, "lr": 1.0} | options))


def test_a_membrane_does_nothing_at_first_and_is_merged_exactly(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    harness = Harness(adapter, tmp_path)
    z_t, gun = torch.randn(1, *adapter.latent_shape), adapter.encode(["a gun"])
    eraser = spm(iterations=4)
    with torch.no_grad():
        original = adapter.predict(z_t, 500, gun)
        module = eraser.module(harness.job)
        assert torch.equal(adapter.predict(z_t, 500, gun), original)
        for parameter in module.extra.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        with_membranes = adapter.predict(z_t, 500, gun)
        result = eraser.result(harness.job, module)
        merged = adapter.predict(z_t, 500, gun)
    assert (with_membranes - original).abs().max() > 1e-2
    torch.testing.assert_close(merged, with_membranes, atol=1e-4, rtol=1e-4)
    layers = membrane_layers(adapter)
    assert set(result.changed["unet"]) == {f"{name}.weight" for name in layers}
    assert all(".attentions." in name for name in layers)
    assert {kind for name in layers for kind in ("attn1", "attn2", "ff", "proj_in") if kind in name} == {
        "attn1",
        "attn2",
        "ff",
        "proj_in",
    }


def test_the_lora_of_spm_opens_in_diffusers(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    eraser, harness = spm(), Harness(adapter, tmp_path)
    result = eraser.erase(harness.job)
    save_file(dict(result.files["lora"]), tmp_path / "lora.safetensors")
    other = StableDiffusionAdapter(build_tiny_pipeline())
    z_t, gun = torch.randn(1, *adapter.latent_shape), adapter.encode(["a gun"])
    with torch.no_grad():
        erased, original = adapter.predict(z_t, 500, gun), other.predict(z_t, 500, gun)
        other.pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        loaded = other.predict(z_t, 500, gun)
    assert (erased - original).abs().max() > 1e-3
    torch.testing.assert_close(loaded, erased, atol=1e-4, rtol=1e-3)


def test_anchors_have_norms_around_the_concepts_and_are_the_same_each_time(
    adapter: StableDiffusionAdapter,
) -> None:
    gun = adapter.encode(["a gun"])
    ratios = [anchor_text(gun, seed).states["clip"].norm() / gun.states["clip"].norm() for seed in range(40)]
    assert 0.8 <= min(ratios) < 0.88 and 1.12 < max(ratios) <= 1.2
    assert torch.equal(anchor_text(gun, 3).states["clip"], anchor_text(gun, 3).states["clip"])


def test_every_anchor_counts_and_the_membrane_is_held_there(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """The released code's loss sees some anchors only. Here a change at any of them changes the loss."""
    eraser, harness = spm(anchors=3), Harness(adapter, tmp_path)
    batch = batch_of(eraser, harness)  # before the membranes are put on
    module = eraser.module(harness.job)
    with torch.no_grad():
        held = eraser.losses(module, batch)["anchor"]
        assert held < 1e-8
        for index in range(2, 5):
            other = {**batch, "erase": dict(batch["erase"])}
            other["erase"]["predictions"] = batch["erase"]["predictions"].clone()
            other["erase"]["predictions"][:, index] += 1
            torch.testing.assert_close(eraser.losses(module, other)["anchor"], torch.tensor(1 / 3))
    assert eraser.weight_of("anchor") == 1000 and eraser.weight_of("erase") == 1


def test_spms_learning_rate_rises_and_goes_round() -> None:
    eraser = SPM(**(TUNED | {"iterations": 40, "warmup": 10, "restarts": 3}))
    factors = [eraser.lr_factor(step) for step in range(41)]
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert factors[20] == pytest.approx(1) and factors[19] < 0.1 and factors[15] == pytest.approx(0.5)
    assert SPM(**(TUNED | {"warmup": 0, "restarts": 0})).lr_factor(2) == 1
