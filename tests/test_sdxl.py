"""Stable Diffusion XL: two text encoders, a pooled text, and the two matrices T of stage 1."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attack_targets import largest_difference, searched, target_of, ways
from conftest import MAX_LENGTH
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from tiny_runs import KEEP_PROMPTS, WEAPONS, stage1_statistics
from tiny_sdxl import POOLED, WIDTHS, build_tiny_sdxl
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from trce_lightning import cli, erase
from trce_lightning.adapters import adapter_of, load_adapter
from trce_lightning.adapters.clip_text import Tokens
from trce_lightning.adapters.sdxl import SDXLAdapter
from trce_lightning.adapters.single_file import unet_state
from trce_lightning.attacks.inverse_edit import InverseEdit
from trce_lightning.attacks.inversion import Inversion
from trce_lightning.attacks.single_token import SingleToken
from trce_lightning.attacks.state_pgd import StatePgd
from trce_lightning.closed_form import Edit, keep_statistics, pair_statistics, solve_edit
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import FORMS, TextualConfig
from trce_lightning.erasers.weights import weights_of
from trce_lightning.errors import InputError
from trce_lightning.export import load_edit, save_edit, save_single_file
from trce_lightning.generation.loop import generate
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.textual import apply_edit_
from trce_lightning.tokens import Role, Text

PROMPTS = ["a gun", "", "two cats, at sea!!", "word " * MAX_LENGTH]
CONFIG = TextualConfig(eta=0.1, ridge=0.01)
LINEAR_1 = "add_embedding.linear_1"


@pytest.fixture(scope="session")
def shared() -> SDXLAdapter:
    """Shared by all tests: its weights must stay as they are."""
    return SDXLAdapter(build_tiny_sdxl())


@pytest.fixture
def own() -> SDXLAdapter:
    """An adapter of the test's own, which it may edit."""
    return SDXLAdapter(build_tiny_sdxl())


def drawn(pipeline: StableDiffusionXLPipeline, guidance_scale: float = 3.0, **options) -> np.ndarray:
    """A picture by diffusers, of 255, ``[H, W, 3]``."""
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(
        "a gun",
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(7)],
        output_type="np",
        **options,
    ).images
    return (image * 255).round().astype(int)


def drawn_here(adapter: SDXLAdapter, guidance_scale: float = 3.0) -> np.ndarray:
    """The same picture by this project."""
    record = PromptRecord("1", "a gun", seed=7)
    (image,) = generate(adapter, [record], guidance_scale=guidance_scale, num_steps=3, batch_size=1)
    return image.permute(1, 2, 0).numpy().astype(int)


def moved(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a - b).max())


# Text and predictions


@pytest.mark.parametrize("force_zeros", [True, False])
def test_predictions_are_the_calls_that_the_pipeline_makes(force_zeros: bool) -> None:
    adapter = SDXLAdapter(build_tiny_sdxl(force_zeros=force_zeros))
    calls: list[tuple[Tensor, Tensor, dict, Tensor]] = []

    def record(_: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        calls.append((*args, kwargs, output[0]))

    handle = adapter.denoiser.register_forward_hook(record, with_kwargs=True)
    drawn(adapter.pipeline)
    handle.remove()
    assert [int(timestep) for _, timestep, *_ in calls] == adapter.schedule(3).timesteps.tolist()
    text = Text.cat([adapter.empty(), adapter.encode(["a gun"])])
    for z_t, timestep, read, output in calls:
        assert torch.equal(read["encoder_hidden_states"], text.states["clip"])
        assert torch.equal(read["added_cond_kwargs"]["text_embeds"], text.states["pooled"][:, 0])
        with torch.no_grad():
            found = adapter.predict(z_t, timestep, text)
            torch.testing.assert_close(found, output, atol=1e-6, rtol=1e-5)
            # The prediction reads both segments, and the sizes.
            for name in text.states:
                other = replace(text, states=text.states | {name: text.states[name].flip(0)})
                assert (adapter.predict(z_t, timestep, other) - output).abs().max() > 1e-3
    assert moved(drawn_here(adapter), drawn(adapter.pipeline)) <= 1
    other = drawn(adapter.pipeline, original_size=(512, 512))
    assert moved(drawn_here(adapter), other) > 1


def test_no_guidance_is_the_prompt_alone(shared: SDXLAdapter) -> None:
    """SDXL-Turbo draws so: without ∅, in few steps."""
    assert moved(drawn_here(shared, 0.0), drawn(shared.pipeline, 0.0)) <= 1
    assert moved(drawn_here(shared, 0.0), drawn(shared.pipeline)) > 1


def test_encode_is_encode_prompt(shared: SDXLAdapter) -> None:
    with torch.no_grad():
        states, _, pooled, _ = shared.pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False
        )
    text = shared.encode(PROMPTS)
    assert torch.equal(text.states["clip"], states) and states.shape == (4, MAX_LENGTH, sum(WIDTHS))
    assert torch.equal(text.states["pooled"][:, 0], pooled) and pooled.shape == (4, POOLED)
    assert text.roles["pooled"].tolist() == [[Role.EOT]] * 4
    assert [shared.fits(prompt) for prompt in PROMPTS] == [True, True, True, False]
    # Trimmed states are the padded ones up to the last EoT.
    trimmed = shared.encode(PROMPTS[:3], trimmed=True)
    length = trimmed.states["clip"].shape[1]
    assert length < MAX_LENGTH
    assert torch.equal(trimmed.roles["clip"], text.roles["clip"][:3, :length])
    for name, states in text.states.items():
        expected = states[:3, :length]
        torch.testing.assert_close(trimmed.states[name], expected, atol=1e-6, rtol=1e-5)


