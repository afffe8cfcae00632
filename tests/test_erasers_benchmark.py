"""The released loops that ours are compared with, and what one step of each method changes."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import quick

from benchmarks import released
from benchmarks.eraser_memory import STEPS, one_step
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.weights import weights_of


def loop_of(iterations: int) -> released.Loop:
    student, teacher = (StableDiffusionAdapter(build_tiny_pipeline()) for _ in range(2))
    return released.Loop(
        student, teacher, iterations, batch=2, num_steps=5, guidance_scale=2.0, lr=1e-2, eta=1.0
    )


def test_the_released_loop_samples_anew_in_each_step_and_erases() -> None:
    """A run to step n takes 2 n evaluations of each latent, the target 2, and the student 1."""
    loop = loop_of(12)
    weights = [*weights_of(loop.student, "x").values()]
    text = loop.teacher.encode(["a gun", "a gun"])
    z_t, timestep = loop.sampled(text, torch.Generator().manual_seed(3))
    before = [own.detach().clone() for own in weights]

    def distance() -> float:
        with torch.no_grad():
            predicted = loop.student.predict(z_t, timestep, text)
        return float((predicted - loop.target(z_t, timestep, text)).square().mean())

    far = distance()
    for adapter in (loop.student, loop.teacher):
        adapter.network_evaluations = 0
    released.esd(loop, ["a gun"], weights)
    assert loop.teacher.network_evaluations == 12 * 2 * 2
    sampled = loop.student.network_evaluations - 12 * 2
    assert sampled % 4 == 0 and 0 < sampled < 12 * 2 * 2 * 5
    assert distance() < 0.8 * far
    assert not any(torch.equal(*pair) for pair in zip(weights, before, strict=True))


def test_the_released_attack_samples_in_each_of_its_steps() -> None:
    counts = []
    for steps in (0, 4):
        loop = loop_of(3)
        attack = released.Attack(warmup=1, steps=steps, lr=1e-2, retain_weight=1.0, retain_batch=2)
        encoder = loop.student.networks()["text_encoder"]
        weight = encoder.get_parameter("encoder.layers.0.mlp.fc1.weight")
        before = weight.detach().clone()
        released.advunlearn(loop, attack, ["a gun"], ["a cat"], [weight])
        assert not torch.equal(weight, before)
        counts.append(loop.teacher.network_evaluations)
    assert counts[1] - counts[0] == 2 * 4 * 2, "two attacked steps, four searches each, two latents"


@pytest.mark.parametrize("name", quick(STEPS, "esd", "advunlearn"))
def test_one_step_changes_what_its_method_says(name: str, tmp_path: Path) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    assert one_step(STEPS[name], adapter) > 0
