"""ESD and what all tuned methods share: the teacher is the original at matching latents."""

import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import TUNED, Alone, Harness
from safetensors.torch import save_file
from tiny_runs import cpu_trainer

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.esd import ESD, esd_target
from trce_lightning.erasers.teachers import draw_walks, teachers_of
from trce_lightning.erasers.tuning import Points
from trce_lightning.erasers.weights import weights_of
from trce_lightning.errors import InputError
from trce_lightning.sampling import classifier_free_guidance, denoise_step, noise


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def text(prompt: str, adapter: StableDiffusionAdapter) -> Any:
    return adapter.encode([prompt])


def walks(**options: Any) -> Any:
    given: dict[str, Any] = {
        "points": 5,
        "draws": 2,
        "steps": range(1, 4),
        "num_steps": 4,
        "guidance_scale": 2.0,
        "seed": 0,
    }
    prompts = ["a gun", "an axe"]
    return draw_walks("erase", prompts, lambda prompt, _: (prompt, "", "tea"), **(given | options))


@pytest.mark.parametrize("guidance_scale", [2.0, 1.0])
def test_cached_rows_are_the_originals_predictions_on_its_own_way(
    adapter: StableDiffusionAdapter, tmp_path: Path, guidance_scale: float
) -> None:
    """Single evaluations give the same rows. Noise level and timestep belong together, even at pure noise."""
    plan = walks(guidance_scale=guidance_scale, steps=range(4), points=7)
    teachers = teachers_of(plan, tmp_path, "model")
    before = adapter.network_evaluations
    teachers.sample(cpu_trainer(tmp_path), adapter, lambda prompt: text(prompt, adapter))
    assert adapter.network_evaluations - before == plan.evaluations_of(plan.walks) > 0
    rows, schedule = teachers.load(), adapter.schedule(4)
    assert len(rows["z_t"]) == plan.points == 7
    row = 0
    for number, walk in enumerate(plan.walks):
        z_t, seen = noise(adapter.latent_shape, walk.seed)[None], {}
        with torch.no_grad():
            for step in range(4):
                eps = [
                    adapter.predict(z_t, schedule.timesteps[step], text(prompt, adapter))
                    for prompt in (walk.prompt, "", "tea")
                ]
                seen[step] = z_t, torch.stack(eps, 1)
                led = classifier_free_guidance(eps[1], eps[0], 2.0) if guidance_scale > 1 else eps[0]
                z_t = denoise_step(led, z_t, schedule, step)
        for step in walk.step_indices:
            assert rows["walk"][row] == number and rows["step_index"][row] == step
            assert rows["timestep"][row] == schedule.timesteps[step]
            torch.testing.assert_close(rows["z_t"][row], seen[step][0][0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(rows["predictions"][row], seen[step][1][0], atol=1e-4, rtol=1e-4)
            row += 1


def test_the_cache_is_sampled_once_and_belongs_to_its_model(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    teachers = teachers_of(walks(), tmp_path, "model")
    encode: Any = lambda prompt: text(prompt, adapter)  # noqa: E731
    assert teachers.evaluations > 0
    teachers.sample(cpu_trainer(tmp_path), adapter, encode)
    assert teachers.evaluations == 0
    before = adapter.network_evaluations
    teachers.sample(cpu_trainer(tmp_path), adapter, encode)
    assert adapter.network_evaluations == before
    others = [teachers_of(walks(), tmp_path, "other"), teachers_of(walks(seed=1), tmp_path, "model")]
    assert len({other.fingerprint for other in (teachers, *others)}) == 3
    file = teachers.folder / "walks-00000.safetensors"
    rows = teachers.load()
    rows["z_t"][0, 0, 0, 0] = float("nan")
    save_file({name: value for name, value in rows.items() if name != "walk"}, file)
    with pytest.raises(InputError, match=r"walks-00000.*NaN"):
        teachers.load()


def test_large_images_are_evaluated_in_parts_with_equal_results(
    adapter: StableDiffusionAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    predict = adapter.predict

    def counting(z_t: Any, *others: Any) -> Any:
        counts.append(len(z_t))
        return predict(z_t, *others)

    monkeypatch.setattr(adapter, "predict", counting)
    found = []
    for images in (100, 4, 0.5):
        monkeypatch.setattr("trce_lightning.erasers.teachers.PIXELS", int(images * adapter.side**2))
        teachers = teachers_of(walks(), tmp_path / str(images), "model")
        counts.clear()
        teachers.sample(cpu_trainer(tmp_path), adapter, lambda prompt: text(prompt, adapter))
        assert max(counts) == max(1, images) or (images == 100 and max(counts) > 4)
        assert sum(counts) == teachers.plan.evaluations_of(teachers.plan.walks)
        found.append(teachers.load())
    for rows in found[1:]:
        for key, expected in found[0].items():
            torch.testing.assert_close(rows[key], expected, atol=1e-4, rtol=1e-4)


def test_steps_come_from_the_range_and_a_wrong_one_is_refused() -> None:
    assert {step for walk in walks(points=60).walks for step in walk.step_indices} == {1, 2, 3}
    with pytest.raises(InputError, match="steps from 0 to 4"):
        walks(steps=range(3, 3))
    with pytest.raises(InputError, match="steps from 0 to 4"):
        walks(steps=range(0, 5))


def test_each_step_takes_the_next_points_and_ranks_share_them(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    teachers = teachers_of(walks(points=6, draws=1), tmp_path, "model")
    teachers.sample(cpu_trainer(tmp_path), adapter, lambda prompt: text(prompt, adapter))

    def taken(rank: int, size: int) -> list[list[int]]:
        data = Points({"erase": (teachers, 2)}, 4, seed=0)
        data.trainer = Alone(rank, size)  # type: ignore[assignment]
        data.setup("fit")
        return [data.collate(step)["erase"]["walk"].tolist() for step in range(4)]

    alone = taken(0, 1)
    assert sorted(chain(*alone[:3])) == [0, 1, 2, 3, 4, 5] and alone[3] == alone[0]
    assert [a + b for a, b in zip(taken(0, 2), taken(1, 2), strict=True)] == alone


def test_a_batch_that_the_ranks_cant_share_is_refused(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    job = Harness(adapter, tmp_path).job

    with pytest.raises(InputError, match=r"method\.batch_size.*multiple of the 2 processes, got 1"):
        ESD(**(TUNED | {"batch_size": 1})).ahead(dataclasses.replace(job, trainer=Alone(0, 2)))  # type: ignore[arg-type]


def test_esds_target_is_the_papers() -> None:
    """η = 1 mirrors the concept's direction at ∅. The released script's number for this is 2."""
    empty, concept = torch.tensor([[[[1.0]]]]), torch.tensor([[[[4.0]]]])
    assert esd_target(empty, concept, empty, 1.0).item() == 1 - (4 - 1)
    assert esd_target(empty, concept, empty, 0.0).item() == 1
    assert esd_target(torch.tensor([[[[7.0]]]]), concept, empty, 1.0).item() == 7 - 3


def test_esd_comes_nearer_to_its_target_and_not_by_the_teacher(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    harness = Harness(adapter, tmp_path)
    eraser = ESD(**(TUNED | {"iterations": 30, "lr": 5e-4, "variant": "all"}))
    teachers = eraser.teachers(harness.job, eraser.sources(harness.job))["erase"]
    eraser.erase(harness.job)
    rows, plan = teachers.load(), teachers.plan
    concept, empty, guide = rows["predictions"].unbind(1)
    target = esd_target(guide, concept, empty, 1.0)
    prompts = [plan.walks[walk].prompt for walk in rows["walk"]]
    with torch.no_grad():
        now = torch.cat(
            [
                adapter.predict(z_t[None], t, adapter.encode([prompt]))
                for z_t, t, prompt in zip(rows["z_t"], rows["timestep"], prompts, strict=True)
            ]
        )
    assert len(rows["z_t"]) == 60
    assert (now - target).square().mean() < 0.8 * (concept - target).square().mean()


def test_variants_are_those_of_the_paper(adapter: StableDiffusionAdapter) -> None:
    names = {kind: set(weights_of(adapter, kind)) for kind in ("x", "x_strict", "u", "all", "self")}
    assert all("attn2" in name for name in names["x"]) and not any("attn2" in name for name in names["u"])
    assert names["x_strict"] == {name for name in names["x"] if ".to_k." in name or ".to_v." in name}
    assert names["x"] | names["u"] == names["all"] and names["self"] < names["u"]
    assert all("attn1" in name for name in names["self"])
    assert {"conv_in.weight", "time_embedding.linear_1.bias"} <= names["u"]
    assert not any("norm" in name for name in names["all"])


def test_cross_attention_is_refused_where_the_denoiser_itself_reads_the_text(
    adapter: StableDiffusionAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = adapter.streams()["context"]
    entries = {"context_embedder": next(iter(stream.entries.values()))}
    monkeypatch.setattr(adapter, "streams", lambda: {"context": stream._replace(entries=entries)})
    with pytest.raises(InputError, match="reads them elsewhere"):
        weights_of(adapter, "x")
