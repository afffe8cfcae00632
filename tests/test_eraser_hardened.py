"""Hardened TRCE: the adversary attacks, the network learns to withstand it, and what is kept stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import HARDENED, Harness, batch_of

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.adapters.clip_text import ClipText
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import TextualConfig
from trce_lightning.erasers.hardened import Hardened, Hardening, Rows, relative_distance
from trce_lightning.erasers.pool import DECAYS, Pool
from trce_lightning.erasers.tuning import Source
from trce_lightning.errors import InputError
from trce_lightning.tokens import Text


class Started:
    """A hardened erasure on the tiny pipeline, with stage 1 applied and one batch."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.adapter = StableDiffusionAdapter(build_tiny_pipeline())
        self.eraser, self.harness = Hardened(**(HARDENED | options)), Harness(self.adapter, folder)
        self.harness.job.textual.ridge = 0.1
        self.batch = batch_of(self.eraser, self.harness)
        self.original = StableDiffusionAdapter(build_tiny_pipeline())
        self.module = self.eraser.module(self.harness.job)
        self.module.setup("fit")
        self.module._trainer = self.harness.job.trainer
        self.points = Rows.of(self.batch["concept"])

    def objective(self, text: Text) -> float:
        """Return the adversary's objective under a text."""
        with torch.no_grad():
            return float(self.eraser.attacked(self.adapter, self.points, text).mean())


def test_the_distance_is_relative_to_what_separates_safe_from_unsafe() -> None:
    safe, unsafe = torch.randn(2, 3, 4, 2, 2)
    rms = (unsafe - safe).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(relative_distance(unsafe, safe, unsafe), rms)
    assert not relative_distance(safe, safe, unsafe).any()
    half = relative_distance((safe + unsafe) / 2, safe, unsafe)
    torch.testing.assert_close(half, rms / 4)
    assert relative_distance(safe, safe, safe).isfinite().all()


def test_the_pool_moves_as_adam_does() -> None:
    begin = {"clip": torch.randn(7, 5)}
    pool = Pool(begin, 3, 2, torch.Generator().manual_seed(0))
    every = torch.arange(3)
    weight = torch.nn.Parameter(pool.values(every)["clip"].clone())
    adam = torch.optim.Adam([weight], lr=0.1, betas=DECAYS)
    for _ in range(4):
        gradient = torch.randn(3, 2, 5)
        weight.grad = gradient
        adam.step()
        pool.descend(every, {"clip": gradient}, 0.1)
    torch.testing.assert_close(pool.values(every)["clip"], weight.detach())
    others = pool.values(torch.tensor([0, 2]))["clip"]
    pool.begin_anew(torch.tensor([1]), torch.Generator().manual_seed(1))
    assert torch.equal(pool.values(torch.tensor([0, 2]))["clip"], others)
    (fresh,) = pool.values(torch.tensor([1]))["clip"]
    assert all(any(torch.equal(row, word) for word in begin["clip"]) for row in fresh)
    assert pool.get_buffer("age").tolist() == [4, 0, 4]


def test_learnt_embeddings_attack_and_only_they_move(tmp_path: Path) -> None:
    run = Started(tmp_path, learnt=2, pool=1, learnt_steps=40, learnt_lr=0.05)
    before = {name: own.clone() for name, own in run.adapter.denoiser.state_dict().items()}
    points = run.points.part(0, 2)
    begun = run.module.pool.values(torch.tensor([0]))["clip"]
    losses = []
    for _ in range(2):
        text = run.eraser.learnt_text(run.module, points, 1)
        with torch.no_grad():
            losses.append(float(run.eraser.attacked(run.adapter, points, text).mean()))
    untouched = Started(tmp_path, learnt=2, pool=1, learnt_steps=0)
    text = untouched.eraser.learnt_text(untouched.module, points, 1)
    assert losses[-1] < 0.9 * float(untouched.eraser.attacked(untouched.adapter, points, text).mean())
    assert not torch.equal(begun, run.module.pool.values(torch.tensor([0]))["clip"])
    assert all(torch.equal(own, before[name]) for name, own in run.adapter.denoiser.state_dict().items())
    assert all(weight.grad is None for weight in run.adapter.denoiser.parameters())


def test_moved_states_stay_in_the_ball_and_attack(tmp_path: Path) -> None:
    run = Started(tmp_path, radius=0.3, moved_steps=20)
    text = run.module.text(run.points.prompts)
    moved = run.eraser.moved_text(run.module, run.points, 0)
    radius = 0.3 * text.states["clip"].square().mean(-1, keepdim=True).sqrt()
    assert ((moved.states["clip"] - text.states["clip"]).abs() <= radius * (1 + 1e-5)).all()
    run.eraser.moved_steps = 0
    at_random = run.eraser.moved_text(run.module, run.points, 0)
    assert run.objective(moved) < run.objective(text) and run.objective(moved) < run.objective(at_random)


