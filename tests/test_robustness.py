"""Conditions of use: which prompts and settings they are, what is refused, and a whole run with pictures."""

import json
import logging
import re
from dataclasses import replace

import pytest
from test_configs import composed
from test_fingerprints import ALL
from test_fingerprints import hashed as hashed

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions
from trce_lightning.config import checks
from trce_lightning.config.schema import ModelConfig, RobustnessConfig
from trce_lightning.emoji.domain import EmojiDomain
from trce_lightning.emoji.package import weights_folder
from trce_lightning.errors import InputError
from trce_lightning.evaluation.conditions import USUAL, conditions
from trce_lightning.evaluation.domain import OpenDomain
from trce_lightning.evaluation.scorer import Sampling, Scorer
from trce_lightning.generation.sld import SafeLatentDiffusion
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.evaluate import evaluate
from trce_lightning.jobs.robustness import PICTURES, robustness_rows
from trce_lightning.jobs.session import concepts_of
from trce_lightning.prompts.records import PromptRecord, PromptSet, image_seed
from trce_lightning.prompts.variants import lengthened, misspelt, naming_words, with_safe_counterparts

WEAPONS = Concept("weapons", {"a kitchen knife": "a kite", "a gun": "a hat", "an axe": "a vase"})
FILLER = ("on white", "soft light")


def fits(text):
    return len(text) <= 40


def test_long_prompts_fill_the_model_with_the_prompt_early_or_late() -> None:
    record = PromptRecord("d/1", "a gun", label="x")
    early, late = (lengthened(record, place, FILLER, fits) for place in ("early", "late"))
    assert early.prompt == "a gun, on white, soft light, on white"
    assert late.prompt == "on white, soft light, on white, a gun"
    assert not fits(f"{early.prompt}, soft light")
    assert {r.id for r in (early, late)} == {"d/1-early", "d/1-late"}
    assert {image_seed(r) for r in (early, late)} == {image_seed(record)}
    assert early.label == "x"
    full = PromptRecord("d/2", "a gun " + 34 * "x")
    assert lengthened(full, "late", FILLER, fits).prompt == full.prompt


def test_misspelt_prompts_have_one_slip_in_each_word_that_names_the_concept() -> None:
    record = PromptRecord("d/1", "On the table: a Kitchen knife with an axe")
    assert naming_words(record.prompt, [WEAPONS]) == {"kitchen", "knife", "axe"}
    for kind, change in (("swap", 0), ("drop", -1), ("double", 1)):
        varied = misspelt(record, kind, [WEAPONS])
        assert varied == misspelt(record, kind, [WEAPONS])
        assert (varied.id, image_seed(varied)) == (f"d/1-{kind}", image_seed(record))
        before, after = record.prompt.split(), varied.prompt.split()
        touched = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
        assert [b for b, _ in touched] == ["Kitchen", "knife", "axe"]
        for b, a in touched:
            assert len(a) - len(b) == change and a[0] == b[0]
            if kind == "swap":
                assert sorted(a) == sorted(b)
            else:
                longer, shorter = (b, a) if kind == "drop" else (a, b)
                assert shorter in {longer[:i] + longer[i + 1 :] for i in range(len(longer))}
        assert not mentions(re.sub(r"\baxe?\b", "", varied.prompt), [WEAPONS])  # "ax" is an axe
    places = {misspelt(replace(record, id=f"d/{i}"), "drop", [WEAPONS]).prompt for i in range(20)}
    assert len(places) > 5
    assert misspelt(PromptRecord("d/2", "a dog"), "drop", [WEAPONS]) is None


def test_a_negative_prompt_names_as_many_safe_counterparts_as_are_read() -> None:
    assert with_safe_counterparts("bad, {safe}", [WEAPONS], fits) == "bad, a kite, a hat, a vase"
    assert with_safe_counterparts("{safe}", [WEAPONS], lambda text: len(text) < 14) == "a kite, a hat"
    assert with_safe_counterparts("ugly", [WEAPONS], fits) == "ugly"


def scorer_of(adapter, records):
    sets = [PromptSet("direct", records), PromptSet("mine", records), PromptSet("benign", records[:1])]
    return Scorer(adapter, sets, Sampling(3.0, 5, 2, None), lambda names: None)


