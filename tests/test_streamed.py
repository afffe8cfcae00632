"""Stage 1 on the files of a denoiser that is never loaded: equal to the edit in memory, and its refusals."""

import hashlib
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_flow_runs import RUN
from tiny_flow import T5_LENGTH, build_flux, build_sd3
from tiny_runs import stage1_statistics
from tiny_sdxl import build_tiny_sdxl

from trce_lightning import cli
from trce_lightning.adapters import load_adapter, load_stored, stored_pipeline
from trce_lightning.adapters.stored import StoredNetwork
from trce_lightning.apply import main as apply
from trce_lightning.closed_form import Edit
from trce_lightning.config.schema import TextualConfig
from trce_lightning.emoji.domain import EmojiDomain, EmojiFluxDomain, EmojiSD3Domain, EmojiXLDomain
from trce_lightning.emoji.siblings import opened_folder
from trce_lightning.errors import InputError
from trce_lightning.export import save_edit, save_stored_delta, save_stored_pipeline
from trce_lightning.runtime.tensor_files import write_one_by_one
from trce_lightning.textual import apply_edit_, edited_tensors, stored_edits

CARD: dict[str, Any] = {"base": "b", "concepts": "c", "method": "m", "table": "", "changed": 0}
BUILDERS = {"sd": build_tiny_pipeline, "sdxl": build_tiny_sdxl, "sd3": build_sd3, "flux": build_flux}
SOURCES = {
    "emoji": lambda: EmojiDomain.source,
    "emoji_xl": lambda: opened_folder(EmojiXLDomain.family),
    "emoji_sd3": lambda: opened_folder(EmojiSD3Domain.family),
    "emoji_flux": lambda: opened_folder(EmojiFluxDomain.family),
}
FORM = TextualConfig(ridge=1e-2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of random weights in several shards of each family."""
    parent = tmp_path_factory.mktemp("models")
    for name, build in BUILDERS.items():
        build().save_pretrained(parent / name, max_shard_size="20KB")
    return {name: parent / name for name in BUILDERS}


def options(name: str) -> dict[str, Any]:
    if name in ("emoji_sd3", "emoji_flux"):
        return {"max_sequence_length": 32}
    return {"max_sequence_length": T5_LENGTH} if name in ("sd3", "flux") else {}


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def solved(source: Path, config: TextualConfig, name: str) -> tuple[Edit, dict[str, torch.Tensor]]:
    """Return the edit of a model in memory, and its edited tensors."""
    adapter = load_adapter(source, **options(name))
    edit = stage1_statistics(adapter, config).solve(config)
    state = dict(adapter.denoiser.named_parameters())
    return edit, {key: state[key].detach() for key in apply_edit_(adapter, edit)}


def check_equal(source: Path, config: TextualConfig, name: str, file: Path) -> None:
    before = digests(source)
    edit, expected = solved(source, config, name)
    adapter, pipeline = load_stored(source, **options(name))
    described = [*adapter.denoiser.parameters(), *adapter.vae.parameters()]
    assert all(parameter.is_meta for parameter in described)
    streamed = stage1_statistics(adapter, config).solve(config)
    assert torch.equal(streamed.transform, edit.transform)
    edits = list(stored_edits(adapter, streamed).values())
    save_stored_delta(file, pipeline.denoiser, edits, {}, torch.float32)
    found = load_file(file)
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    original = load_adapter(source, **options(name)).denoiser.state_dict()
    assert not any(torch.equal(found[key], original[key]) for key in found)
    assert digests(source) == before


@pytest.mark.parametrize("name", SOURCES)
def test_the_files_of_shipped_models_get_the_edit_of_memory_to_the_bit(name: str, tmp_path: Path) -> None:
    check_equal(SOURCES[name](), FORM, name, tmp_path / "delta.safetensors")


@pytest.mark.parametrize("name", BUILDERS)
def test_shards_get_the_edit_of_memory_in_a_form_that_reads_weights(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert len(stored_pipeline(folders[name]).denoiser.files) > 1
    config = TextualConfig(form="projection", ridge=1e-2, adversarial_rounds=1, matrices=["value"])
    check_equal(folders[name], config, name, tmp_path / "delta.safetensors")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_copy_opens_in_plain_diffusers_with_the_edited_tensors_alone_changed(
    name: str, variant: str | None, tmp_path: Path
) -> None:
    """A variant loses its name, so that nobody has to be told of it."""
    source, copy = tmp_path / "model", tmp_path / "copy"
    dtype = torch.float16 if variant else torch.float32
    BUILDERS[name]().to(dtype).save_pretrained(source, max_shard_size="20KB", variant=variant)
    edit, _ = solved(source, FORM, name)
    adapter, pipeline = load_stored(source, **options(name))
    edits = list(stored_edits(adapter, edit).values())
    save_stored_pipeline(copy, pipeline, edits, CARD)
    expected = dict(edited_tensors(pipeline.denoiser, edits))
    component = pipeline.denoiser.folder.name
    opened = DiffusionPipeline.from_pretrained(copy, dtype=dtype)
    original = DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variant)
    assert type(opened) is type(original)
    before, after = (getattr(p, component).state_dict() for p in (original, opened))
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(expected)
    assert all(torch.equal(after[key], expected[key].to(dtype)) for key in expected)
    assert not list(copy.rglob("*fp16*"))
    for part, network in original.components.items():
        if part != component and isinstance(network, torch.nn.Module):
            same = getattr(opened, part).state_dict()
            assert all(torch.equal(same[key], tensor) for key, tensor in network.state_dict().items())


def test_one_edited_tensor_is_in_memory_at_a_time(folders: dict[str, Path]) -> None:
    adapter, pipeline = load_stored(folders["sdxl"])
    edit = stage1_statistics(adapter, FORM).solve(FORM)
    seen: list[weakref.ref[torch.Tensor]] = []
    for name, tensor in edited_tensors(pipeline.denoiser, stored_edits(adapter, edit).values()):
        assert [earlier for earlier in seen if earlier() is not None] == [], name
        seen.append(weakref.ref(tensor))
        del tensor
    assert len(seen) == sum(len(stream.entries) for stream in adapter.streams().values()) > 2


@pytest.mark.usefixtures("clean_process")
def test_a_streamed_run_and_its_edit_on_another_day_equal_an_ordinary_run(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog\na red car\n")
    places = [f"model.path={folders['flux']}", f"textual.keep_prompts={captions}", f"cache={tmp_path / 'c'}"]
    common = ["model=flux_dev", *RUN, *places, "stages=[textual]"]
    cli.train([*common, f"output={tmp_path / 'ordinary'}"])
    cli.train([*common, "experiment=streamed", f"output={tmp_path / 'streamed'}"])
    ordinary, streamed = (load_file(tmp_path / run / "delta.safetensors") for run in ("ordinary", "streamed"))
    assert set(streamed) == {"context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"}
    assert all(torch.equal(streamed[key], ordinary[key]) for key in streamed)
    assert json.loads((tmp_path / "streamed" / "metrics.json").read_text())["seconds"]["writing"] >= 0
    opened = [
        DiffusionPipeline.from_pretrained(tmp_path / run / "erased") for run in ("ordinary", "streamed")
    ]
    states = [pipeline.transformer.state_dict() for pipeline in opened]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    # Either run's edit says which tensors it edits, and no model needs to be opened.
    for run in ("ordinary", "streamed"):
        out, delta = tmp_path / f"{run}-copy", tmp_path / f"{run}.safetensors"
        edit = str(tmp_path / run / "edit.safetensors")
        apply([edit, str(folders["flux"]), "--out", str(out), "--delta", str(delta)])
        again = DiffusionPipeline.from_pretrained(out).transformer.state_dict()
        assert all(torch.equal(states[0][key], again[key]) for key in again)
        assert all(torch.equal(streamed[key], tensor) for key, tensor in load_file(delta).items())


def test_a_plan_writes_nothing(folders: dict[str, Path], tmp_path: Path, capfd: Any) -> None:
    places = [f"model.path={folders['flux']}", f"runs={tmp_path / 'runs'}", f"cache={tmp_path / 'c'}"]
    cli.train(["model=flux_dev", *RUN, *places, "experiment=streamed", "plan=true"])
    assert "stage 1 alone, on the files of its transformer" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def broken(kind: str, source: Path, folder: Path) -> Path:
    """Return a copy of a model whose denoiser's files are not usable."""
    shutil.copytree(source, folder)
    part = folder / "transformer"
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "context_embedder.weight"
    file = part / content["weight_map"][name]
    tensors = load_file(file)
    match kind:
        case "missing tensor":
            del content["weight_map"][name]
            index.write_text(json.dumps(content))
        case "missing shard":
            file.unlink()
        case "wrong shape":
            save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, file)
        case "quantized":
            save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
        case "quantized config":
            settings = json.loads((part / "config.json").read_text())
            (part / "config.json").write_text(json.dumps(settings | {"quantization_config": {}}))
        case "damaged":
            file.write_bytes(file.read_bytes()[:-10])
        case "pickled":
            for weights in part.glob("diffusion*"):
                weights.unlink()
            (part / "diffusion_pytorch_model.bin").touch()
        case "single file":
            return file
    return folder