def test_keyed_states_undo_stage_1(tmp_path: Path) -> None:
    run = Started(tmp_path)
    text = run.module.text(run.points.prompts)
    wanted = run.original.predict(run.points.z_t, run.points.timestep, text).detach()
    keyed = run.eraser.keyed_text(run.module, run.points)
    found = run.adapter.predict(run.points.z_t, run.points.timestep, keyed).detach()
    edited = run.adapter.predict(run.points.z_t, run.points.timestep, text).detach()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (edited - wanted).abs().max() > 1e-3


def test_before_training_what_is_kept_costs_little_and_the_losses_reach_the_denoiser(tmp_path: Path) -> None:
    run = Started(tmp_path)
    terms = run.eraser.losses(run.module, run.batch)
    assert set(terms) == {"learnt", "moved", "keyed", "other", "keep", "unconditional"}
    sum(run.eraser.weight_of(name) * term for name, term in terms.items()).backward()  # type: ignore[union-attr]
    trained = run.module.trained["unet"]
    assert all(weight.grad is not None for weight in trained.values())
    unchanged = Started(tmp_path)
    unchanged.adapter.denoiser.load_state_dict(run.original.denoiser.state_dict())
    kept = unchanged.eraser.losses(unchanged.module, unchanged.batch)
    assert kept["keep"] < 1e-8 and kept["unconditional"] < 1e-8 < kept["learnt"]


def test_training_brings_every_kind_of_text_nearer_to_the_safe_prediction(tmp_path: Path) -> None:
    run = Started(tmp_path)
    first = {name: float(term) for name, term in run.eraser.losses(run.module, run.batch).items()}
    adam = torch.optim.Adam(run.module.parameters_in_training(), lr=1e-3)
    for _ in range(30):
        adam.zero_grad()
        terms = run.eraser.losses(run.module, run.batch)
        sum(terms[name] for name in ("learnt", "moved", "keyed", "other")).backward()  # type: ignore[union-attr]
        adam.step()
    last = {name: float(term) for name, term in run.eraser.losses(run.module, run.batch).items()}
    assert all(last[name] < 0.7 * first[name] for name in ("learnt", "moved", "keyed", "other"))


def test_the_result_is_the_average_of_the_weights(tmp_path: Path) -> None:
    plain, averaged = (Hardened(**(HARDENED | {"average_decay": decay, "lr": 1e-2})) for decay in (0.0, 0.9))
    found = []
    for eraser in (plain, averaged):
        adapter = StableDiffusionAdapter(build_tiny_pipeline())
        changed = eraser.erase(Harness(adapter, tmp_path).job).changed["unet"]
        found.append(torch.cat([own.flatten() for own in changed.values()]))
        assert torch.equal(changed["conv_in.weight"], adapter.denoiser.get_parameter("conv_in.weight"))
    assert not torch.allclose(*found)


