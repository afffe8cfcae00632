"""The plain implementation gives what ours gives, counts are the paper's, and the table is put in place."""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline, text_of
from tiny_flow import build_flux, build_sd3
from tiny_runs import WEAPONS
from tiny_sdxl import build_tiny_sdxl
from torch import Tensor

from benchmarks import attacks, gpu, gpu_families, memory, networks, plain, plan, readme, report, textual
from benchmarks.__main__ import measure_gpu
from benchmarks.fitting import fit_in_turns, inputs, mean_square, small
from benchmarks.plan import Counter
from benchmarks.report import Row
from benchmarks.textual import Stage1, check, difference
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.attacks.mma import Mma
from trce_lightning.attacks.p4d import P4D
from trce_lightning.attacks.protocol import Attack, Target
from trce_lightning.attacks.unlearndiff import UnlearnDiff
from trce_lightning.concepts import Concept, prompt_pairs
from trce_lightning.evaluation.attacked import Outcome, attack_rows
from trce_lightning.losses import guided_prediction, steering_hinge
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.sampling import noise


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Stage1:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    return Stage1(adapter, tmp_path_factory.mktemp("cache"), WEAPONS, ["a dog", "one red car", "tea"])


def test_plain_and_ours_edit_alike(stage1: Stage1) -> None:
    check(stage1)
    assert len(stage1.pairs) == len(prompt_pairs([WEAPONS])["weapons"])
    copied = stage1.plain_algebra()
    assert difference(copied, stage1.plain_algebra(copies=False)) == 0
    assert difference(copied, stage1.plain_algebra(weights=textual.ONE_SLOT)) == 0
    # The check would see it: η enters twice, λ is left out.
    k = stage1.sums.states
    twice = plain.KeptSums([value * 2 for value in stage1.sums.values], k * 2)
    states = list(zip(*stage1.states, strict=True))
    config = stage1.config
    other = plain.edit_projections(stage1.projections, states, twice, config.eta, config.ridge)
    assert difference(other, copied) > 0.01


def test_ours_leaves_the_weights_for_the_next_repeat(stage1: Stage1) -> None:
    stage1.ours()
    assert difference([layer.weight.data for layer in stage1.projections], stage1.original) == 0


def network_of(adapter: StableDiffusionAdapter) -> plain.Network:
    """The denoiser as the plain implementation calls it."""
    return lambda z_t, timestep, states: adapter.predict(z_t, timestep, text_of(states))


@torch.no_grad()
def test_the_plain_loop_samples_as_diffusers_does(tiny_adapter: StableDiffusionAdapter) -> None:
    z_t = noise((1, *tiny_adapter.latent_shape), 0)
    scheduler = tiny_adapter.ddim
    scheduler.set_timesteps(3)
    states = tiny_adapter.encode(["", "a gun"]).states["clip"]
    steps = plain.sample_trajectory(network_of(tiny_adapter), scheduler, states, z_t, guidance_scale=3.0)
    expected = tiny_adapter.pipeline.__class__(**tiny_adapter.pipeline.components)
    expected.scheduler = scheduler
    latents = expected(
        "a gun", latents=z_t, num_inference_steps=3, guidance_scale=3.0, output_type="latent"
    ).images
    last = scheduler.step(steps[-1][1], steps[-1][2], steps[-1][0]).prev_sample
    torch.testing.assert_close(last, latents, atol=1e-4, rtol=1e-4)
    assert len(steps) == 3 and torch.equal(steps[0][0], z_t)


def test_the_papers_counts() -> None:
    assert plan.plain_sampling() == 210_000
    assert plan.plain_training() == 3_900
    network = Counter()
    network(torch.zeros(2, 1, 1, 1), torch.tensor(0), torch.zeros(2, 1, 1))
    assert network.evaluations == 2


