"""Attacks on latents: what is handed over, inverted, kept and made noisier, and the controls of each."""

from dataclasses import replace

import pytest
import torch
from attack_targets import (
    RECORDS,
    control,
    images,
    judged,
    largest_difference,
    plain,
    same_findings,
    searched,
    target_of,
    ways,
)
from conftest import build_tiny_pipeline

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.attacks.completion import Completion, implied_picture
from trce_lightning.attacks.inpainting import Box, Inpainting, box_alone, painted_over, subject_box
from trce_lightning.attacks.noise import Noise
from trce_lightning.attacks.text_free import TextFree, first_step, more_noise, slerp
from trce_lightning.errors import InputError
from trce_lightning.losses import squared_distance
from trce_lightning.sampling import denoise_step, invert_step, mix, noise

ATTACKS = (
    Completion(steps=(1, 2), num_steps=4),
    TextFree(num_steps=4),
    Inpainting(box="subject", num_steps=4),
    Noise(etas=(1.0,), scales=(1.0, 1.04), num_steps=4),
)


def erased_adapter():
    """Return a model that predicts half of what the original does."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    adapter.denoiser.conv_out.weight.data *= 0.5
    return adapter


def silent_adapter():
    """Return a model whose prediction depends on nothing."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    adapter.denoiser.conv_out.weight.data.zero_()
    return adapter


@pytest.fixture(scope="module")
def erased():
    return erased_adapter()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_findings_repeat_and_do_not_depend_on_batches(tiny_adapter, erased, attack) -> None:
    target = target_of(erased, tiny_adapter)
    whole = searched(attack, target)
    assert set(whole) == {record.id for record in RECORDS}
    alone = searched(attack, replace(target, batch_size=1), RECORDS[1:2])
    assert same_findings({"a/1": whole["a/1"]}, alone)
    by_random = control(attack, target)
    assert by_random.keys() == whole.keys()
    for id in whole:
        assert {n: t.shape for n, t in by_random[id].tensors.items()} == {
            n: t.shape for n, t in whole[id].tensors.items()
        }
    assert {way.name for way in attack.ways(target, by_random)} == set(ways(attack, target, whole))


def test_what_completion_refuses() -> None:
    for steps, num_steps in (((), 4), ((0, 1), 4), ((1, 4), 4)):
        with pytest.raises(InputError, match=r"attack\.completion\.steps: expected"):
            Completion(steps=steps, num_steps=num_steps)


@pytest.mark.parametrize("attack", ATTACKS[1:3], ids=lambda attack: attack.name)
def test_pictures_must_be_there(tiny_adapter, attack) -> None:
    with pytest.raises(InputError, match=rf"attack\.{attack.name}: expected a picture .* got 0"):
        searched(attack, target_of(tiny_adapter, pictures=torch.zeros(0, 3, 16, 16, dtype=torch.uint8)))


# Completion


def test_a_planted_hole_finishes_what_the_original_has_begun(tiny_adapter, erased) -> None:
    attack = Completion(steps=(1, 3), num_steps=4)
    hole = target_of(tiny_adapter)
    named = ways(attack, hole, searched(attack, hole))
    assert list(named) == [
        "0 steps",
        "1 steps",
        "handed over after 1 steps",
        "",
        "handed over after 3 steps",
    ]
    originals = plain(hole, named[""], tiny_adapter)
    for name in ("0 steps", "1 steps", ""):
        assert largest_difference(images(hole, named[name]), originals) <= 1
    # Prompts, scales and both models are told apart.
    target = target_of(erased, tiny_adapter)
    named = ways(attack, target, searched(attack, target))
    drawn = {name: images(target, way) for name, way in named.items()}
    assert torch.equal(drawn["0 steps"], plain(target, named[""], erased))
    gaps = [squared_distance(drawn[name], originals).mean() for name in ("0 steps", "1 steps", "")]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert [named[name].spent for name in ("0 steps", "1 steps", "")] == [0, 5, 15]
    benign = ways(attack, target, control(attack, target))
    assert squared_distance(images(target, benign[""]), originals).mean() > gaps[2]
    assert torch.equal(images(target, benign["0 steps"]), drawn["0 steps"])
    assert [name for name, way in named.items() if way.on_curve] == ["0 steps", "1 steps", ""]


def test_the_handed_over_picture_is_what_the_step_implies(tiny_adapter) -> None:
    schedule = tiny_adapter.schedule(4)
    z_0, eps = noise((2, 4, 8, 8), 0), noise((2, 4, 8, 8), 1)
    before = mix(z_0, eps, schedule.signal[1], schedule.sigma[1])
    after = mix(z_0, eps, schedule.next_signal[1], schedule.next_sigma[1])
    assert torch.allclose(implied_picture(before, after, schedule, 1), z_0, atol=1e-4)


