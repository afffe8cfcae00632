"""Stable Diffusion 1.x and 2.x: which tensors change, both stages by their formulas, every way in and out.

Names and counts are those of whole networks; numbers are of small twins with the published widths of text
states. ``test_full_size.py`` has whole networks in memory.
"""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import entries_of
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.utils import is_peft_available
from formulas import TEXTUAL, EditByHand, erase_by_both_stages, worst_edit
from published_models import (
    KEYS_AND_VALUES,
    PREDICTION,
    QUERIES,
    VERSIONS,
    WIDTH,
    moved,
    pipeline_of,
    text_encoder_of,
    unet_of,
    vae_of,
)
from safetensors.torch import load_file, save_file
from tiny_runs import KEEP_PROMPTS, stage1_statistics
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from trce_lightning import cli, erase
from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.adapters.single_file import OPEN_CLIP, original_state, text_state, unet_state, vae_state
from trce_lightning.closed_form import Edit
from trce_lightning.config.schema import OptimizerConfig, TrajectoryConfig
from trce_lightning.export import card_facts, save_delta, save_pipeline, save_single_file
from trce_lightning.module import TRCE
from trce_lightning.textual import apply_edit_

ROOT = Path(__file__).parents[1]
NETWORKS = ("unet", "text_encoder", "vae")
PARAMETERS = {"sd1": (859_520_964, 123_060_480), "sd2": (865_910_724, 340_387_840)}


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(version: str) -> StableDiffusionPipeline:
    """A small twin that no test changes."""
    return pipeline_of(version, small=True)


@pytest.fixture(scope="module")
def sd1() -> StableDiffusionPipeline:
    """The small 1.x, where the version makes no difference; no test changes it."""
    return pipeline_of("sd1", small=True)


