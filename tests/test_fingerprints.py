"""A model is hashed once for each change of its weights, and every change gives another fingerprint."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from safetensors.torch import load_file, save_file
from test_variations import save_lora
from tiny_runs import cpu_trainer, sample_plan, stage1_statistics, trajectory_config
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter, base
from trce_lightning.config.schema import OptimizerConfig, TextualConfig
from trce_lightning.data.datamodule import TrajectoryDataModule
from trce_lightning.generation.lora import Lora, lora_applied
from trce_lightning.module import TRCE
from trce_lightning.textual import apply_edit_


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often a network of each class was hashed."""
    counts: Counter = Counter()
    fingerprint = base.fingerprint

    def counted(network: torch.nn.Module) -> str:
        counts[type(network).__name__] += 1
        return fingerprint(network)

    monkeypatch.setattr(base, "fingerprint", counted)
    return counts


ALL = ("UNet2DConditionModel", "CLIPTextModel", "AutoencoderKL")
"""The parts by which a whole model is hashed; tests of whole runs count them."""


def weight_of(adapter: StableDiffusionAdapter) -> Tensor:
    return next(iter(adapter.trainable("*.to_q").values()))


def optimizer_step(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., None]:
    def step(adapter: StableDiffusionAdapter) -> None:
        weight = weight_of(adapter).requires_grad_(True)
        weight.square().sum().backward()
        make([weight], lr=0.1, **options).step()

    return step


def load(adapter: StableDiffusionAdapter) -> None:
    state = adapter.denoiser.state_dict()
    adapter.denoiser.load_state_dict({name: tensor + 0.1 for name, tensor in state.items()})


def in_place(adapter: StableDiffusionAdapter) -> None:
    with torch.no_grad():
        weight_of(adapter).add_(0.1)


def stage_1(adapter: StableDiffusionAdapter) -> None:
    statistics = stage1_statistics(adapter, TextualConfig())
    apply_edit_(adapter, statistics.solve(TextualConfig()))


def raw_data(adapter: StableDiffusionAdapter) -> None:
    weight_of(adapter).data.copy_(weight_of(adapter).data + 0.1)
    adapter.weights_changed()


def halved(adapter: StableDiffusionAdapter) -> None:
    adapter.denoiser.half()


CHANGES: dict[str, Callable[[StableDiffusionAdapter], None]] = {
    "AdamW": optimizer_step(torch.optim.AdamW, foreach=False),
    "AdamW, foreach": optimizer_step(torch.optim.AdamW, foreach=True),
    "SGD": optimizer_step(torch.optim.SGD),
    "load_state_dict": load,
    "in place": in_place,
    "stage 1": stage_1,
    "through .data, and said so": raw_data,
    "another precision": halved,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_weights_is_another_fingerprint(hashed: Counter, name: str) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    with adapter.unchanged():
        before = adapter.fingerprint()
        assert adapter.fingerprint() == adapter.to("cpu").fingerprint() == before
        assert hashed["UNet2DConditionModel"] == 1
        with adapter.unchanged():
            CHANGES[name](adapter)
        after = adapter.fingerprint()
        assert after != before and hashed["UNet2DConditionModel"] == 2
        assert after == StableDiffusionAdapter(adapter.pipeline).fingerprint()
    assert adapter.fingerprint() == after


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_training_is_another_fingerprint_whether_or_not_torch_counts_its_steps(
    hashed: Counter, tmp_path: Path, name: str
) -> None:
    """bitsandbytes writes through pointers, and torch's fused optimizers count no change either."""
    adapter, config = StableDiffusionAdapter(build_tiny_pipeline()), trajectory_config(epochs=1)
    plan = sample_plan(adapter, config, tmp_path)
    module = TRCE(adapter, None, config, OptimizerConfig(name, lr=0.1))
    data = TrajectoryDataModule(adapter, plan, tmp_path, config, seed=0)
    with adapter.unchanged():
        before = adapter.fingerprint()
        cpu_trainer(tmp_path).fit(module, data)
        assert adapter.fingerprint() != before
        assert adapter.fingerprint() == StableDiffusionAdapter(adapter.pipeline).fingerprint()


def test_nothing_is_kept_where_nobody_has_said_that_weights_stay(hashed: Counter) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    with adapter.unchanged():
        found = {adapter.fingerprint()}
    for network in (adapter.denoiser, adapter.text_encoder, adapter.vae):
        next(network.parameters()).data.view(-1)[0] += 1
        found.add(adapter.fingerprint())
    assert len(found) == 4 and hashed["UNet2DConditionModel"] == 4


def test_each_lora_is_another_fingerprint_and_leaves_the_first(hashed: Counter, tmp_path: Path) -> None:
    save_lora(tmp_path / "one")
    (file,) = (tmp_path / "one").iterdir()
    (tmp_path / "two").mkdir()
    weights = {name: 2 * weight for name, weight in load_file(file).items()}
    save_file(weights, tmp_path / "two" / file.name)
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    with adapter.unchanged():
        before, found = adapter.fingerprint(), []
        for name in ("one", "two", "one"):
            with lora_applied(adapter, Lora(str(tmp_path / name))):
                found += [adapter.fingerprint(), adapter.fingerprint()]
            assert adapter.fingerprint() == before
        assert hashed["UNet2DConditionModel"] == 4
    assert found[0] == found[1] == found[4] == found[5] and found[2] == found[3]
    assert len({before, found[0], found[2]}) == 3
    assert adapter.fingerprint() == before  # hashed anew
