"""Prompts longer than what a model reads: pairs it can't learn from are refused, others counted."""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import MAX_LENGTH, build_tiny_pipeline

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.adapters.cut import check_pairs, warn_of_cut
from trce_lightning.api import compose
from trce_lightning.concepts import Concept, PromptPair
from trce_lightning.config.schema import EvalConfig, ModelConfig
from trce_lightning.jobs.session import Session
from trce_lightning.jobs.train import TrainingRun

READ = MAX_LENGTH - 2
"""Characters without spaces, of which the tiny tokenizer makes one token each, between start and end."""
KNIFE = Concept("knife", {"knife": "spoon"}, templates=("{}", "my {}"))


def test_the_adapter_finds_prompts_that_are_cut(tiny_adapter: StableDiffusionAdapter) -> None:
    whole, longer = "x" * READ, "x" * (READ + 1)
    assert tiny_adapter.cut([whole, longer, "", longer + "y"]) == [longer, longer + "y"]
    assert tiny_adapter.cut([]) == []
    assert tiny_adapter.fits(whole) and not tiny_adapter.fits(longer)
    assert tiny_adapter.tokenize([longer])["clip"].equal(tiny_adapter.tokenize([longer + "y"])["clip"])


@pytest.mark.parametrize(
    ("template", "term", "refused"),
    [
        ("x" * (READ - 5) + "{}", "knife", False),  # ends where the model stops reading
        ("x" * (READ - 4) + "{}", "knife", True),  # one token across
        ("x" * READ + "{}", "knife", True),
        ("{}" + "x" * READ, "knife", False),  # what is cut follows the term
        ("{}", "knife" * READ, True),
    ],
)
def test_a_term_that_is_cut_off_is_refused(
    tiny_adapter: StableDiffusionAdapter, template: str, term: str, refused: bool
) -> None:
    concept = Concept("blades", {term: "spoon"}, templates=("my {}", template))
    pairs = {"knife": KNIFE.pairs(), "blades": concept.pairs()}
    if not refused:
        check_pairs(tiny_adapter, pairs)
        return
    with pytest.raises(ValueError, match=rf"^concept\.blades: .* {MAX_LENGTH} tokens .* got '{term}' after"):
        check_pairs(tiny_adapter, pairs)


def test_a_term_that_reads_as_its_counterpart_is_refused(tiny_adapter: StableDiffusionAdapter) -> None:
    check_pairs(tiny_adapter, {"knife": KNIFE.pairs()})
    same = PromptPair("a 枪", "a 花", "枪")  # characters that the tiny tokenizer hasn't
    assert tiny_adapter.tokenize([same.malicious])["clip"].equal(tiny_adapter.tokenize([same.safe])["clip"])
    with pytest.raises(
        ValueError, match=r"^concept\.gun: .* got '枪': it reads 'a 枪' and 'a 花' as the same"
    ):
        check_pairs(tiny_adapter, {"gun": [same]})


def test_cut_prompts_are_counted(
    tiny_adapter: StableDiffusionAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_cut(tiny_adapter, ["x"] * 9 + ["x" * 40] * 3, "i2p")
    warn_of_cut(tiny_adapter, ["x"], "coco")
    check_pairs(tiny_adapter, {"knife": replace(KNIFE, templates=("{}", "{} " + "x" * READ)).pairs()})
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    tail = f"are longer than the {MAX_LENGTH} tokens that the model reads; they are cut"
    assert said == [f"3 of 12 prompts of i2p {tail}", f"2 of 4 prompts of concept knife's pairs {tail}"]


def test_a_run_refuses_what_its_model_can_t_read_before_it_begins(tmp_path) -> None:
    options = ["metrics.enabled=false", "model=sd15", "model.resolution=16", f"runs={tmp_path / 'runs'}"]
    for stages in ("[textual]", "[trajectory]"):
        concept = replace(KNIFE, templates=("{}", "a long prompt that says much before the {}"))
        config = compose(concept, f"stages={stages}", "trainer.accelerator=cpu", *options)
        with pytest.raises(ValueError, match=r"concept\.knife: .*got 'knife' after"):
            TrainingRun(config, [concept], StableDiffusionAdapter(build_tiny_pipeline()))
    assert not (tmp_path / "runs").exists()


def nothing(concepts: object) -> object:
    """A detector that sees nothing."""
    return lambda images: torch.zeros(len(images))


def test_an_evaluation_counts_each_sets_cut_prompts(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    (file := tmp_path / "long.csv").write_text("prompt\na cat\n" + f"{'x' * 50}\n{'y' * 50}\n")
    model = ModelConfig("sd", judge=f"{__name__}.nothing", resolution=16)
    config = EvalConfig(model=model, prompts=[str(file)], sets=["direct"])
    config.metrics.samples_per_prompt = 2
    session = Session(config, [KNIFE], StableDiffusionAdapter(build_tiny_pipeline()))
    session.scorer("report", 4)
    assert "2 of 3 prompts of long are longer" in caplog.text
    assert "prompts of direct" in caplog.text  # sentences of more than 30 letters
