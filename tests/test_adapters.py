"""The adapter against diffusers' own pipeline: states, predictions, projections, fingerprints, refusals."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import MAX_LENGTH, WIDTH, build_tiny_pipeline, entries_of, text_of
from diffusers import (
    DDIMPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor
from model_table import write
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPTextModelWithProjection

from trce_lightning.adapters import StableDiffusionAdapter, base, load_adapter
from trce_lightning.errors import InputError
from trce_lightning.generation.samplers import make_sampler
from trce_lightning.runtime.fingerprints import fingerprint
from trce_lightning.sampling import denoise_step
from trce_lightning.tokens import Role

PROMPTS = ["a gun", "", "tea", "word " * MAX_LENGTH]
PATH_MESSAGE = "expected a diffusers pipeline folder"


def test_predict_is_the_call_that_the_pipeline_makes(tiny_adapter: StableDiffusionAdapter) -> None:
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        calls.append((*args, kwargs["encoder_hidden_states"], output[0]))

    handle = tiny_adapter.denoiser.register_forward_hook(record, with_kwargs=True)
    tiny_adapter.pipeline("a gun", num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    handle.remove()
    assert [int(timestep) for _, timestep, *_ in calls] == tiny_adapter.schedule(3).timesteps.tolist()
    states = tiny_adapter.encode(["", "a gun"]).states["clip"]
    for z_t, timestep, encoder_hidden_states, output in calls:
        torch.testing.assert_close(encoder_hidden_states, states)
        before = tiny_adapter.network_evaluations
        with torch.no_grad():
            assert torch.equal(tiny_adapter.predict(z_t, timestep, text_of(encoder_hidden_states)), output)
            swapped = tiny_adapter.predict(z_t, timestep, text_of(encoder_hidden_states.flip(0)))
        assert not torch.allclose(swapped, output, atol=1e-4)
        assert tiny_adapter.network_evaluations == before + 4


def test_encode_is_encode_prompt(tiny_adapter: StableDiffusionAdapter) -> None:
    with torch.no_grad():
        expected = tiny_adapter.pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    text = tiny_adapter.encode(PROMPTS)
    states, roles = text.states["clip"], text.roles["clip"]
    assert states.shape == (4, MAX_LENGTH, WIDTH) and len(text) == 4
    assert torch.equal(states, expected)
    input_ids = tiny_adapter.tokenize(PROMPTS)["clip"]
    assert input_ids.shape == roles.shape == (4, MAX_LENGTH)
    assert (input_ids[:, 0] == tiny_adapter.tokenizer.bos_token_id).all() and (roles[:, 0] == Role.SOT).all()
    assert (input_ids[roles == Role.EOT] == tiny_adapter.tokenizer.eos_token_id).all()
    assert (roles == Role.EOT).sum(1).tolist() == [1, 1, 1, 1]


def test_token_embeddings_give_the_states_of_their_prompts(tiny_adapter: StableDiffusionAdapter) -> None:
    input_ids = tiny_adapter.tokenize(PROMPTS)
    embeddings = {name: rows.requires_grad_() for name, rows in tiny_adapter.embed(input_ids).items()}
    found, expected = tiny_adapter.encode_embeddings(embeddings, input_ids), tiny_adapter.encode(PROMPTS)
    assert torch.equal(found.states["clip"], expected.states["clip"])
    assert torch.equal(found.roles["clip"], expected.roles["clip"])
    # The EoT's gradient reaches every token up to it, and none behind it.
    ends = found.roles["clip"] == Role.EOT
    (gradient,) = torch.autograd.grad(found.states["clip"][ends].square().sum(), embeddings["clip"])
    reached = gradient.abs().amax(-1) > 0
    assert torch.equal(reached, expected.roles["clip"] <= Role.EOT)
    # A step along a gradient changes what it says it changes, and the prompts' own states come back.
    moved = {"clip": embeddings["clip"].detach() + gradient}
    assert not torch.allclose(
        tiny_adapter.encode_embeddings(moved, input_ids).states["clip"], expected.states["clip"], atol=1e-3
    )
    assert torch.equal(tiny_adapter.encode(PROMPTS).states["clip"], expected.states["clip"])


def test_token_embeddings_keep_the_mask_of_an_encoder_that_reads_one(
    tiny_pipeline: StableDiffusionPipeline,
) -> None:
    tiny_pipeline.text_encoder.config.use_attention_mask = True
    adapter = StableDiffusionAdapter(tiny_pipeline)
    input_ids = adapter.tokenize(PROMPTS)
    found = adapter.encode_embeddings(adapter.embed(input_ids), input_ids)
    assert torch.equal(found.states["clip"], adapter.encode(PROMPTS).states["clip"])


def test_the_vocabulary_is_what_comes_back_alone(tiny_adapter: StableDiffusionAdapter) -> None:
    ids = tiny_adapter.vocabulary()["clip"]
    texts = tiny_adapter.detokenize("clip", ids[:, None].tolist())
    assert [row[1:2] for row in tiny_adapter.tokenize(texts)["clip"].tolist()] == ids[:, None].tolist()
    assert {"a", "z", "7"} <= set(texts) and "A" not in texts and "" not in texts
    assert not set(ids.tolist()) & set(tiny_adapter.tokenizer.all_special_ids)
    assert tiny_adapter.detokenize("clip", []) == []
    inside = tiny_adapter.tokenizer.convert_tokens_to_ids("a")
    assert inside not in ids and tiny_adapter.tokenizer.convert_tokens_to_ids("a</w>") in ids


def test_nothing_is_said_by_the_empty_prompt(tiny_adapter: StableDiffusionAdapter) -> None:
    assert torch.equal(tiny_adapter.empty().states["clip"], tiny_adapter.encode([""]).states["clip"])


def test_trimmed_states_equal_the_padded_ones_up_to_the_end_of_text(
    tiny_adapter: StableDiffusionAdapter,
) -> None:
    full, trimmed = tiny_adapter.encode(PROMPTS[:3]), tiny_adapter.encode(PROMPTS[:3], trimmed=True)
    length = trimmed.states["clip"].shape[1]
    # Start, a token for each letter of "a gun", end.
    assert length == 6
    assert torch.equal(trimmed.roles["clip"], full.roles["clip"][:, :length])
    torch.testing.assert_close(trimmed.states["clip"], full.states["clip"][:, :length], atol=1e-6, rtol=1e-5)


def test_text_projections_are_the_k_and_v_of_cross_attention(tiny_adapter: StableDiffusionAdapter) -> None:
    stream = tiny_adapter.streams()["context"]
    projections = entries_of(tiny_adapter)
    assert (stream.segments, stream.width) == (("clip",), WIDTH)
    assert {entry.first for entry in stream.entries.values()} == {0}
    modules = dict(tiny_adapter.denoiser.named_modules())
    assert set(projections) == {name for name in modules if re.search(r"\.attn2\.to_[kv]$", name)}
    assert all(modules[name] is projection for name, projection in projections.items())
    blocks = [name for name, module in modules.items() if type(module).__name__ == "BasicTransformerBlock"]
    assert len(projections) == 2 * len(blocks) > 0
    assert {projection.in_features for projection in projections.values()} == {WIDTH}


def test_trainable_patterns(tiny_adapter: StableDiffusionAdapter) -> None:
    parameters = dict(tiny_adapter.denoiser.named_parameters())
    queries = {name for name in parameters if re.search(r"\.attn[12]\.to_q\.weight$", name)}
    trainable = tiny_adapter.trainable("*.to_q")
    assert set(trainable) == queries
    assert all(trainable[name] is parameters[name] for name in queries)
    assert set(tiny_adapter.trainable("*.attn2.to_q")) == {name for name in queries if ".attn2." in name}
    with pytest.raises(ValueError, match=r"trajectory\.trainable.*'\*\.to_x'"):
        tiny_adapter.trainable("*.to_x")


def fused(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipeline.fuse_qkv_projections()
    return pipeline


def with_encoder_hid_proj(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    config = {name: value for name, value in pipeline.unet.config.items() if not name.startswith("_")}
    config |= {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj"}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    return pipeline


def with_bias(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k = nn.Linear(WIDTH, attention.to_k.out_features)
    return pipeline


def with_other_width(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipeline.unet = UNet2DConditionModel.from_config(
        {**pipeline.unet.config, "cross_attention_dim": WIDTH // 2}
    )
    return pipeline


def for_inpainting(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 9})
    return pipeline


def bidirectional(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    config = BertConfig(
        vocab_size=len(pipeline.tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        initializer_range=0.3,
    )
    pipeline.text_encoder = BertModel(config)
    return pipeline


def two_encoders(pipeline: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=pipeline.vae,
        unet=pipeline.unet,
        scheduler=pipeline.scheduler,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(pipeline.text_encoder.config),
        tokenizer_2=pipeline.tokenizer,
    )


def without_text(pipeline: StableDiffusionPipeline) -> DDIMPipeline:
    unet = UNet2DModel(
        8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    return DDIMPipeline(unet, pipeline.scheduler)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (fused, "unfuse_qkv_projections"),
        (with_encoder_hid_proj, "encoder_hid_proj"),
        (with_bias, "bias-free"),
        (with_other_width, f"width {WIDTH}"),
        (for_inpainting, "4 latent channels, got 9"),
        (bidirectional, "causal"),
        (two_encoders, "one text encoder"),
        (without_text, "UNet2DConditionModel"),
    ],
)
def test_models_that_the_method_does_not_fit_are_refused(
    tiny_pipeline: StableDiffusionPipeline, change: Callable, reason: str
) -> None:
    StableDiffusionAdapter(tiny_pipeline)
    with pytest.raises(ValueError, match=reason):
        StableDiffusionAdapter(change(tiny_pipeline))


def test_any_weight_changes_a_fingerprint(tiny_pipeline: StableDiffusionPipeline) -> None:
    unet = tiny_pipeline.unet
    found = {fingerprint(unet)}
    tensors = unet.state_dict().values()
    for tensor in tensors:
        last = tensor.view(-1)[-1:]
        before = last.clone()
        last += 1
        found.add(fingerprint(unet))
        last.copy_(before)
    assert len(found) == len(tensors) + 1
    assert fingerprint(unet) == fingerprint(build_tiny_pipeline().unet) in found


def test_the_generator_fingerprint_covers_all_that_makes_an_image(
    tiny_pipeline: StableDiffusionPipeline,
) -> None:
    found = [StableDiffusionAdapter(tiny_pipeline).fingerprint()]
    assert found == [StableDiffusionAdapter(build_tiny_pipeline()).fingerprint()]
    found.append(StableDiffusionAdapter(tiny_pipeline, resolution=32).fingerprint())
    found.append(StableDiffusionAdapter(build_tiny_pipeline("v_prediction")).fingerprint())
    for network in (tiny_pipeline.unet, tiny_pipeline.text_encoder, tiny_pipeline.vae):
        next(network.parameters()).data.view(-1)[0] += 1
        found.append(StableDiffusionAdapter(tiny_pipeline).fingerprint())
    assert len(set(found)) == len(found)
    adapter = StableDiffusionAdapter(tiny_pipeline)
    before = adapter.text_fingerprint()
    adapter.tokenizer.add_tokens(["dagger"])
    assert adapter.text_fingerprint() != before


def test_text_states_do_not_depend_on_autocast(tiny_adapter: StableDiffusionAdapter) -> None:
    expected = tiny_adapter.encode(["a gun"]).states["clip"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_adapter.encode(["a gun"]).states["clip"], expected)
        input_ids = tiny_adapter.tokenize(["a gun"])["clip"]
        assert not torch.equal(tiny_adapter.text_encoder(input_ids)[0].float(), expected)


def test_the_autoencoder_takes_a_few_images_at_a_time(
    tiny_adapter: StableDiffusionAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(5, *tiny_adapter.latent_shape)
    images = tiny_adapter.decode(latents)
    encoded = tiny_adapter.encode_images(images)
    sizes: list[int] = []
    for half in (tiny_adapter.vae.encoder, tiny_adapter.vae.decoder):
        half.register_forward_hook(lambda network, inputs, output: sizes.append(len(inputs[0])))
    monkeypatch.setattr(base, "PIXELS_AT_ONCE", 2 * tiny_adapter.side**2)
    torch.testing.assert_close(tiny_adapter.decode(latents).float(), images.float(), atol=1, rtol=0)
    torch.testing.assert_close(tiny_adapter.encode_images(images), encoded, atol=1e-5, rtol=1e-4)
    assert sizes == [2, 2, 1] * 2


def test_loads_what_was_saved(tiny_pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.fingerprint() == StableDiffusionAdapter(tiny_pipeline).fingerprint()
    assert adapter.latent_shape == (4, 8, 8)
    assert load_adapter(str(tmp_path), resolution=24).latent_shape == (4, 12, 12)
    assert load_adapter(tmp_path, dtype=torch.float16).denoiser.dtype == torch.float16
    last = load_adapter(tmp_path, channels_last=True)
    weights = [network.conv_in.weight for network in (last.denoiser, last.vae.decoder)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert last.fingerprint() == adapter.fingerprint()
    z_t, text = torch.randn(2, *adapter.latent_shape), adapter.encode(["a cat", "a dog"])
    predictions = (model.predict(z_t, 5, text) for model in (last, adapter))
    torch.testing.assert_close(*predictions, atol=1e-5, rtol=1e-4)
    pictures = (model.decode(z_t).float() for model in (last, adapter))
    torch.testing.assert_close(*pictures, atol=1, rtol=0)  # the last bits may round another way
    last.pipeline.save_pretrained(tmp_path / "again")
    assert load_adapter(tmp_path / "again").fingerprint() == adapter.fingerprint()
    with pytest.raises(ValueError, match=r"model\.resolution.*multiple of 2.*25"):
        load_adapter(tmp_path, resolution=25)


@pytest.mark.parametrize(
    "source", ["missing", "./missing", "../missing", "~/missing", "a/b/c", Path("runs/erased")]
)
def test_a_missing_folder_is_never_asked_of_a_hub(source: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=PATH_MESSAGE):
        load_adapter(source)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
            load_adapter(folder)


def test_only_an_owner_and_a_name_are_asked_of_a_hub() -> None:
    with pytest.raises(OSError) as raised:
        load_adapter("owner/no-such-model")
    assert PATH_MESSAGE not in str(raised.value)


# --- text ---------------------------------------------------------------------------------------------------


def with_inversion(pipeline: StableDiffusionPipeline, vectors: int = 3) -> StableDiffusionPipeline:
    """A textual inversion ``<x>`` of several vectors, as diffusers loads it."""
    pipeline.tokenizer.add_tokens(["<x>", *(f"<x>_{i}" for i in range(1, vectors))])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    return pipeline


def test_a_textual_inversion_of_several_vectors_is_all_of_its_tokens(
    tiny_pipeline: StableDiffusionPipeline,
) -> None:
    adapter = StableDiffusionAdapter(with_inversion(tiny_pipeline))
    ids = adapter.tokenize(["<x> a"])["clip"]
    assert adapter.tokenizer.convert_ids_to_tokens(ids[0])[1:5] == ["<x>", "<x>_1", "<x>_2", "a</w>"]
    (mask,) = adapter.mentions(["<x> a"], ["<x>"], trimmed=False)["clip"]
    assert mask.nonzero().flatten().tolist() == [1, 2, 3]
    with torch.no_grad():
        expected = tiny_pipeline.encode_prompt(["<x> a", ""], "cpu", 1, False)[0]
    assert torch.equal(adapter.encode(["<x> a", ""]).states["clip"], expected)
    # Start, end and three for each of ten.
    assert MAX_LENGTH == 32 and adapter.fits("<x> " * 10) and not adapter.fits("<x> " * 11)


def test_an_attention_mask_is_used_where_the_text_encoder_asks_for_it(
    tiny_pipeline: StableDiffusionPipeline,
) -> None:
    without = StableDiffusionAdapter(tiny_pipeline).encode(PROMPTS).states["clip"]
    tiny_pipeline.text_encoder.config.use_attention_mask = True
    adapter = StableDiffusionAdapter(tiny_pipeline)
    with torch.no_grad():
        expected = tiny_pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    assert torch.equal(adapter.encode(PROMPTS).states["clip"], expected)
    assert not torch.allclose(without, expected, atol=1e-3)
    trimmed = adapter.encode(PROMPTS[:3], trimmed=True).states["clip"]
    torch.testing.assert_close(trimmed[0], expected[0, : trimmed.shape[1]], atol=1e-5, rtol=1e-4)


# --- schedules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 30, 61])
def test_a_step_is_that_of_diffusers(
    tiny_pipeline: StableDiffusionPipeline, spacing: str, num_steps: int
) -> None:
    config = tiny_pipeline.scheduler.config
    scheduler = type(tiny_pipeline.scheduler).from_config(config, timestep_spacing=spacing)
    tiny_pipeline.scheduler = scheduler
    adapter = StableDiffusionAdapter(tiny_pipeline)
    if (spacing, num_steps) == ("trailing", 61):
        with pytest.raises(InputError, match=r"num_inference_steps.* got 61, .* to -1; take one step less"):
            adapter.schedule(num_steps)
        return
    scheduler.set_timesteps(num_steps)
    schedule = adapter.schedule(num_steps)
    z_t, prediction = torch.randn(2, 1, *adapter.latent_shape).unbind(0)
    for step_index, timestep in enumerate(schedule.timesteps):
        expected = scheduler.step(prediction, timestep, z_t).prev_sample
        torch.testing.assert_close(
            denoise_step(prediction, z_t, schedule, step_index), expected, atol=1e-5, rtol=1e-5
        )


def test_as_many_steps_as_timesteps_have_no_place(tiny_adapter: StableDiffusionAdapter) -> None:
    with pytest.raises(InputError, match=r"between 0 and 999, got 1000, which diffusers places from 1000"):
        tiny_adapter.schedule(1000)
    with pytest.raises(InputError, match=r"num_inference_steps.*PNDMScheduler can take, got 3"):
        make_sampler(tiny_adapter, 3, scheduler="PNDMScheduler")


# --- networks in memory -------------------------------------------------------------------------------------


def offloaded(pipeline: StableDiffusionPipeline) -> None:
    pipeline.enable_sequential_cpu_offload(device="cpu")


def compiled(network: str) -> Callable[[StableDiffusionPipeline], None]:
    return lambda pipeline: setattr(pipeline, network, torch.compile(getattr(pipeline, network)))


def original(network: str) -> Callable[[StableDiffusionPipeline], None]:
    return lambda pipeline: setattr(pipeline, network, getattr(pipeline, network)._orig_mod)


@pytest.mark.parametrize(
    ("change", "reason", "undo"),
    [
        (offloaded, r"call pipeline\.remove_all_hooks\(\)", lambda p: p.remove_all_hooks()),
        *(
            (compiled(name), rf"pipeline\.{name} = pipeline\.{name}\._orig_mod", original(name))
            for name in ("unet", "text_encoder", "vae")
        ),
        (
            lambda p: p.unet.set_attn_processor(CustomDiffusionAttnProcessor(hidden_size=32)),
            r"call pipeline\.unet\.set_attn_processor\(AttnProcessor2_0\(\)\)",
            lambda p: p.unet.set_attn_processor(AttnProcessor2_0()),
        ),
    ],
)
def test_a_refusal_says_what_undoes_it(
    tiny_pipeline: StableDiffusionPipeline, change: Callable, reason: str, undo: Callable
) -> None:
    before = StableDiffusionAdapter(tiny_pipeline).fingerprint()
    change(tiny_pipeline)
    with pytest.raises(InputError, match=reason):
        StableDiffusionAdapter(tiny_pipeline)
    undo(tiny_pipeline)
    assert StableDiffusionAdapter(tiny_pipeline).fingerprint() == before


def test_weights_that_know_no_gradients_are_refused() -> None:
    with torch.inference_mode():
        pipeline = build_tiny_pipeline()
        with pytest.raises(InputError, match=r"outside of torch\.inference_mode"):
            StableDiffusionAdapter(pipeline)
    for name in ("unet", "text_encoder", "vae"):
        with pytest.raises(InputError, match=rf"{name} made in .*copy\.deepcopy\(pipeline\.{name}\)"):
            StableDiffusionAdapter(pipeline)
        setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
    adapter = StableDiffusionAdapter(pipeline)
    assert adapter.fingerprint() == StableDiffusionAdapter(build_tiny_pipeline()).fingerprint()


# --- stored weights -----------------------------------------------------------------------------------------

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FORMS = [
    ("unet", "bin", False),
    ("vae", "safetensors", True),
    ("text_encoder", "bin", True),
    ("text_encoder", "safetensors", False),
]


@pytest.fixture
def folder(tiny_pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, network: str, suffix: str, sharded: bool, change: Callable) -> None:
    """A network's weights after a change, in another form."""
    file = folder / network / f"{STEMS[network]}.safetensors"
    state = change(load_file(file))
    file.unlink()
    stem = f"pytorch_{STEMS[network]}" if (network, suffix) == ("text_encoder", "bin") else STEMS[network]
    write(folder / network, stem, state, "", suffix, sharded, False)