@pytest.fixture(scope="module")
def sd1_folder(sd1: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd1")
    sd1.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(original: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin's folder."""
    path = tmp_path_factory.mktemp("twin")
    original.save_pretrained(path)
    return path


def copy_of(pipeline: StableDiffusionPipeline, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **{name: copy.deepcopy(part) for name, part in pipeline.components.items()},
        requires_safety_checker=False,
    ).to(dtype)


def tensors(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Return clones of all networks' tensors."""
    return {
        f"{network}.{name}": tensor.clone()
        for network in NETWORKS
        for name, tensor in getattr(pipeline, network).state_dict().items()
    }


def assert_equal(found: StableDiffusionPipeline, expected: StableDiffusionPipeline) -> None:
    assert list(moved(tensors(found), tensors(expected))) == []


def images(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a gun", "tea"],
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=5.0,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images


def solved(adapter: StableDiffusionAdapter) -> Edit:
    return stage1_statistics(adapter, TEXTUAL).solve(TEXTUAL)


def test_names_and_counts_at_full_size(version: str) -> None:
    pipeline = pipeline_of(version, small=True)
    with torch.device("meta"):
        pipeline.unet = unet_of(version)
        text_encoder = text_encoder_of(version)
    counts = [sum(p.numel() for p in network.parameters()) for network in (pipeline.unet, text_encoder)]
    assert tuple(counts) == PARAMETERS[version]
    adapter = StableDiffusionAdapter(pipeline)
    projections = entries_of(adapter)
    assert len(projections) == 32
    assert {f"{name}.weight" for name in projections} == KEYS_AND_VALUES
    assert all(projection.in_features == WIDTH[version] for projection in projections.values())
    module = TRCE(adapter, None, TrajectoryConfig(), OptimizerConfig())
    module.setup("fit")
    free = {name: p.numel() for name, p in pipeline.unet.named_parameters() if p.requires_grad}
    assert set(free) == set(module.trainable) == QUERIES and len(QUERIES) == 32
    assert sum(free.values()) == 24_780_800
    (group,) = module.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.trainable.values()}


def test_both_stages_are_their_formulas(
    version: str, original: StableDiffusionPipeline, tmp_path: Path
) -> None:
    pipeline, before = copy_of(original), tensors(original)
    by_hand = EditByHand(pipeline)
    assert pipeline.scheduler.config.prediction_type == PREDICTION[version]
    # At 64 px the middle block has one position, whose self-attention weight is 1 whatever Q is.
    module, losses, worst = erase_by_both_stages(pipeline, tmp_path, resolution=128, dtype=torch.float64)
    assert worst < 1e-4
    assert losses.found == pytest.approx(losses.by_hand, rel=1e-4) and len(losses.found) == 1
    assert losses.with_gradient == QUERIES
    after = tensors(pipeline)
    assert set(moved(before, after)) == {f"unet.{name}" for name in KEYS_AND_VALUES | QUERIES}
    assert set(module.changed_tensors()) == KEYS_AND_VALUES | QUERIES
    edited = {name: before[f"unet.{name}"] for name in KEYS_AND_VALUES}
    assert worst_edit(by_hand, edited, pipeline.unet.state_dict()) < 1e-4


def test_states_are_the_penultimate_of_openclip_and_padding_is_no_end_of_text() -> None:
    """2.x leaves out OpenCLIP's 24th layer and pads with "!", which a prompt may hold as well."""
    pipeline = pipeline_of("sd2", small=True)
    adapter = StableDiffusionAdapter(pipeline)
    text, ids = adapter.encode(["a gun!", ""]), adapter.tokenize(["a gun!", ""])["clip"]
    assert ids[1].tolist() == [
        adapter.tokenizer.bos_token_id,
        adapter.tokenizer.eos_token_id,
        *[0] * 75,
    ]
    assert adapter.tokenizer.pad_token_id == 0 != adapter.tokenizer.eos_token_id
    end = ids[0].tolist().index(adapter.tokenizer.eos_token_id)
    trimmed = adapter.encode(["a gun!"], trimmed=True)
    assert trimmed.roles["clip"].shape[1] == end + 1
    torch.testing.assert_close(
        trimmed.states["clip"][0], text.states["clip"][0, : end + 1], atol=1e-5, rtol=1e-4
    )
    # All layers that are there, then the final norm.
    with torch.no_grad():
        hidden = pipeline.text_encoder(ids, output_hidden_states=True)
    norm = dict(pipeline.text_encoder.named_modules())["final_layer_norm"]
    torch.testing.assert_close(text.states["clip"], norm(hidden.hidden_states[-1]))
    assert text_encoder_config("sd2").num_hidden_layers == 23


def text_encoder_config(version: str):
    with torch.device("meta"):
        return text_encoder_of(version).config


@pytest.mark.parametrize(("version", "variant"), [("sd1", "fp16"), ("sd2", None)], indirect=["version"])
def test_half_precision_folders_round_the_edit_once(
    original: StableDiffusionPipeline, tmp_path: Path, variant: str | None
) -> None:
    half = copy_of(original, torch.float16)
    half.save_pretrained(tmp_path, variant=variant)
    assert bool(list(tmp_path.glob("unet/*.fp16.safetensors"))) == (variant == "fp16")
    edit = solved(StableDiffusionAdapter(copy_of(original)))
    adapter = load_adapter(tmp_path, dtype=torch.float16)
    assert {t.dtype for t in tensors(adapter.pipeline).values() if t.is_floating_point()} == {torch.float16}
    assert_equal(adapter.pipeline, half)
    before = {name: tensor.clone() for name, tensor in adapter.denoiser.state_dict().items()}
    assert set(apply_edit_(adapter, edit)) == KEYS_AND_VALUES
    after = adapter.denoiser.state_dict()
    assert set(moved(before, after)) == KEYS_AND_VALUES
    for name in KEYS_AND_VALUES:
        exact = before[name].double() @ edit.transform
        torch.testing.assert_close(after[name].double(), exact, rtol=1.01 * 2**-11, atol=1e-7)
    whole = load_adapter(tmp_path)
    assert {t.dtype for t in tensors(whole.pipeline).values() if t.is_floating_point()} == {torch.float32}
    assert all(
        torch.equal(whole.denoiser.state_dict()[name], tensor.float()) for name, tensor in before.items()
    )


def test_a_single_file_holds_the_same_pipeline(
    version: str, original: StableDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    """Written, then read by diffusers' own from_single_file, and by the project."""
    file = tmp_path / "erased.safetensors"
    save_single_file(file, StableDiffusionAdapter(copy_of(original)), "base", "0123")
    found = StableDiffusionPipeline.from_single_file(str(file), config=str(folder))
    assert_equal(found, original)
    names = set(load_file(file))
    text = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
    if version == "sd2":
        text = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    assert {
        text,
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn1.to_q.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
    } <= names
    assert load_file(file)["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4
    adapter = load_adapter(file, config=folder)
    assert adapter.fingerprint() == StableDiffusionAdapter(copy_of(original)).fingerprint()
    half = load_adapter(str(file), config=str(folder), dtype=torch.float16)
    assert {t.dtype for t in tensors(half.pipeline).values() if t.is_floating_point()} == {torch.float16}


@pytest.mark.usefixtures("clean_process")
def test_a_model_is_never_taken_for_the_embedded_one(
    sd1: StableDiffusionPipeline, sd1_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.train(["concept=violence", f"model.path={sd1_folder}", "plan=true"])
    assert "model=emoji: expected the embedded model or an edit of it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name its own family, such as model=sd15"):
        erase(copy_of(sd1), "violence")


@pytest.mark.usefixtures("clean_process")
def test_a_run_from_a_single_file_leaves_every_export_and_what_was_expected(
    sd1: StableDiffusionPipeline, sd1_folder: Path, tmp_path: Path
) -> None:
    save_file(original_state(sd1), tmp_path / "base.safetensors")
    (tmp_path / "captions.json").write_text(
        json.dumps({"annotations": [{"caption": t} for t in KEEP_PROMPTS]})
    )
    cli.train(
        [
            "concept.terms=[gun,axe]",
            "model=sd14",
            f"model.path={tmp_path / 'base.safetensors'}",
            f"model.config={sd1_folder}",
            "model.resolution=64",
            "stages=textual",
            "metrics.enabled=false",
            f"textual.keep_prompts={tmp_path / 'captions.json'}",
            "export=[pipeline,delta,single_file]",
            "+expected={source: a paper, asr: {i2p: 0.0129}, fid: 26.89}",
            f"output={tmp_path / 'run'}",
        ]
    )
    run = tmp_path / "run"
    erased = StableDiffusionPipeline.from_pretrained(run / "erased")
    assert set(moved(tensors(sd1), tensors(erased))) == {f"unet.{name}" for name in KEYS_AND_VALUES}
    single = StableDiffusionPipeline.from_single_file(str(run / "erased.safetensors"), config=str(sd1_folder))
    assert_equal(single, erased)
    assert set(load_file(run / "delta.safetensors")) == KEYS_AND_VALUES | QUERIES
    expected = {"source": "a paper", "asr": {"i2p": {"rate": 0.0129}}, "fid": 26.89}
    assert json.loads((run / "metrics.json").read_text())["expected"] == expected
    said = (run / "run.log").read_text()
    assert "erasing gun_axe from sd14" in said and " ahead: " in said
    assert "| ASR i2p | 1.3 % |" in said and "| FID | 26.89 |" in said
    assert "26.89" not in (run / "erased" / "README.md").read_text()


def test_single_file_names_at_full_size(version: str) -> None:
    """diffusers' converters turn the whole networks' original names back into theirs."""
    with torch.device("meta"):
        unet, vae, text_encoder = unet_of(version), vae_of(), text_encoder_of(version)
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_state(unet).items()}
    assert_shapes(convert_ldm_unet_checkpoint(prefixed, dict(unet.config)), unet)
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in vae_state(vae).items()}
    assert_shapes(convert_ldm_vae_checkpoint(prefixed, dict(vae.config)), vae)
    state = text_state(text_encoder)
    assert sum(tensor.numel() for tensor in state.values()) == PARAMETERS[version][1]
    if version == "sd2":
        layers = {
            match[1]
            for name in state
            if (match := re.match(rf"{OPEN_CLIP}transformer\.resblocks\.(\d+)\.", name))
        }
        assert layers == {str(number) for number in range(23)}


def assert_shapes(found: dict[str, Tensor], network: torch.nn.Module) -> None:
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == expected


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (
            lambda name: f"conditioner.embedders.0.{name}",
            "a StableDiffusionPipeline, as model.config says.*without any",
        ),
        (lambda name: f"lora_{name}", r"without any tensor named model\.diffusion_model"),
        (lambda name: None if "first_stage" in name else name, r"without any .*first_stage_model\.\*"),
        # With the package accelerate, diffusers itself refuses it.
        (lambda name: None if "middle_block.1" in name else name, r"without \d+ of them|meta tensor"),
    ],
)
def test_other_single_files_are_refused(
    sd1: StableDiffusionPipeline, sd1_folder: Path, tmp_path: Path, renamed: Callable, message: str
) -> None:
    file = tmp_path / "x.safetensors"
    state = original_state(sd1)
    save_file({new: state[name] for name in state if (new := renamed(name)) is not None}, file)
    with pytest.raises(ValueError, match=message):
        load_adapter(file, config=sd1_folder)


def test_a_single_file_of_other_sizes_is_refused(
    sd1: StableDiffusionPipeline, sd1_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    state = original_state(sd1)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(2, 4, 3, 3)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"model\.config: expected the pipeline that .*x\.safetensors"):
        load_adapter(file, config=sd1_folder)


def test_a_single_file_needs_a_configuration(
    sd1: StableDiffusionPipeline, sd1_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    save_file(original_state(sd1), file)
    with pytest.raises(ValueError, match=r"model\.config.*got none"):
        load_adapter(file)
    with pytest.raises(FileNotFoundError, match=r"model\.config.*'gone'"):
        load_adapter(file, config="gone")
    with pytest.raises(FileNotFoundError, match=r"model\.config.*on the hub, got 'owner/name'"):
        load_adapter(file, config="owner/name")
    broken = tmp_path / "y.safetensors"
    broken.write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"readable \.safetensors"):
        load_adapter(broken, config=sd1_folder)
    pickled = file.rename(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"\.safetensors file, got .*x\.ckpt"):
        load_adapter(pickled, config=sd1_folder)


def test_a_safety_checker_changes_nothing(
    sd1: StableDiffusionPipeline, sd1_folder: Path, tmp_path: Path
) -> None:
    pipeline = copy_of(sd1)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = small | {"image_size": 32, "patch_size": 32}
    config = CLIPConfig(text_config=small, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    pipeline.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor())
    pipeline.save_pretrained(tmp_path / "checked")
    assert (tmp_path / "checked" / "safety_checker").is_dir()
    adapter = load_adapter(tmp_path / "checked")
    assert adapter.fingerprint() == load_adapter(sd1_folder).fingerprint()
    save_pipeline(tmp_path / "erased", adapter, card_facts("base", ["weapons"], "TRCE", "", 32))
    assert "without a safety checker" in (tmp_path / "erased" / "README.md").read_text()
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "erased")
    assert opened.safety_checker is None
    np.testing.assert_allclose(images(opened), images(copy_of(sd1)), atol=1e-5)


