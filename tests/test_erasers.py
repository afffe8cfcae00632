"""All erasers: exact counts, what changes, the same weights each time, and many concepts at once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline, entries_of
from eraser_jobs import HARDENED, MACE_SMALL, STEREO_SMALL, TUNED, Harness, quick

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.erasers.advunlearn import AdvUnlearn
from trce_lightning.erasers.ca import ConceptAblation
from trce_lightning.erasers.esd import ESD
from trce_lightning.erasers.hardened import Hardened
from trce_lightning.erasers.mace import MACE
from trce_lightning.erasers.oce import OCE
from trce_lightning.erasers.protocol import Eraser
from trce_lightning.erasers.rece import RECE
from trce_lightning.erasers.speed import SPEED
from trce_lightning.erasers.spm import SPM
from trce_lightning.erasers.stereo import STEREO
from trce_lightning.erasers.tuning import TunedEraser
from trce_lightning.erasers.uce import UCE
from trce_lightning.errors import InputError


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


ERASERS: dict[str, Callable[..., TunedEraser]] = {
    "esd": lambda **options: ESD(**(TUNED | options)),
    "ca": lambda **options: ConceptAblation(**(TUNED | {"guide": "counterpart"} | options)),
    "spm": lambda **options: SPM(**(TUNED | {"anchors": 2, "warmup": 1, "lr": 1.0} | options)),
    "hardened": lambda **options: Hardened(**(HARDENED | options)),
    "advunlearn": lambda **options: AdvUnlearn(
        **(TUNED | {"warmup": 1, "attack_steps": 2, "retain_batch_size": 2} | options)
    ),
    "stereo": lambda **options: STEREO(**(TUNED | STEREO_SMALL | options)),
    "mace": lambda **options: MACE(**(MACE_SMALL | options)),
}


@pytest.mark.parametrize("name", ERASERS)
def test_a_method_counts_exactly_and_changes_what_it_says(
    name: str, adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    eraser, harness = ERASERS[name](), Harness(adapter, tmp_path)
    before = {
        f"{part}.{key}": value.clone()
        for part, network in adapter.networks().items()
        for key, value in network.state_dict().items()
    }
    ahead = eraser.ahead(harness.job)
    result = eraser.erase(harness.job)
    planned = {part: cost.forward + cost.backward for part, cost in ahead.parts.items()}
    assert planned == {part: count for part, count in harness.counted.items() if count}
    assert all(planned.values())
    assert eraser.ahead(harness.job).parts["teachers"].forward == 0
    after = {
        f"{part}.{key}": value
        for part, network in adapter.networks().items()
        for key, value in network.state_dict().items()
    }
    assert after.keys() == before.keys()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    said = {f"{part}.{key}" for part, tensors in result.changed.items() for key in tensors}
    assert moved <= said and len(moved) > 0.8 * len(said)
    assert {key.partition(".")[0] for key in said} == {"text_encoder" if name == "advunlearn" else "unet"}
    numbers = sum(value.numel() for tensors in result.changed.values() for value in tensors.values())
    assert ahead.training_bytes == {"hardened": 20, "stereo": 16}.get(name, 12) * ahead.trainable
    assert ahead.trainable == numbers if name not in ("spm", "mace") else 0 < ahead.trainable < numbers
    assert not any(p.requires_grad for network in adapter.networks().values() for p in network.parameters())


@pytest.mark.parametrize("name", quick(ERASERS, "esd"))
def test_the_same_seed_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        own = StableDiffusionAdapter(build_tiny_pipeline())
        changed = ERASERS[name]().erase(Harness(own, tmp_path).job).changed
        found.append([value.clone() for tensors in changed.values() for value in tensors.values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("eraser", "differs"),
    [
        (UCE(keep="prompts"), False),
        (RECE(keep="prompts", rounds=2), False),
        (OCE(), False),
        (SPEED(threshold=1.0, copies=0), False),
        (SPEED(threshold=1.0, copies=2), True),
        (ERASERS["esd"](), True),
        pytest.param(ERASERS["mace"](), True, marks=pytest.mark.slow),
    ],
)
def test_a_method_says_whether_its_result_depends_on_the_seed(
    eraser: Eraser, differs: bool, tmp_path: Path
) -> None:
    """Two seeds give the same bits where it doesn't, for the same prompts to keep."""
    found = []
    for seed in (0, 1):
        harness = Harness(StableDiffusionAdapter(build_tiny_pipeline()), tmp_path)
        changed = eraser.erase(replace(harness.job, seed=seed)).changed
        found.append(torch.cat([own.flatten() for named in changed.values() for own in named.values()]))
    assert eraser.reads_seed == differs != torch.equal(*found)


