"""Attacks on embeddings: gradients, counts, keys of edits, and what holds against them."""

from dataclasses import replace

import pytest
import torch
from attack_targets import (
    RECORDS,
    control,
    images,
    largest_difference,
    plain,
    same_findings,
    searched,
    target_of,
    ways,
)
from conftest import build_tiny_pipeline, entries_of
from safetensors.torch import save_file

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.adapters.slots import PLACEHOLDER
from trce_lightning.attacks.diversity import diversity
from trce_lightning.attacks.inverse_edit import InverseEdit
from trce_lightning.attacks.inversion import Inversion, InversionN
from trce_lightning.attacks.objectives import Noised
from trce_lightning.attacks.proxies import with_states
from trce_lightning.attacks.state_pgd import StatePgd
from trce_lightning.closed_form import apply_edits
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate, generate_to
from trce_lightning.generation.variation import Variation

LEARN = {"steps": 6, "batch_size": 3, "pictures": 2, "lr": 0.02, "levels": 4, "checkpoints": (0, 2)}


def edited(transform, parts=("to_k", "to_v")):
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    weights = [module.weight.data for name, module in entries_of(adapter).items() if name.endswith(parts)]
    for weight, changed in zip(weights, apply_edits(weights, transform), strict=True):
        weight.copy_(changed)
    return adapter


def transform_of(width=32):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.eye(width, dtype=torch.float64) + 0.15 * noise