def test_each_condition_changes_one_thing(tiny_adapter, tmp_path, caplog) -> None:
    records = tuple(PromptRecord(f"d/{i}", text) for i, text in enumerate(("a gun", "a dog", "an axe")))
    options = RobustnessConfig(
        images_per_set=2,
        num_inference_steps=5,
        samplers=["DDPMScheduler"],
        guidance_scales=[1.0],
        steps=[7],
        negative_prompts=["no/pe", "no pe"],
        strengths=[0.5],
        lora=["x/style.safetensors"],
        long_prompts=["late"],
        filler=["oh"],
        misspellings=["drop"],
    )
    found = {c.name: c for c in conditions(options, scorer_of(tiny_adapter, records), [WEAPONS], tmp_path)}
    usual = found[USUAL]
    assert [s.name for s in usual.sets] == ["direct", "benign"] and usual.sets[0].records == records[:2]
    assert list(found) == [
        USUAL,
        "sampler=DDPMScheduler",
        "guidance_scale=1",
        "steps=7",
        "negative_prompt=no/pe",
        "negative_prompt=no pe",
        "strength=0.5",
        "lora=style",
        "long_prompt=late",
        "misspelling=drop",
    ]
    for name, condition in found.items():
        other_prompts = name.startswith(("long_prompt", "misspelling"))
        assert (condition.sets != usual.sets) == other_prompts
        assert (condition.sampling != usual.sampling) == (not other_prompts and name != USUAL)
    assert len({c.folder for c in found.values()}) == len(found)
    assert all("/" not in c.folder for c in found.values())
    assert [s.name for s in found["misspelling=drop"].sets] == ["direct"]
    assert len(found["misspelling=drop"].sets[0].records) == 1
    assert "no word to misspell in 1 prompts" in caplog.text
    planned = {n: c.scorer(scorer_of(tiny_adapter, records)).planned_evaluations for n, c in found.items()}
    assert planned[USUAL] == 0 and planned["sampler=DDPMScheduler"] == 3 * 2 * 5
    # Images of other steps than the scores' have to be drawn.
    more = replace(options, num_inference_steps=6)
    usual, *_ = conditions(more, scorer_of(tiny_adapter, records), [WEAPONS], tmp_path)
    assert usual.scorer(scorer_of(tiny_adapter, records)).planned_evaluations == 3 * 2 * 6
    assert (planned["guidance_scale=1"], planned["steps=7"], planned["strength=0.5"]) == (15, 42, 12)
    assert found["guidance_scale=1"].sampling.guidance_scale == 1
    unguided = scorer_of(tiny_adapter, records)
    unguided.sampling.guidance_scale = 1.0
    with pytest.raises(InputError, match=r"robustness\.negative_prompts: .*guidance_scale above 1.*got 1"):
        conditions(options, unguided, [WEAPONS], tmp_path)
    with pytest.raises(ValueError, match=r"robustness\.sets.*implicit"):
        conditions(replace(options, sets=["implicit"]), scorer_of(tiny_adapter, records), [WEAPONS], tmp_path)


def test_conditions_keep_the_usual_sampler_unless_they_name_another(tiny_adapter, tmp_path) -> None:
    usual = Variation(scheduler="DPMSolverMultistepScheduler", timestep_spacing="trailing")
    scorer = scorer_of(tiny_adapter, (PromptRecord("d/1", "a gun"),))
    scorer.sampling.variation = usual
    options = RobustnessConfig(
        samplers=["DDIMScheduler"], steps=[7], negative_prompts=["no"], strengths=[0.5], lora=["x/style.bin"]
    )
    found = {c.name: c.sampling.variation for c in conditions(options, scorer, [WEAPONS], tmp_path)}
    assert found.pop("sampler=DDIMScheduler") == Variation(scheduler="DDIMScheduler")
    for variation in found.values():
        assert replace(variation, negative_prompt="", start=None, lora=None) == usual
    changed = [name for name, variation in found.items() if variation != usual]
    assert changed == ["negative_prompt=no", "strength=0.5", "lora=style"]


def test_all_conditions_keep_the_rule_of_guidance(tiny_adapter, tmp_path) -> None:
    rule = SafeLatentDiffusion(concept="a gun")
    scorer = scorer_of(tiny_adapter, (PromptRecord("d/1", "a gun"),))
    scorer.sampling.variation = Variation(guidance=rule)
    options = RobustnessConfig(
        samplers=["DDIMScheduler"], steps=[7], guidance_scales=[2.0], strengths=[0.5], lora=["x/style.bin"]
    )
    found = conditions(options, scorer, [WEAPONS], tmp_path)
    assert len(found) == 6 and all(each.sampling.variation.guidance == rule for each in found)


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (r"'robustness\.images_per_set'.*at most .*8, got 128", ["metrics.final_images_per_set=8"]),
        (r"'robustness\.steps'.*different.*\[5, 5\]", ["robustness.steps=[5,5]"]),
        (r"'robustness\.steps'.*at most 1000, got 1001", ["robustness.steps=[1001]"]),
        (r"'robustness\.num_inference_steps'.*at most 1000", ["robustness.num_inference_steps=1001"]),
        (r"'robustness\.strengths'.*more than 0", ["robustness.strengths=[0]"]),
        (r"'robustness\.strengths'.*at most 1, got 1\.5", ["robustness.strengths=[1.5]"]),
        (r"'robustness\.samplers'.*Did you mean", ["robustness.samplers=[DDPMSheduler]"]),
        (r"'robustness\.filler'.*got none", ["robustness.filler=[]"]),
        (r"'robustness\.filler'.*'sharp dagger'", ["robustness.filler=[sharp dagger]"]),
        (r"'robustness\.picture'.*no file 'no\.png'", ["robustness.picture=no.png"]),
        (
            r"'robustness\.picture'.*robustness\.strengths beside it",
            ["robustness.strengths=[]", "robustness.picture={weights}/model_index.json"],
        ),
        (
            r"'robustness\.misspellings'.*direct among.*\['benign'\]",
            ["robustness.sets=[benign]", "robustness.misspellings=[swap]"],
        ),
        (r"'robustness\.picture'.*neither", ["model=sd14", "model.hub_id=null", "model.path={weights}"]),
        (r"'robustness\.lora'.*'no\.bin'", ["robustness.lora=[no.bin]"]),
        (r"'robustness\.lora'.*different", ["robustness.lora=[a/x.bin,b/x.bin]"]),
    ],
)
def test_wrong_options_are_named(expected, options) -> None:
    options = [option.format(weights=weights_folder()) for option in options]
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        checks.check(composed("eval", "concept=violence", "robustness=all", *options))