@pytest.mark.parametrize("name", quick(ERASERS, "esd"))
def test_losses_that_are_not_finite_are_refused(
    name: str, adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    warmup = {"warmup": 0} if name in ("spm", "advunlearn") else {}
    with pytest.raises(InputError, match=r"method\.lr"):
        ERASERS[name](lr=1e30, iterations=6, **warmup).erase(Harness(adapter, tmp_path).job)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("esd", {"eta": 1e38}, r"method\.eta: .* before the optimizer's first step.* 1e\+38"),
        ("ca", {"preserve_weight": 1e50}, r"method\.preserve_weight: "),
        ("spm", {"anchor_weight": 1e50}, r"method\.anchor_weight: "),
        ("hardened", {"learnt_lr": 1e38}, r"method\.learnt_lr: "),
        ("advunlearn", {"warmup": 0, "attack_lr": 1e30}, r"method\.attack_lr: "),
        ("stereo", {"round_eta": 1e38}, r"method\.round_eta: "),
        ("stereo", {"erase_weight": 1e38}, r"method\.erase_weight: "),
    ],
)
def test_before_the_first_step_the_learning_rate_is_not_blamed(
    name: str, options: dict[str, float], expected: str, adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        ERASERS[name](**options).erase(Harness(adapter, tmp_path).job)


def test_a_network_that_fails_in_training_alone_is_named(
    adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its teacher's predictions are cached already."""
    job = Harness(adapter, tmp_path).job
    eraser = ERASERS["esd"]()
    for each in eraser.teachers(job, eraser.sources(job)).values():
        each.sample(job.trainer, adapter, eraser.encoder(adapter))
    adapter.denoiser.get_parameter("conv_out.bias").data.fill_(float("nan"))
    with pytest.raises(InputError, match=r"denoiser's output before the optimizer's first step.*conv_out"):
        eraser.erase(job)


def hundred() -> Concept:
    letters = "abcdefghij"
    return Concept("many", {f"{a}{b}": "x" for a in letters for b in letters}, templates=("{}",))


@pytest.mark.parametrize(
    "eraser",
    [
        OCE(),
        SPEED(keep="empty", threshold=1e-3, refined=False, copies=0, ridge=0.05),
        UCE(),
        RECE(positions="last", rounds=2),
    ],
    ids=lambda eraser: eraser.name,
)
def test_a_hundred_concepts_are_erased_at_once(
    eraser: Any, adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    concepts = [Concept(f"c{i}", {term: "x"}, templates=("{}",)) for i, term in enumerate(hundred().terms)]
    harness = Harness(adapter, tmp_path, concepts)
    numbers = sum(layer.weight.numel() for name, layer in entries_of(adapter).items())
    ahead = eraser.ahead(harness.job)
    assert ahead.parts == {} and ahead.training_bytes == 0
    assert ahead.trainable == (numbers if eraser.maps == "kv" else numbers // 2)
    result = eraser.erase(harness.job)
    assert harness.counted == {"edit": 0}
    assert all(tensor.isfinite().all() for tensor in result.changed["unet"].values())
