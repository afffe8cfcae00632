"""UCE and what all closed forms share: texts, positions, maps, and the minimiser of a sum of squares."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, entries_of
from eraser_jobs import D, Harness, normal
from tiny_runs import WEAPONS
from torch import Tensor, nn

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.concepts import Concept
from trce_lightning.erasers.linear import edited_stream, moments
from trce_lightning.erasers.texts import erased_pairs, paired_states, prompt_states
from trce_lightning.erasers.uce import UCE, uce_transform
from trce_lightning.errors import InputError


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def test_texts_are_names_or_sentences_with_a_guide() -> None:
    names = erased_pairs([WEAPONS], "names", "counterpart")
    assert [pair[:2] for pair in names] == [("a gun", "a kite"), ("an axe", "a hat")]
    assert {pair.safe for pair in erased_pairs([WEAPONS], "names", "empty")} == {""}
    sentences = erased_pairs([WEAPONS], "sentences", "counterpart")
    assert ("see a gun", "see a kite") in [pair[:2] for pair in sentences] and len(sentences) == 6


def test_no_guide_names_another_erased_concept() -> None:
    kites = Concept("kites", {"a kite": "a dog"}, templates=("{}",))
    guides = [pair.safe for pair in erased_pairs([WEAPONS, kites], "names", "counterpart")]
    assert guides == ["a hat", "a dog"]


def test_positions_are_those_of_the_two_published_codes(adapter: StableDiffusionAdapter) -> None:
    """A character is a token: "a gun" ends at position 4 of 32, "hi" at 2, and the empty text at its SoT."""
    (pair,) = erased_pairs([Concept("c", {"a gun": "hi"}, templates=("{}",))], "names", "counterpart")
    gun, hi = (adapter.encode([text]).states["clip"][0] for text in ("a gun", "hi"))
    last = paired_states(adapter, ["clip"], [pair], "last")
    assert torch.equal(last[0], gun[4:5]) and torch.equal(last[1], hi[2:3])
    from_last = paired_states(adapter, ["clip"], [pair], "from_last")
    assert torch.equal(from_last[0], gun[4:32]) and torch.equal(from_last[1], hi[2:30])
    every = paired_states(adapter, ["clip"], [pair], "all")
    assert torch.equal(every[0], gun) and torch.equal(every[1], hi)
    empty = paired_states(adapter, ["clip"], [pair._replace(safe="")], "last")
    assert torch.equal(empty[1], adapter.empty().states["clip"][0, :1])
    found = [
        len(prompt_states(adapter, ["clip"], ["a gun", "hi"], which)) for which in ("last", "content", "all")
    ]
    assert found == [2, 6 + 4, 64]


def uce_objective(edited: Tensor, w: Tensor, erased: Tensor, guides: Tensor, kept: Tensor) -> Tensor:
    """The paper's sum for one map, with scales 0.7 and 2, and λ 0.3."""
    return (
        0.7 * (erased @ edited.mT - guides @ w.mT).square().sum()
        + 2.0 * ((kept @ (edited - w).mT).square().sum())
        + 0.3 * (edited - w).square().sum()
    )


def test_uce_is_the_stationary_point_of_its_objective() -> None:
    w, erased, guides, kept = normal(7, D), normal(5, D, seed=1), normal(5, D, seed=2), normal(4, D, seed=3)
    transform = uce_transform(erased, guides, kept.mT @ kept, erase_scale=0.7, keep_scale=2.0, ridge=0.3)
    edited = (w @ transform).requires_grad_(True)
    uce_objective(edited, w, erased, guides, kept).backward()
    assert edited.grad is not None and edited.grad.abs().max() < 1e-10
    wrong = w.clone().requires_grad_(True)
    uce_objective(wrong, w, erased, guides, kept).backward()
    assert wrong.grad is not None and wrong.grad.abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["last", "from_last", "all"])
def test_uce_gives_the_network_the_values_of_the_guide(
    adapter: StableDiffusionAdapter, tmp_path: Path, positions: str
) -> None:
    """The edited maps on e are the original's on T e, whatever bias a layer has: no target holds a bias."""
    layers = entries_of(adapter)
    for number, layer in enumerate(layers.values()):
        layer.bias = nn.Parameter(normal(layer.out_features, seed=number).float())
    erased, guides = paired_states(
        adapter, ["clip"], erased_pairs([WEAPONS], "names", "counterpart"), positions
    )
    before = {name: layer(guides) for name, layer in layers.items()}
    unedited = {name: layer(erased) for name, layer in layers.items()}
    eraser = UCE(guide="counterpart", positions=positions, keep="none", ridge=1e-7)
    result = eraser.erase(Harness(adapter, tmp_path).job)
    assert set(result.changed) == {"unet"}
    assert set(result.changed["unet"]) == {f"{name}.weight" for name in layers}
    for name, layer in layers.items():
        goal = before[name]
        if positions == "last":  # two states, which the edit meets; of more, it is a compromise
            torch.testing.assert_close(layer(erased), goal, atol=2e-3, rtol=0)
        assert (layer(erased) - goal).norm() < (unedited[name] - goal).norm()


def test_uce_keeps_the_empty_prompt_if_asked(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    empty, layers = adapter.empty().states["clip"][0], entries_of(adapter)
    moved = {}
    for keep_scale in (0.0, 1e4):
        own = StableDiffusionAdapter(build_tiny_pipeline())
        UCE(positions="from_last", keep="empty", keep_scale=keep_scale).erase(Harness(own, tmp_path).job)
        edited = entries_of(own)
        moved[keep_scale] = sum(
            float((edited[name](empty) - layer(empty)).norm().detach()) for name, layer in layers.items()
        )
    assert moved[1e4] < 0.05 * moved[0.0]


def test_maps_choose_keys_or_values(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    names = {maps: set(edited_stream(adapter, maps).entries) for maps in ("k", "v", "kv")}
    assert names["k"] | names["v"] == names["kv"] and not names["k"] & names["v"]
    assert all(name.endswith("to_v") for name in names["v"])
    before = {name: layer.weight.clone() for name, layer in entries_of(adapter).items()}
    UCE(maps="v").erase(Harness(adapter, tmp_path).job)
    changed = {
        name for name, layer in entries_of(adapter).items() if not torch.equal(layer.weight, before[name])
    }
    assert changed == names["v"]


def test_a_network_of_other_maps_is_refused_for_values_alone(
    adapter: StableDiffusionAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = adapter.streams()["context"]
    other = {"context": stream._replace(entries={"embedder": next(iter(stream.entries.values()))})}
    monkeypatch.setattr(adapter, "streams", lambda: other)
    assert set(edited_stream(adapter, "kv").entries) == {"embedder"}
    with pytest.raises(InputError, match=r"method\.maps: expected kv"):
        edited_stream(adapter, "v")


def test_moments_are_sums() -> None:
    states, targets = normal(3, D), normal(3, D, seed=1)
    twice = moments(states, targets).plus(moments(states, targets))
    torch.testing.assert_close(twice.s, moments(states, targets, 2.0).s)
    torch.testing.assert_close(twice.s[0, 1], 2 * (targets[:, 0] * states[:, 1]).sum())