# Text-free


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_is_inverted_exactly_where_the_prediction_is_known(prediction_type) -> None:
    schedule = StableDiffusionAdapter(build_tiny_pipeline(prediction_type)).schedule(4)
    z_t, prediction = noise((2, 4, 8, 8), 0), noise((2, 4, 8, 8), 1)
    for step_index in range(4):
        arrived = denoise_step(prediction, z_t, schedule, step_index)
        assert torch.allclose(invert_step(prediction, arrived, schedule, step_index), z_t, atol=1e-4)


def test_any_silent_model_reconstructs_so_reconstruction_is_no_evidence() -> None:
    adapter = silent_adapter()
    attack, target = (
        TextFree(level=0.5, noise_levels=(0.9,), reconstruction=True, num_steps=4),
        target_of(silent_adapter()),
    )
    named = ways(attack, target, searched(attack, target))
    decoded = adapter.decode(adapter.encode_images(target.pictures))
    assert largest_difference(images(target, named["reconstruction 0.7"]), decoded) <= 1
    assert largest_difference(images(target, named[""]), decoded) > 1


def test_an_inverted_picture_returns_and_fixed_points_return_it_better(tiny_adapter) -> None:
    target = target_of(tiny_adapter)
    z_0 = tiny_adapter.encode_images(target.pictures)
    gaps = []
    for iterations in (1, 4):
        attack = TextFree(reconstruction=True, iterations=iterations, num_steps=20)
        found = searched(attack, target)
        way = ways(attack, target, found)["reconstruction 0.7"]
        gaps.append(squared_distance(images(target, way), tiny_adapter.decode(z_0)).mean())
    assert gaps[1] < gaps[0]
    told = way.records[0]
    assert told.prompt == "" and told.guidance_scale == 1.0


def test_the_ways_of_text_free(tiny_adapter) -> None:
    attack, target = TextFree(num_steps=10), target_of(tiny_adapter)
    found = searched(attack, target)
    named = ways(attack, target, found)
    forms = ["", "noise 0.5 to 0.7", "noise 0.5 to 0.9", "slerp 0.7", "another prompt 0.7"]
    assert [name for name in named if not name.startswith("visible")] == forms
    assert [name for name, way in named.items() if way.on_curve] == [""]
    assert named["visible in noise 0.5 to 0.9"].variation.start.first_step == 10
    assert [named[name].variation.start.first_step for name in forms] == [2, 3, 1, 3, 3]
    assert [record.prompt for record in named["another prompt 0.7"].records] == [
        "a gun",
        "a dagger",
        "a gun",
    ]
    assert torch.equal(attack.learnt_from(target), target.pictures)
    drawn = {name: images(target, way) for name, way in named.items()}
    assert all(images_.shape == (3, 3, 16, 16) for images_ in drawn.values())
    # The same findings give the same images, in batches of any size.
    again = ways(attack, replace(target, batch_size=1), found)
    assert all(
        largest_difference(drawn[name], images(replace(target, batch_size=1), way)) <= 1
        for name, way in again.items()
    )


def test_tries_of_text_free_have_noise_of_their_own(tiny_adapter) -> None:
    attack, target = TextFree(num_steps=10, tries=3), target_of(tiny_adapter)
    found = searched(attack, target)
    tried = ways(attack, target, found)
    counts = [len(tried[name].records) for name in ("", "visible in noise 0.5 to 0.8", "slerp 0.7")]
    assert counts == [9, 9, 3]
    starts = list(tried[""].variation.start.latents.values())
    assert len({start.numpy().tobytes() for start in starts}) == 9
    once = ways(TextFree(num_steps=10), target, found)[""].variation.start.latents.values()
    assert all(torch.equal(starts[3 * row], start) for row, start in enumerate(once))


def test_more_noise_reaches_its_level(tiny_adapter) -> None:
    schedule = tiny_adapter.schedule(10)
    z_0, eps, fresh = noise((4, 64, 64), 0), noise((4, 64, 64), 1), noise((4, 64, 64), 2)
    z_s = schedule.signal[5] * z_0 + schedule.sigma[5] * eps
    added = more_noise(z_s, fresh, schedule, 5, 1) - schedule.signal[1] * z_0
    assert float(added.std()) == pytest.approx(float(schedule.sigma[1]), rel=0.02)
    assert torch.equal(more_noise(z_s, fresh, schedule, 5, 5), z_s)
    assert [first_step(level, 20) for level in (1.0, 0.9, 0.5, 0.01)] == [0, 2, 10, 19]
    a, b = noise((2, 4, 8, 8), 3), noise((2, 4, 8, 8), 4)
    middle = slerp(a, b)
    assert torch.allclose(middle.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1), rtol=0.1)
    assert torch.allclose(slerp(a, a), a, atol=1e-5)


