"""MACE: the words around a term, the attention that LoRAs lower, and their fusion, by their formulas."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline, entries_of
from eraser_jobs import MACE_SMALL, Alone, D, Harness, normal, published
from published_models import KEYS_AND_VALUES, pipeline_of, unet_of
from tiny_runs import WEAPONS
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.adapters.attention import attention_maps, cross_attention
from trce_lightning.concepts import Concept
from trce_lightning.erasers.linear import CONTEXT, apply_transform, read_weights, solved
from trce_lightning.erasers.mace import (
    MACE,
    Avoiding,
    attention_loss,
    boxes,
    fused,
    importance,
    shared_positions,
    terms_of,
)
from trce_lightning.errors import InputError
from trce_lightning.tokens import roles_of

START, END = 98, 99


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def mace(**options: Any) -> MACE:
    return MACE(**(MACE_SMALL | options))


def padded(*ids: int) -> Tensor:
    row = [START, *ids, END]
    return torch.tensor(row + [END] * (10 - len(row)))


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        # The beginning, the end, and padding as far as both have it.
        ((1, 2, 3, 4, 5), (1, 2, 6, 7, 4, 5), ([0, 1, 2, 4, 5, 6, 7, 8], [0, 1, 2, 5, 6, 7, 8, 9])),
        ((3,), (6, 7), ([0, 2, 3, 4, 5, 6, 7, 8], [0, 3, 4, 5, 6, 7, 8, 9])),
        # Nothing but the start: the term stands at the beginning and at the end.
        ((1, 2), (), ([0, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7])),
        # A word that both sentences have twice counts once.
        ((1, 1), (1,), ([0, 1, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8])),
    ],
)
def test_the_words_around_a_term_are_paired(
    own: Sequence[int], other: Sequence[int], expected: tuple[list[int], list[int]]
) -> None:
    rows = [padded(*own), padded(*other)]
    places = shared_positions(*rows, *(roles_of(row[None], END)[0] for row in rows))
    assert tuple(place.tolist() for place in places) == expected


def test_the_first_step_moves_the_words_around_and_leaves_the_terms_tokens_out(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """The gradient of its objective is zero at the solution, with the positions of the sentences by hand."""
    one = Concept("guns", {"a gun": "a kite"}, templates=("see {} at sea",))
    job, eraser = Harness(adapter, tmp_path, [one]).job, mace()
    texts = [adapter.encode([f"see {word} at sea"]).states["clip"][0] for word in ("a gun", "a kite")]
    # One token a letter: SoT "see" "a" | "gun" or "kite" | "at" "sea" EoT and padding.
    e = torch.cat([texts[0][:5], texts[0][8:31]]).double()
    target = torch.cat([texts[1][:5], texts[1][9:32]]).double()
    found = eraser.around(job)
    torch.testing.assert_close(found.m, e.mT @ e)
    torch.testing.assert_close(found.s, target.mT @ e)
    transform = solved(found, 0.1)
    w = normal(D, 32)
    gradient = (w @ transform @ e.mT - w @ target.mT) @ e + 0.1 * (w @ transform - w)
    assert gradient.abs().max() < 1e-8


def test_the_attention_is_counted_inside_the_box_at_the_terms_tokens() -> None:
    pixels = torch.zeros(2, 4, 4, dtype=torch.bool)
    pixels[:, :2, :2] = True
    tokens = torch.tensor([[False, True, True], [False, True, False]])
    outside, inside = torch.zeros(2, 2, 1, 4, 3).unbind(0)
    outside[:, :, 1:, 1:] = 1.0  # the other cells of a grid of two
    outside[:, :, 0, 0] = 1.0  # another token
    assert not attention_loss([outside], pixels, tokens).any()
    inside[:, :, 0] = torch.tensor([5.0, 3.0, 4.0])
    torch.testing.assert_close(attention_loss([inside], pixels, tokens), torch.tensor([5.0, 3.0]))
    fine = torch.full((2, 1, 16, 3), 0.5)
    expected = torch.tensor([5 + 0.5 * 8**0.5, 3 + 0.5 * 4**0.5])
    torch.testing.assert_close(attention_loss([inside, fine], pixels, tokens), expected)
    both = torch.cat([inside, 2 * inside], 1)
    torch.testing.assert_close(attention_loss([both], pixels, tokens), torch.tensor([5.0, 3.0]) * 5**0.5)


def test_maps_are_the_networks_own_attention(adapter: StableDiffusionAdapter) -> None:
    layers = cross_attention(adapter, "method=mace")
    text, z_t = adapter.encode(["a gun", "tea"]), torch.randn(2, *adapter.latent_shape)
    name, layer = next(iter(layers.items()))
    seen: list[Tensor] = []
    hook = layer.to_q.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad(), attention_maps(layers) as maps:
        adapter.predict(z_t, 500, text)
        found = maps()
    hook.remove()
    assert len(found) == len(layers) == 4 and "attn2" in name
    for attention in found:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))
    heads = layer.heads
    query = seen[0].unflatten(-1, (heads, -1)).transpose(1, 2)
    key = (text.states["clip"] @ layer.to_k.weight.mT).unflatten(-1, (heads, -1)).transpose(1, 2)
    by_hand = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(found[0], by_hand, atol=1e-5, rtol=1e-4)
    assert not layer.to_q._forward_hooks and not layer.to_k._forward_hooks


def test_fused_weights_are_the_least_squares_solution() -> None:
    """Against lstsq in float64 on all rows, each scaled by its weight."""
    terms, ridge = 3, 0.3
    weights = {"k": normal(5, D, seed=1), "v": normal(7, D, seed=2)}
    originals = {"k": normal(5, D, seed=3), "v": normal(7, D, seed=4)}
    loras = {"k": (normal(terms, D, seed=5), normal(terms, 5, seed=6))}
    loras["v"] = (normal(terms, D, seed=7), normal(terms, 7, seed=8))
    states = [normal(4, D, seed=10 + term) for term in range(terms)]
    kept = normal(6, D, seed=20)
    found = fused(weights, loras, [e.mT @ e for e in states], originals, 2.0 * kept.mT @ kept, ridge)
    for name, weight in weights.items():
        down, up = loras[name]
        rows = [*states, 2.0**0.5 * kept, ridge**0.5 * torch.eye(D, dtype=torch.float64)]
        goals = [e @ (weight + torch.outer(up[i], down[i])).mT for i, e in enumerate(states)]
        goals += [rows[-2] @ originals[name].mT, rows[-1] @ weight.mT]
        expected = torch.linalg.lstsq(torch.cat(rows), torch.cat(goals)).solution.mT
        torch.testing.assert_close(found[name], expected)


def test_the_closed_form_comes_first_and_loras_act_on_it(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """LoRAs that didn't move leave the first step's weights, and the network sees them while they train."""
    harness, eraser = Harness(adapter, tmp_path), mace(fuse_keep_scale=0.0, lr=1e-12)
    other = StableDiffusionAdapter(build_tiny_pipeline())
    stream = other.streams()[CONTEXT]
    around = eraser.around(dataclasses.replace(harness.job, adapter=other))
    eraser.keep_scale = 0.0
    expected = apply_transform(other, stream, solved(around, eraser.ridge)).changed["unet"]
    seen: list[Tensor] = []
    name = next(iter(expected))

    def fit(module: Any, data: Any, part: str) -> None:
        seen.append(adapter.denoiser.get_parameter(name).clone())
        harness.fit(module, data, part)

    found = eraser.erase(dataclasses.replace(harness.job, fit=fit)).changed["unet"]
    torch.testing.assert_close(seen[0], expected[name], atol=1e-5, rtol=1e-4)
    assert found.keys() == expected.keys() == {f"{name}.weight" for name in entries_of(adapter)}
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(weight, build_weights()[key], atol=1e-3)


def build_weights() -> dict[str, Tensor]:
    return build_tiny_pipeline().unet.state_dict()


def started(adapter: StableDiffusionAdapter, folder: Path, **options: Any) -> tuple[MACE, Avoiding, Harness]:
    """The LoRAs on the network, before the first step."""
    eraser, harness = mace(**options), Harness(adapter, folder)
    walks = eraser.walks(harness.job)
    walks.sample(harness.job.trainer, adapter, eraser.encoder(adapter))
    module = Avoiding(eraser, harness.job, eraser.seen(harness.job))
    module._trainer = harness.job.trainer
    module.setup("fit")
    return eraser, module, harness


def test_training_lowers_the_attention_of_every_term(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    eraser, module, _ = started(adapter, tmp_path, batch_size=2)
    assert module.parameters_in_training() and all(p.requires_grad for p in module.loras.parameters())
    adam = torch.optim.Adam(module.parameters_in_training(), lr=0.1)
    losses = []
    for _ in range(15):
        adam.zero_grad()
        loss = eraser.losses(module, {"step": 0})["attention"]
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    ups = torch.stack([up.abs().amax(1) for up in module.loras.up])
    # No attention comes after the values of the last layer.
    assert ((ups > 0).all(1).sum(), (ups == 0).all(1).sum()) == (7, 1)
    assert all(weight.grad is None for weight in adapter.denoiser.parameters())


def test_a_lora_acts_in_rows_of_its_own_term_and_comes_off(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    _, module, _ = started(adapter, tmp_path)
    z_t, text = torch.randn(1, *adapter.latent_shape).expand(3, -1, -1, -1), adapter.encode(3 * ["a gun"])
    with torch.no_grad():
        module.loras.rows = torch.tensor([0, 1, 0])
        before = adapter.predict(z_t, 500, text)
        for up in module.loras.up:
            up[1] = 0.5
        after = adapter.predict(z_t, 500, text)
        weights = read_weights(adapter.streams()[CONTEXT])
        loras = module.loras.take_off()
        for name, layer in entries_of(adapter).items():
            down, up = loras[name]
            layer.weight.copy_(weights[name] + torch.outer(up[1], down[1]))
        merged = adapter.predict(z_t, 500, text)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], atol=1e-5, rtol=1e-5)
    assert (after[1] - before[1]).abs().max() > 1e-2
    torch.testing.assert_close(merged[1], after[1], atol=1e-4, rtol=1e-4)


def test_checkpointing_leaves_the_gradients(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        own = StableDiffusionAdapter(build_tiny_pipeline())
        eraser, module, _ = started(own, tmp_path, gradient_checkpointing=checkpointing)
        own.denoiser.train()
        for up in module.loras.up:
            up.data += 0.1
        eraser.losses(module, {"step": 0})["attention"].backward()
        found.append([parameter.grad for parameter in module.loras.parameters()])
    moved = [own.abs().max() > 0 for own in found[0][: len(found[0]) // 2] if own is not None]
    assert (len(moved), sum(moved)) == (8, 7)  # no attention comes after the values of the last layer
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-3)


def test_a_box_is_what_differs_from_the_background() -> None:
    pictures = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    pictures[0, 1, 2:5, 3:7] = 90
    masks = boxes(pictures, 0.15)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 3:7] = True
    assert torch.equal(masks[0], expected) and masks[1].all()


def left_half() -> Any:
    """A segmenter as a user may give one."""
    return lambda pictures, prompts: torch.arange(pictures.shape[3]).expand(pictures[:, 0].shape) < 8


def too_few() -> Any:
    return lambda pictures, prompts: torch.ones(1, 2, 2, dtype=torch.bool)


def test_masks_can_be_given_and_terms_have_their_tokens(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    options = {"masks": f"{__name__}.left_half", "ends": "none"}
    _, module, _ = started(adapter, tmp_path, **options)
    pixels, tokens = module.pictures.pixels, module.pictures.tokens
    assert pixels.shape == (2, 2, 16, 16) and pixels[..., :8].all() and not pixels[..., 8:].any()
    for term, prompts, rows in zip(("agun", "anaxe"), module.pictures.prompts, tokens, strict=True):
        for prompt, row in zip(prompts, rows, strict=True):
            ids = adapter.tokenize([prompt])["clip"][0, row]
            assert adapter.detokenize("clip", [ids.tolist()])[0].replace(" ", "") == term
    roles = adapter.encode(["a gun"]).roles["clip"][0].tolist()
    (first,), (every,) = (mace(ends=ends).tokens(adapter, ["a gun"], ["gun"]) for ends in ("first", "all"))
    assert first.tolist() == [role == 2 or 2 <= i <= 4 for i, role in enumerate(roles)]
    assert every.tolist() == [role >= 2 or 2 <= i <= 4 for i, role in enumerate(roles)]
    with pytest.raises(
        InputError, match=r"method\.masks: expected masks of bool \[4, 16, 16\], got .*\[1, 2, 2\]"
    ):
        started(adapter, tmp_path, masks=f"{__name__}.too_few")
    with pytest.raises(InputError, match=r"method\.masks: .*nowhere"):
        mace(masks="nowhere.at_all").ahead(Harness(adapter, tmp_path).job)
    assert not started(adapter, tmp_path, masks="whole")[1].pictures.pixels.logical_not().any()


def test_timesteps_between_the_centres_are_drawn_more_often(
    adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ(0) − σ(−10) at 200, nearly 1 at 300, and nearly 0 at both ends."""
    found = importance(torch.tensor([0, 200, 300, 400, 999]))
    expected = torch.tensor([4.5e-5, 0.49995, 0.98661, 0.49995, 0.0]).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    eraser, module, _ = started(adapter, tmp_path, weighted=True, levels=20, batch_size=16)
    seen: list[Tensor] = []
    predict = adapter.predict

    def noting(z_t: Tensor, timestep: Tensor, text: Any) -> Tensor:
        seen.append(timestep)
        return predict(z_t, timestep, text)

    monkeypatch.setattr(adapter, "predict", noting)
    eraser.losses(module, {"step": 0})
    assert ((seen[0] > 100) & (seen[0] < 500)).all() and len(seen[0].unique()) > 3