@torch.no_grad()
def test_the_plain_loss_is_ours_at_the_authors_weights(tiny_adapter: StableDiffusionAdapter) -> None:
    network = network_of(tiny_adapter)

    def trained(z_t: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return network(z_t, timestep, states) + 0.1

    empty, first, second = tiny_adapter.encode(["", "a gun", "tea"]).states["clip"].split(1)
    points = [plain.Point(noise((1, *tiny_adapter.latent_shape), i), torch.tensor(400)) for i in range(3)]
    z_t, timestep = points[0].z_t, points[0].timestep
    hinges = []
    # Whatever is predicted, one of both orders has an active hinge.
    for malicious, safe in ((first, second), (second, first)):
        states = {"uncond": empty, "malicious": malicious, "safe": safe}
        loss = plain.training_loss(plain.Networks(network, network, trained), points[0], points[1:], states)
        uncond = network(z_t, timestep, empty)
        f_safe, f_unsafe = (
            guided_prediction(uncond, network(z_t, timestep, text), 16.0) for text in (safe, malicious)
        )
        predictions = torch.cat([trained(z_t, timestep, text) for text in (malicious, empty)])
        hinges.append(
            steering_hinge(predictions, f_safe.repeat(2, 1, 1, 1), f_unsafe.repeat(2, 1, 1, 1), 0.01)
        )
        torch.testing.assert_close(loss, hinges[-1].mean() + 100 * 0.1**2, rtol=1e-3, atol=1e-4)
    assert max(float(hinge.mean()) for hinge in hinges) > 0.009


def test_steps_are_timed_in_turns_on_one_batch() -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    forward_alone, step = fit_in_turns(adapter, small(rows=3, epochs=3))
    assert forward_alone > 0 and step > 0
    z_t = torch.zeros(2, *adapter.latent_shape)
    batch = {
        "malicious_z_t": z_t[:1],
        "unconditional_z_t": z_t,
        "malicious_timestep": torch.zeros(1, dtype=torch.int64),
        "unconditional_timestep": torch.ones(2, dtype=torch.int64),
        "malicious_text": adapter.encode(["a gun"]),
    }
    assert [len(part) for part in inputs(adapter, batch)] == [3, 3, 3]
    alone = {name: part for name, part in batch.items() if name.startswith("malicious")}
    assert [len(part) for part in inputs(adapter, alone)] == [1, 1, 1]
    before = adapter.trainable("*.to_q")
    mean_square(adapter, *inputs(adapter, batch)).backward()
    assert all(parameter.grad is not None for parameter in before.values())


@pytest.fixture
def attacked() -> Target:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    records = (PromptRecord("1", "z w"), PromptRecord("2", "w b"), PromptRecord("3", "a q"))
    return Target(
        adapter=adapter,
        original=adapter,
        records=records,
        concepts=[Concept.from_terms(["z", "q"], "a")],
        pictures=torch.full((3, 3, adapter.side, adapter.side), 99, dtype=torch.uint8),
        selector=lambda images: images.float().flatten(1).mean(1) / 255,
        guidance_scale=3.0,
        num_steps=2,
        batch_size=2,
        autocast_dtype=None,
    )


@pytest.mark.parametrize(
    "attack",
    [
        Mma(tokens=2, steps=2, restarts=2, candidates=6, top_k=9, checkpoints=2),
        P4D(tokens=2, steps=2, levels=9, checkpoints=2),
        UnlearnDiff(tokens=2, steps=2, levels=2, checkpoints=1),
    ],
    ids=lambda attack: attack.name,
)
@torch.no_grad()
def test_ours_and_the_plain_search_are_compared_on_the_same_prompts(attack: Attack, attacked: Target) -> None:
    search: Callable[..., str] = getattr(attacks.Plain(attacked), attack.name)
    texts = [search(attack, record, attacked.pictures[0]) for record in attacked.records]
    assert len(set(texts)) == 3 and all(texts)
    found = attacks.compared(
        attack, partial(search, attack), attacked, lambda images: images[:, 0, 0, 0] / 255, 2
    )
    assert all(seconds > 0 for seconds in found[:2]) and all(0 <= rate <= 1 for rate in found[2:])


@torch.no_grad()
def test_the_plain_mma_finds_the_prompt_where_nothing_is_blocked(attacked: Target) -> None:
    attack = Mma(tokens=2, steps=15, restarts=2, candidates=80, top_k=40, checkpoints=2, blocked=False)
    assert attacks.Plain(attacked).mma(attack, attacked.records[0], attacked.pictures[0]) == "z w"
    attack.blocked = True
    assert "z" not in attacks.Plain(attacked).mma(attack, attacked.records[0], attacked.pictures[0])


@torch.no_grad()
def test_the_plain_searches_read_what_the_model_would(attacked: Target) -> None:
    plain_search = attacks.Plain(attacked)
    words = plain_search.tokenizer("z w", add_special_tokens=False).input_ids
    for before in (0, 1, 2):
        text = plain_search._text(plain_search.table[words[:before]], words[before:])
        expected = attacked.adapter.encode(["z w"])
        torch.testing.assert_close(text.states["clip"], expected.states["clip"])


def test_the_measured_step_of_a_search_is_the_same_with_recomputed_activations() -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    slope = memory.search_step(adapter, 2)
    adapter.denoiser.enable_gradient_checkpointing()
    torch.testing.assert_close(memory.search_step(adapter, 2), slope)
    assert slope.shape[:2] == (2, memory.FREE_TOKENS) and (slope != 0).any(-1).all()


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("a", 2.0, "s", 20.0, least_gain=8), ["a", "20 s", "2 s", "10×", "≥ 8×", "yes"]),
        (Row("a", 4.0, "s", 20.0, least_gain=8), ["a", "20 s", "4 s", "5×", "≥ 8×", "**no**"]),
        (Row("a", 6.0, "/s", 2.0, rate=True, least_gain=2), ["a", "2 /s", "6 /s", "3×", "≥ 2×", "yes"]),
        (Row("a", 1.5, "s", most=1.0), ["a", "", "1.5 s", "", "≤ 1 s", "**no**"]),
        (
            Row("a", 1.1, "s", 1.0, most_share=1.15),
            ["a", "1 s", "1.1 s", "0.909×", "ours ≤ 1.15 plain", "yes"],
        ),
        (
            Row("a", 1.2, "s", 1.0, most_share=1.15),
            ["a", "1 s", "1.2 s", "0.833×", "ours ≤ 1.15 plain", "**no**"],
        ),
        (Row("a", 9176, "", 210_000), ["a", "210,000", "9,176", "22.9×", "", ""]),
    ],
)
def test_rows_and_goals(row: Row, cells: list[str]) -> None:
    assert row.cells() == cells