def test_strength_goes_on_along_the_way_of_training(tmp_path: Path) -> None:
    first = torch.cat([own.flatten() for own in build_tiny_pipeline().unet.state_dict().values()])
    moves = []
    for strength in (0.5, 1.0, 1.5):
        adapter = StableDiffusionAdapter(build_tiny_pipeline())
        eraser = Hardened(**(HARDENED | {"edit": "none", "strength": strength, "lr": 1e-2}))
        eraser.erase(Harness(adapter, tmp_path).job)
        weights = torch.cat([own.detach().flatten() for own in adapter.denoiser.state_dict().values()])
        moves.append(weights - first)
    half, whole, further = moves
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(half, whole / 2, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(further, 1.5 * whole, atol=1e-6, rtol=1e-4)


def test_without_stage_1_training_begins_with_the_original_and_reads_its_prompts(tmp_path: Path) -> None:
    run = Started(tmp_path, edit="none")
    for name, weight in run.original.denoiser.state_dict().items():
        assert torch.equal(run.adapter.denoiser.state_dict()[name], weight), name
    keyed, text = (run.eraser.keyed_text(run.module, run.points), run.module.text(run.points.prompts))
    assert torch.equal(keyed.states["clip"], text.states["clip"])
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    erased = Hardened(**(HARDENED | {"edit": "none"})).erase(Harness(adapter, tmp_path).job)
    assert not erased.files  # no T to publish
    edited = Started(tmp_path)
    assert not torch.equal(
        edited.eraser.keyed_text(edited.module, run.points).states["clip"], text.states["clip"]
    )


def test_stage_1_after_training_multiplies_what_training_left(tmp_path: Path) -> None:
    weights = {}
    for place in ("none", "after"):
        adapter = StableDiffusionAdapter(build_tiny_pipeline())
        harness = Harness(adapter, tmp_path)
        harness.job.textual.ridge = 0.1
        erased = Hardened(**(HARDENED | {"edit": place, "lr": 1e-2})).erase(harness.job)
        weights[place] = {name: own.detach().clone() for name, own in adapter.denoiser.state_dict().items()}
    transform = erased.files["edit"]["transform"]
    entries = [name for name in weights["none"] if ".attn2.to_k." in name or ".attn2.to_v." in name]
    assert entries and not torch.allclose(transform, torch.eye(len(transform)).to(transform), atol=1e-3)
    for name, trained in weights["none"].items():
        expected = (trained.double() @ transform.double()).float() if name in entries else trained
        torch.testing.assert_close(weights["after"][name], expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(weights["after"][name], erased.changed["unet"][name])


def test_entries_serve_their_own_concept_alone(tmp_path: Path) -> None:
    """Only the vectors of the concept that a point shows get a gradient, if there are two concepts."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    two = (
        Concept("guns", {"a gun": "a kite"}, templates=("{}",)),
        Concept("axes", {"an axe": "a hat"}, templates=("{}",)),
    )
    eraser = Hardened(**(HARDENED | {"learnt": 2, "pool": 1}))
    harness = Harness(adapter, tmp_path, two)
    batch, module = batch_of(eraser, harness), eraser.module(harness.job)
    module._trainer = harness.job.trainer
    points = Rows.of(batch["concept"])
    row = points.prompts.index("an axe")
    points = points.part(row, row + 1)
    before = module.pool.values(torch.tensor([0, 1]))["clip"]
    eraser.visited = 1
    eraser.learnt_text(module, points, 1)
    after = module.pool.values(torch.tensor([0, 1]))["clip"]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"visited": 2, "learnt": 3}, r"method\.visited: expected at most method\.pool = 3 entries"),
        ({"unconditional": 3}, r"method\.unconditional: expected a multiple of 2"),
        ({"early_steps": 5}, r"method\.early_steps: expected more than method\.other_from = 1"),
        ({"trainable": "none"}, r"method\.trainable: expected a pattern that matches a module"),
        ({"vectors": 40}, r"method\.vectors: expected a prompt of at most 32 tokens"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, int], expected: str, tmp_path: Path) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    with pytest.raises(InputError, match=expected):
        Hardened(**(HARDENED | options)).ahead(Harness(adapter, tmp_path).job)


def test_the_form_of_stage_1_is_an_option(tmp_path: Path) -> None:
    keys = []
    for form in ("ridge", "projection"):
        adapter = StableDiffusionAdapter(build_tiny_pipeline())
        job = Harness(adapter, tmp_path).job
        module = Hardened(**HARDENED).module(
            type(job)(**(vars(job) | {"textual": TextualConfig(form=form, ridge=0.1)}))
        )
        assert isinstance(module, Hardening)
        keys.append(module.keys["clip"])
    assert not torch.allclose(*keys)


def test_the_vocabulary_is_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    spelt: list[int] = []
    detokenize = ClipText.detokenize

    def counting(self: ClipText, words: Any) -> list[str]:
        spelt.append(len(words))
        return detokenize(self, words)

    monkeypatch.setattr(ClipText, "detokenize", counting)
    eraser, job = Hardened(**HARDENED), Harness(adapter, tmp_path).job
    eraser.ahead(job)
    eraser.module(job)
    whole = len(adapter.vocabulary()["clip"])
    assert len([count for count in spelt if count >= whole]) == 1 and max(spelt) >= whole > 1


@pytest.mark.parametrize("scenes", [True, False])
def test_stage_1_reads_scenes_and_training_where_it_is_asked_to(scenes: bool, tmp_path: Path) -> None:
    job = Harness(StableDiffusionAdapter(build_tiny_pipeline()), tmp_path).job
    (alone,) = job.alone
    both = replace(job, concepts=[replace(alone, templates=(*alone.templates, "{} beside a dog"))])
    eraser = Hardened(**(HARDENED | {"scenes": scenes, "concept_runs": 40}))
    read = {prompt for kind in ("concept", "late") for prompt in prompts_of(eraser.sources(both)[kind])}
    assert any("dog" in prompt for prompt in read) == scenes
    (ids,) = eraser.slots(both).ids.values()
    assert len(ids) == len(alone.templates) + scenes
    with_scenes, without = (
        eraser.apply_stage_1(replace(each, adapter=StableDiffusionAdapter(build_tiny_pipeline())))
        for each in (both, job)
    )
    assert not torch.allclose(with_scenes["context"], without["context"], atol=1e-6)


def prompts_of(source: Source) -> list[str]:
    """Return the prompts of a source's sampling runs."""
    return [walk.prompt for walk in source.plan.walks]


def test_streams_that_the_model_lacks_are_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    job = Harness(StableDiffusionAdapter(build_tiny_pipeline()), tmp_path).job
    job.textual.streams = ["pooled"]
    with pytest.raises(InputError, match=r"textual\.streams: expected one of context, .* got pooled"):
        Hardened(**HARDENED).ahead(job)
    Hardened(**(HARDENED | {"edit": "none"})).ahead(job)  # no edit, no streams


def test_an_edit_of_values_alone_has_no_key(tmp_path: Path) -> None:
    job = Harness(StableDiffusionAdapter(build_tiny_pipeline()), tmp_path).job
    job.textual.matrices = ["value"]
    with pytest.raises(InputError, match=r"textual\.matrices: expected keys and values"):
        Hardened(**HARDENED).ahead(job)
    Hardened(**(HARDENED | {"edit": "none"})).ahead(job)  # no edit, no key