def deaf_adapter():
    """Return a model whose denoiser ignores text: no embedding can bring anything back."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    for name, module in entries_of(adapter).items():
        if name.endswith("to_v"):
            module.weight.data.zero_()
    return adapter


# Proxies


def test_changed_states_reach_images_counts_and_fingerprints(tiny_adapter, tmp_path) -> None:
    rose = tiny_adapter.encode(["a rose"]).states["clip"][0]
    proxy = with_states(tiny_adapter, {"<x>": {"clip": rose}})
    records = [replace(RECORDS[0], prompt="<x>"), replace(RECORDS[1], prompt="a gun")]
    settings = {"guidance_scale": 3.0, "num_steps": 3, "batch_size": 2}
    before = tiny_adapter.network_evaluations
    found = generate(proxy, records, **settings)
    assert proxy.network_evaluations == tiny_adapter.network_evaluations == before + 3 * 3
    expected = [replace(RECORDS[0], prompt="a rose"), records[1]]
    assert largest_difference(found, generate(tiny_adapter, expected, **settings)) <= 1
    assert largest_difference(found[0], generate(tiny_adapter, records, **settings)[0]) > 1
    other = with_states(tiny_adapter, {"<x>": {"clip": rose + 1}})
    assert len({a.fingerprint() for a in (tiny_adapter, proxy, other)}) == 3
    assert len({a.text_fingerprint() for a in (tiny_adapter, proxy, other)}) == 3
    assert generate_to(tmp_path, proxy, records, **settings) == 2
    with pytest.raises(InputError, match="generator"):
        generate_to(tmp_path, other, records, **settings)


# Inverse edit


@pytest.mark.parametrize("given", [False, True], ids=["recovered", "from the file"])
def test_the_key_of_an_edit_gives_the_originals_images(tiny_adapter, tmp_path, given) -> None:
    transform = transform_of()
    save_file({"transform": transform}, tmp_path / "edit.safetensors")
    target = target_of(edited(transform), tiny_adapter)
    attack = InverseEdit(edit=str(tmp_path / "edit.safetensors") if given else None)
    found = searched(attack, target)
    facts = found["all"].facts["streams"]["context"]
    assert facts["residual"] < 1e-4 and facts["changed"] and facts["rank"] == facts["width"] == 32
    assert torch.allclose(found["all"].tensors["clip"], torch.linalg.inv(transform).mT, atol=1e-4)
    way = ways(attack, target, found)[""]
    original = plain(target, way, tiny_adapter)
    assert largest_difference(images(target, way), original) <= 1
    assert largest_difference(plain(target, way, target.adapter), original) > 1
    unlucky = ways(attack, target, control(attack, target))[""]
    assert largest_difference(images(target, unlucky), original) > 1
    untouched = searched(attack, target_of(tiny_adapter))["all"].tensors["clip"]
    assert torch.allclose(untouched, torch.eye(32, dtype=untouched.dtype), atol=1e-4), (
        "there is no edit to undo"
    )
    shift = [key - torch.eye(32) for key in (found["all"].tensors["clip"], unlucky_key(attack, target))]
    assert torch.allclose(shift[0].norm(), shift[1].norm())


def test_images_are_made_as_the_target_says(tiny_adapter) -> None:
    variation = Variation("EulerDiscreteScheduler")
    target = target_of(tiny_adapter, variation=variation)
    for attack in (InverseEdit(), Inversion(**LEARN), StatePgd(steps=1)):
        assert all(way.variation == variation for way in attack.ways(target, control(attack, target)))


def unlucky_key(attack, target):
    return control(attack, target)["all"].tensors["clip"]


def test_an_edit_of_another_form_is_told_by_its_residual(tiny_adapter) -> None:
    values_alone = target_of(edited(transform_of(), parts=("to_v",)), tiny_adapter)
    assert searched(InverseEdit(), values_alone)["all"].facts["streams"]["context"]["residual"] > 0.3
    untouched = searched(InverseEdit(), target_of(tiny_adapter))["all"]
    assert not untouched.facts["streams"]["context"]["changed"]
    assert torch.allclose(untouched.tensors["clip"], torch.eye(32, dtype=torch.float64), atol=1e-6)
    projection = torch.eye(32, dtype=torch.float64)
    projection[0, 0] = 0
    facts = searched(InverseEdit(), target_of(edited(projection), tiny_adapter))["all"].facts
    assert facts["streams"]["context"]["rank"] == 31 and facts["streams"]["context"]["residual"] < 1e-4


def test_a_file_without_an_edit_is_refused(tiny_adapter, tmp_path) -> None:
    save_file({"transform": torch.eye(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"attack\.inverse_edit\.edit: .*\[32, 32\].*\[3, 3\]"):
        searched(InverseEdit(edit=str(tmp_path / "x.safetensors")), target_of(tiny_adapter))


# Inversion


@pytest.mark.parametrize("vectors", [1, 3])
def test_free_places_stand_where_the_word_stood(tiny_adapter, vectors) -> None:
    attack = Inversion(vectors=vectors, initial="cat")
    prompts = [f"a {PLACEHOLDER} up", PLACEHOLDER]
    slots = attack.slots(tiny_adapter, prompts)
    start = attack.initial_vectors(tiny_adapter)["clip"]
    assert start.shape == (vectors, 32)
    embeddings = tiny_adapter.embed(tiny_adapter.tokenize(["cat"]))["clip"][0, 1:4]
    assert torch.allclose(start[0], embeddings.mean(0))
    ids = slots.ids["clip"]
    assert ids.shape == (2, 32) and slots.places["clip"].tolist() == [
        list(range(2, 2 + vectors)),
        list(range(1, 1 + vectors)),
    ]
    # The rest is what the tokenizer makes of a word of as many tokens.
    word = "xyz"[:vectors]
    usual = tiny_adapter.tokenize([p.replace(PLACEHOLDER, word) for p in prompts])["clip"]
    free = torch.zeros_like(ids, dtype=torch.bool).scatter(1, slots.places["clip"], True)
    assert torch.equal(ids[~free], usual[~free])
    vector = tiny_adapter.embed({"clip": usual[:1]})["clip"][0, slots.places["clip"][0]]
    filled = slots.filled(tiny_adapter, {"clip": vector}).rows([0])
    expected = tiny_adapter.encode([prompts[0].replace(PLACEHOLDER, word)])
    assert torch.allclose(filled.states["clip"], expected.states["clip"], atol=1e-5)
    assert torch.equal(filled.roles["clip"], expected.roles["clip"])


def test_inversions_gradient_equals_finite_differences(tiny_adapter) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    adapter.denoiser.double()
    adapter.text_encoder.double()
    target, attack = target_of(adapter), Inversion(**LEARN)
    slots = attack.slots(adapter, [f"a {PLACEHOLDER}", f"the {PLACEHOLDER}"])
    z_0 = adapter.encode_images(target.pictures)

    def loss(vector):
        return attack.loss(target, slots, z_0, {"clip": vector}, torch.Generator().manual_seed(3))

    vector = attack.initial_vectors(adapter)["clip"].double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(vector), vector)
    direction = gradient / gradient.norm()
    step = 0.02
    slope = (loss(vector + step * direction) - loss(vector - step * direction)) / (2 * step)
    assert gradient.norm() > 0
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_inversion_lowers_the_loss_counts_and_repeats(tiny_adapter) -> None:
    target = target_of(tiny_adapter)
    options = {"lr": 0.05, "levels": 4, "num_steps": 2}
    attack = Inversion(steps=40, batch_size=8, pictures=1, checkpoints=(0, 10), **options)
    found = searched(attack, target)
    assert len(found["all"].facts["losses"]) == 40
    slots, z_0 = attack.slots(tiny_adapter, [PLACEHOLDER]), tiny_adapter.encode_images(target.pictures[:1])
    first, last = (
        sum(
            float(attack.loss(target, slots, z_0, {"clip": found["all"].tensors[f"clip.{step}"]}, generator))
            for _ in range(20)
        )
        for step, generator in ((0, torch.Generator().manual_seed(5)), (40, torch.Generator().manual_seed(5)))
    )
    assert last < first
    assert found["all"].facts["pictures"] == ["a/0"]
    assert torch.equal(attack.learnt_from(target), target.pictures[:1])
    assert [way.num_steps for way in attack.ways(target, found)] == [2, 2, 2]
    assert found["all"].facts["evaluations"] == [0, 80, 320]
    assert found["all"].facts["norms"]["clip"]["tokens"][0] > 0
    short = Inversion(**LEARN, runs=2)
    twice = [searched(short, target), searched(short, target, target.records[1:])]
    assert same_findings(*twice)  # universal: whatever the records
    final = twice[0]["all"].facts["final losses of the runs"]
    assert len(set(final)) == 2
    named = ways(short, target, twice[0])
    assert list(named) == ["0 steps", "2 steps", ""]
    compared = 2 * 8 * 3  # two runs, eight batches of three
    assert [way.spent for way in named.values()] == [0, 12 + compared, 36 + compared]
    drawn = {name: images(target, way) for name, way in named.items()}
    assert largest_difference(drawn[""], drawn["0 steps"]) > 0
    by_random = control(short, target)
    assert list(ways(short, target, by_random)) == [""]
    assert by_random["all"].tensors["clip.0"].shape == twice[0]["all"].tensors["clip.6"].shape


def test_each_try_of_an_inversion_has_its_own_noise_and_belongs_to_its_prompt(tiny_adapter) -> None:
    target, attack = target_of(tiny_adapter), Inversion(**LEARN, tries=2)
    found = searched(attack, target)
    assert same_findings(found, searched(Inversion(**LEARN), target)), "tries cost no search"
    records = ways(attack, target, found)[""].records
    assert [record.prompt_id for record in records] == [
        record.prompt_id for record in target.records for _ in range(2)
    ]
    assert len({record.id for record in records}) == len(records), "an image's noise follows from its id"
    assert all(record.seed is None for record in records)
    once = ways(Inversion(**LEARN), target, found)[""].records
    assert [record.id for record in once] == [record.id for record in records[::2]]


def test_several_vectors_are_an_attack_of_their_own(tiny_adapter) -> None:
    target, attack = target_of(tiny_adapter), InversionN(**LEARN, vectors=3)
    found = searched(attack, target)["all"]
    assert found.tensors["clip.6"].shape == (3, 32) and attack.name == "inversion_n"
    assert len(found.tensors["clip.6"].unique(dim=0)) == 3, "they begin as one and part"
    assert same_findings(*(searched(kind(**LEARN, vectors=1), target) for kind in (Inversion, InversionN)))
    with pytest.raises(InputError, match=r"attack\.inversion_n\.steps: expected"):
        InversionN(steps=0)


def test_no_embedding_moves_a_model_that_ignores_text() -> None:
    target = target_of(deaf_adapter())
    inversion, pgd = Inversion(**LEARN), StatePgd(steps=2, epsilon=1.0)
    found = searched(inversion, target)
    named = ways(inversion, target, found)
    assert torch.equal(images(target, named[""]), images(target, named["0 steps"]))
    way = ways(pgd, target, searched(pgd, target))[""]
    assert torch.equal(images(target, way), plain(target, way, target.adapter))


def test_what_inversion_refuses(tiny_adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, value in (
        ("steps", 0),
        ("batch_size", 0),
        ("vectors", 0),
        ("runs", 0),
        ("tries", 0),
        ("pictures", 0),
        ("levels", 0),
        ("num_steps", 0),
        ("lr", 0.0),
        ("checkpoints", (6,)),
    ):
        with pytest.raises(InputError, match=rf"attack\.inversion\.{option}: expected"):
            Inversion(**LEARN | {option: value})
    target = target_of(tiny_adapter)
    for attack in (Inversion(**LEARN | {"levels": 2000}), StatePgd(levels=2000)):
        with pytest.raises(InputError, match=rf"attack\.{attack.name}\.levels: expected .*2000"):
            searched(attack, target)
    with pytest.raises(InputError, match=r"attack\.inversion\.vectors: .*at most 32 tokens"):
        searched(Inversion(**LEARN, vectors=25), target)
    with pytest.raises(InputError, match=r"attack\.inversion: expected a picture"):
        searched(Inversion(**LEARN), replace(target, pictures=target.pictures[:0]))
    quantised = StableDiffusionAdapter(build_tiny_pipeline())
    weight = quantised.denoiser.conv_in.weight
    quantised.denoiser.conv_in.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    for attack in (Inversion(**LEARN), StatePgd()):
        with pytest.raises(InputError, match=rf"attack\.{attack.name}: expected weights that.*int8"):
            searched(attack, target_of(quantised))
    monkeypatch.setattr(type(tiny_adapter), "tokenize", lambda *_: {})
    with pytest.raises(InputError, match=r"attack\.inversion: expected a model with a tokenizer, got"):
        searched(Inversion(**LEARN), target)


def test_copies_of_training_pictures_are_seen() -> None:
    pictures = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(0))
    others = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(1))
    new, stored = diversity(others, pictures), diversity(pictures[[0, 0, 1]], pictures)
    assert new.nearest > 0.8 and new.copies < 0.5 and new.between == pytest.approx(1, abs=0.1)
    assert stored.nearest == 0 and stored.copies == 1 and stored.between < 0.8
    assert diversity(pictures[[0, 0, 1]], pictures, torch.nn.Flatten()).copies == 1


# States


def test_state_pgds_gradient_equals_finite_differences(tiny_adapter) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    adapter.denoiser.double()
    target, attack = target_of(adapter), StatePgd(samples=2)
    text = adapter.encode([record.prompt for record in RECORDS[:2]])
    z_0 = adapter.encode_images(target.pictures[:2])
    seen = attack._noised(target, z_0, attack._generators(target, RECORDS[:2]))
    assert isinstance(seen, Noised) and len(seen.z_t) == 4
    delta = torch.zeros_like(text.states["clip"]).requires_grad_(True)

    def loss(delta):
        return attack.loss(target, seen, text, {"clip": delta}).sum()

    (gradient,) = torch.autograd.grad(loss(delta), delta)
    direction, step = gradient / gradient.norm(), 0.05
    slope = (loss(delta + step * direction) - loss(delta - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_states_stay_in_their_ball_and_explain_the_picture_better(tiny_adapter) -> None:
    target, attack = target_of(tiny_adapter), StatePgd(epsilon=0.5, steps=8, samples=8)
    found = searched(attack, target)
    text = tiny_adapter.encode([record.prompt for record in RECORDS])
    z_0 = tiny_adapter.encode_images(target.pictures)
    fresh = [torch.Generator().manual_seed(9 + row) for row in range(3)]
    seen = attack._noised(target, z_0, fresh)
    radius = 0.5 * text.states["clip"].square().mean(-1, keepdim=True).sqrt()
    losses = {}
    for name, findings in {"found": found, "random": control(attack, target)}.items():
        delta = torch.stack([findings[record.id].tensors["clip"] for record in RECORDS])
        assert (delta.abs() <= radius * 1.0001).all() and delta.abs().max() > 0
        losses[name] = attack.loss(target, seen, text, {"clip": delta})
    losses["none"] = attack.loss(target, seen, text, {"clip": torch.zeros_like(radius)})
    assert (losses["found"] < losses["none"]).all() and (losses["found"] < losses["random"]).all()
    assert len(found["a/0"].facts["losses"]) == 8
    way = ways(attack, target, found)[""]
    assert len({record.prompt for record in way.records}) == 3  # two prompts of one text
    floor = ways(attack, target, found)["epsilon 0"]
    assert torch.equal(images(target, floor), plain(target, way, tiny_adapter)) and not floor.on_curve
    assert largest_difference(images(target, way), plain(target, way, tiny_adapter)) > 1


def test_state_pgd_does_not_depend_on_what_is_attacked_beside_a_prompt(tiny_adapter) -> None:
    target, attack = target_of(tiny_adapter), StatePgd(steps=2)
    whole = searched(attack, target)
    for parts in (RECORDS[:1], RECORDS[1:]):
        found = searched(attack, replace(target, batch_size=1), parts)
        for id, finding in found.items():
            # A gradient of rounding's size has any sign.
            same = (finding.tensors["clip"] - whole[id].tensors["clip"]).abs() < 1e-6
            assert same.float().mean() > 0.99
    assert not same_findings(whole, searched(attack, replace(target, seed=1)))


def test_what_state_pgd_refuses() -> None:
    for option, value in (("steps", 0), ("samples", 0), ("levels", 0), ("epsilon", 0.0), ("step_size", -1.0)):
        with pytest.raises(InputError, match=rf"attack\.state_pgd\.{option}: expected"):
            StatePgd(**{option: value})
