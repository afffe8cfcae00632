"""Both stages on SD3 and FLUX.1: whole runs of ``train.py``, the cache, T5's pairs, names at full size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from safetensors.torch import load_file
from test_flow_adapters import drawn_by_diffusers, drawn_here, opened
from tiny_flow import SIDE, T5_LENGTH, build, build_flux, build_sd3
from tiny_runs import KEEP_PROMPTS, WEAPONS, cpu_trainer, stage1_statistics, trajectory_config
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from benchmarks.gpu_families import SD3, t5_xxl
from benchmarks.networks import CLIP_G, CLIP_L
from trce_lightning import cli
from trce_lightning.adapters import adapter_of, load_adapter
from trce_lightning.closed_form import pair_statistics
from trce_lightning.config.schema import OptimizerConfig, TextualConfig
from trce_lightning.data.datamodule import TrajectoryDataModule
from trce_lightning.data.plan import draw_plan, without_empty
from trce_lightning.data.trajectories import load_rows, sample_missing
from trce_lightning.errors import InputError
from trce_lightning.module import TRCE
from trce_lightning.sampling import denoise_step, noise
from trce_lightning.textual import kept_statistics
from trce_lightning.tokens import Role

RUN = (
    "concept.terms=[a gun,an axe]",
    f"model.resolution={SIDE}",
    f"model.max_sequence_length={T5_LENGTH}",
    "model.dtype=float32",
    "metrics.enabled=false",
    "export=[pipeline,delta]",
    "trajectory.epochs=1",
    "trajectory.num_trajectories=2",
    "trajectory.num_unconditional=2",
    "trajectory.num_kept=2",
    "trajectory.num_steps=4",
    "trajectory.early_steps=2",
    "trajectory.batch_size=2",
    "optimizer.lr=0.01",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("family", ["sd3", "flux_dev", "flux_schnell"])
def test_a_run_leaves_what_plain_diffusers_opens_and_draws(family: str, tmp_path: Path) -> None:
    folder, run, captions = tmp_path / "model", tmp_path / "run", tmp_path / "captions.txt"
    build(family).save_pretrained(folder)
    captions.write_text("a dog\na red car\n")
    places = [f"model.path={folder}", f"textual.keep_prompts={captions}", f"cache={tmp_path / 'cache'}"]
    cli.train([f"model={family}", *RUN, *places, f"output={run}"])
    metrics = json.loads((run / "metrics.json").read_text())["network_evaluations"]
    announced = (run / "run.log").read_text()
    for part in ("trajectories", "training"):
        assert f"{metrics[part]:8d} network evaluations" in announced and metrics[part] > 0

    options = {"resolution": SIDE, "max_sequence_length": T5_LENGTH}
    original, erased = load_adapter(folder, **options), load_adapter(run / "erased", **options)
    plain = adapter_of(DiffusionPipeline.from_pretrained(run / "erased"), **options)
    drawn = drawn_by_diffusers(plain, 3.5)
    assert np.abs(drawn_here(erased, 3.5) - drawn).max() <= 1
    assert np.abs(drawn_by_diffusers(original, 3.5) - drawn).max() > 1
    delta, state = load_file(run / "delta.safetensors"), original.denoiser.state_dict()
    entries = {f"{name}.weight" for stream in original.streams().values() for name in stream.entries}
    assert set(delta) == entries | set(original.trainable("*.to_q"))
    unmoved = {name for name in delta if torch.equal(delta[name], state[name])}
    assert unmoved == set()
    assert original.denoiser.load_state_dict(delta, strict=False).unexpected_keys == []
    assert np.abs(drawn_by_diffusers(original, 3.5) - drawn).max() == 0


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd3", "flux_dev"])
def test_cached_rows_equal_a_plain_loop(family: str, tmp_path: Path) -> None:
    """SD3's trajectories are guided away from ∅. FLUX evaluates ∅ at drawn steps of malicious ones alone."""
    adapter = opened(build(family))
    config = trajectory_config(kept_per_malicious=0 if adapter.guided else 1)
    config = config if adapter.guided else without_empty(config)
    plan = draw_plan(WEAPONS.pairs(), config, 0, KEEP_PROMPTS)
    assert bool(plan.unconditional) == adapter.guided == plan.guided
    counted = adapter.network_evaluations
    sample_missing(cpu_trainer(tmp_path), adapter, plan, tmp_path, config.shard_size)
    assert adapter.network_evaluations - counted == plan.network_evaluations
    rows = load_rows(plan, tmp_path, config.shard_size, "malicious")
    assert rows["timestep"].dtype == torch.float32
    schedule, at = adapter.schedule(plan.num_steps), 0
    for trajectory in plan.malicious:
        assert trajectory.pair is not None
        texts = {"uncond": "", "malicious": trajectory.pair.malicious, "safe": trajectory.pair.safe}
        encoded = {kind: adapter.encode([text]) for kind, text in texts.items()}
        z_t, visited = noise(adapter.latent_shape, trajectory.seed)[None], []
        for step_index, timestep in enumerate(schedule.timesteps):
            found = {kind: adapter.predict(z_t, timestep, text) for kind, text in encoded.items()}
            visited.append({"z_t": z_t, **found})
            led = found["malicious"]
            if adapter.guided:
                led = found["uncond"] + plan.guidance_scale * (led - found["uncond"])
            z_t = denoise_step(led, z_t, schedule, step_index)
        for step_index in trajectory.step_indices:
            for name, expected in visited[step_index].items():
                torch.testing.assert_close(rows[name][at], expected[0], atol=1e-4, rtol=1e-4)
            at += 1
    assert at == len(rows["z_t"])