def test_the_end_of_text_is_where_both_encoders_have_theirs(shared: SDXLAdapter) -> None:
    """The second tokenizer may cut what the first one joins: here both ends are one, and "!" has two ids."""
    ids = [text.tokens(["a gun!!"]).ids[0] for text in shared.texts]
    assert not torch.equal(*ids)
    (roles,) = shared.encode(["a gun!!"]).roles["clip"]
    (end,) = (roles == Role.EOT).nonzero().flatten().tolist()
    assert all(int(own[end]) == text.end for own, text in zip(ids, shared.texts, strict=True))
    longer = torch.cat([ids[1][:2], ids[1][1:-1]])
    tokens = [Tokens(own[None], torch.ones_like(own)[None]) for own in (ids[0], longer)]
    assert shared._roles(tokens)[0].tolist().index(Role.EOT) == end + 1


def test_no_prompt_is_zeros_if_the_pipeline_says_so(shared: SDXLAdapter) -> None:
    empty, said = shared.empty(), shared.encode([""])
    assert all(not states.any() for states in empty.states.values())
    assert all(torch.equal(roles, said.roles[name]) for name, roles in empty.roles.items())
    other = SDXLAdapter(build_tiny_sdxl(force_zeros=False))
    assert torch.equal(other.empty().states["clip"], said.states["clip"])
    assert other.fingerprint() != shared.fingerprint()
    assert other.text_fingerprint() == shared.text_fingerprint()


def test_token_embeddings_of_both_encoders_lie_side_by_side(shared: SDXLAdapter) -> None:
    prompts = ["a gun", "", "two cats, at sea"]
    input_ids = shared.tokenize(prompts)
    embeddings = {name: rows.requires_grad_() for name, rows in shared.embed(input_ids).items()}
    assert embeddings["clip"].shape == (3, MAX_LENGTH, sum(WIDTHS))
    found, expected = shared.encode_embeddings(embeddings, input_ids), shared.encode(prompts)
    for name in expected.states:
        torch.testing.assert_close(found.states[name], expected.states[name])
        assert torch.equal(found.roles[name], expected.roles[name])
    (gradient,) = torch.autograd.grad(found.states["pooled"].square().sum(), embeddings["clip"])
    reached = gradient.abs() > 0
    # The pooled text is the second encoder's alone, and no position behind the EoT counts.
    assert not reached[..., : WIDTHS[0]].any()
    assert torch.equal(reached[..., WIDTHS[0] :].any(-1), expected.roles["clip"] <= Role.EOT)


def test_what_both_tokenizers_read_can_be_typed(shared: SDXLAdapter) -> None:
    ids = shared.vocabulary()["clip"]
    texts = shared.detokenize("clip", ids[:, None].tolist())
    assert "!" not in texts and {"a", "7"} <= set(texts)
    for text in shared.texts:
        assert text.tokens(texts).ids[:, 1].tolist() == ids.tolist()