def test_the_table_is_refreshed_between_its_marks(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nafter\n")
    rows = [Row("a", 2.0, "s", 20.0, least_gain=8)]
    report.save({"textual": rows}, {"cores": "2"}, file)
    assert report.load(file) == {"textual": rows}
    for _ in range(2):
        report.refresh(report.table(rows), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| a | 20 s | 2 s | 10× | ≥ 8× | yes |") == 1
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected the lines"):
        report.refresh("x", page)


def test_prompts_of_benchmarks_are_clips_tokens() -> None:
    """Ids as published for CLIP: the vocabulary's order is right, not its size alone."""
    tokenizer = networks.clip_tokenizer()
    assert len(tokenizer) == networks.VOCABULARY
    expected = [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("a photo of a cat", padding="max_length").input_ids
    assert padded == expected + [49407] * (networks.TOKENS - len(expected))


TINY = gpu.Sizes(
    pipeline=lambda _: build_tiny_pipeline(),
    xl=lambda _: networks.xl_unet((32, 160, 160)),
    concept=WEAPONS,
    kept=8,
    shard=2,
    trajectory_steps=4,
    training_batches=(1, 3),
    training_steps=3,
    image_batches=(1, 2),
    image_steps=2,
    denoiser_batch=2,
    xl_side=8,
    xl_batches=(1,),
    repeats=1,
    matrix=64,
    families={
        "SDXL": gpu_families.FamilySize(lambda _: build_tiny_sdxl(), steps=2, prompts=3),
        "SD3 Medium": gpu_families.FamilySize(lambda _: build_sd3(), steps=2, prompts=3),
        "FLUX.1 dev": gpu_families.FamilySize(lambda _: build_flux(), steps=2, prompts=3, guided=False),
    },
)


FULL_SIZE = ("hardened", *gpu_families.FAMILIES)


def test_what_is_measured_on_gpus_runs_on_a_cpu_in_tiny(tmp_path: Path) -> None:
    """All but what compiles, and but other families: no slip of ours costs time on a GPU."""
    chosen = [part for part in gpu.parts() if not part.name.startswith("compiled")]
    chosen = [part for part in chosen if part.name not in FULL_SIZE]
    bench = gpu.Bench("cpu", TINY)
    adapter = bench.adapter
    sections = list(gpu.run(bench, chosen=chosen, limit=math.inf))
    assert [section.name for section in sections] == [part.name for part in chosen]
    assert [section.note for section in sections] == [""] * len(chosen)
    rows = [row for section in sections for row in section.rows]
    assert len(rows) > 20 and all(0 < row.ours < float("inf") for row in rows)
    # Sections leave the network in its type.
    assert {weight.dtype for weight in adapter.denoiser.parameters()} == {torch.float32}
    report.save_cards({"CPU": report.Card(gpu.versions(bench.device), sections)}, tmp_path / "gpu.json")
    assert report.load_cards(tmp_path / "gpu.json")["CPU"].sections == sections
    assert "### CPU" in report.gpu_tables(report.load_cards(tmp_path / "gpu.json"))


@pytest.mark.slow
def test_what_is_measured_of_other_families_runs_on_a_cpu_in_tiny() -> None:
    chosen = [part for part in gpu.parts() if part.name in FULL_SIZE]
    bench = gpu.Bench("cpu", TINY)
    adapter = bench.adapter
    sections = list(gpu.run(bench, chosen=chosen, limit=math.inf))
    assert [(section.name, section.note) for section in sections] == [(name, "") for name in FULL_SIZE]
    assert bench.adapter is not adapter, "each family has a network of its own"
    names = [row.what for row in sections[-1].rows]
    assert any("FLUX.1 dev at" in name and "a training step of Q" in name for name in names)


@pytest.mark.slow
def test_what_compiles_runs_on_a_cpu_in_tiny() -> None:
    names = ("compiled blocks, backward", "compiled, forward")
    chosen = [part for part in gpu.parts() if part.name in names]
    sections = list(gpu.run(gpu.Bench("cpu", TINY), chosen=chosen, limit=math.inf))
    assert len(sections) == 2 and [section.note for section in sections] == ["", ""]


def test_results_of_a_gpu_are_written_and_a_failure_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: gpu.Bench) -> Iterator[Row]:
        yield Row("a", 1.0, "s")
        raise RuntimeError("no such kernel")

    bench, now = gpu.Bench("cpu", TINY), time.monotonic()
    measure_gpu(bench, tmp_path, now, [gpu.Part("ceilings", 1, gpu.ceilings)])
    assert "| copy, bytes read and written |" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit) as end:
        measure_gpu(bench, tmp_path, now, [gpu.Part("x", 1, fails), gpu.Part("ceilings", 1, gpu.ceilings)])
    assert end.value.code == 1
    stored = report.load_cards(tmp_path / "results_gpu.json")["CPU"].sections
    assert [part.name for part in stored] == ["x", "ceilings"]
    assert "- x: failed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_part_that_is_measured_again_leaves_the_others_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part for which no time is left keeps its rows as well."""
    file = tmp_path / "results_gpu.json"
    monkeypatch.setattr(report, "load_cards", partial(report.load_cards, file=file))
    bench = gpu.Bench("cpu", TINY)
    rows = {name: [Row(name, 1.0, "s")] for name in ("kept", "late", "again")}
    sections = [report.Section(name, each) for name, each in rows.items()]
    report.save_cards({"CPU": report.Card(gpu.versions(bench.device), sections)}, file)

    def again(bench: gpu.Bench) -> Iterator[Row]:
        yield Row("again", 2.0, "s")

    late = gpu.Part("late", 1e9, again)
    (tmp_path / "out").mkdir()
    measure_gpu(bench, tmp_path / "out", time.monotonic(), [gpu.Part("again", 0, again), late])
    found = report.load_cards(file=tmp_path / "out" / "results_gpu.json")["CPU"].sections
    values = {section.name: section.rows[0].ours for section in found}
    assert values == {"kept": 1.0, "late": 1.0, "again": 2.0}


def test_sections_that_fail_or_come_too_late_say_so() -> None:
    def fails(bench: gpu.Bench) -> Iterator[Row]:
        yield Row("a", 1.0, "s")
        raise RuntimeError("no such kernel\nsecond line")

    chosen = [
        gpu.Part("first", 5, fails),
        gpu.Part("second", 20, fails),
        gpu.Part("third", 5, lambda _: iter([])),
    ]
    first, second, third = gpu.run(gpu.Bench("cpu", TINY), limit=10, chosen=chosen, started=time.monotonic())
    assert (first.note, len(first.rows)) == ("failed: RuntimeError: no such kernel", 1)
    assert second.note.startswith("left out: ") and second.note.endswith("s of 10 were over")
    assert second.rows == [] and third.note == ""
    card = report.gpu_tables({"card": report.Card({"PyTorch": "2"}, [first, second, third])})
    assert "- second: left out" in card and "| a |  | 1 s |  |" in card


def test_the_large_networks_are_stable_diffusions() -> None:
    with torch.device("meta"):
        built = networks.unet(), networks.xl_unet(), networks.decoder()
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in built]
    assert sizes == [859_520_964, 2_567_463_684, 83_653_863]