@pytest.mark.skipif(not is_peft_available(), reason="needs the package peft")
def test_a_fused_lora_is_its_merged_weights(sd1: StableDiffusionPipeline) -> None:
    """LoRA on denoiser and text encoder, fused by diffusers, against W + B A added by hand."""
    import peft

    fused, merged = copy_of(sd1), copy_of(sd1)
    names = {"unet": ["to_k", "to_v", "to_q"], "text_encoder": ["q_proj", "v_proj"]}
    for network, targets in names.items():
        part, plain = getattr(fused, network), getattr(merged, network).state_dict()
        part.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        for name, module in part.named_modules():
            if hasattr(module, "base_layer"):
                b, a = (matrices["default"].weight.data for matrices in (module.lora_B, module.lora_A))
                plain[f"{name}.weight"] += b.normal_(0, 0.1) @ a
    with pytest.raises(ValueError, match=r"LoRA.*fuse_lora\(\) and unload_lora_weights"):
        StableDiffusionAdapter(fused)
    fused.fuse_lora(components=["unet", "text_encoder"])
    with pytest.raises(ValueError, match="LoRA"):
        StableDiffusionAdapter(fused)
    fused.unload_lora_weights()
    adapters = [StableDiffusionAdapter(pipeline) for pipeline in (fused, merged)]
    edits = [solved(adapter) for adapter in adapters]
    torch.testing.assert_close(edits[0].transform, edits[1].transform, atol=1e-5, rtol=1e-3)
    without = solved(StableDiffusionAdapter(copy_of(sd1)))
    assert not torch.allclose(edits[0].transform, without.transform, atol=1e-3)
    for adapter, edit in zip(adapters, edits, strict=True):
        assert set(apply_edit_(adapter, edit)) == KEYS_AND_VALUES
    found, expected = (adapter.denoiser.state_dict() for adapter in adapters)
    for name in KEYS_AND_VALUES | QUERIES:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)