def test_stage_2_without_empty_prompts_keeps_prompts(tmp_path: Path) -> None:
    """The number of forward passes is what was announced, and no row of ∅ is among them."""
    adapter = opened(build_flux())
    config = without_empty(trajectory_config(keep_weight=10.0))
    assert (config.unconditional_per_malicious, config.kept_per_malicious) == (0, 2)
    plan = draw_plan(WEAPONS.pairs(), config, 0, KEEP_PROMPTS)
    sample_missing(cpu_trainer(tmp_path), adapter, plan, tmp_path, config.shard_size)
    module = TRCE(adapter, None, config, OptimizerConfig(lr=1e-2))
    before = {name: parameter.detach().clone() for name, parameter in module.trainable.items()}
    data = TrajectoryDataModule(adapter, plan, tmp_path, config, seed=0)
    counted = adapter.network_evaluations
    trainer = cpu_trainer(tmp_path, epochs=config.epochs)
    trainer.fit(module, data)
    assert adapter.network_evaluations - counted == plan.training_evaluations(config, seed=0)
    assert {"loss/erase_epoch", "loss/keep_epoch"} <= trainer.callback_metrics.keys()
    assert not {"loss/preserve_epoch", "loss/erase_uncond_epoch"} & trainer.callback_metrics.keys()
    assert all(not torch.equal(before[name], parameter) for name, parameter in module.trainable.items())


def test_a_hinge_on_the_empty_prompt_is_refused_without_one() -> None:
    with pytest.raises(InputError, match=r"trajectory\.uncond_hinge_weight: expected 0"):
        without_empty(trajectory_config(uncond_hinge_weight=1.0))


@pytest.mark.parametrize("build_one", [build_sd3, build_flux])
def test_pairs_and_kept_states_of_segments_weigh_the_same(build_one: Any) -> None:
    """S, M and K are means of the means of each segment and kind, whose energies are one."""
    adapter = opened(build_one())
    config = TextualConfig(empty_prompt_weight=0.0, safe_weight=0.0, keep_eot_weight=0.0)
    statistics = stage1_statistics(adapter, config)
    stream = adapter.streams()["context"]

    def rows(segment: str, prompts: list[str], terms: list[str], kind: str) -> list[torch.Tensor]:
        """States of a kind of position, one prompt at a time, as wide as the stream."""
        found = []
        for prompt, term in zip(prompts, terms, strict=True):
            text = adapter.encode([prompt])
            states = text.states[segment][0] * stream.scales[segment]
            states = torch.nn.functional.pad(states, (0, stream.width - states.shape[-1]))
            mask = adapter.mentions([prompt], [term], trimmed=False)[segment][0]
            end = text.roles[segment][0] == Role.EOT
            found.append(states if kind == "all" else states[mask if kind == "keyword" else end])
        return found

    pairs = WEAPONS.pairs()
    malicious, safe = [pair.malicious for pair in pairs], [pair.safe for pair in pairs]
    terms = [pair.term for pair in pairs]
    counterparts = [WEAPONS.terms[term] for term in terms]
    kinds = [("clip", "eot")] if "clip" in stream.segments else []
    kinds += [("t5", "keyword"), ("t5", "eot")]
    moments = []
    for segment, kind in kinds:
        sources, targets = (
            rows(segment, texts, words, kind) for texts, words in ((malicious, terms), (safe, counterparts))
        )
        assert all(len(source) for source in sources)
        paired = [
            target.mean(0, keepdim=True).expand(len(source), -1)
            for source, target in zip(sources, targets, strict=True)
        ]
        moments.append(pair_statistics(torch.cat(sources), torch.cat(paired)))
    pooled = statistics.pairs["weapons"]
    for name in ("s", "m"):
        expected = torch.stack([getattr(own, name) for own in moments]).mean(0)
        torch.testing.assert_close(getattr(pooled, name), expected, atol=1e-5, rtol=1e-4)
    kept = []
    for segment in stream.segments:
        states = torch.cat(rows(segment, list(KEEP_PROMPTS), ["x"] * len(KEEP_PROMPTS), "all")).double()
        kept.append(states.mT @ states / len(states))
    torch.testing.assert_close(statistics.keep.k, torch.stack(kept).mean(0), atol=1e-5, rtol=1e-4)
    empty = adapter.empty()
    for segment, scale in stream.scales.items():
        after = empty.states[segment][empty.roles[segment] != Role.SOT] * scale
        assert float(after.square().mean()) == pytest.approx(1.0, abs=1e-4)
    assert set(kept_statistics(adapter, KEEP_PROMPTS)) == {"context", "pooled"}


