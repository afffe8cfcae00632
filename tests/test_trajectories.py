"""Cached trajectories against a plain loop with diffusers' scheduler; resuming, refusing, sharding."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import DDIMScheduler
from tiny_runs import cpu_trainer, one_thread, plan_of, sample_plan, trajectory_config
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.data.plan import Trajectory, TrajectoryPlan
from trce_lightning.data.trajectories import load_rows, sample_missing, shards
from trce_lightning.sampling import noise

CONFIG = trajectory_config(kept_per_malicious=1, num_kept=5)
# Batches of another size round otherwise: one number of 5,120 was off by 3.7e-5 on one CPU.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def cache(tiny_adapter: StableDiffusionAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sampled once; tests that change files copy it."""
    folder = tmp_path_factory.mktemp("trajectories")
    sample_plan(tiny_adapter, CONFIG, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@torch.no_grad()
def naive_rows(
    adapter: StableDiffusionAdapter, plan: TrajectoryPlan, trajectory: Trajectory
) -> list[dict[str, Tensor]]:
    """One trajectory, one prompt at a time, all steps, stepped by diffusers."""
    scheduler = DDIMScheduler.from_config(adapter.pipeline.scheduler.config)
    scheduler.set_timesteps(plan.num_steps)
    prompts = {"uncond": ""}
    if trajectory.pair:
        prompts |= {"malicious": trajectory.pair.malicious, "safe": trajectory.pair.safe}
    if trajectory.prompt:
        prompts["kept"] = trajectory.prompt
    states = {
        kind: adapter.pipeline.encode_prompt(text, "cpu", 1, False)[0] for kind, text in prompts.items()
    }
    z_t = noise(adapter.latent_shape, trajectory.seed)[None]
    visited = []
    for timestep in scheduler.timesteps:
        eps = {kind: adapter.denoiser(z_t, timestep, text).sample for kind, text in states.items()}
        visited.append(
            {"z_t": z_t[0], **{kind: value[0] for kind, value in eps.items()}, "timestep": timestep}
        )
        guided, prompted = eps["uncond"], eps.get("malicious", eps.get("kept"))
        if prompted is not None and plan.guidance_scale <= 1:
            guided = prompted
        elif prompted is not None:
            guided = eps["uncond"] + plan.guidance_scale * (prompted - eps["uncond"])
        z_t = scheduler.step(guided, timestep, z_t).prev_sample
    rows = [visited[step_index] for step_index in trajectory.step_indices]
    if trajectory.prompt:  # nothing needs ε(z_k, ∅)
        rows = [{name: value for name, value in row.items() if name != "uncond"} for row in rows]
    return rows


@pytest.mark.parametrize(
    ("prediction_type", "guidance_scale"),
    [("epsilon", 3.0), ("v_prediction", 3.0), ("epsilon", 0.0), ("epsilon", 0.5), ("epsilon", 1.5)],
)
def test_cached_rows_equal_a_plain_loop(prediction_type: str, guidance_scale: float, tmp_path: Path) -> None:
    """At guidance of 1 and below a trajectory follows the prompt alone, as diffusers draws it."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline(prediction_type))
    config = trajectory_config(guidance_scale=guidance_scale, kept_per_malicious=1, num_kept=5)
    plan = sample_plan(adapter, config, tmp_path)
    for kind in ("malicious", "unconditional", "kept"):
        trajectories = getattr(plan, kind)
        rows = load_rows(plan, tmp_path, CONFIG.shard_size, kind)
        expected = [row for trajectory in trajectories for row in naive_rows(adapter, plan, trajectory)]
        labels = [(row.index, step_index) for row in trajectories for step_index in row.step_indices]
        assert set(rows) == {*expected[0], "trajectory", "step_index"}
        for name in expected[0]:
            torch.testing.assert_close(rows[name], torch.stack([row[name] for row in expected]), **CLOSE)
        assert list(zip(rows["trajectory"].tolist(), rows["step_index"].tolist(), strict=True)) == labels
    # Predictions under the three prompts differ by far more than the tolerance.
    rows = load_rows(plan, tmp_path, CONFIG.shard_size, "malicious")
    for a, b in (("uncond", "malicious"), ("malicious", "safe")):
        assert (rows[a] - rows[b]).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_deleted_shard_comes_back_and_nothing_else_is_sampled(
    tiny_adapter: StableDiffusionAdapter, cache: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(cache, tmp_path / "copy")
    before, plan = contents(folder), plan_of(CONFIG)
    name, trajectories = shards(plan, CONFIG.shard_size)[1]
    times = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors") if file.name != name}
    (folder / name).unlink()
    taken = sample_missing(cpu_trainer(tmp_path), tiny_adapter, plan, folder, CONFIG.shard_size)
    assert contents(folder) == before
    assert taken == plan.evaluations_of(trajectories)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert [file for file in folder.iterdir() if file.suffix != ".safetensors"] == []


def test_trajectories_of_another_model_are_refused_by_name(cache: Path, tmp_path: Path) -> None:
    pipeline = build_tiny_pipeline()
    pipeline.unet.conv_out.bias.data += 0.1
    name = shards(plan_of(CONFIG), CONFIG.shard_size)[0][0]
    before = contents(cache)
    with pytest.raises(ValueError, match=rf"{name}.*fingerprint"):
        sample_missing(
            cpu_trainer(tmp_path), StableDiffusionAdapter(pipeline), plan_of(CONFIG), cache, CONFIG.shard_size
        )
    assert contents(cache) == before


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_shard_is_refused_by_name(
    tiny_adapter: StableDiffusionAdapter, cache: Path, tmp_path: Path, keep: int
) -> None:
    folder = shutil.copytree(cache, tmp_path / "copy")
    name = shards(plan_of(CONFIG), CONFIG.shard_size)[-1][0]
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name}.*whole trajectory shard"):
        sample_missing(cpu_trainer(tmp_path), tiny_adapter, plan_of(CONFIG), folder, CONFIG.shard_size)


def test_shard_size_changes_files_and_no_rows(
    tiny_adapter: StableDiffusionAdapter, cache: Path, tmp_path: Path
) -> None:
    """Also when files of another shard size lie in the same folder."""
    folder, plan = shutil.copytree(cache, tmp_path / "copy"), plan_of(CONFIG)
    for shard_size in (1, 3, 16):
        sample_missing(cpu_trainer(tmp_path), tiny_adapter, plan, folder, shard_size)
        for kind in ("malicious", "unconditional", "kept"):
            rows, expected = (
                load_rows(plan, *place, kind) for place in ((folder, shard_size), (cache, CONFIG.shard_size))
            )
            assert rows.keys() == expected.keys()
            for name in rows:
                torch.testing.assert_close(rows[name], expected[name], **CLOSE)


@pytest.mark.parametrize("shard_size", [1, 4])
def test_ranks_share_the_shards(
    tiny_adapter: StableDiffusionAdapter, cache: Path, tmp_path: Path, shard_size: int
) -> None:
    """Three processes; with shard size 4 there are fewer shards than processes."""
    plan = plan_of(CONFIG)
    trainer = cpu_trainer(tmp_path, devices=3, strategy="ddp_fork")
    with one_thread():
        sample_missing(trainer, tiny_adapter, plan, tmp_path / "cache", shard_size)
    for kind in ("malicious", "unconditional", "kept"):
        rows = load_rows(plan, tmp_path / "cache", shard_size, kind)
        expected = load_rows(plan, cache, CONFIG.shard_size, kind)
        for name in rows:
            torch.testing.assert_close(rows[name], expected[name], **CLOSE)
