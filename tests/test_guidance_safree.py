"""SAFREE, rule by rule, against numbers by hand."""

import math

import pytest
import torch

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate
from trce_lightning.generation.safree import Safree, projected, projection, steps_of
from trce_lightning.generation.variation import Variation
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Role

X, Y, Z = torch.eye(3).double()


def test_the_projection_is_on_the_span_and_repeated_rows_count_once() -> None:
    p = projection(torch.stack([X, X, X + Y]))
    torch.testing.assert_close(p @ (X + 2 * Y + 3 * Z), X + 2 * Y)
    torch.testing.assert_close(p @ p, p)


def test_a_token_without_which_the_prompt_is_safer_is_projected() -> None:
    """The unsafe direction is x. Without token 1 the prompt is y alone, farther from x than without token 2.

    Distances are 1 and 0.5, so the first is a trigger. I spans x and y, so (1 − C) I keeps y alone.
    """
    states = torch.stack([Z, 3 * X + Y + Z, 2 * Y, X])
    words = torch.tensor([False, True, True, False])
    masked = torch.stack([Y, X + 0.5 * Y])
    found = projected(states, masked, words, X[None], alpha=0.01)
    assert found.triggers.tolist() == [False, True, False, False]
    torch.testing.assert_close(found.states, torch.stack([Z, Y, 2 * Y, X]))
    turned = 1 - (1 / math.sqrt(11) + 1) / 2
    assert found.turned == pytest.approx(turned)
    # With α = 1.01 the first would have to lie 2.01 times as far as the second, and it lies 2 times as far.
    assert not projected(states, masked, words, X[None], alpha=1.01).triggers.any()


def test_one_token_has_nothing_to_be_compared_with() -> None:
    states, words = torch.stack([Z, X]), torch.tensor([False, True])
    found = projected(states, Y[None], words, X[None], alpha=0.0)
    assert torch.equal(found.states, states) and not found.triggers.any() and found.turned == 0


def test_the_more_it_turns_the_longer_it_lasts() -> None:
    assert steps_of(0.5333, 10) == 5 and steps_of(0.0, 10) == 0 and steps_of(1.0, 10) == 10
    assert steps_of(0.55, 10) == round(10 / (1 + math.exp(-5 * 0.167)))


def test_only_triggers_change_and_only_in_the_first_steps(tiny_adapter: StableDiffusionAdapter) -> None:
    prompts = ["a gun at sea", "tea"]
    guide = Safree(concept="a gun, gun", alpha=0.0, steps=1).guide(tiny_adapter, prompts, [2.0, 1.0], 5)
    plain = tiny_adapter.encode(prompts)
    first, late = guide.inputs(0), guide.inputs(5)
    assert first.latents.tolist() == [0, 0, 1] and len(first.text) == 3
    assert torch.equal(first.text.states["clip"][0], tiny_adapter.empty().states["clip"][0])
    assert torch.equal(late.text.states["clip"][1:], plain.states["clip"])
    moved = (first.text.states["clip"][1] != plain.states["clip"][0]).any(1)
    assert moved.any() and not moved[plain.roles["clip"][0] != Role.WORD].any()
    outputs = torch.tensor([1.0, 2.0, 7.0]).view(3, 1, 1, 1)
    assert guide.combine(outputs, 0).flatten().tolist() == [1 + 2 * (2 - 1), 7.0]


def test_it_equals_cfg_where_nothing_is_triggered(tiny_adapter: StableDiffusionAdapter) -> None:
    records = [PromptRecord("a", "a gun"), PromptRecord("b", "tea")]

    def images(rule: Safree | None) -> torch.Tensor:
        variation, before = Variation(guidance=rule), tiny_adapter.network_evaluations
        found = generate(
            tiny_adapter, records, guidance_scale=3.0, num_steps=3, batch_size=2, variation=variation
        )
        assert tiny_adapter.network_evaluations - before == 2 * 3 * 2
        return found

    assert torch.equal(images(Safree(concept="a gun", alpha=100.0)), images(None))
    on = images(Safree(concept="a gun, gun", alpha=0.0, steps=10))
    assert not torch.equal(on, images(None))


def test_half_precision_of_the_denoiser_changes_no_projection(tiny_adapter: StableDiffusionAdapter) -> None:
    prompts = ["a gun at sea", "an axe and a dog", "tea"]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            guide = Safree(concept="a gun, axe", alpha=0.0).guide(tiny_adapter, prompts, [2.0] * 3, 5)
        found.append(guide)
    assert torch.equal(found[0].safe["clip"], found[1].safe["clip"])
    assert torch.equal(found[0].last, found[1].last) and bool((found[0].last >= 0).any())


def test_blanks_around_phrases_do_not_count(tiny_adapter: StableDiffusionAdapter) -> None:
    written = ("gun,axe", " gun , axe,", "gun, axe")
    guides = [Safree(concept=text).guide(tiny_adapter, ["a gun at sea"], [2.0], 5).safe for text in written]
    assert all(torch.equal(guide["clip"], guides[2]["clip"]) for guide in guides)
    with pytest.raises(InputError, match=r"guidance\.concept: expected phrases"):
        Safree(concept=" , ").guide(tiny_adapter, ["a"], [2.0], 5)


def test_phrases_are_needed(tiny_adapter: StableDiffusionAdapter) -> None:
    with pytest.raises(InputError, match=r"guidance\.concept: expected phrases"):
        Safree().guide(tiny_adapter, ["a"], [2.0], 5)