REFUSALS = {
    "missing tensor": r"without 1 of them, such as context_embedder\.weight",
    "missing shard": r"which its index names; get the folder anew",
    "wrong shape": r"1 of other shapes, such as context_embedder\.weight: \[32, 39\] for \[32, 40\]",
    "quantized": r"got F8_E4M3 in .*quantized weights can't be edited",
    "quantized config": r"expected plain weights of transformer, got quantized ones",
    "damaged": r"got damaged ones in",
    "pickled": r"as \.safetensors, got pickled ones alone",
    "single file": r"got the single file .*, whose tensors have other names",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_files_that_cannot_be_edited_are_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = broken(kind, folders["flux"], tmp_path / "model")
    with pytest.raises(InputError, match=REFUSALS[kind]):
        load_stored(source, max_sequence_length=T5_LENGTH)


def test_an_edit_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    edits: dict[str, Any] = {}
    for name in ("flux", "sd"):
        adapter, _ = load_stored(folders[name], **options(name))
        edits[name] = list(stored_edits(adapter, stage1_statistics(adapter, FORM).solve(FORM)).values())
    denoiser = StoredNetwork(folders["flux"] / "transformer")
    with pytest.raises(InputError, match="expected all tensors of transformer"):
        save_stored_delta(tmp_path / "delta.safetensors", denoiser, edits["sd"], {})
    wider = [edits["flux"][0]._replace(transform=torch.eye(50, dtype=torch.float64))]
    with pytest.raises(InputError, match=r"with 50 columns or more.*this edit belongs to another model"):
        save_stored_delta(tmp_path / "delta.safetensors", denoiser, wider, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["EDIT", "MODEL"], "expected --out FOLDER, --delta FILE or both, got none"),
        (["EDIT", "MODEL", "--out", "."], "--out: expected a new place, got '.', which is there"),
        (["no-file", "MODEL", "--out", "new"], "EDIT: no file 'no-file'"),
        (
            ["EDIT", "no-model", "--out", "new"],
            "expected a diffusers pipeline folder, got 'no-model'",
        ),
        (["OLD", "MODEL", "--out", "new"], "expected an edit that names the tensors it edits, got"),
    ],
)
def test_an_edit_that_cannot_be_applied_is_refused(
    typed: list[str], said: str, folders: dict[str, Path], tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, _ = load_stored(folders["sd"])
    statistics = stage1_statistics(adapter, FORM)
    edit = statistics.solve(FORM)
    save_edit(Path("EDIT"), statistics, edit, FORM, "base", "0123", stored_edits(adapter, edit))
    save_file({"transform": edit.transform}, "OLD")
    Path("MODEL").symlink_to(folders["sd"])
    with pytest.raises(SystemExit):
        apply(typed)
    assert said in " ".join(capfd.readouterr().err.split())
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("stages=[textual,trajectory]", r"'stages': expected \[textual\] with streamed=true"),
        ("metrics.enabled=true", r"'metrics\.enabled': expected false with streamed=true"),
        ("method=uce", r"'method': expected trce with streamed=true"),
        ("export=[single_file]", r"'export': expected pipeline, delta or both with streamed=true"),
        ("trainer.devices=2", r"expected one device"),
    ],
)
def test_options_that_need_the_denoiser_are_refused(typed: str, said: str, capfd: Any) -> None:
    with pytest.raises(SystemExit):
        cli.train(["concept=violence", "experiment=streamed", typed])
    assert re.search(said, " ".join(capfd.readouterr().err.split()))


def test_a_file_of_tensors_that_come_one_by_one_is_a_plain_one(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7)}
    file = tmp_path / "x.safetensors"
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_one_by_one(file, shapes, torch.bfloat16, iter(tensors.items()), {"base_model": "ü"})
    found = load_file(file)
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in tensors.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"base_model": "ü"}
    with pytest.raises(ValueError, match="zip"):
        write_one_by_one(tmp_path / "y", shapes, torch.float32, [("b", tensors["b"])], {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