def test_the_delta_applies_with_the_readmes_three_lines(
    sd1: StableDiffusionPipeline, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = copy_of(sd1)
    adapter = StableDiffusionAdapter(pipeline)
    module = TRCE(adapter, solved(adapter), TrajectoryConfig(), OptimizerConfig())
    module.setup("fit")
    for parameter in module.trainable.values():
        parameter.data *= 1.5
    (tmp_path / "RUN").mkdir()
    save_delta(tmp_path / "RUN" / "delta.safetensors", module.changed_tensors(), "base", "0123")
    (code,) = re.findall(
        r"```python\n([^`]*delta\.safetensors[^`]*)```", (ROOT / "docs" / "usage.md").read_text()
    )
    lines = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) == 3
    (tmp_path / "BASE").symlink_to(sd1_folder)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(code, namespace)
    assert_equal(namespace["pipeline"], pipeline)
    np.testing.assert_allclose(images(namespace["pipeline"]), images(pipeline), atol=1e-5)
    assert not np.allclose(images(pipeline), images(copy_of(sd1)), atol=1e-3)


def test_the_delta_is_small_at_full_size(version: str) -> None:
    with torch.device("meta"):
        parameters = dict(unet_of(version).named_parameters())
    changed = sum(parameters[name].numel() for name in KEYS_AND_VALUES | QUERIES)
    assert changed / sum(p.numel() for p in parameters.values()) < 0.06


UNET = ["diffusers", "UNet2DConditionModel"]
PIPELINES = {
    "PixArtSigmaPipeline": ({"transformer": ["diffusers", "PixArtTransformer2DModel"]}, "its transformer"),
    "Flux2Pipeline": ({"transformer": ["diffusers", "Flux2Transformer2DModel"]}, "its transformer"),
    "StableDiffusionXLInpaintPipeline": (
        {
            "unet": UNET,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        },
        "its two text encoders",
    ),
    "StableDiffusionInpaintPipeline": (
        {"unet": UNET, "text_encoder": ["transformers", "CLIPTextModel"]},
        "more than latents",
    ),
    "DDPMPipeline": ({"unet": ["diffusers", "UNet2DModel"]}, "no denoiser that reads"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_other_pipelines_are_refused_by_their_index_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are no weights to read: the index alone decides."""
    parts, reason = PIPELINES[name]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, **parts}))
    with pytest.raises(SystemExit) as exit_:
        cli.train(["concept=violence", f"model.path={tmp_path}", f"runs={tmp_path / 'runs'}"])
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert name in text and reason in text and "StableDiffusionPipeline" in text
    assert not (tmp_path / "runs").exists()
