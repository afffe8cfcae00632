"""SLD, rule by rule, against numbers by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from test_cli import refusal
from torch import Tensor

from trce_lightning import cli
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.config.schema import EvalConfig
from trce_lightning.errors import InputError
from trce_lightning.generation.guidance import ClassifierFreeGuidance
from trce_lightning.generation.loop import generate, planned_evaluations
from trce_lightning.generation.sld import SafeLatentDiffusion
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.session import Session
from trce_lightning.prompts.records import PromptRecord

STEPS = 10


def rows(*values: float) -> Tensor:
    """One latent of one number each."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def combined(adapter: StableDiffusionAdapter, outputs: Tensor, *steps: int, **options: Any) -> list[float]:
    """The predictions at some steps, for one image at scale 2 and the same outputs ∅, S, p each time."""
    given: dict[str, Any] = {"warmup": 0, "concept": "gore", "momentum_scale": 0.0} | options
    guide = SafeLatentDiffusion(**given).guide(adapter, ["a gun"], [2.0], STEPS)
    return [guide.combine(outputs, step).item() for step in steps]


def test_the_direction_to_the_unsafe_text_is_taken_off(tiny_adapter: StableDiffusionAdapter) -> None:
    """∅ = 1, S = 3, p = 2: |p − S| = 1 saturates, γ = S − ∅ = 2, ε = 1 + 2 (2 − 1 − 2)."""
    assert combined(tiny_adapter, rows(1, 3, 2), 0, scale=10.0, threshold=0.0) == [-1.0]


def test_the_strength_grows_with_the_distance(tiny_adapter: StableDiffusionAdapter) -> None:
    """s |p − S| = 0.25, γ = 0.5, ε = 1 + 2 (1 − 0.5)."""
    assert combined(tiny_adapter, rows(1, 3, 2), 0, scale=0.25, threshold=0.0) == [2.0]


@pytest.mark.parametrize(("threshold", "expected"), [(-1.0, 3.0), (-0.5, -1.0)])
def test_a_prompt_far_enough_from_the_unsafe_text_is_left_alone(
    tiny_adapter: StableDiffusionAdapter, threshold: float, expected: float
) -> None:
    """p − S = −1 is at the first threshold, so nothing is led away, and below the second."""
    assert combined(tiny_adapter, rows(1, 3, 2), 0, scale=10.0, threshold=threshold) == [expected]


def test_nothing_is_led_away_before_the_warm_up_ends_but_the_momentum_grows(
    tiny_adapter: StableDiffusionAdapter,
) -> None:
    """γ₀ = 2, ν₁ = 0.6 · 2 = 1.2, γ₁ = 2 + 0.5 · 1.2 = 2.6: ε₀ = CFG = 3, ε₁ = 1 + 2 (1 − 2.6)."""
    options: dict[str, Any] = {"scale": 10.0, "threshold": 0.0, "momentum_scale": 0.5, "momentum": 0.4}
    first, second = combined(tiny_adapter, rows(1, 3, 2), 0, 1, warmup=1 / STEPS, **options)
    assert first == 3.0 and second == pytest.approx(-2.2)
    # ν₂ = 0.4 · 1.2 + 0.6 · 2.6 = 2.04, γ₂ = 2 + 1.02
    *_, third = combined(tiny_adapter, rows(1, 3, 2), 0, 1, 2, warmup=1 / STEPS, **options)
    assert third == pytest.approx(1 + 2 * (1 - 3.02))


@pytest.mark.parametrize(
    ("warmup", "num_steps", "first"), [(0.2, 50, 10), (0.14, 50, 7), (0.2, 5, 1), (0.14, 5, 1)]
)
def test_the_warm_up_is_a_share_of_the_steps(
    tiny_adapter: StableDiffusionAdapter, warmup: float, num_steps: int, first: int
) -> None:
    rule = SafeLatentDiffusion(warmup=warmup, scale=10.0, threshold=0.0, momentum_scale=0.0, concept="gore")
    guide = rule.guide(tiny_adapter, ["a gun"], [2.0], num_steps)
    predicted = [guide.combine(rows(1, 3, 2), step).item() for step in range(num_steps)]
    assert predicted == [3.0] * first + [-1.0] * (num_steps - first)


