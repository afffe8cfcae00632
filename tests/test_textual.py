"""Stage 1 on a real pipeline: the edited network on E is the original on E Tᵀ, and what T is solved from."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import MAX_LENGTH, build_tiny_pipeline, entries_of
from diffusers import StableDiffusionPipeline
from tiny_runs import KEEP_PROMPTS, WEAPONS, stage1_statistics
from torch import Tensor

from trce_lightning import textual
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.closed_form import adversarial_answer, merge_pairs, pair_statistics, solve_edit
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import FORMS, TextualConfig
from trce_lightning.errors import InputError
from trce_lightning.textual import apply_edit_, pair_states

DRINKS = Concept("drinks", {"beer": "milk"}, templates=("{}", "cold {}"))


def outer(states: Tensor) -> Tensor:
    """Mean of e eᵀ over rows, term by term, in float64."""
    return torch.stack([torch.outer(e, e) for e in states.double()]).mean(0)


def state_at(adapter: StableDiffusionAdapter, prompt: str, position: str) -> Tensor:
    """State of one prompt at its start or first end of text, ``[d]``."""
    end = adapter.tokenize([prompt])["clip"][0].tolist().index(adapter.tokenizer.eos_token_id)
    return adapter.encode([prompt]).states["clip"][0, {"sot": 0, "eot": end}[position]]


def pairs_at(adapter: StableDiffusionAdapter, *positions: str) -> tuple[Tensor, Tensor]:
    return pair_states(adapter, adapter.streams()["context"], WEAPONS.pairs(), positions)


def test_the_edited_network_on_e_is_the_original_on_e_t(tiny_pipeline: StableDiffusionPipeline) -> None:
    adapter = StableDiffusionAdapter(tiny_pipeline)
    edit = stage1_statistics(adapter, TextualConfig(eta=0.1)).solve(TextualConfig(eta=0.1))
    states = adapter.encode(["a gun", "tea", ""]).states["clip"].double()
    z_t = torch.randn(
        3, *adapter.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    unet = adapter.denoiser.double()
    timestep = torch.tensor([900, 500, 10])
    with torch.no_grad():
        original = unet(z_t, timestep, states).sample
        expected = unet(z_t, timestep, states @ edit.transform.T).sample
        names = apply_edit_(adapter, edit)
        found = unet(z_t, timestep, states).sample
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert (found - original).abs().amax((1, 2, 3)).min() > 1e-4
    assert set(names) == {f"{name}.weight" for name in entries_of(adapter)}


def test_only_k_and_v_of_cross_attention_are_written(tiny_pipeline: StableDiffusionPipeline) -> None:
    adapter = StableDiffusionAdapter(tiny_pipeline)
    config = TextualConfig(eta=0.1)
    edit = stage1_statistics(adapter, config).solve(config)
    names = apply_edit_(adapter, edit)
    original = build_tiny_pipeline().unet.state_dict()
    for name, tensor in adapter.denoiser.state_dict().items():
        if name in names:
            assert not torch.allclose(tensor, original[name])
            torch.testing.assert_close(tensor, (original[name].double() @ edit.transform).float())
        else:
            assert torch.equal(tensor, original[name]), name


def test_eta_trades_kept_states_against_malicious_ones(tiny_adapter: StableDiffusionAdapter) -> None:
    statistics = stage1_statistics(tiny_adapter, TextualConfig())
    kept = tiny_adapter.encode([*KEEP_PROMPTS, ""]).states["clip"].flatten(0, 1).double()
    malicious, safe = (states.double() for states in pairs_at(tiny_adapter, "eot"))

    def distances(eta: float) -> tuple[float, float]:
        transform = statistics.solve(TextualConfig(eta=eta, ridge=1e-6)).transform
        moved = (kept @ transform.T - kept).norm() / kept.norm()
        missed = (malicious @ transform.T - safe).norm() / (malicious - safe).norm()
        return moved.item(), missed.item()

    (moved_little, missed_much), (moved_much, missed_little) = distances(1e5), distances(1e-5)
    assert moved_little < 1e-3 < 1e-2 < moved_much
    assert missed_little < 0.1 < 0.5 < missed_much


@pytest.mark.parametrize("position", ["sot", "eot"])
def test_pairs_at_one_position_each(
    tiny_adapter: StableDiffusionAdapter, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textual, "ENCODE_BATCH", 4)  # several batches, by length
    malicious, safe = pairs_at(tiny_adapter, position)
    for index, kind in enumerate((malicious, safe)):
        expected = torch.stack([state_at(tiny_adapter, pair[index], position) for pair in WEAPONS.pairs()])
        torch.testing.assert_close(kind, expected, atol=1e-5, rtol=1e-4)
    assert (malicious - safe).abs().max() > 0.1 or position == "sot"


def test_padding_pairs_position_by_position(tiny_adapter: StableDiffusionAdapter) -> None:
    malicious, safe = pairs_at(tiny_adapter, "padding")
    rows, targets = [], []
    for *pair, _ in WEAPONS.pairs():
        (source, *_), (target, *_) = (tiny_adapter.encode([text]).states["clip"] for text in pair)
        ids = [tiny_adapter.tokenize([text])["clip"][0].tolist() for text in pair]
        start = max(row.index(tiny_adapter.tokenizer.eos_token_id) for row in ids) + 1
        rows.append(source[start:])
        targets.append(target[start:])
    torch.testing.assert_close(malicious, torch.cat(rows), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(safe, torch.cat(targets), atol=1e-5, rtol=1e-4)


def test_keywords_go_to_the_safe_end_of_text(tiny_adapter: StableDiffusionAdapter) -> None:
    malicious, safe = pairs_at(tiny_adapter, "keyword")
    rows, targets = [], []
    for pair in WEAPONS.pairs():
        states = tiny_adapter.encode([pair.malicious]).states["clip"]
        # The tiny tokenizer makes one token of each letter.
        first = 1 + len(pair.malicious[: pair.malicious.index(pair.term)].replace(" ", ""))
        chosen = range(first, first + len(pair.term) - 1)
        rows += [states[0, token_index] for token_index in chosen]
        targets += [state_at(tiny_adapter, pair.safe, "eot")] * len(chosen)
    torch.testing.assert_close(malicious, torch.stack(rows), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(safe, torch.stack(targets), atol=1e-5, rtol=1e-4)


def test_positions_add_up(tiny_adapter: StableDiffusionAdapter) -> None:
    both = pairs_at(tiny_adapter, "sot", "eot")
    apart = [pairs_at(tiny_adapter, which) for which in ("sot", "eot")]
    for found, *parts in zip(both, *apart, strict=True):
        assert torch.equal(found, torch.cat(parts))


def test_keyword_mask_spells_the_term(tiny_adapter: StableDiffusionAdapter) -> None:
    prompts = ["see a gun at sea", "a gun, a gun", "tea", "a gunner", "tea"]
    terms: Sequence[str] = ["a gun", "a gun", "a gun", "a gun", "x" * (2 * MAX_LENGTH)]
    input_ids = tiny_adapter.tokenize(prompts)["clip"]
    mask = tiny_adapter.mentions(prompts, terms, trimmed=False)["clip"]
    trimmed = tiny_adapter.mentions(prompts, terms, trimmed=True)["clip"]
    length = tiny_adapter.encode(prompts, trimmed=True).states["clip"].shape[1]
    assert torch.equal(trimmed, mask[:, :length]) and trimmed.shape[1] == length < MAX_LENGTH
    assert mask.shape == input_ids.shape
    assert mask.sum(1).tolist() == [4, 8, 0, 0, 0]
    for row, times in ((0, 1), (1, 2)):
        expected = tiny_adapter.tokenizer("a gun", add_special_tokens=False).input_ids * times
        assert input_ids[row][mask[row]].tolist() == expected


def test_kept_states_by_hand(tiny_adapter: StableDiffusionAdapter) -> None:
    config = TextualConfig(keep_eot_weight=2.0, empty_prompt_weight=0.5, safe_weight=3.0)
    keep = stage1_statistics(tiny_adapter, config, [WEAPONS, DRINKS]).keep
    prompts = outer(tiny_adapter.encode(KEEP_PROMPTS).states["clip"].flatten(0, 1))
    ends = outer(torch.stack([state_at(tiny_adapter, prompt, "eot") for prompt in KEEP_PROMPTS]))
    empty = outer(tiny_adapter.encode([""]).states["clip"][0])
    pairs = [*WEAPONS.pairs(), *DRINKS.pairs()]
    safe = outer(torch.stack([state_at(tiny_adapter, pair.safe, "eot") for pair in pairs]))
    expected = (prompts + 2.0 * ends + 0.5 * empty + 3.0 * safe) / 6.5
    torch.testing.assert_close(keep.k, expected, rtol=1e-4, atol=1e-6)
    config = TextualConfig(keep_eot_weight=0.0, empty_prompt_weight=0.0, safe_weight=0.0)
    without = stage1_statistics(tiny_adapter, config)
    torch.testing.assert_close(without.keep.k, prompts, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(keep.k, prompts, rtol=1e-2)


def test_several_concepts_are_one_solution(tiny_adapter: StableDiffusionAdapter) -> None:
    config = TextualConfig(eta=0.5)
    statistics = stage1_statistics(tiny_adapter, config, [WEAPONS, DRINKS])
    assert [(name, pairs.count) for name, pairs in statistics.pairs.items()] == [
        ("weapons", 6),
        ("drinks", 2),
    ]
    expected = solve_edit(
        merge_pairs(list(statistics.pairs.values())), statistics.keep, eta=0.5, ridge=config.ridge
    )
    assert torch.equal(statistics.solve(config).transform, expected.transform)


def test_safe_sides_that_name_another_concept_are_left_out(tiny_adapter: StableDiffusionAdapter) -> None:
    (counterpart, *_) = WEAPONS.terms.values()
    other = Concept.from_terms([counterpart])
    config = TextualConfig()
    alone = stage1_statistics(tiny_adapter, config).pairs["weapons"]
    both = stage1_statistics(tiny_adapter, config, [WEAPONS, other]).pairs["weapons"]
    assert 0 < both.count < alone.count


FORM_OPTIONS = {
    "ridge": {"eta": 0.5},
    "null_space": {"null_space_share": 0.05, "null_space_ridge": 0.01},
    "projection": {"projection_share": 0.5, "eta": 0.5},
}


@pytest.fixture
def short_adapter() -> StableDiffusionAdapter:
    """A model whose prompts have half as many positions as states have numbers, so that ∅ leaves some."""
    pipeline = build_tiny_pipeline()
    pipeline.tokenizer.model_max_length = MAX_LENGTH // 2
    return StableDiffusionAdapter(pipeline)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("matrices", [["key", "value"], ["value"], ["key"]])
def test_a_form_edits_the_matrices_that_are_named(
    short_adapter: StableDiffusionAdapter, form: str, matrices: list[str]
) -> None:
    adapter = short_adapter
    config = TextualConfig(form=form, matrices=matrices, **FORM_OPTIONS[form])
    edit = stage1_statistics(adapter, config).solve(config)
    names = apply_edit_(adapter, edit)
    endings = {"key": "to_k.weight", "value": "to_v.weight"}
    chosen = tuple(endings[kind] for kind in matrices)
    readers = {f"{name}.weight" for name in entries_of(adapter)}
    assert set(names) == {name for name in readers if name.endswith(chosen)}
    original = build_tiny_pipeline().unet.state_dict()
    for name, tensor in adapter.denoiser.state_dict().items():
        if name in names:
            torch.testing.assert_close(tensor, (original[name].double() @ edit.transform).float())
            assert not torch.allclose(tensor, original[name])
        else:
            assert torch.equal(tensor, original[name])


def test_the_null_space_leaves_the_networks_output_for_the_empty_prompt(
    short_adapter: StableDiffusionAdapter,
) -> None:
    adapter = short_adapter
    z_t = torch.randn(1, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    texts = [adapter.empty(), adapter.encode(["a gun"])]
    with torch.no_grad():
        before = [adapter.predict(z_t, 500, text) for text in texts]
        found = {}
        for form in ("null_space", "ridge"):
            config = TextualConfig(form=form, **FORM_OPTIONS[form])
            weights = {name: tensor.clone() for name, tensor in adapter.denoiser.state_dict().items()}
            apply_edit_(adapter, stage1_statistics(adapter, config).solve(config))
            after = [adapter.predict(z_t, 500, text) for text in texts]
            found[form] = [(a - b).abs().max().item() for a, b in zip(after, before, strict=True)]
            adapter.denoiser.load_state_dict(weights)
    assert found["null_space"][0] < 1e-5 < 1e-3 < found["null_space"][1]
    assert found["ridge"][0] > 1e-4


def test_the_span_is_that_of_all_malicious_states_after_the_start(
    tiny_adapter: StableDiffusionAdapter,
) -> None:
    config = TextualConfig(form="projection", **FORM_OPTIONS["projection"])
    statistics = stage1_statistics(tiny_adapter, config, [WEAPONS, DRINKS])
    prompts = [[pair.malicious for pair in concept.pairs()] for concept in (WEAPONS, DRINKS)]
    states = [tiny_adapter.encode(texts).states["clip"][:, 1:].flatten(0, 1) for texts in prompts]
    expected = outer(states[0]) + outer(states[1])
    torch.testing.assert_close(statistics.span, expected, rtol=1e-4, atol=1e-6)
    edit = statistics.solve(config)
    assert edit.directions is not None
    everything = tiny_adapter.encode(["a gun", "tea", ""]).states["clip"].flatten(0, 1).double()
    assert (everything @ edit.transform.T @ edit.directions).abs().max() < 1e-9


def test_an_adversarial_round_erases_the_answers_to_the_first_edit(
    tiny_adapter: StableDiffusionAdapter,
) -> None:
    config = TextualConfig(eta=0.1, adversarial_rounds=1)
    statistics = stage1_statistics(tiny_adapter, config)
    first = statistics.solve(TextualConfig(eta=0.1)).transform
    assert statistics.readers is not None
    answer = adversarial_answer(first, statistics.readers, ridge=config.adversarial_ridge)
    malicious, safe = (states.double() for states in statistics.states["weapons"])
    answers = malicious @ answer.T
    both = pair_statistics(torch.cat([malicious, answers]), torch.cat([safe, safe]))
    expected = solve_edit(both, statistics.keep, eta=0.1, ridge=config.ridge)
    found = statistics.solve(config)
    torch.testing.assert_close(found.transform, expected.transform, rtol=1e-6, atol=1e-8)

    def missed(transform: Tensor) -> float:
        return float((answers @ transform.T - safe).norm() / (answers - safe).norm())

    assert missed(found.transform) < missed(first) - 0.05


def test_the_distance_to_a_key_is_told_where_there_may_be_none(
    short_adapter: StableDiffusionAdapter,
) -> None:
    def distance(**options: Any) -> float | None:
        config = TextualConfig(**options)
        return stage1_statistics(short_adapter, config).solve(config).keyless_distance

    assert distance() is None
    reached = distance(form="null_space", **FORM_OPTIONS["null_space"])
    assert reached is not None and reached < 1e-9
    for options in ({"matrices": ["value"]}, {"form": "projection", **FORM_OPTIONS["projection"]}):
        left = distance(**options)
        assert left is not None and 1e-3 < left <= 1


def test_an_option_that_leaves_nothing_to_edit_is_refused_by_name(
    tiny_adapter: StableDiffusionAdapter,
) -> None:
    config = TextualConfig(form="null_space", null_space_share=1e-12)
    with pytest.raises(InputError, match=r"textual\.form=null_space: no direction holds as little as 1e-12"):
        stage1_statistics(tiny_adapter, config).solve(config)