def test_what_text_free_refuses() -> None:
    for option, changes in (
        ("level", {"level": 0.0}),
        ("noise_levels", {"noise_levels": ()}),
        ("noise_levels", {"level": 0.8}),
        ("noise_levels", {"level": 0.5, "noise_levels": (0.52,), "num_steps": 20}),
        ("slerp_levels", {"slerp_levels": (1.5,)}),
        ("other_prompt_levels", {"other_prompt_levels": (0.0,)}),
        ("iterations", {"iterations": 0}),
        ("tries", {"tries": 0}),
    ):
        with pytest.raises(InputError, match=rf"attack\.text_free\.{option}: expected"):
            TextFree(**changes)


# Inpainting


def test_the_subjects_box_is_found_and_painted_over() -> None:
    picture = torch.full((3, 16, 16), 20, dtype=torch.uint8)
    picture[0, 5:9, 3:12] = 200
    assert subject_box(picture, 0.15) == Box(5, 3, 9, 12)
    assert subject_box(picture, 0.9) is None
    painted = painted_over(picture, Box(2, 1, 5, 6), 2)
    assert (painted == 20).all()
    assert (painted_over(picture, Box(0, 0, 1, 1), 2) == picture).all()
    assert (box_alone(picture, Box(2, 1, 5, 6), 2) == picture).all()
    assert (box_alone(picture, Box(0, 0, 1, 1), 2) == 20).all()


def test_the_rim_stays_and_has_not_seen_the_subject(tiny_adapter) -> None:
    attack, target = Inpainting(box="subject", num_steps=4), target_of(tiny_adapter)
    found = searched(attack, target)
    assert found["a/0"].facts["box"] == [2, 2, 6, 6]  # rows 4 to 10 and columns 5 to 11 in pixels
    blank = torch.full((1, 3, 16, 16), 20, dtype=torch.uint8)
    assert torch.allclose(found["a/0"].tensors["known"], tiny_adapter.encode_images(blank)[0], atol=1e-5)
    named = ways(attack, target, found)
    rim = images(target, named["rim alone"])
    assert largest_difference(rim, tiny_adapter.decode(tiny_adapter.encode_images(blank)).expand_as(rim)) <= 1
    assert largest_difference(images(target, named[""]), rim) > 1
    drawn = images(target, named[""])
    seen, inside = judged(named[""], drawn), slice(4, 12)
    assert torch.equal(seen[0, :, inside, inside], drawn[0, :, inside, inside])
    around = seen[0].clone()
    around[:, inside, inside] = around[:, :1, :1]
    assert (around == around[:, :1, :1]).all(), "the judge sees nothing of the rim"
    assert judged(named["rim alone"], rim) is rim
    masks = [control(attack, target)[record.id].tensors["mask"] for record in RECORDS]
    assert [int(mask.sum()) for mask in masks] == [
        int(found[record.id].tensors["mask"].sum()) for record in RECORDS
    ]
    assert any(not torch.equal(m, found[r.id].tensors["mask"]) for m, r in zip(masks, RECORDS, strict=True))
    assert all(mask[0, 0].sum() == mask[0, :, -1].sum() == 0 for mask in masks)
    centre = searched(Inpainting(), target)
    assert centre["a/0"].facts == {"box": [2, 2, 6, 6], "share": 0.25}


def test_what_inpainting_refuses(tiny_adapter) -> None:
    for option, value in (("box", "left"), ("threshold", 0.0), ("rim", -1)):
        with pytest.raises(InputError, match=rf"attack\.inpainting\.{option}: expected"):
            Inpainting(**{option: value})
    with pytest.raises(InputError, match=r"attack\.inpainting\.rim: .* 8 cells, got 4"):
        searched(Inpainting(rim=4), target_of(tiny_adapter))


# Noise


def test_every_point_of_the_grid_is_a_try_and_the_control_has_as_many_plain_seeds(tiny_adapter) -> None:
    attack, target = Noise(etas=(1.0, 1.85), scales=(1.0, 1.04), num_steps=4), target_of(tiny_adapter)
    way = ways(attack, target, searched(attack, target))[""]
    assert len(way.records) == len({record.id for record in way.records}) == 3 * 4
    usual = plain(target, way, tiny_adapter)
    assert largest_difference(images(target, way), usual) > 1
    tries = ways(attack, target, control(attack, target))[""]
    assert [record.id for record in tries.records] == [record.id for record in way.records]
    assert largest_difference(images(target, tries), usual) <= 1
    for option, value in (("etas", ()), ("scales", ()), ("etas", (-1.0,))):
        with pytest.raises(InputError, match=rf"attack\.noise\.{option}: expected"):
            Noise(**{option: value})