def rows_of_attacks() -> dict[str, dict[str, dict[str, object]]]:
    """Three attacks of two tries on two models, made up. None by words is above its controls, one is weak."""
    broken = {"original": {"weak": 10, "sure": 20, "key": 10}, "erased": {"weak": 3, "sure": 1, "key": 12}}

    def outcome(count: int, unattacked: int) -> Outcome:
        found, before = ({f"p{i}": [i < n, False] for i in range(20)} for n in (count, unattacked))
        return Outcome(found, before, before, tries=2, backward=1200)

    outcomes = {
        label: {name: outcome(count, 20 if label == "original" else 0) for name, count in counts.items()}
        for label, counts in broken.items()
    }
    rows = attack_rows(outcomes, false_alarms=dict.fromkeys(outcomes, 0.0))
    for by_attack in rows.values():
        for name, row in by_attack.items():
            row["door"] = "embeddings" if name == "key" else "words"
    return rows


def test_a_door_shows_its_strongest_attack_or_a_failure_that_says_something() -> None:
    rows = rows_of_attacks()
    words, embeddings = readme.door_lines(rows, "original", ["erased"])
    assert words.startswith("| attacked, words: `sure` | 100.0 % [") and "| 5.0 % [" in words
    assert embeddings.startswith("| attacked, embeddings: `key` | 50.0 % ["), "its success counts"
    taught = readme.door_lines(rows | {"never-learnt": rows["original"]}, "original", ["erased"])
    assert taught[1].startswith("| attacked, embeddings: `key` (50 % if never learnt) |")
    two = readme.door_lines(rows, "original", ["erased", "original"])
    assert two[0].count(" % [") == 3, "a cell for each erased model"
    header, _, *lines = readme.attacks_lines(rows, ["erased"])
    assert header.startswith("| attack | original | erased | ρ of erased | erased: other seeds |")
    weak = next(line for line in lines if "`weak`" in line)
    assert "| 50 % | 15 % | – | 0 % |" in weak and "**no**" in weak and "1,200 B" in weak
    figure = readme.attacks_figure(rows)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "words: weak",
        "words: sure",
        "embeddings: key",
    ]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"original", "erased"}