@pytest.mark.parametrize(("network", "suffix", "sharded"), FORMS)
def test_weights_that_are_missing_are_named(folder: Path, network: str, suffix: str, sharded: bool) -> None:
    """Random numbers would stand in their place."""
    lost: list[str] = []

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        lost.extend(sorted(state)[-3:])
        return {name: tensor for name, tensor in state.items() if name not in lost}

    rewrite(folder, network, suffix, sharded, change)
    message = rf"all tensors of {network}, got '.*/{network}' without 3 of them, such as {re.escape(lost[0])}"
    with pytest.raises(InputError, match=message):
        load_adapter(folder)


@pytest.mark.parametrize(("network", "suffix", "sharded"), FORMS)
def test_weights_of_other_shapes_are_named(folder: Path, network: str, suffix: str, sharded: bool) -> None:
    changed: list[str] = []

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        changed.append(max(state))
        return {**state, changed[0]: torch.zeros(3)}

    rewrite(folder, network, suffix, sharded, change)
    with pytest.raises(InputError, match=rf"weights of {network} that fit .*{re.escape(changed[0])}"):
        load_adapter(folder)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40]) and None


def empty(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def pointer(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def lost_shard(folder: Path) -> None:
    rewrite(folder, "vae", "safetensors", True, lambda state: state)
    next((folder / "vae").glob("*-00002-of-*")).unlink()


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


def with_code(folder: Path) -> None:
    rewrite(folder, "text_encoder", "bin", False, lambda state: {**state, "code": Code()})


def quantized(folder: Path) -> None:
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (empty, r"weights of vae in .*as \.safetensors or \.bin, got none"),
        (pointer, r"vae that can be read.*run git lfs pull"),
        (lost_shard, r"vae that can be read"),
        (with_code, r"text_encoder that can be read"),
        (quantized, r"plain weights of vae, got quantized"),
        (without("tokenizer/tokenizer.json"), "a tokenizer with a vocabulary"),
        (without("tokenizer/tokenizer_config.json"), 'write "model_max_length": 32 into'),
        (without("text_encoder/config.json"), "how text_encoder is built"),
        *((cut(f"{part}/config.json"), f"{part}/config.json' as JSON") for part in STEMS),
        *((cut(f"tokenizer/tokenizer{end}.json"), "a tokenizer and a scheduler") for end in ("", "_config")),
        (cut("scheduler/scheduler_config.json"), "a tokenizer and a scheduler"),
    ],
)
def test_damaged_folders_are_answered_by_name(
    folder: Path, damage: Callable, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    damage(folder)
    with pytest.raises(InputError, match=rf"model(\.path)?: expected .*{reason}"):
        load_adapter(folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (
            {"vae": ["diffusers", "ConsistencyDecoderVAE"]},
            "a vae of AutoencoderKL.* got ConsistencyDecoderVAE",
        ),
        ({"vae": [None, None]}, "a vae of AutoencoderKL"),
        ({"text_encoder": ["my_code", "MyEncoder"]}, "never run"),
        ({"text_encoder": ["transformers", "NoSuchModel"]}, "transformers knows, got NoSuchModel"),
        ({"tokenizer": [None, None]}, "with a tokenizer, got none"),
        ({"scheduler": ["my_code", "MyScheduler"]}, "a tokenizer and a scheduler .*my_code"),
    ],
)
def test_other_parts_are_refused_by_the_index(folder: Path, part: dict, reason: str) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    with pytest.raises(InputError, match=reason):
        load_adapter(folder)


def test_a_hub_that_has_half_precision_alone_opens(
    tiny_pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c" * 40)
    half = copy.deepcopy(tiny_pipeline.unet).half().float()
    copy.deepcopy(tiny_pipeline).to(torch.float16).save_pretrained(
        cached / "snapshots" / ("c" * 40), variant="fp16"
    )
    for module in (huggingface_hub.constants, diffusers.utils.constants):
        for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
            monkeypatch.setattr(module, name, str(tmp_path), raising=False)
    found = load_adapter("owner/name").denoiser.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in half.state_dict().items())