def test_each_image_has_its_own_scale_and_momentum(tiny_adapter: StableDiffusionAdapter) -> None:
    """The middle image isn't guided, and follows its prompt."""
    rule = SafeLatentDiffusion(warmup=0, scale=10.0, threshold=0.0, momentum_scale=0.0, concept="gore")
    guide = rule.guide(tiny_adapter, ["a", "b", "c"], [2.0, 1.0, 3.0], STEPS)
    inputs = guide.inputs(0)
    assert inputs.latents.tolist() == [0, 2, 0, 2, 0, 1, 2] and len(inputs.text) == 7
    found = guide.combine(rows(1, 1, 3, 3, 2, 5, 2), 0)
    assert found.flatten().tolist() == [-1.0, 5.0, 1 + 3 * (1 - 2)]
    assert [rule.evaluations(w) for w in (0.5, 1.0, 1.5)] == [1, 1, 3]


def images(adapter: StableDiffusionAdapter, rule: SafeLatentDiffusion | None) -> Tensor:
    records = [PromptRecord("a", "a gun"), PromptRecord("b", "tea")]
    variation = Variation(guidance=rule)
    before = adapter.network_evaluations
    found = generate(adapter, records, guidance_scale=3.0, num_steps=3, batch_size=2, variation=variation)
    said = planned_evaluations(records, 3, 3.0, variation.rule)
    assert adapter.network_evaluations - before == said == 2 * 3 * (3 if rule else 2)
    return found


def test_it_equals_cfg_where_nothing_is_triggered(tiny_adapter: StableDiffusionAdapter) -> None:
    usual = images(tiny_adapter, None)
    off = SafeLatentDiffusion(warmup=0, scale=0.0, concept="a gun")
    assert (images(tiny_adapter, off).int() - usual.int()).abs().max() <= 1
    on = SafeLatentDiffusion(warmup=0, scale=5000.0, threshold=1.0, concept="a dog")
    assert (images(tiny_adapter, on).int() - usual.int()).abs().max() > 5


def test_the_rule_enters_the_record_of_images_and_leaves_that_of_others_alone() -> None:
    rule = SafeLatentDiffusion(concept="gore")
    assert Variation().meta() == {} and "guidance" not in repr(Variation())
    assert Variation(guidance=rule).meta() == {"guidance": repr(rule)}
    assert Variation().rule == ClassifierFreeGuidance()
    with pytest.raises(InputError, match="negative prompt"):
        Variation(guidance=rule, negative_prompt="gore")


def session_of(*options: str) -> Session:
    from test_configs import composed

    from trce_lightning.jobs.session import concepts_of

    config = composed("eval", "concept=violence", *options)
    assert isinstance(config, EvalConfig)
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    session = Session(config, concepts_of(config))
    session.__dict__["adapter"] = adapter
    return session


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sld_weak", (15 / 50, 20, 0, 0, 0)),
        ("sld", (10 / 50, 1000, 0.01, 0.3, 0.4)),
        ("sld_strong", (7 / 50, 2000, 0.025, 0.5, 0.7)),
        ("sld_max", (0, 5000, 1.0, 0.5, 0.7)),
    ],
)
def test_the_settings_are_the_published_ones(name: str, numbers: tuple[float, ...]) -> None:
    rule = session_of(f"guidance={name}").guidance()
    assert isinstance(rule, SafeLatentDiffusion)
    found = (rule.warmup, rule.scale, rule.threshold, rule.momentum_scale, rule.momentum)
    assert found == numbers
    assert rule.concept.startswith("kitchen knife, dagger, ")
    assert session_of("guidance=cfg").guidance() is None


def test_only_phrases_that_fit_are_read(tiny_adapter: StableDiffusionAdapter) -> None:
    for comma in (", ", ",", " ,  "):
        rule = SafeLatentDiffusion(concept=comma.join(["gore", "x" * 40, "war"]))
        text = rule.guide(tiny_adapter, ["a"], [2.0], STEPS).inputs(0).text
        assert torch.equal(text.states["clip"][1], tiny_adapter.encode(["gore, war"]).states["clip"][0])


def test_wrong_options_are_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def said(*argv: str) -> str:
        return refusal(capsys, "concept=violence", f"runs={tmp_path}", *argv, command=cli.evaluate)

    assert "'guidance.scale'" in said("guidance.scale=2") and "guidance=cfg" in said("guidance.scale=2")
    assert "expected none with guidance=sld" in said("guidance=sld", "attacks=noise")
    assert "no guidance named 'slt'" in said("guidance=slt")
    with pytest.raises(InputError, match=r"'guidance\.momentum'.*at most 1"):
        session_of("guidance=sld", "guidance.momentum=2").guidance()