def test_a_pooled_text_mentions_what_its_prompt_mentions(shared: SDXLAdapter) -> None:
    masks = shared.mentions(["a gun", "tea"], ["gun", "gun"], trimmed=True)
    assert masks["pooled"].tolist() == [[True], [False]]
    assert masks["clip"].any(1).tolist() == [True, False]


# Stage 1


def test_the_edited_network_is_the_original_on_moved_text(own: SDXLAdapter) -> None:
    edit = stage1_statistics(own, CONFIG).solve(CONFIG)
    assert (edit.stream, [further.stream for further in edit.further]) == ("context", ["pooled"])
    t, t_pooled = edit.transform, edit.further[0].transform
    assert (len(t), len(t_pooled)) == (sum(WIDTHS), POOLED)
    own.denoiser.double()
    z_t = torch.randn(3, *own.latent_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([900, 500, 10])
    text = own.encode(["a gun", "tea", ""])
    empty = own.empty().expand(3)

    def predicted(states: Tensor, pooled: Tensor) -> Tensor:
        # predict() would round to float32.
        conditions = own._conditions(z_t, text) | {"text_embeds": pooled[:, 0]}
        with torch.no_grad():
            return own.denoiser(
                z_t, timestep, encoder_hidden_states=states, added_cond_kwargs=conditions
            ).sample

    states, pooled = (text.states[name].double() for name in ("clip", "pooled"))
    original, of_empty = predicted(states, pooled), predicted(states * 0, pooled * 0)
    expected = predicted(states @ t.T, pooled @ t_pooled.T)
    halves = predicted(states @ t.T, pooled), predicted(states, pooled @ t_pooled.T)
    names = apply_edit_(own, edit)
    found = predicted(states, pooled)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for other in (original, *halves):
        assert (found - other).abs().amax((1, 2, 3)).min() > 1e-5
    assert torch.equal(predicted(states * 0, pooled * 0), of_empty)
    assert all(not states.any() for states in empty.states.values())
    entries = [name for stream in own.streams().values() for name in stream.entries]
    assert names == [f"{name}.weight" for name in entries]


def test_only_text_columns_are_written(own: SDXLAdapter, shared: SDXLAdapter) -> None:
    edit = stage1_statistics(own, CONFIG).solve(CONFIG)
    names = apply_edit_(own, edit)
    for name, tensor in own.denoiser.state_dict().items():
        before = shared.denoiser.state_dict()[name]
        if name == f"{LINEAR_1}.weight":
            edited = (before[:, :POOLED].double() @ edit.further[0].transform).float()
            torch.testing.assert_close(tensor[:, :POOLED], edited)
            assert torch.equal(tensor[:, POOLED:], before[:, POOLED:])
        elif name in names:
            torch.testing.assert_close(tensor, (before.double() @ edit.transform).float())
            assert not torch.equal(tensor, before)
        else:
            assert torch.equal(tensor, before), name


@pytest.mark.parametrize("positions", [["eot"], ["keyword", "eot"], ["padding"]])
def test_the_pooled_edit_is_solved_from_pooled_texts(shared: SDXLAdapter, positions: list[str]) -> None:
    config = replace(CONFIG, positions=positions)
    statistics = stage1_statistics(shared, config)

    def pooled(prompts: list[str]) -> Tensor:
        return shared.encode(prompts).states["pooled"][:, 0]

    pairs = WEAPONS.pairs()
    malicious, safe = pooled([pair.malicious for pair in pairs]), pooled([pair.safe for pair in pairs])
    kept = pooled(list(KEEP_PROMPTS)).double()
    moments = [states.T @ states / len(states) for states in (kept, pooled([""]).double(), safe.double())]
    k = (2 * moments[0] + moments[1] + moments[2]) / 4
    keep = keep_statistics(kept)
    expected = solve_edit(
        pair_statistics(malicious, safe), replace(keep, k=k), eta=config.eta, ridge=config.ridge
    )
    found = statistics.solve(config).further[0]
    torch.testing.assert_close(found.transform, expected.transform, rtol=1e-4, atol=1e-5)
    assert found.erase_residual < 1


@pytest.mark.parametrize("form", FORMS)
def test_every_form_edits_both_streams_and_comes_back_from_its_file(
    shared: SDXLAdapter, form: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, form=form, null_space_share=0.5, matrices=["value"], adversarial_rounds=1)
    statistics = stage1_statistics(shared, config)
    edit = statistics.solve(config)
    file = tmp_path / "edit.safetensors"
    save_edit(file, statistics, edit, config, "base", "0123", {})
    found, read = load_edit(file)
    assert read == config

    def transforms(solved: Edit) -> list[Tensor]:
        return [one.transform for one in (solved, *solved.further)]

    identity = [torch.eye(len(t), dtype=t.dtype) for t in transforms(edit)]
    for again, t, unmoved in zip(transforms(found.solve(read)), transforms(edit), identity, strict=True):
        assert torch.equal(again, t) and (t - unmoved).abs().max() > 0.01
    assert torch.equal(load_file(file)["pooled.transform"], edit.further[0].transform)


def test_one_stream_can_be_edited_alone(own: SDXLAdapter, shared: SDXLAdapter, tiny_adapter) -> None:
    config = replace(CONFIG, streams=["pooled"])
    edit = stage1_statistics(own, config).solve(config)
    assert edit.stream == "pooled" and edit.further == ()
    both = stage1_statistics(shared, CONFIG).solve(CONFIG)
    assert torch.equal(edit.transform, both.further[0].transform)
    assert apply_edit_(own, edit) == [f"{LINEAR_1}.weight"]
    with pytest.raises(InputError, match=r"textual\.streams: expected one of context.*got pooled"):
        stage1_statistics(tiny_adapter, config)


# Attacks


def test_attacks_reach_both_encoders(shared: SDXLAdapter, own: SDXLAdapter) -> None:
    """Vectors, words and states are searched, and each way draws other pictures than the prompts."""
    apply_edit_(own, stage1_statistics(own, CONFIG).solve(CONFIG))
    target = target_of(own, shared)
    vectors = searched(Inversion(steps=3, batch_size=2, pictures=2, levels=4), target)["all"].tensors
    assert all(own.shape[-1] == sum(WIDTHS) for own in vectors.values())
    for attack in (StatePgd(steps=1), SingleToken(tries=1, finalists=2, final_tries=1)):
        found = searched(attack, target)
        assert ways(attack, target, found)[""].records
    key = searched(InverseEdit(), target)["all"]
    assert set(key.tensors) == {"clip", "pooled"}
    way = ways(InverseEdit(), target, {"all": key})[""]
    options = {"guidance_scale": 3.0, "num_steps": 3, "batch_size": 2}
    original = generate(shared, way.records, **options)
    assert largest_difference(generate(way.adapter, way.records, **options), original) <= 1
    assert largest_difference(generate(own, way.records, **options), original) > 1


def test_attention_is_what_methods_find(shared: SDXLAdapter) -> None:
    """The layer that reads the pooled text is no cross-attention, and its like no self-attention."""
    assert {name.split(".")[-2] for name in weights_of(shared, "x_strict")} == {"to_k", "to_v"}
    for kind, part in (("x", ".attn2."), ("self", ".attn1.")):
        names = weights_of(shared, kind)
        assert names and all(part in name for name in names)


# Whole runs


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl")
    build_tiny_sdxl().save_pretrained(path)
    return path


@pytest.mark.usefixtures("clean_process")
def test_a_run_leaves_what_diffusers_opens(folder: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog\na red car\n")
    run = tmp_path / "run"
    options = [
        "concept.terms=[a gun,an axe]",
        "model=sdxl",
        f"model.path={folder}",
        "model.resolution=16",
        "metrics.enabled=false",
        "export=[pipeline,delta]",
        f"textual.keep_prompts={captions}",
        "trajectory.epochs=1",
        "trajectory.num_trajectories=2",
        "trajectory.num_unconditional=2",
        "trajectory.num_steps=4",
        "trajectory.early_steps=2",
        "trajectory.batch_size=2",
        "optimizer.lr=0.01",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        f"cache={tmp_path / 'cache'}",
    ]
    cli.train([*options, f"output={run}"])
    original = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    erased = StableDiffusionXLPipeline.from_pretrained(run / "erased", add_watermarker=False)
    assert moved(drawn(erased), drawn(original)) > 1
    assert moved(drawn(erased), drawn_here(load_adapter(run / "erased"))) <= 1
    delta = load_file(run / "delta.safetensors")
    streams = adapter_of(original).streams().values()
    entries = {f"{name}.weight" for stream in streams for name in stream.entries}
    queries = {name for name in original.unet.state_dict() if name.endswith("to_q.weight")}
    assert set(delta) == entries | queries
    before = {name: tensor.clone() for name, tensor in original.unet.state_dict().items()}
    assert all(not torch.equal(tensor, before[name]) for name, tensor in delta.items())
    assert original.unet.load_state_dict(delta, strict=False).unexpected_keys == []
    assert moved(drawn(original), drawn(erased)) == 0
    card = (run / "erased" / "README.md").read_text()
    assert "`StableDiffusionXLPipeline.from_pretrained(FOLDER)`" in card
    assert {"transform", "pooled.transform"} <= set(load_file(run / "edit.safetensors"))
    # eval.py takes the folder, and another one is scored on the same noise.
    prompts = tmp_path / "weapons.csv"
    prompts.write_text("prompt\na gun\nan axe!!\n")
    scored = [
        *options[:1],
        "model=sdxl",
        f"model.path={run / 'erased'}",
        "model.resolution=16",
        "model.num_inference_steps=2",
        f"model.judge={__name__}.red",
        "model.clip=null",
        "sets=[]",
        f"prompts=[{prompts}]",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        f"output={tmp_path / 'scores'}",
        f"cache={tmp_path / 'cache'}",
    ]
    cli.evaluate(scored)
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())["scores"]
    assert scores["asr"]["weapons"]["images"] == 2


def red(concepts: list[Concept]) -> Callable[[Tensor], Tensor]:
    """A detector that says how red an image is."""
    return lambda images: images[:, 0].float().mean((1, 2)) / 255


def test_erase_takes_a_pipeline_in_memory() -> None:
    pipeline, before = build_tiny_sdxl(), build_tiny_sdxl()
    options = ["model=sdxl", "stages=[textual]", "trainer.accelerator=cpu", "trainer.precision=32-true"]
    assert erase(pipeline, WEAPONS, *options) is pipeline
    changed = {
        name
        for name, tensor in pipeline.unet.state_dict().items()
        if not torch.equal(tensor, before.unet.state_dict()[name])
    }
    streams = adapter_of(before).streams().values()
    assert changed == {f"{name}.weight" for stream in streams for name in stream.entries}


# Autoencoder and folders


def test_the_autoencoder_decodes_in_float32(folder: Path) -> None:
    adapter, exact = load_adapter(folder, dtype=torch.float16), load_adapter(folder)
    seen: list[torch.dtype] = []
    adapter.vae.decoder.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    latents = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        images = adapter.decode(latents)
    assert seen == [torch.float32] and adapter.vae.dtype == torch.float16
    assert largest_difference(images, exact.decode(latents)) <= 1
    before = adapter.fingerprint()
    adapter.encode_images(images)
    assert adapter.fingerprint() == before
    adapter.vae.register_to_config(force_upcast=False)
    adapter.decode(latents)
    assert seen[-1] == torch.float16


def test_channels_are_standardised_as_the_pipeline_does() -> None:
    pipeline = build_tiny_sdxl()
    plain = drawn(pipeline)
    pipeline.vae.register_to_config(latents_mean=[0.5, 0.0, -0.5, 1.0], latents_std=[2.0, 1.0, 0.5, 1.5])
    adapter = SDXLAdapter(pipeline)
    assert moved(drawn_here(adapter), drawn(pipeline)) <= 1 and moved(drawn(pipeline), plain) > 1
    latents = torch.randn(2, *adapter.latent_shape)
    torch.testing.assert_close(adapter._scaled(adapter._unscaled(latents)), latents, atol=1e-5, rtol=1e-4)


def test_folders_open_and_every_part_counts(folder: Path, shared: SDXLAdapter) -> None:
    adapter = load_adapter(folder)
    assert isinstance(adapter, SDXLAdapter) and adapter.fingerprint() == shared.fingerprint()
    assert adapter.latent_shape == (4, 8, 8)
    assert list(adapter.networks()) == ["unet", "text_encoder", "text_encoder_2", "vae"]
    for name in ("text_encoder", "text_encoder_2"):
        other = SDXLAdapter(build_tiny_sdxl())
        next(other.networks()[name].parameters()).data += 0.1
        assert other.fingerprint() != shared.fingerprint()
        assert other.text_fingerprint() != shared.text_fingerprint()


# One file


def test_a_single_file_holds_the_same_pipeline(folder: Path, tmp_path: Path) -> None:
    """Written, then read by diffusers' own from_single_file, and by the project."""
    file = tmp_path / "erased.safetensors"
    pipeline = build_tiny_sdxl()
    save_single_file(file, SDXLAdapter(pipeline), "base", "0123")
    theirs = StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), add_watermarker=False)
    ours = load_adapter(file, config=folder)
    for name, network in adapter_of(pipeline).networks().items():
        expected = network.state_dict()
        for found in (getattr(theirs, name).state_dict(), ours.networks()[name].state_dict()):
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), name
    assert moved(drawn(theirs), drawn(pipeline)) == 0
    names = set(load_file(file))
    assert {
        "model.diffusion_model.label_emb.0.0.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    } <= names


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ("conditioner.", "StableDiffusionXLPipeline, as model.config says"),
        ("label_emb", r"without 4 of them, such as model\.diffusion_model\.label_emb\.0\.0"),
        (
            "1.model.text_projection",
            r"without 1 of them, such as conditioner\.embedders\.1\.model\.text",
        ),
    ],
)
def test_an_incomplete_single_file_is_refused(folder: Path, tmp_path: Path, lost: str, reason: str) -> None:
    file = tmp_path / "x.safetensors"
    state = adapter_of(build_tiny_sdxl()).original_state()
    save_file({name: tensor for name, tensor in state.items() if lost not in name}, file)
    with pytest.raises(InputError, match=reason):
        load_adapter(file, config=folder)


