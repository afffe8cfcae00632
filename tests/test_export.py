"""The files that a run leaves open without any of its code: delta, pipeline folder, edit."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import WEAPONS, stage1_statistics
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.closed_form import Edit, KeepStatistics, merge_pairs, pair_statistics, solve_edit
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import FORMS, OptimizerConfig, TextualConfig, TrajectoryConfig
from trce_lightning.errors import InputError
from trce_lightning.export import (
    card_facts,
    compact_pairs,
    delta_name,
    load_deltas,
    load_edit,
    save_delta,
    save_edit,
    save_pipeline,
)
from trce_lightning.module import TRCE
from trce_lightning.textual import TextualStatistics

TEXTUAL = TextualConfig(eta=0.1, ridge=0.02)
CONCEPTS = [WEAPONS, Concept("drinks", {"beer": "milk"}, templates=("{}", "cold {}"))]


@dataclass(frozen=True)
class Erased:
    adapter: StableDiffusionAdapter
    changed: dict[str, Tensor]
    statistics: TextualStatistics
    edit: Edit


@pytest.fixture(scope="module")
def erased() -> Erased:
    """A pipeline with stage 1 applied and every trainable matrix moved."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    statistics = stage1_statistics(adapter, TEXTUAL, CONCEPTS)
    edit = statistics.solve(TEXTUAL)
    module = TRCE(adapter, edit, TrajectoryConfig(), OptimizerConfig())
    module.setup("fit")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return Erased(adapter, module.changed_tensors(), statistics, edit)


def images(pipeline: StableDiffusionPipeline) -> np.ndarray:
    options = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(["a gun", "tea"], generator=torch.Generator().manual_seed(0), **options).images


def test_the_delta_makes_the_erased_network_of_the_original(erased: Erased, tmp_path: Path) -> None:
    file = tmp_path / "delta.safetensors"
    save_delta(file, erased.changed, "base", "0123")
    pipeline = build_tiny_pipeline()
    before = images(pipeline)
    report = pipeline.unet.load_state_dict(load_file(file), strict=False)
    assert report.unexpected_keys == []
    expected = erased.adapter.denoiser.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert np.allclose(images(pipeline), images(erased.adapter.pipeline), atol=1e-5)
    assert not np.allclose(images(pipeline), before, atol=1e-3)
    with safe_open(file, "pt") as delta:
        assert delta.metadata() == {"base_model": "base", "fingerprint": "0123"}
        original = build_tiny_pipeline().unet.state_dict()
        assert not any(torch.equal(delta.get_tensor(name), original[name]) for name in delta.keys())  # noqa: SIM118


def test_the_pipeline_folder_opens_with_diffusers_alone(erased: Erased, tmp_path: Path) -> None:
    folder = tmp_path / "erased"
    card = card_facts("base/model", ["weapons", "drinks"], "TRCE (both)", "| asr | 0.1 |", 20)
    for _ in range(2):
        save_pipeline(folder, erased.adapter, card)
        assert list(tmp_path.iterdir()) == [folder]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert np.allclose(images(pipeline), images(erased.adapter.pipeline), atol=1e-5)
    assert not np.allclose(images(pipeline), images(build_tiny_pipeline()), atol=1e-3)
    text = (folder / "README.md").read_text()
    for part in (
        "base/model without weapons, drinks",
        "after TRCE (both) with",
        "| asr | 0.1 |",
        "tensors: 20",
    ):
        assert part in text
    assert re.match(r"---\n.*\n---\n#", text, re.DOTALL)
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} <= {
        ".json",
        ".safetensors",
        ".md",
        ".txt",
    }


def test_an_interrupted_save_leaves_the_old_folder(erased: Erased, tmp_path: Path) -> None:
    folder = tmp_path / "erased"
    save_pipeline(folder, erased.adapter, card_facts("base", ["weapons"], "TRCE", "", 1))
    with pytest.raises(KeyError):
        save_pipeline(folder, erased.adapter, {})
    assert "base without weapons" in (folder / "README.md").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_the_edit_is_solved_again_from_its_file(erased: Erased, form: str, tmp_path: Path) -> None:
    file = tmp_path / "edit.safetensors"
    options = {"null_space_share": 0.1, "matrices": ["value"], "adversarial_rounds": 1}
    config = dataclasses.replace(TEXTUAL, form=form, **options)
    pipeline = build_tiny_pipeline()
    pipeline.tokenizer.model_max_length = 16  # so that the empty prompt leaves directions free
    statistics = stage1_statistics(StableDiffusionAdapter(pipeline), config, CONCEPTS)
    edit = statistics.solve(config)
    save_edit(file, statistics, edit, config, "base", "0123", {})
    found, read = load_edit(file)
    assert read == config
    assert torch.equal(found.solve(read).transform, edit.transform)
    assert torch.equal(load_file(file)["transform"], edit.transform)
    # Without a concept, or with another form, it is another edit.
    alone = dataclasses.replace(found, states={"weapons": found.states["weapons"]})
    assert not torch.allclose(alone.solve(read).transform, edit.transform, atol=1e-3)
    other = next(name for name in ("ridge", "null_space") if name != form)
    changed = dataclasses.replace(read, form=other)
    assert not torch.allclose(found.solve(changed).transform, edit.transform, atol=1e-3)


