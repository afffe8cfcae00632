"""SD3, SD3.5 and FLUX.1 as this project reads them, against diffusers' own pipelines."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tiny_flow import FAMILIES, SIDE, T5_LENGTH, build, build_flux, build_sd3
from torch import Tensor

from trce_lightning.adapters import Adapter, adapter_of
from trce_lightning.adapters.flux import packed, unpacked
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate
from trce_lightning.generation.variation import Start, Variation
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.sampling import noise
from trce_lightning.tokens import Role, Text

PROMPTS = ["a gun at sea", "see red kite"]
STEPS = 4


def opened(pipeline: Any, **options: Any) -> Adapter:
    return adapter_of(pipeline, resolution=SIDE, max_sequence_length=T5_LENGTH, **options)


@pytest.fixture(scope="module", params=[*FAMILIES, "sd3 without T5"])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Shared: its weights must stay as they are."""
    return opened(build_sd3(t5=False) if request.param == "sd3 without T5" else build(request.param))


@contextmanager
def watched(network: torch.nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Latents that a denoiser reads, and its output, of each call."""
    calls: list[tuple[Tensor, Tensor]] = []

    def remember(_: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        calls.append((inputs["hidden_states"], output[0]))

    hook = network.register_forward_hook(remember, with_kwargs=True)
    yield calls
    hook.remove()


def drawn_by_diffusers(adapter: Adapter, guidance_scale: float) -> np.ndarray:
    """Pictures of ``PROMPTS`` from the noise of seeds 7 and 8, ``[2, H, W, 3]`` in 0 … 255."""
    parts = dict(adapter.pipeline.components)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(parts["scheduler"].config)
    own = type(adapter.pipeline)(**parts | {"scheduler": scheduler})
    own.set_progress_bar_config(disable=True)
    images = own(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        max_sequence_length=T5_LENGTH,
        output_type="np",
    ).images
    return (images * 255).round()


def drawn_here(adapter: Adapter, guidance_scale: float, variation: Variation | None = None) -> np.ndarray:
    records = [PromptRecord(str(seed), text, seed=seed) for seed, text in zip((7, 8), PROMPTS, strict=True)]
    images = generate(
        adapter,
        records,
        guidance_scale=guidance_scale if adapter.guided else 1.0,
        num_steps=STEPS,
        batch_size=2,
        variation=variation or Variation(),
    )
    return images.permute(0, 2, 3, 1).numpy().astype(float)


def test_pictures_and_every_prediction_are_those_of_diffusers(adapter: Adapter) -> None:
    guidance, rows = (4.0, 4) if adapter.guided else (3.5, 2)
    with watched(adapter.denoiser) as theirs:
        expected = drawn_by_diffusers(adapter, guidance)
    evaluated = adapter.network_evaluations
    with watched(adapter.denoiser) as ours:
        found = drawn_here(adapter, guidance)
    assert np.abs(found - expected).max() <= 1
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine[0]) == rows
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-4)
    assert adapter.network_evaluations - evaluated == STEPS * rows


def test_the_comparison_sees_guidance_and_text(adapter: Adapter) -> None:
    usual = drawn_here(adapter, 4.0)
    assert np.abs(usual[0] - usual[1]).max() > 1
    if adapter.guided:
        assert np.abs(usual - drawn_here(adapter, 2.0)).max() > 1
    elif adapter.denoiser.config.guidance_embeds:
        other = opened(adapter.pipeline, guidance_scale=1.5)
        assert np.abs(usual - drawn_here(other, 1.0)).max() > 1
        assert np.abs(drawn_here(other, 1.0) - drawn_by_diffusers(adapter, 1.5)).max() <= 1
        assert other.fingerprint() != adapter.fingerprint()


@pytest.mark.parametrize("sampler", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_samplers_by_name(adapter: Adapter, sampler: str) -> None:
    found = drawn_here(adapter, 4.0, Variation(scheduler=sampler))
    if sampler == "FlowMatchEulerDiscreteScheduler":
        np.testing.assert_allclose(found, drawn_here(adapter, 4.0), atol=1)
        return
    scheduler = adapter.scheduler(sampler, STEPS, None)
    assert scheduler.config.prediction_type == "flow_prediction"
    own = adapter.schedule(STEPS)
    # Its own levels begin a step of 1/1000 below pure noise; with the same shift they are near the model's.
    sigma, shift = scheduler.sigmas[0], scheduler.config.flow_shift
    assert sigma == pytest.approx(shift * 0.999 / (1 + (shift - 1) * 0.999), abs=1e-4)
    assert np.abs(found - drawn_here(adapter, 4.0)).max() > 1
    assert scheduler.sigmas[-1] == own.next_sigma[-1] == 0


def test_dpm_solver_shifts_as_diffusers_does_by_mu() -> None:
    adapter = opened(build_flux())
    scheduler = adapter.scheduler("DPMSolverMultistepScheduler", STEPS, None)
    theirs = type(scheduler)(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    )
    theirs.set_timesteps(STEPS, mu=adapter._set(STEPS)["mu"])
    torch.testing.assert_close(scheduler.sigmas, theirs.sigmas)
    unshifted = type(scheduler)(prediction_type="flow_prediction", use_flow_sigmas=True)
    unshifted.set_timesteps(STEPS)
    assert (scheduler.sigmas - unshifted.sigmas).abs().max() > 0.05


def test_image_to_image_starts_between_picture_and_noise(adapter: Adapter, tmp_path: Any) -> None:
    """FlowMatchEuler's own start equals this project's: (1 − σ) z_0 + σ ε."""
    from PIL import Image

    Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    start = Start(tmp_path / "grey.png", strength=0.5)
    ours = drawn_here(adapter, 4.0, Variation(start=start))
    theirs = drawn_here(adapter, 4.0, Variation(start=start, scheduler="FlowMatchEulerDiscreteScheduler"))
    np.testing.assert_allclose(ours, theirs, atol=1)
    assert np.abs(ours - drawn_here(adapter, 4.0)).max() > 1


def test_text_is_that_of_the_pipeline_with_a_role_for_every_position(adapter: Adapter) -> None:
    text, options = adapter.encode(PROMPTS), {"max_sequence_length": T5_LENGTH}
    clip_length = adapter.pipeline.tokenizer.model_max_length
    if isinstance(adapter.pipeline, FluxPipeline):
        sequence, pooled, _ = adapter.pipeline.encode_prompt(PROMPTS, **options)
        assert set(text.states) == {"t5", "pooled"}
    else:
        sequence, _, pooled, _ = adapter.pipeline.encode_prompt(PROMPTS, None, None, **options)
        width = text.states["clip"].shape[-1]
        assert torch.equal(text.states["clip"], sequence[:, :clip_length, :width])
        assert not sequence[:, :clip_length, width:].any()
        ends = adapter.tokenize(PROMPTS)["clip"] == adapter.pipeline.tokenizer.eos_token_id
        assert (text.roles["clip"] == Role.EOT).int().argmax(1).equal(ends.int().argmax(1))
        sequence = sequence[:, clip_length:]
    if "t5" in text.states:
        assert torch.equal(text.states["t5"], sequence)
        words = [adapter.pipeline.tokenizer_2 if isinstance(adapter.pipeline, FluxPipeline) else None]
        assert words
        roles = text.roles["t5"]
        counts = torch.tensor(adapter.token_counts(PROMPTS))
        places = torch.arange(T5_LENGTH)
        assert (roles == Role.EOT).equal(places == counts[:, None] - 1)
        assert (roles == Role.WORD).equal(places < counts[:, None] - 1)
    else:
        assert not sequence.any()
    assert torch.equal(text.states["pooled"][:, 0], pooled)
    assert text.roles["pooled"].eq(Role.EOT).all()


def test_only_clip_is_trimmed(adapter: Adapter) -> None:
    whole, trimmed = adapter.encode(PROMPTS), adapter.encode(PROMPTS, trimmed=True)
    for name, states in trimmed.states.items():
        length = states.shape[1]
        assert (length < whole.states[name].shape[1]) == (name == "clip")
        torch.testing.assert_close(states, whole.states[name][:, :length], atol=1e-5, rtol=1e-5)


def test_a_term_is_found_in_every_segment(adapter: Adapter) -> None:
    found = adapter.mentions(PROMPTS, ["gun", "red kite"], trimmed=False)
    text = adapter.tokenize(PROMPTS)
    for name, ids in text.items():
        spelt = [
            "".join(adapter.detokenize(name, [row[mask].tolist()]))
            for row, mask in zip(ids, found[name], strict=True)
        ]
        assert [word.replace(" ", "") for word in spelt] == ["gun", "redkite"]
    assert not found["pooled"].any()
    assert not adapter.mentions(PROMPTS, ["hat", "hat"], trimmed=False)["clip"].any()


def test_embeddings_in_place_of_token_ids(adapter: Adapter) -> None:
    ids = adapter.tokenize(PROMPTS)
    embeddings = {name: own.requires_grad_() for name, own in adapter.embed(ids).items()}
    text, plain = adapter.encode_embeddings(embeddings, ids), adapter.encode(PROMPTS)
    for name, states in plain.states.items():
        torch.testing.assert_close(text.states[name], states, atol=1e-5, rtol=1e-5)
    sum(states.sum() for states in text.states.values()).backward()
    assert all(own.grad is not None and own.grad.abs().max() > 0 for own in embeddings.values())


def test_the_vocabulary_is_what_can_be_typed(adapter: Adapter) -> None:
    for name, ids in adapter.vocabulary().items():
        chosen = ids[:: max(1, len(ids) // 7)].tolist()
        prompts = adapter.detokenize(name, [[token] for token in chosen])
        first = 1 if name == "clip" else 0
        assert adapter.tokenize(prompts)[name][:, first].tolist() == chosen


def test_packing_is_that_of_diffusers() -> None:
    latents = torch.randn(2, 4, 6, 6)
    assert torch.equal(packed(latents), FluxPipeline._pack_latents(latents, 2, 4, 6, 6))
    assert torch.equal(unpacked(packed(latents), 6), latents)


def doubled(text: Text) -> Text:
    return Text({name: states.double() for name, states in text.states.items()}, text.roles)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_the_entries_is_an_edit_of_the_text_of_the_whole_network(family: str) -> None:
    """edited(E, P) = original(E Tᵀ, P Tₚᵀ) in float64. Zeros pad CLIP's rows of SD3 to T5's width."""
    pipeline = build(family)
    adapter = opened(pipeline)
    pipeline.transformer.double()
    streams, text = adapter.streams(), doubled(adapter.encode(PROMPTS))
    generator = torch.Generator().manual_seed(0)
    edits = {
        name: torch.eye(stream.width, dtype=torch.float64)
        + 0.3 * torch.randn(stream.width, stream.width, generator=generator, dtype=torch.float64)
        for name, stream in streams.items()
    }
    z_t = noise((2, *adapter.latent_shape), 0).double()
    timestep = adapter.schedule(STEPS).timesteps[1]
    steps = timestep.expand(2)
    wide = _rows(adapter, text)

    def predicted(rows: Tensor, pooled: Tensor) -> Tensor:
        """The network's own output on a sequence of rows that this project doesn't cut into segments."""
        if isinstance(pipeline, FluxPipeline):
            options = {
                "timestep": steps.double() / 1000,
                "guidance": torch.full((2,), 3.5) if family == "flux_dev" else None,
                "txt_ids": torch.zeros(rows.shape[1], 3),
                "img_ids": FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
            }
            options["hidden_states"] = packed(z_t)
        else:
            options = {"timestep": steps, "hidden_states": z_t}
        output = pipeline.transformer(encoder_hidden_states=rows, pooled_projections=pooled, **options)[0]
        return unpacked(output, z_t.shape[-1]) if isinstance(pipeline, FluxPipeline) else output

    with torch.no_grad():
        before = predicted(wide, text.states["pooled"][:, 0])
        torch.testing.assert_close(adapter.predict(z_t, timestep, text), before.float())
        expected = predicted(wide @ edits["context"].mT, text.states["pooled"][:, 0] @ edits["pooled"].mT)
        for name, stream in streams.items():
            for entry in stream.entries.values():
                weight = entry.module.weight.data[:, entry.first : entry.first + stream.width]
                weight.copy_(weight @ edits[name])
        found = predicted(wide, text.states["pooled"][:, 0])
    assert (found - expected).abs().max() < 1e-12
    assert (found - before).abs().max() > 0.05


def _rows(adapter: Adapter, text: Text) -> Tensor:
    """The sequence that the denoiser reads."""
    width = adapter.streams()["context"].width
    rows = [
        torch.nn.functional.pad(text.states[name], (0, width - text.states[name].shape[-1]))
        for name in adapter.streams()["context"].segments
    ]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stage_2_trains(family: str) -> None:
    adapter = opened(build(family))
    names = set(adapter.trainable("*.to_q"))
    assert names and all(name.rpartition(".")[0].endswith(".to_q") for name in names)
    assert not any("add_q_proj" in name for name in names)
    assert adapter.trainable("*.add_q_proj")
    double = "transformer_blocks.0.attn.to_q.weight"
    assert double in names
    assert ("transformer_blocks.0.attn2.to_q.weight" in names) == (family == "sd35")
    assert ("single_transformer_blocks.1.attn.to_q.weight" in names) == family.startswith("flux")


def test_fingerprints_tell_text_length_and_weights(adapter: Adapter) -> None:
    if adapter.t5 is None:  # type: ignore[attr-defined]
        return
    longer = adapter_of(adapter.pipeline, resolution=SIDE, max_sequence_length=T5_LENGTH + 8)
    assert longer.text_fingerprint() != adapter.text_fingerprint()
    assert longer.encode(PROMPTS).states["t5"].shape[1] == T5_LENGTH + 8


def refused(pipeline: Any, match: str, **options: Any) -> None:
    with pytest.raises(InputError, match=match):
        adapter_of(pipeline, **({"resolution": SIDE, "max_sequence_length": T5_LENGTH} | options))


def changed(pipeline: Any, **parts: Any) -> Any:
    for name, part in parts.items():
        setattr(pipeline, name, part)
    return pipeline


def test_refusals() -> None:
    sd3 = build_sd3()
    kept = {name: getattr(sd3, name) for name in ("scheduler", "text_encoder", "vae", "transformer")}

    def with_parts(**parts: Any) -> Any:
        return changed(sd3, **(kept | parts))

    stochastic = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    refused(with_parts(scheduler=stochastic), "stochastic_sampling=False")
    from diffusers import AutoencoderKL, DDIMScheduler

    refused(with_parts(scheduler=DDIMScheduler()), "a scheduler of flow matching")
    refused(with_parts(text_encoder=None), "a pipeline with a text_encoder, got none")
    plain = AutoencoderKL(latent_channels=4)
    refused(with_parts(vae=plain), "a number as the vae's shift_factor, got None")
    other = AutoencoderKL(latent_channels=16, shift_factor=0.1)
    refused(with_parts(vae=other), "a denoiser of 16 latent channels, got 4")
    refused(with_parts(), "a multiple of 4 pixels up to 32, got 64", resolution=64)
    refused(with_parts(), "from 1 to 512 tokens", max_sequence_length=513)
    fused = copy.deepcopy(sd3.transformer)
    for module in fused.modules():
        if hasattr(module, "fused_projections"):
            module.fused_projections = True
    refused(with_parts(transformer=fused), "unfuse_qkv_projections")
    quantized = copy.deepcopy(sd3.transformer)
    layer = quantized.context_embedder
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    refused(with_parts(transformer=quantized), "open the pipeline without quantization")
    adapter = opened(with_parts())
    with pytest.raises(InputError, match=r"sampler: expected one of FlowMatchEuler\S+ DPMSolver\S+ for flow"):
        adapter.scheduler("HeunDiscreteScheduler", 4, None)
    with pytest.raises(InputError, match="timestep_spacing: expected none"):
        adapter.scheduler("DPMSolverMultistepScheduler", 4, "trailing")
    with pytest.raises(InputError, match="from 1 to 1000 steps"):
        adapter.schedule(1001)
    with pytest.raises(InputError, match="single files of a StableDiffusion3Pipeline"):
        adapter.original_state()
    flux = build_flux()
    refused(flux, "a multiple of 4 pixels, got 18", resolution=18)
    with pytest.raises(InputError, match="guidance_scale: expected at most 1"):
        generate(opened(flux), [PromptRecord("1", "tea")], guidance_scale=3.5, num_steps=2, batch_size=1)