# Whole networks


def test_names_and_counts_at_full_size() -> None:
    pipeline = build_tiny_sdxl(widths=(768, 1280), pooled=1280)
    with torch.device("meta"):
        pipeline.unet = unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    adapter = SDXLAdapter(pipeline, resolution=1024)
    assert adapter.side == 1024 and sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    streams = adapter.streams()
    context, pooled = streams["context"], streams["pooled"]
    assert (context.width, pooled.width) == (2048, 1280)
    assert len(context.entries) == 140 and list(pooled.entries) == [LINEAR_1]
    assert sum(entry.module.weight.numel() for entry in context.entries.values()) == 340_787_200
    assert pooled.entries[LINEAR_1].module.weight.shape == (1280, 2816)
    queries = adapter.trainable("*.to_q")
    assert len(queries) == 140 and sum(query.numel() for query in queries.values()) == 204_800_000
    names = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_state(unet).items()}
    converted = convert_ldm_unet_checkpoint(names, dict(unet.config))
    expected = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == expected


# Refusals


def incomplete(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.text_encoder, pipeline.tokenizer = None, None


def inverted_once(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.tokenizer.add_tokens("<x>")
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))


def swapped(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.text_encoder = CLIPTextModelWithProjection(pipeline.text_encoder.config)


def refined(pipeline: StableDiffusionXLPipeline) -> None:
    width = POOLED + 5 * pipeline.unet.config.addition_time_embed_dim
    pipeline.unet = again(pipeline, projection_class_embeddings_input_dim=width)


def distilled(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.unet = again(pipeline, time_cond_proj_dim=8)


def without_pooled(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.unet = again(pipeline, addition_embed_type=None)


def narrow(pipeline: StableDiffusionXLPipeline) -> None:
    pipeline.unet = again(pipeline, cross_attention_dim=WIDTHS[1])


def again(pipeline: StableDiffusionXLPipeline, **settings) -> UNet2DConditionModel:
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    return UNet2DConditionModel.from_config(config | settings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (incomplete, "with a text_encoder, got none"),
        (inverted_once, r"same tokens, got others in their vocabularies, such as '<x>'"),
        (swapped, "gives states of every position first"),
        (refined, "six sizes|6 sizes of width"),
        (distilled, "guidance scale"),
        (without_pooled, "addition_embed_type None"),
        (narrow, f"width {sum(WIDTHS)}"),
    ],
)
def test_models_that_the_method_does_not_fit_are_refused(
    change: Callable[[StableDiffusionXLPipeline], None], reason: str
) -> None:
    pipeline = build_tiny_sdxl()
    change(pipeline)
    with pytest.raises(InputError, match=rf"model: .*({reason})"):
        adapter_of(pipeline)


def test_a_folder_without_a_second_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    for name, reason in (("text_encoder_2", "text_encoder_2 of the library"), ("tokenizer_2", "tokenizer_2")):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {name: [None, None]}))
        with pytest.raises(InputError, match=reason):
            load_adapter(tmp_path)
