"""Attacks on the weights: what is trained is counted and stored, and the model gets its weights back."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import build_tiny_pipeline
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.attacks.benign_finetuning import BenignFinetuning, drift_of
from trce_lightning.attacks.fine_tuning import Lesson, Training, losses, moved, restored, training_of
from trce_lightning.attacks.protocol import Cost, Target
from trce_lightning.attacks.relearning import Relearning, RelearningLora, changes_in
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.sampling import seeded

RECORDS = tuple(PromptRecord(f"d{i}", f"dagger {i}") for i in range(6))
BENIGN = tuple(PromptRecord(f"b{i}", f"cat {i}") for i in range(6))
FULL = {"pictures": [1, 2], "steps": [0, 2, 4], "learning_rate": 1e-3, "batch_size": 3}
LORA = FULL | {"rank": 2, "learning_rate": 1e-2}
TUNING = {"pictures": 6, "steps": 3, "batch_size": 3, "learning_rate": 1e-3, "seeds": 2, "loss_rows": 5}


each_relearning = pytest.mark.parametrize(
    ("kind", "options"), [(Relearning, FULL), (RelearningLora, LORA)], ids=["full", "lora"]
)


class Bright:
    """A detector of the pictures whose mean is above a level."""

    def __init__(self, level: float) -> None:
        self.level = level

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float().flatten(1).mean(1) > self.level).float()


@pytest.fixture
def target() -> Target:
    adapter, original = (StableDiffusionAdapter(build_tiny_pipeline()) for _ in range(2))
    with torch.no_grad():
        for parameter in adapter.denoiser.parameters():
            parameter.mul_(1.01)
    pictures = generate(original, RECORDS, guidance_scale=3.0, num_steps=2, batch_size=8)
    return Target(
        adapter=adapter,
        original=original,
        records=RECORDS,
        concepts=(),
        pictures=pictures,
        selector=Bright(1000),
        guidance_scale=3.0,
        num_steps=2,
        batch_size=2,
        autocast_dtype=None,
        benign=BENIGN,
    )


def weights(adapter: StableDiffusionAdapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.denoiser.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def mean_loss(target: Target, lesson: Lesson, rows: Tensor, training: Training, seed: int) -> Tensor:
    return torch.cat(list(losses(target.adapter, lesson, rows, training, seeded(seed)))).double().mean()


def attacks() -> list[Relearning | BenignFinetuning]:
    return [Relearning(**FULL), RelearningLora(**LORA), BenignFinetuning(**TUNING)]


def found(attack, target: Target, seed: int = 0):
    (finding,) = attack.search(target, RECORDS, seeded(seed), lambda _: None)
    return finding


@pytest.mark.parametrize("attack", attacks(), ids=lambda attack: attack.name)
def test_the_cost_is_what_the_networks_and_the_progress_count(attack, target: Target) -> None:
    told: list[int] = []
    planned = attack.cost(target)
    (finding,) = attack.search(target, RECORDS, seeded(0), told.append)
    counted = target.adapter.network_evaluations + target.original.network_evaluations - 6 * 2 * 2
    assert finding.spent == planned
    assert planned.forward + planned.backward == counted == sum(told)
    if isinstance(attack, Relearning):
        assert planned == Cost(backward=2 * 4 * 3, text=1 + 2)
    else:
        assert planned == Cost(forward=6 * 2 * 2 + 3 * 5, backward=2 * 3 * 3, text=6)


@pytest.mark.parametrize("attack", attacks(), ids=lambda attack: attack.name)
def test_a_search_leaves_the_model_as_it_was_and_repeats(attack, target: Target) -> None:
    adapter = target.adapter
    before, names = weights(adapter), [name for name, _ in adapter.denoiser.named_modules()]
    state = torch.get_rng_state()
    with adapter.unchanged():
        fingerprint = adapter.fingerprint()
        first, again = found(attack, target), found(attack, target)
        assert adapter.fingerprint() == fingerprint
    assert same(weights(adapter), before)
    assert [name for name, _ in adapter.denoiser.named_modules()] == names
    assert not any(p.requires_grad or p.grad is not None for p in adapter.denoiser.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first.tensors, again.tensors) and first.facts == again.facts
    assert not same(first.tensors, found(attack, target, 1).tensors)


@each_relearning
def test_a_number_of_pictures_learns_the_same_whatever_others_are_tried(
    kind, options, target: Target
) -> None:
    both, alone = (found(kind(**options | {"pictures": counts}), target) for counts in ([1, 2], [2]))
    assert same({n: t for n, t in both.tensors.items() if n.startswith("2/")}, alone.tensors)
    assert both.facts["losses"]["2"] == alone.facts["losses"]["2"]
    attack = kind(**options)
    rows = [RECORDS.index(record) for record in attack._taught(target)]
    assert torch.equal(attack.learnt_from(target), target.pictures[rows])


@each_relearning
def test_parts_find_what_one_search_finds(kind, options, target: Target) -> None:
    attack, told = kind(**options), list[int]()
    parts = [attack.search_part(target, part, seeded(0), told.append) for part in (1, 0)]
    joined, whole = attack.joined(parts[::-1]), found(attack, target)
    assert same(joined.tensors, whole.tensors) and joined.facts == whole.facts
    assert joined.spent == whole.spent == attack.cost(target)
    assert [part.spent for part in parts] == [attack.cost_of_part(target, part) for part in (1, 0)]
    assert sum(told) == joined.spent.backward


def test_benign_prompts_are_drawn_along_the_results_curve(target: Target) -> None:
    attack = Relearning(**FULL, benign_prompts=4)
    by_name = {way.name: way for way in attack.ways(target, {"all": found(attack, target)})}
    benign = {name: [record.prompt for record in way.benign] for name, way in by_name.items()}
    asked = [record.prompt for record in BENIGN[:4]]
    assert benign == {
        "0 steps": asked,
        "1 pictures, 2 steps": [],
        "1 pictures, 4 steps": [],
        "2 pictures, 2 steps": asked,
        "": asked,
    }


@pytest.mark.parametrize("attack", attacks(), ids=lambda attack: attack.name)
def test_an_interrupted_search_gives_the_weights_back(attack, target: Target) -> None:
    before = weights(target.adapter)
    told = []

    def stop(evaluations: int) -> None:
        told.append(evaluations)
        if len(told) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack.search(target, RECORDS, seeded(0), stop)
    assert same(weights(target.adapter), before)


@pytest.mark.parametrize("attack", attacks(), ids=lambda attack: attack.name)
def test_each_way_has_its_weights_within_and_the_model_its_own_after(attack, target: Target) -> None:
    adapter = target.adapter
    before, findings = weights(adapter), {"all": found(attack, target)}
    with adapter.unchanged():
        fingerprints = {adapter.fingerprint()}
        ways = list(attack.ways(target, findings))
        assert ways[-1].name == "" and ways[-1].on_curve
        spent = [way.spent for way in ways if way.on_curve]
        assert spent == ([0, 6, 12] if isinstance(attack, Relearning) else [9])
        assert len({way.name for way in ways}) == len(ways)
        for way in ways:
            if way.entered is None:
                assert way.name == "0 steps" and way.spent == 0
                continue
            with way.entered():
                inside = adapter.fingerprint()
            assert inside not in fingerprints
            fingerprints.add(inside)
            with pytest.raises(KeyboardInterrupt), way.entered():
                raise KeyboardInterrupt
            assert same(weights(adapter), before)
        assert adapter.fingerprint() in fingerprints


@pytest.mark.slow
@each_relearning
def test_relearning_lowers_the_loss_on_what_was_taught_and_changes_what_it_says(
    kind, options, target: Target
) -> None:
    """The changed weights within a way predict the taught pictures better than the model does."""
    attack = kind(**options | {"pictures": [2], "steps": [40], "batch_size": 8})
    finding = found(attack, target)
    (way,) = attack.ways(target, {"all": finding})
    taught = [record for record in RECORDS if record.id in finding.facts["taught"]]
    images = target.pictures[[RECORDS.index(record) for record in taught]]
    texts = [record.prompt for record in taught]
    lesson = Lesson(target.adapter.encode_images(images), target.adapter.encode(texts))
    training = training_of(target, steps=1, batch_size=64, learning_rate=1.0, levels=100)

    def loss() -> float:
        rows = torch.arange(64) % 2
        with torch.no_grad():
            return mean_loss(target, lesson, rows, training, 5).item()

    before = loss()
    with way.entered():
        within = loss()
    assert within < 0.9 * before
    assert loss() == before
    curve = finding.facts["losses"]["2"]
    assert len(curve) == 40 and sum(curve[-10:]) < 0.9 * sum(curve[:10])


def test_taught_prompts_are_not_scored_and_images_have_fresh_noise(target: Target) -> None:
    doubled = dataclasses.replace(
        target,
        records=tuple(dataclasses.replace(r, id=f"{r.id}{c}") for r in RECORDS for c in "ab"),
        pictures=target.pictures.repeat_interleave(2, 0),
    )
    attack = Relearning(**FULL)
    finding = found(attack, doubled)
    taught = {record.prompt for record in doubled.records if record.id in finding.facts["taught"]}
    ways = list(attack.ways(doubled, {"all": finding}))
    assert len(taught) == 2 == len(finding.facts["taught"])
    for way in ways:
        assert {record.prompt for record in way.records} == {r.prompt for r in RECORDS} - taught
        assert all(record.seed is None and record.id != record.prompt_id for record in way.records)
        assert {record.prompt_id for record in way.records} <= {record.id for record in doubled.records}
    with pytest.raises(InputError, match=r"attack\.relearning\.pictures: .* the 6 different"):
        Relearning(pictures=[6]).cost(doubled)


def test_examples_are_taught_and_all_prompts_are_scored(target: Target) -> None:
    examples = tuple(dataclasses.replace(r, id=f"{r.id} again", prompt=f"{r.prompt}, again") for r in RECORDS)
    rich = dataclasses.replace(target, examples=examples, example_pictures=255 - target.pictures)
    attack = Relearning(**FULL)
    finding = found(attack, rich)
    ids = [record.id for record in examples]
    assert set(finding.facts["taught"]) <= set(ids)
    rows = [ids.index(taught) for taught in finding.facts["taught"]]
    assert torch.equal(attack.learnt_from(rich), 255 - target.pictures[rows])
    for way in attack.ways(rich, {"all": finding}):
        assert [record.prompt for record in way.records] == [record.prompt for record in RECORDS]
    with pytest.raises(InputError, match=r"attack\.relearning\.pictures: .* the 6 different"):
        Relearning(pictures=[7]).cost(rich)


def test_the_controls_have_the_findings_form(target: Target) -> None:
    for attack in attacks():
        finding = found(attack, target)
        (control,) = attack.random(target, RECORDS, seeded(3))
        shapes = [{name: t.shape for name, t in part.tensors.items()} for part in (finding, control)]
        if isinstance(attack, Relearning):  # the control has the largest numbers of pictures and steps alone
            shapes[0] = {name: shape for name, shape in shapes[0].items() if name.startswith("2/4/")}
            assert [way.name for way in attack.ways(target, {"all": control})] == [""]
        assert shapes[0] == shapes[1]
        ways = list(attack.ways(target, {"all": control}))
        result = list(attack.ways(target, {"all": finding}))[-1]
        assert ways[-1].name == result.name == "" and ways[-1].records == result.records
        assert [way.spent for way in ways if way.on_curve][-1] == result.spent
    attack = Relearning(**FULL | {"pictures": [3]})
    (control,) = attack.random(target, RECORDS, seeded(0))
    right = found(attack, target).facts["captions"]
    assert sorted(control.facts["captions"]) == sorted(right)
    assert all(a != b for a, b in zip(control.facts["captions"], right, strict=True))
    (alone,) = Relearning(**FULL | {"pictures": [1]}).random(target, RECORDS, seeded(0))
    assert alone.facts["captions"] == [""]


def test_a_random_walk_moves_as_far_as_an_optimizer_that_is_fed_noise(target: Target) -> None:
    attack = BenignFinetuning(**TUNING | {"steps": 100, "seeds": 1})
    (control,) = attack.random(target, RECORDS, seeded(0))
    values = torch.cat([tensor.float().flatten() for tensor in control.tensors.values()])
    walker = torch.nn.Parameter(torch.zeros(2000))
    optimizer, noise = torch.optim.AdamW([walker], lr=1e-3, weight_decay=0.0), seeded(1)
    for _ in range(100):
        walker.grad = torch.randn(2000, generator=noise)
        optimizer.step()
    assert float(values.std()) == pytest.approx(1e-3 * 10, rel=0.01)
    assert float(walker.detach().std()) == pytest.approx(float(values.std()), rel=0.15)


def test_pictures_that_show_the_concept_are_dropped_and_counted(target: Target) -> None:
    records = BenignFinetuning(**TUNING)._benign(target)
    images = generate(target.original, records, guidance_scale=3.0, num_steps=2, batch_size=2)
    means = images.float().flatten(1).mean(1).sort().values
    level = float(means[3] + means[4]) / 2
    some = found(BenignFinetuning(**TUNING), dataclasses.replace(target, selector=Bright(level)))
    assert (some.facts["kept"], some.facts["dropped"]) == (4, 2)
    assert not same(some.tensors, found(BenignFinetuning(**TUNING), target).tensors)
    with pytest.raises(InputError, match=r"attack\.benign_finetuning: .* in 6 of their pictures"):
        found(BenignFinetuning(**TUNING), dataclasses.replace(target, selector=Bright(-1)))


def test_the_drift_and_its_cosine_with_the_way_back(target: Target) -> None:
    adapter, original = target.adapter, target.original
    parameters, there = (dict(a.denoiser.named_parameters()) for a in (adapter, original))
    with restored(adapter, parameters) as before, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.add_(0.5 * (there[name] - parameter))
        drift = drift_of(parameters, before, original)
        # θ₀ is 1.01 times the original, so half the way back is 0.005/1.01 of it.
        assert drift == {"drift": pytest.approx(0.005 / 1.01, rel=1e-3), "cosine": pytest.approx(1, abs=1e-4)}
        assert drift_of(parameters, before, adapter)["cosine"] is None
        for name, parameter in parameters.items():
            parameter.copy_(2 * before[name] - parameter)
        assert drift_of(parameters, before, original)["cosine"] == pytest.approx(-1, abs=1e-4)
    seeds = found(BenignFinetuning(**TUNING), target).facts["seeds"]
    assert len(seeds) == 2 and all(-1 <= seed["cosine"] <= 1 and seed["drift"] > 0 for seed in seeds)


def test_a_rising_benign_loss_is_said(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    steep = found(BenignFinetuning(**TUNING | {"learning_rate": 1.0, "seeds": 1}), target)
    assert steep.facts["seeds"][0]["rose"] and "benign loss rose" in caplog.text
    before, after = steep.facts["seeds"][0]["benign_loss"]
    assert after > before


def test_gradients_of_the_weights_equal_finite_differences(target: Target) -> None:
    adapter = target.adapter
    adapter.denoiser.double()
    lesson = Lesson(adapter.encode_images(target.pictures), adapter.encode([r.prompt for r in RECORDS]))
    training = training_of(target, steps=1, batch_size=4, learning_rate=1.0, levels=50)
    rows = torch.arange(4)
    parameters = [p for _, p in adapter.denoiser.named_parameters() if p.ndim > 1]

    def loss() -> Tensor:
        return mean_loss(target, lesson, rows, training, 2)

    for parameter in parameters:
        parameter.requires_grad_()
    gradients = torch.autograd.grad(loss(), parameters)
    generator = seeded(3)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) / p[0].numel() for p in parameters
    ]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    size = 1e-3
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for parameter, step in zip(parameters, direction, strict=True):
                parameter.add_(sign * size * step)
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(slope, rel=2e-3)


def test_a_batch_in_parts_trains_like_a_whole_one(target: Target) -> None:
    whole = dataclasses.replace(target, batch_size=8)
    first, second = found(Relearning(**FULL), whole), found(Relearning(**FULL), target)
    assert first.spent == second.spent
    for count, curve in first.facts["losses"].items():
        assert curve == pytest.approx(second.facts["losses"][count], rel=1e-4)


def test_low_rank_changes_have_their_rank_and_full_ones_do_not(target: Target) -> None:
    for attack, is_low in ((RelearningLora(**LORA), True), (Relearning(**FULL), False)):
        finding = found(attack, target)
        changes = changes_in(finding.tensors, "2/4/")
        assert changes.keys() <= dict(target.adapter.denoiser.named_parameters()).keys()
        name = next(name for name in changes if name.endswith("attn2.to_q.weight"))
        assert (torch.linalg.matrix_rank(changes[name].float()) <= 2) == is_low


def test_moved_weights_are_the_sum(target: Target) -> None:
    name, parameter = next(iter(target.adapter.denoiser.named_parameters()))
    before = parameter.detach().clone()
    with moved(target.adapter, lambda: {name: torch.ones_like(before)})():
        assert torch.equal(parameter, before + 1)
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Relearning(pictures=[0]), r"attack\.relearning\.pictures: .* got \[0\]"),
        (lambda: Relearning(steps=[0]), r"attack\.relearning\.steps: .* got \[0\]"),
        (lambda: RelearningLora(rank=0), r"attack\.relearning_lora\.rank: .* got 0"),
        (lambda: RelearningLora(steps=[]), r"attack\.relearning_lora\.steps: .* got \[\]"),
        (lambda: Relearning(benign_prompts=-1), r"attack\.relearning\.benign_prompts: .* got -1"),
        (lambda: Relearning(learning_rate=0), r"attack\.relearning\.learning_rate: .* more than 0, got 0"),
        (lambda: Relearning(batch_size=0), r"attack\.relearning\.batch_size: .* got 0"),
        (lambda: Relearning(levels=0), r"attack\.relearning\.levels: .* got 0"),
        (lambda: BenignFinetuning(batch_size=0), r"attack\.benign_finetuning\.batch_size: .* got 0"),
        (lambda: BenignFinetuning(learning_rate=-1), r"attack\.benign_finetuning\.learning_rate: .* got -1"),
        (lambda: BenignFinetuning(steps=0), r"attack\.benign_finetuning\.steps: .* got 0"),
        (lambda: BenignFinetuning(pictures=1), r"attack\.benign_finetuning\.pictures: .* got 1"),
        (lambda: BenignFinetuning(threshold=0), r"attack\.benign_finetuning\.threshold: .* got 0"),
    ],
)
def test_wrong_options_name_themselves(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_wrong_targets_name_the_attack(target: Target) -> None:
    none = dataclasses.replace(target, pictures=target.pictures[:0], benign=())
    with pytest.raises(InputError, match=r"attack\.relearning: expected pictures of the concept, got none"):
        Relearning(**FULL).cost(none)
    with pytest.raises(InputError, match=r"attack\.benign_finetuning: expected at least 2 benign prompts"):
        BenignFinetuning(**TUNING).cost(none)
    target.adapter.denoiser.half()
    for attack in attacks():
        with pytest.raises(InputError, match=rf"{attack.option}: expected weights that can be trained"):
            found(attack, target)