def test_an_edits_file_says_what_it_holds_and_is_small(erased: Erased, tmp_path: Path) -> None:
    file = tmp_path / "edit.safetensors"
    save_edit(file, erased.statistics, erased.edit, TEXTUAL, "base", "0123", {})
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert (facts["base_model"], facts["fingerprint"]) == ("base", "0123")
    assert json.loads(facts["concepts"]) == {"weapons": 6, "drinks": 2}
    assert json.loads(facts["options"])["eta"] == TEXTUAL.eta
    assert {name: tensors[name].dtype for name in ("transform", "k")} == dict.fromkeys(
        ("transform", "k"), torch.float64
    )
    pairs = [
        pair_statistics(tensors[f"malicious.{name}"], tensors[f"safe.{name}"])
        for name in ("weapons", "drinks")
    ]
    keep = KeepStatistics(tensors["k"], float(facts["keep_weight"]))
    solved = solve_edit(merge_pairs(pairs), keep, eta=TEXTUAL.eta, ridge=TEXTUAL.ridge)
    assert torch.equal(solved.transform, tensors["transform"])
    assert solved.erase_residual == erased.edit.erase_residual
    one_concept = solve_edit(pairs[0], keep, eta=TEXTUAL.eta, ridge=TEXTUAL.ridge)
    assert not torch.allclose(one_concept.transform, tensors["transform"], atol=1e-3)


def test_many_pairs_are_kept_as_few_with_the_same_moments() -> None:
    malicious, safe = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fewer = compact_pairs(malicious, safe)
    assert [len(states) for states in fewer] == [12, 12]
    found, expected = pair_statistics(*fewer), pair_statistics(malicious, safe)
    torch.testing.assert_close(found.s, expected.s)
    torch.testing.assert_close(found.m, expected.m)
    assert found.safe_energy == pytest.approx(expected.safe_energy)
    few = malicious[:12], safe[:12]
    assert all(map(torch.equal, compact_pairs(*few), few))


def test_a_damaged_or_earlier_edit_is_refused_by_name(erased: Erased, tmp_path: Path) -> None:
    file = tmp_path / "edit.safetensors"
    save_file({"transform": erased.edit.transform}, file, {"eta": "0.1"})
    with pytest.raises(InputError, match=r"edit\.safetensors: expected an edit, .*run train\.py again"):
        load_edit(file)
    file.write_bytes(b"x")
    with pytest.raises(InputError, match=r"edit\.safetensors: expected an edit, .*run train\.py again"):
        load_edit(file)


def test_changed_tensors_make_the_erased_model_again(erased: Erased, tmp_path: Path) -> None:
    """A method may change the denoiser, a text encoder, or both."""
    encoder = {name: tensor + 1 for name, tensor in build_tiny_pipeline().text_encoder.state_dict().items()}
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    before = adapter.fingerprint()
    for component, tensors in {"unet": erased.changed, "text_encoder": encoder}.items():
        save_delta(tmp_path / delta_name(adapter, component), tensors, "tiny", before)
    assert {file.name for file in tmp_path.iterdir()} == {
        "delta.safetensors",
        "delta.text_encoder.safetensors",
    }
    load_deltas(tmp_path, adapter)
    assert adapter.fingerprint() != before
    for name, tensor in erased.adapter.denoiser.state_dict().items():
        assert torch.equal(adapter.denoiser.state_dict()[name], tensor), name
    for name, tensor in adapter.pipeline.text_encoder.state_dict().items():
        assert torch.equal(tensor, encoder[name]), name


def test_changed_tensors_of_other_weights_are_refused(tmp_path: Path) -> None:
    """All names and shapes fit, so only the fingerprint tells. Nothing is loaded then."""
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    before = adapter.fingerprint()
    with pytest.raises(InputError, match=r"expected changed tensors, such as delta\.safetensors, got none"):
        load_deltas(tmp_path, adapter)
    changed = {"conv_in.weight": adapter.denoiser.conv_in.weight.detach() + 1}
    save_delta(tmp_path / "delta.safetensors", changed, "tiny", before)
    encoder = adapter.pipeline.text_encoder.state_dict()
    save_delta(tmp_path / "delta.text_encoder.safetensors", encoder, "tiny", "another")
    with pytest.raises(InputError, match=r"text_encoder.*: expected a change of the weights of .* of other"):
        load_deltas(tmp_path, adapter)
    assert adapter.fingerprint() == before
