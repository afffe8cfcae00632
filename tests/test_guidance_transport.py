"""SPM's facilitated transport: γ by hand, applied once, and by the prompt of each image."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import TUNED, Harness
from safetensors.torch import save_file
from test_configs import composed
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.config.schema import EvalConfig
from trce_lightning.erasers.spm import SPM, Membranes
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate
from trce_lightning.generation.transport import FacilitatedTransport, transport_strength
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Text


def text(*states: list[float]) -> Text:
    """Prompts of two positions with one number each."""
    rows = torch.tensor(states)[..., None]
    return Text({"clip": rows}, {"clip": torch.ones(rows.shape[:2], dtype=torch.int8)})


def test_the_strength_is_the_larger_of_likeness_and_share_of_tokens() -> None:
    """cos((3, 4), (1, 0)) = 0.6 and cos((0, −1), (1, 0)) = 0; one of two, and both, of a phrase's tokens."""
    prompts, phrase = text([3.0, 4.0], [0.0, -1.0], [0.0, 1.0]), text([1.0, 0.0])
    found = transport_strength(prompts, phrase, [{7, 8}, {7}, {5, 6, 7}], [{5, 7}])
    torch.testing.assert_close(found, torch.tensor([0.6, 0.5, 1.0]))
    several = transport_strength(prompts, text([1.0, 0.0], [0.0, -2.0]), [set()] * 3, [{1}, {2}])
    torch.testing.assert_close(several, torch.tensor([0.6, 1.0, 0.0]))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of random numbers, as a run stores it."""
    folder = tmp_path_factory.mktemp("lora")
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    module = SPM(**TUNED).module(Harness(adapter, folder).job)
    assert isinstance(module.extra, Membranes)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.extra.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    save_file(module.extra.lora(), folder / "lora.safetensors")
    return folder / "lora.safetensors"


def images(
    adapter: StableDiffusionAdapter, variation: Variation, *prompts: str, scale: float = 2.0
) -> Tensor:
    records = [PromptRecord(f"{i}", prompt, seed=i) for i, prompt in enumerate(prompts)]
    return generate(
        adapter, records, guidance_scale=scale, num_steps=3, batch_size=4, variation=variation
    ).float()


def test_the_strength_is_applied_once_and_by_each_images_prompt(
    lora: Path, tiny_adapter: StableDiffusionAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights with γ B A give the same images. Those with γ² B A, as in the released code, give others."""
    strengths = torch.tensor([0.5, 1.0, 0.0])
    monkeypatch.setattr(
        "trce_lightning.generation.transport.transport_strength", lambda *_: strengths.clone()
    )
    prompts = ("a gun", "an axe", "tea")
    rule = Variation(guidance=FacilitatedTransport(lora=str(lora), concept="gun"))
    found = images(tiny_adapter, rule, *prompts)
    original = images(tiny_adapter, Variation(), *prompts)

    def merged(strength: float) -> Tensor:
        other = StableDiffusionAdapter(build_tiny_pipeline())
        other.pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        other.pipeline.fuse_lora(lora_scale=strength)
        return images(other, Variation(), *prompts)

    pytest.importorskip("peft")
    for row, strength in enumerate(strengths.tolist()):
        assert (found[row] - merged(strength)[row]).abs().max() <= 1
    assert (found[0] - merged(0.25)[0]).abs().max() > 1
    assert torch.equal(found[2], original[2]) and not torch.equal(found[1], original[1])
    # The network is the original's again.
    assert torch.equal(images(tiny_adapter, Variation(), *prompts), original)


def test_the_rule_is_chosen_on_the_command_line_and_names_its_file(lora: Path) -> None:
    config = composed("eval", "concept=violence", "guidance=spm", f"guidance.lora={lora}")
    assert isinstance(config, EvalConfig)
    rule = Session(config, concepts_of(config)).guidance()
    assert (
        isinstance(rule, FacilitatedTransport) and "dagger" in rule.concept and "a dagger" not in rule.concept
    )
    assert str(lora) not in repr(rule) and rule.evaluations(3.0) == 2
    other = lora.with_name("other.safetensors")
    other.write_bytes(lora.read_bytes()[:-4] + b"\0\0\0\0")
    assert repr(FacilitatedTransport(lora=str(other), concept=rule.concept)) != repr(rule)


def test_files_that_fit_no_map_are_refused(
    lora: Path, tiny_adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"guidance\.lora: expected a file, got ''; set guidance\.lora=RUN"):
        FacilitatedTransport()
    save_file({"lora_unet_elsewhere.alpha": torch.ones(1)}, tmp_path / "other.safetensors")
    rule = FacilitatedTransport(lora=str(tmp_path / "other.safetensors"), concept="gun")
    with pytest.raises(InputError, match=r"guidance\.lora: expected the maps of .* got 1 other tensors"):
        rule.guide(tiny_adapter, ["a gun"], [2.0], 5)
    with pytest.raises(InputError, match=r"guidance\.concept"):
        FacilitatedTransport(lora=str(lora)).guide(tiny_adapter, ["a gun"], [2.0], 5)