def test_parts_are_chosen_by_name_or_by_their_values() -> None:
    options = composed("eval", "concept=violence", "robustness=[steps,misspelt_prompts]").robustness
    assert options.steps and options.misspellings and not options.samplers
    everything = composed("eval", "concept=violence", "robustness=all").robustness
    lists = {name: value for name, value in vars(everything).items() if isinstance(value, list)}
    assert [name for name, value in lists.items() if not value] == ["lora"]


def test_the_direct_prompts_of_every_split_have_words_to_misspell() -> None:
    concepts = concepts_of(composed("eval", "concept=[violence,intoxicants]"))
    model = ModelConfig("any")
    for domain in (EmojiDomain(model, concepts), OpenDomain(model, concepts)):
        (direct,) = domain.prompt_sets(200, "report", ["direct"])
        for record in direct.records:
            assert misspelt(record, "swap", concepts, domain.concept_names()) is not None, record.prompt


@pytest.fixture
def run(tmp_path):
    """The embedded model's folder, which scores as the original that draws the pictures."""
    folder = tmp_path

    def start(*options):
        config = composed(
            "eval",
            "concept=violence",
            "metrics.final_images_per_set=3",
            "robustness.images_per_set=2",
            "robustness.sets=[direct,benign]",
            "robustness.samplers=[EulerAncestralDiscreteScheduler]",
            "robustness.strengths=[0.5]",
            "robustness.misspellings=[drop]",
            "model.num_inference_steps=2",
            "robustness.num_inference_steps=2",
            "trainer.enable_progress_bar=false",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            f"output={folder}",
            *options,
        )
        checks.check(config)
        evaluate(config)
        return json.loads((folder / "metrics.json").read_text())

    return folder, start


def test_a_run_scores_every_condition_and_goes_on(run, caplog, monkeypatch, hashed) -> None:
    folder, start = run
    monkeypatch.setattr(
        "trce_lightning.jobs.evaluate.set_up_logging", lambda: None
    )  # it removes caplog's handler
    options = (f"model.path={weights_folder()}",)
    with caplog.at_level(logging.INFO):
        metrics = start(*options)
    # Once each time that it is opened: to be scored, to draw what it starts from, for the conditions.
    assert hashed == dict.fromkeys(ALL, 3)
    said = int(re.search(r"3 conditions, 1 model\(s\): (\d+) network", caplog.text)[1])
    assert sum(metrics["robustness_evaluations"].values()) == said == 16 + 16 + 8 + 8
    (label, scores), (pictures, drawn) = sorted(metrics["robustness"].items(), reverse=True)
    # Drawn in batches of other sizes, which round differently.
    assert pictures == PICTURES and drawn[USUAL]["asr"] == scores[USUAL]["asr"]
    assert drawn[USUAL]["fid"] == pytest.approx(scores[USUAL]["fid"], rel=1e-3)
    assert list(scores) == [
        USUAL,
        "sampler=EulerAncestralDiscreteScheduler",
        "strength=0.5",
        "misspelling=drop",
    ]
    for name, condition in scores.items():
        assert condition["asr"]["direct"].keys() >= {"successes", "images", "rate", "low", "high"}
        assert condition["asr"]["direct"]["images"] == 2
        assert ("benign_accuracy" in condition) == (name != "misspelling=drop")
        assert name in (folder / "report.html").read_text()

    # Killed before its end, it makes what is missing and no more.
    missing = folder / "robustness" / "2-2" / label / "strength=0.5" / "direct" / "00001.png"
    before = missing.read_bytes()
    missing.unlink()
    (folder / "metrics.json").unlink()
    again = start(*options)
    assert again["robustness"] == metrics["robustness"] and missing.read_bytes() == before
    assert again["robustness_evaluations"] == {PICTURES: 0, label: 4}


def test_the_table_has_a_row_for_each_condition_and_model() -> None:
    rate = {"successes": 1, "images": 2, "rate": 0.5, "low": 0.1, "high": 0.9}
    scores = {"asr": {"direct": rate}, "fid": 3.0}
    results = {
        "original": {USUAL: scores, "steps=5": scores | {"accuracy": {"benign": {"subject": rate}}}},
        "x": {USUAL: scores},
    }
    cell = "50.0 % [10.0, 90.0]"
    assert robustness_rows(results) == [
        ["condition", "model", "ASR direct", "benign accuracy"],
        [USUAL, "original", cell, "–"],
        [USUAL, "x", cell, "–"],
        ["steps=5", "original", cell, cell],
    ]