SD35 = SD3 | {
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
FULL_SIZE: dict[str, tuple[Any, float, int, float]] = {
    "sd3": (lambda: SD3Transformer2DModel(**SD3), 2028.3, 24, 56.7),
    "sd35": (lambda: SD3Transformer2DModel(**SD35), 2243.2, 37, 87.4),
    "flux_dev": (lambda: FluxTransformer2DModel(guidance_embeds=True), 11901.4, 57, 538.1),
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_names_counts_and_shapes_at_full_size(family: str) -> None:
    """Networks of the published sizes take no memory here."""
    make, millions, queries, trained = FULL_SIZE[family]
    pipeline = build(family)
    ends = {name: getattr(pipeline.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    with torch.device("meta"):
        pipeline.transformer = make()
        t5 = t5_xxl()
        if family == "flux_dev":
            pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L, **ends))
            pipeline.text_encoder_2 = t5
        else:
            clip_l = CLIPTextConfig(projection_dim=768, **CLIP_L, **ends)
            clip_g = CLIPTextConfig(projection_dim=1280, **CLIP_G, **ends)
            pipeline.text_encoder = CLIPTextModelWithProjection(clip_l)
            pipeline.text_encoder_2 = CLIPTextModelWithProjection(clip_g)
            pipeline.text_encoder_3 = t5
        pipeline.vae.register_to_config(latent_channels=16)
    adapter = adapter_of(pipeline)
    assert sum(p.numel() for p in adapter.denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert sum(p.numel() for p in t5.parameters()) / 1e6 == pytest.approx(4762, abs=1)
    free = adapter.trainable("*.to_q")
    assert len({name.rpartition(".")[0] for name in free}) == queries
    assert sum(p.numel() for p in free.values()) / 1e6 == pytest.approx(trained, abs=0.05)
    assert adapter.latent_shape[0] == 16
    state = adapter.denoiser.state_dict()
    inner, pooled = (3072, 768) if family == "flux_dev" else (1536, 2048)
    assert state["context_embedder.weight"].shape == (inner, 4096)
    assert state["time_text_embed.text_embedder.linear_1.weight"].shape == (inner, pooled)


def test_steps_at_full_size_are_the_published_ones() -> None:
    """28 steps of SD3 with shift 3, and of dev at 1024 and 512 px; four of schnell."""
    flux, sd3 = opened(build_flux()), opened(build_sd3())
    steps = sd3.schedule(28).timesteps
    assert steps[[0, 1, -2, -1]].tolist() == pytest.approx([1000, 987.4, 110.9, 8.9], abs=0.05)
    for side, mu in ((128, 1.15), (64, 0.63)):
        flux.latent_shape = (4, side, side)
        assert flux._set(28)["mu"] == pytest.approx(mu, abs=5e-3)  # type: ignore[attr-defined]
    schnell = opened(build_flux("flux_schnell"))
    assert schnell.schedule(4).timesteps.tolist() == [1000, 750, 500, 250]
