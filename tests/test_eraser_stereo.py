"""STEREO: rounds find embeddings, all is erased from the original, by written coefficients."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import STEREO_SMALL, TUNED, Alone, Harness, published
from published_models import pipeline_of, unet_of
from tiny_runs import WEAPONS, cpu_trainer

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.adapters.slots import initial_vectors, slots_of
from trce_lightning.attacks.inversion import inversion_loss, training_sentences
from trce_lightning.concepts import Concept
from trce_lightning.erasers.stereo import STEREO, composed_target
from trce_lightning.erasers.teachers import finished
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import latents_after
from trce_lightning.prompts.records import PromptRecord


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def stereo(**options: Any) -> STEREO:
    return STEREO(**(TUNED | STEREO_SMALL | options))


def test_the_coefficients_are_those_of_the_released_guidance() -> None:
    """ε(∅) = 1, ε(a) = 4, ε(e) = 2 and 6: 1 + (4 − 1) − 3 (4 − 1), or 10 + … with a guide."""
    empty, anchor, guide = (torch.full((1, 1, 1, 1), value) for value in (1.0, 4.0, 10.0))
    erased = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1, 1)
    options, scale = published("stereo"), 2.0
    weights = options["anchor_weight"], options["erase_weight"]
    assert weights == (scale - 1, scale + 1) and options["round_eta"] == scale - 2
    assert composed_target(empty, empty, anchor, erased, *weights).item() == 1 + 3 - 3 * 3
    assert composed_target(guide, empty, anchor, erased, *weights).item() == 10 + 3 - 3 * 3
    assert composed_target(empty, empty, anchor, erased, 0.0, 0.5).item() == 1 - 0.5 * 3


def test_pictures_are_those_that_sampling_ends_in(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    harness, eraser = Harness(adapter, tmp_path), stereo()
    before = eraser._before(harness.job)
    teachers = before["pictures of weapons"]
    teachers.sample(harness.job.trainer, adapter, eraser.encoder(adapter))
    walks = teachers.plan.walks
    records = [PromptRecord(f"{i}", walk.prompt, seed=walk.seed) for i, walk in enumerate(walks)]
    expected = latents_after(adapter, records, [4], guidance_scale=2.0, num_steps=4, batch_size=8)[4]
    found = finished(teachers, adapter)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # The rounds share none of them.
    rounds = [eraser._pictures(harness.job, before, number)[0] for number in (1, 2)]
    assert torch.equal(torch.cat(rounds), found)


def test_a_search_finds_embeddings_that_explain_the_pictures_to_the_erased_network(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    """The last round's embedding has a lower loss with that round's network than the word it began as."""
    eraser = stereo(inversion_steps=30, inversion_lr=0.05, inversion_batch_size=4)
    harness = Harness(adapter, tmp_path)
    original = {name: own.clone() for name, own in adapter.denoiser.state_dict().items()}
    losses: list[float] = []

    def fit(module: Any, data: Any, part: str) -> None:
        harness.fit(module, data, part)
        if part != "round-2-inversion":
            return
        (pictures,) = eraser._pictures(harness.job, eraser._before(harness.job), 2)
        slots = slots_of(adapter, training_sentences("subject"), "cat", 1, "method")
        begun = initial_vectors(adapter, "cat", 1, "method")
        found = {name: own.detach()[0] for name, own in module.extra.items()}
        for vectors in (begun, found):
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                losses.append(float(inversion_loss(adapter, slots, pictures, vectors, 64, 4, generator)))
        assert not torch.equal(adapter.denoiser.get_parameter(trained), original[trained])

    job = dataclasses.replace(harness.job, fit=fit)
    trained = next(iter(eraser.trained(adapter)["unet"]))
    found = eraser._search(job)
    assert losses[1] < losses[0]
    assert set(found) == {"<weapons 1>", "<weapons 2>"}
    assert not torch.equal(found["<weapons 1>"]["clip"], found["<weapons 2>"]["clip"])
    # All is erased from the original again.
    assert all(torch.equal(own, original[name]) for name, own in adapter.denoiser.state_dict().items())


def test_a_search_runs_once_and_belongs_to_its_options(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    harness = Harness(adapter, tmp_path)
    first = stereo().erase(harness.job).changed["unet"]
    counted = dict(harness.counted)
    assert [part for part in counted if part.startswith("round")] == [
        f"round-{number}-{part}" for number in (1, 2) for part in ("erasing", "inversion")
    ]
    again = Harness(StableDiffusionAdapter(build_tiny_pipeline()), tmp_path)
    assert set(stereo(lr=1e-3).ahead(again.job).parts) == {"teachers", "training"}
    second = stereo().erase(again.job).changed["unet"]
    assert again.counted == {"teachers": 0, "training": counted["training"]}
    assert all(torch.equal(own, second[name]) for name, own in first.items())
    for option in ({"rounds": 1}, {"round_lr": 1e-3}, {"initial": "dog"}, {"pictures": 3}, {"draws": 1}):
        assert "search" in stereo(**option).ahead(again.job).parts, option
    # Other sentences, and other steps.
    style = dataclasses.replace(again.job, concepts=[dataclasses.replace(WEAPONS, kind="style")])
    clipped = dataclasses.replace(again.job, trainer=cpu_trainer(tmp_path, gradient_clip_val=0.1))
    for job in (style, clipped):
        assert "search" in stereo().ahead(job).parts


def test_a_later_round_reads_the_concepts_points_under_what_was_found(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    job, eraser = Harness(adapter, tmp_path).job, stereo()
    vectors = initial_vectors(adapter, "x", 1, "method")
    rounds = [eraser._round(job, number, {"<weapons 1>": vectors}) for number in (1, 2)]
    plans = [round_.sources(job)["erase"].plan for round_ in rounds]
    assert all(walk.taught == walk.prompt for walk in plans[0].walks)
    assert all(walk.taught == "<weapons 1>" and walk.prompt in WEAPONS.all_names for walk in plans[1].walks)
    assert all(walk.texts == (walk.prompt, "", "") for plan in plans for walk in plan.walks)
    # The text that stands for an embedding is that of the embedding alone.
    stand_in = rounds[1].encoder(adapter)("<weapons 1>")
    torch.testing.assert_close(stand_in.states, adapter.encode(["x"]).states, atol=1e-5, rtol=1e-4)


def test_what_is_erased_at_the_end_takes_turns_and_knows_all_others(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    job = Harness(adapter, tmp_path).job
    eraser = stereo(iterations=60, draws=1, guide="counterpart")
    walks = eraser.sources(job)["erase"].plan.walks
    taught = [walk.taught for walk in walks]
    for text in ("<weapons 1>", "<weapons 2>"):
        assert taught.count(text) == len(walks) / 3
    for walk in walks:
        empty, guide, anchor, name, *found = walk.texts
        assert empty == "" and found == ["<weapons 1>", "<weapons 2>"] and WEAPONS.terms[name] == guide
        assert walk.prompt in (name, *found) and anchor in [each.format(name) for each in WEAPONS.templates]
    assert {walk.texts[2] for walk in walks} >= {"see a gun", "an axe at sea"}


def test_each_concept_has_embeddings_of_its_own(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    two = (
        Concept("guns", {"a gun": "a kite"}, templates=("{}",)),
        Concept("axes", {"an axe": "a hat"}, templates=("{}",)),
    )
    harness = Harness(adapter, tmp_path, two)
    eraser = stereo(rounds=1)
    work = eraser.ahead(harness.job)
    found = eraser._search(harness.job)
    assert work.parts["round-1-inversion"].backward == 2 * 3 * 2 == harness.counted["round-1-inversion"]
    assert set(found) == {"<guns 1>", "<axes 1>"}
    assert not torch.equal(found["<guns 1>"]["clip"], found["<axes 1>"]["clip"])
    eraser._found = found
    texts = {walk.texts[3:] for walk in eraser.sources(harness.job)["erase"].plan.walks}
    assert texts <= {("a gun", "<guns 1>"), ("an axe", "<axes 1>")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"initial": ""}, r"method\.initial: expected a word that the tokenizer leaves whole"),
        (
            {"inversion_batch_size": 3},
            r"method\.inversion_batch_size: expected a multiple of the 2 processes",
        ),
        ({"variant": "x", "last_step": 9}, r"expected steps from 0 to 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], expected: str, adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    job = dataclasses.replace(Harness(adapter, tmp_path).job, trainer=Alone(0, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=expected):
        stereo(**options).ahead(job)


def test_at_stable_diffusions_shape_the_variant_trains(tmp_path: Path) -> None:
    pipeline = pipeline_of("sd1", small=True)
    job = Harness(StableDiffusionAdapter(pipeline), tmp_path).job
    with torch.device("meta"):
        pipeline.unet = unet_of("sd1")
    adapter, eraser = StableDiffusionAdapter(pipeline), STEREO(**published("stereo"))
    ahead = eraser.ahead(dataclasses.replace(job, adapter=adapter))
    names = eraser.trained(adapter)["unet"]
    assert ahead.trainable == sum(own.numel() for own in names.values()) == 815_358_084
    assert not any("attn2" in name for name in names) and "conv_in.weight" in names
    assert ahead.parts["round-4-inversion"].backward == 3000 and ahead.parts["training"].backward == 200