def test_a_term_is_its_wordings_and_a_term_without_sentences_is_none() -> None:
    one = Concept(
        "w",
        {"a gun": "a kite", "an axe": "a gun rack"},
        {"a gun": ("a rifle",)},
        ("{}", "see {}"),
        unrelated=("gun rack",),
    )
    other = Concept("racks", {"a gun rack": "a shelf"}, templates=("{}",))
    terms = {term.name: [pair.malicious for pair in term.pairs] for term in terms_of([one, other])}
    assert terms == {"a gun": ["a gun", "see a rifle"], "a gun rack": ["a gun rack"]}
    assert [term.name for term in terms_of([WEAPONS])] == ["a gun", "an axe"]


def test_a_guide_that_is_empty_pairs_ends_alone(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    job = Harness(adapter, tmp_path).job
    assert {pair.safe for term in mace(guide="empty").terms(job) for pair in term.pairs} == {""}
    found, other = (mace(guide=guide).around(job) for guide in ("empty", "counterpart"))
    assert not torch.allclose(found.s, other.s)


def test_what_does_not_fit_is_refused(
    adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Harness(adapter, tmp_path).job
    with pytest.raises(
        InputError, match=r"method\.batch_size: expected a multiple of the 2 processes, got 1"
    ):
        mace(batch_size=1).ahead(dataclasses.replace(job, trainer=Alone(0, 2)))  # type: ignore[arg-type]
    stream = adapter.streams()[CONTEXT]
    name, entry = next(iter(stream.entries.items()))
    monkeypatch.setattr(
        adapter, "streams", lambda: {CONTEXT: stream._replace(entries={"context_embedder": entry})}
    )
    with pytest.raises(InputError, match=r"method=mace: .*reads them elsewhere"):
        mace().ahead(job)
    monkeypatch.setattr(adapter, "streams", lambda: {CONTEXT: stream._replace(width=31)})
    with pytest.raises(
        InputError, match=f"method=mace: expected maps that read text states alone, got {name}"
    ):
        mace().ahead(job)


def test_at_stable_diffusions_shape_a_lora_has_a_row_and_a_column_of_each_map(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd1", small=True)
    job = Harness(StableDiffusionAdapter(pipeline), tmp_path).job
    with torch.device("meta"):
        pipeline.unet = unet_of("sd1")
    adapter = StableDiffusionAdapter(pipeline)
    ahead = MACE(**published("mace")).ahead(dataclasses.replace(job, adapter=adapter))
    weights = [own for name, own in pipeline.unet.named_parameters() if name in KEYS_AND_VALUES]
    assert len(weights) == 32
    assert ahead.trainable == 2 * sum(sum(weight.shape) for weight in weights) == 2 * (32 * 768 + 24_960)
    assert ahead.parts["teachers"].forward == 2 * 8 * 60 and ahead.parts["training"].backward == 2 * 120
