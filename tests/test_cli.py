"""The command line accepts all spellings, and refuses in a few lines with exit code 2, without torch."""

import contextlib
import importlib.util
import os
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import regex
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

from trce_lightning import cli
from trce_lightning.api import compose
from trce_lightning.concepts import Concept
from trce_lightning.config import checks
from trce_lightning.config.arguments import rewrite
from trce_lightning.config.schema import (
    ConceptConfig,
    DemoConfig,
    EvalConfig,
    ModelConfig,
    ScoresConfig,
    TrainConfig,
)
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import shard

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return folder


def composed(capsys, *argv, command=cli.train):
    command([*argv, "--cfg", "job"])
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *argv, command=cli.train):
    with pytest.raises(SystemExit) as exit_info:
        command(list(argv))
    text = capsys.readouterr().err
    assert exit_info.value.code == 2, text
    assert "Traceback" not in text
    assert 1 <= len(text.splitlines()) <= 4, text
    return text


WRONG = [
    ([], ["no concept chosen", "concept=NAME"]),
    (["concept=violense"], ["'violense'", "Did you mean 'violence'?", "horror"]),
    (["concept=[violense,horror]"], ["'violense'", "Did you mean 'violence'?"]),
    (["concept=gone.yaml"], ["gone.yaml"]),
    (["concept=[violence,violence]"], ["'concept'", "once"]),
    (["concept=[violence"], ["cannot read", "concept=[violence"]),
    (["violence"], ["'violence'", "concept=violence"]),
    (["concept.terms=[]"], ["concept.terms"]),
    (["concept.terms=3"], ["concept.terms", "a list of texts", "3"]),
    (["concept.terms=[cubism]", "concept.kind=mood"], ["concept.cubism.kind", "subject or style", "'mood'"]),
    (["concept=violence", "concept.terms=[knife]"], ["concept.NAME.terms"]),
    (["concept.terms=[a {b}]"], ["concept.terms=[a {b}]", '"TEXT"']),
    (["concept.terms=[café"], ["concept.terms=[café", '"TEXT"']),
    (["concept.terms=[dagger]", "concept.templates=[a {}]"], ["concept.templates=[a {}]", '"TEXT"']),
    (["concept.terms=[a]b,[é]"], ["concept.terms=[a]b,[é]", '"TEXT"']),
    (["concept.terms='${oc.env:HOME}'"], ["terms", "'${'", "a reference"]),
    (["concept=violence", "concept.枪.terms={a: b}"], ["'concept.枪.terms'", "ASCII", "its own file"]),
    (["concept=violence", "expected.asr={café: 0.1}"], ["'expected.asr'", "ASCII", "'café'", "a YAML file"]),
    (["concept=épée"], ["'épée'", "violence"]),
    (["model=ünï dir"], ["'ünï dir'", "emoji"]),
    (["concept=violence", "seed=é"], ["'seed'", "a whole number", "'é'"]),
    (["concept=violence", "concept.violence.templates=[abc]"], ["concept.violence.templates", "'abc'"]),
    (["model=sd144"], ["'sd144'", "Did you mean 'sd14'?", "emoji"]),
    (["concept=violence", "model=/"], ["model.path=/"]),
    (["modle.path=x"], ["'modle.path'", "Did you mean 'model'?"]),
    (["model.pth=x"], ["'model.pth'", "Did you mean 'model.path'?"]),
    (["+trainer.device=2"], ["'trainer.device'", "Did you mean 'trainer.devices'?"]),
    (["--trainer.device", "2"], ["'trainer.device'", "Did you mean 'trainer.devices'?"]),
    (["exprt=delta"], ["'exprt'", "Did you mean 'export'?"]),
    (["metrics.sets=[foo]"], ["'metrics.sets'.\n", "valid here: metrics.batch_size, "]),
    (["trainer.precision.x=1"], ["'trainer.precision'"]),
    (["--trainer.devices"], ["'--trainer.devices' needs a value"]),
    (["--trainer.devices", "concept=violence"], ["'--trainer.devices' needs a value"]),
    (["--trainer.devices", "--plan"], ["'--trainer.devices' needs a value"]),
    (["seed="], ["'seed' needs a value"]),
    (["concept=violence", "model.resolution=abc"], ["'model.resolution'", "a whole number", "'abc'"]),
    (["concept=violence", "optimizer.betas=[0.9,high]"], ["'optimizer.betas[1]'", "a number", "'high'"]),
    (["concept=3"], ["'concept'", "the name of a choice", "3"]),
    (["concept=[violence,2]"], ["'concept'", "the name of a choice", "2"]),
    (["concept=violence", "optimizer=null"], ["'optimizer'", "the name of a choice", "None"]),
    (["concept=violence", "logger=[csv,true]"], ["'logger'", "the name of a choice", "True"]),
    (["concept=violence", "optimizer={a:1}"], ["'optimizer'", "the name of a choice", "{'a': 1}"]),
    (["concept=violence", "seed='${nope}'"], ["'seed'", "'nope' not found"]),
    (["concept=violence", "trainer.strategy=ddp_spawn"], ["'trainer.strategy'", "ddp", "'ddp_spawn'"]),
    (["concept=violence", "plan=perhaps"], ["'plan'", "true or false", "'perhaps'"]),
    (["concept=violence", "trainer.precision=fp16"], ["'trainer.precision'", "'fp16'", "bf16-mixed"]),
    (["concept=violence", "export=delt"], ["'export'", "'delt'", "Did you mean 'delta'?", "pipeline"]),
    (["concept=violence", "export=both"], ["'export'", "'both'", "'pipeline', 'delta' or 'single_file'"]),
    (["concept=violence", "export=[delta,delta]"], ["'export'", "at most once"]),
    (["concept=violence", "export=[]"], ["'export'", "one at least"]),
    (["concept=violence", "model.path=/etc/passwd"], ["'model.path'", ".safetensors", "/etc/passwd"]),
    (["concept=violence", "model.config=x"], ["'model.config'", "expected none", "'x'"]),
    (["concept=violence", "expected.kid=1"], ["'expected.kid'", "expected.clip_score"]),
    (["concept=violence", "model.sampler=DIMScheduler"], ["'model.sampler'", "Did you mean 'DDIMScheduler'"]),
    (
        ["concept=violence", "model.sampler=null"],
        ["'model.timestep_spacing'", "without model.sampler", "'trailing'"],
    ),
    (["concept=violence", "model.judge_options={a: 1}"], ["'model.judge_options'", "none", "{'a': 1}"]),
    (["concept=violence", "model.judge=embedded"], ["'model.judge'", "null", "model.domain", "'embedded'"]),
    (["concept=violence", "model.judge=clip", "model.clip=x"], ["'model.clip'", "model.domain=", "'x'"]),
    (
        ["concept=violence", "model.domain=no.Domain"],
        ["model.domain", "a Domain", "'no.Domain'"],
    ),
    (["concept=violence", "model.domain=pathlib.Path.cwd"], ["model.domain", "'pathlib.Path.cwd'"]),
    (["concept=violence", "model.judge_options.a=1"], ["'model.judge_options'", "none", "{'a': 1}"]),
    (["concept=violence", "expected.asr.i2p=2"], ["'expected.asr.i2p'", "at most 1", "2"]),
    (["concept=violence", "+expected.fid=low"], ["'expected.fid'", "a number", "'low'"]),
    (["concept=violence", "+expected.asr={i2p: 1.29}"], ["'expected.asr.i2p'", "at most 1", "1.29"]),
    (["concept=violence", "expected.asr=0.1"], ["'expected.asr'", "float to Dict"]),
    (["concept=violence", "textual.keep_prompts=hub:x"], ["'textual.keep_prompts'", "hub:OWNER/NAME/FILE"]),
    (["concept=violence", "optimizer=sgd"], ["'sgd'", "paged_adamw8bit"]),
    (["concept=violence", "optimizer.name=sgd"], ["'optimizer.name'", "'sgd'", "adamw8bit"]),
    (["concept=violence", "stages=[textul]"], ["'stages'", "Did you mean 'textual'?"]),
    (["concept=violence", "stages=[]"], ["'stages'", "one at least"]),
    (["concept=violence", "textual.positions=[eos]"], ["'textual.positions'", "eot"]),
    (["concept=violence", "--textual.eta", "-1"], ["'textual.eta'", "at least 0", "-1"]),
    (["concept=violence", "model.num_inference_steps=1001"], ["'model.num_inference_steps'", "1000", "1001"]),
    (["concept=violence", "trajectory.num_steps=1001"], ["'trajectory.num_steps'", "at most 1000", "1001"]),
    (["concept=violence", "textual.ridge=-0.5"], ["'textual.ridge'", "at least 0", "-0.5"]),
    (["concept=violence", "textual.ridge=nan"], ["'textual.ridge'", "a finite number, got nan"]),
    (["concept=violence", "textual.ridge=inf"], ["'textual.ridge'", "a finite number, got inf"]),
    (["concept=violence", "textual.positions=[]"], ["'textual.positions'", "a list of 1 or more", "[]"]),
    (["concept=violence", "optimizer.betas=[0.9]"], ["'optimizer.betas'", "a list of 2 or more", "[0.9]"]),
    (["concept=violence", "optimizer.lr=0"], ["'optimizer.lr'", "more than 0"]),
    (["concept=violence", "optimizer.betas=[0.9,1.0]"], ["'optimizer.betas'", "less than 1"]),
    (["concept=violence", "trajectory.early_steps=51"], ["'trajectory.early_steps'", "20", "51"]),
    (["concept=violence", "trainer.devices=0"], ["'trainer.devices'", "got 0"]),
    (["concept=violence", "output=/dev/null/x"], ["'output'", "/dev/null"]),
    (["concept=violence", "model.path=gone"], ["'model.path'", "'gone'"]),
    (["concept=violence", "model.path=/"], ["'model.path'", "model_index.json"]),
    (["concept=violence", "model.path=${gone}"], ["'model.path'", "gone"]),
    (["concept=violence", "textual.keep_prompts=gone.txt"], ["'textual.keep_prompts'", "'gone.txt'"]),
    (["concept=violence", "previous=gone"], ["'previous'", "'gone'"]),
    (["concept=violence", "model=sd15", "model.judge=null"], ["'model.judge'", "metrics.enabled=false"]),
    (["concept=style", "model=sd15"], ["'model.judge'", "no style", "got clip"]),
    (["concept=violence", "model=sd15", "model.clip=null"], ["'model.clip'", "model.judge=clip"]),
    (["concept=violence", "model.clip=gone"], ["'model.clip'", "none with model.domain=", "'gone'"]),
    (
        ["concept=violence", "trainer.accelerator=cpu", "trainer.devices=2", "trajectory.batch_size=7"],
        ["trajectory.batch_size", "a multiple of the 2 processes, got 7"],
    ),
    (["-m", "concept=violence,horror", "seed=-1"], ["'seed'", "at least 0"]),
    (
        ["concept=violence", "metrics.final_images_per_set=1"],
        ["'metrics.final_images_per_set'", "at least 2", "FID", "got 1", "samples_per_prompt=2"],
    ),
    (["concept=violence", "metrics.images_per_set=1"], ["'metrics.images_per_set'", "at least 2"]),
    (["concept=violence", "trainer.accelerator=foo"], ["trainer.accelerator=foo", "cuda"]),
    (["concept=violence", "trainer.accelerator=cpu", "trainer.strategy=foo"], ["trainer.strategy=foo"]),
]


@pytest.mark.parametrize(("argv", "expected"), WRONG, ids=[" ".join(argv) or "nothing" for argv, _ in WRONG])
def test_wrong_input_is_explained(argv, expected, capsys):
    text = refusal(capsys, *argv)
    for part in expected:
        assert part in text


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["metrics.final_images_per_set=1"], "metrics.final_images_per_set"),
        (["robustness.steps=[2]", "robustness.images_per_set=1"], "robustness.images_per_set"),
    ],
)
def test_fid_of_one_image_is_refused_before_it_is_drawn(argv, option, capsys):
    text = refusal(capsys, "concept=violence", *argv, command=cli.evaluate)
    assert f"'{option}'" in text and "at least 2" in text


@pytest.mark.parametrize(
    "options",
    [
        {"metrics": ScoresConfig(final_images_per_set=1, samples_per_prompt=2)},
        {"metrics": ScoresConfig(final_images_per_set=1), "sets": ["direct"]},
        {"metrics": ScoresConfig(final_images_per_set=1), "judge": "a.judge"},
        {"metrics": ScoresConfig(final_images_per_set=2)},
    ],
)
def test_one_image_is_enough_where_no_fid_is_computed(options):
    violence = ConceptConfig("violence", {"a knife": "a spoon"})
    domain = None if "judge" in options else "a.Domain"
    model = ModelConfig(name="any", hub_id="any/model", judge=options.pop("judge", None), domain=domain)
    checks.check(EvalConfig(concept={"violence": violence}, model=model, **options))


@pytest.mark.parametrize(
    ("package", "argv"),
    [("tensorboard", ["logger=tensorboard"]), ("bitsandbytes", ["optimizer=adamw8bit"])],
)
def test_a_package_that_is_missing_is_named_at_once(package, argv, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == package else found(name)
    )
    for command in (cli.train, cli.evaluate) if package == "tensorboard" else (cli.train,):
        text = refusal(capsys, "concept=violence", *argv, command=command)
        assert f"{package} is not installed" in text and "pip install" in text


def test_wrong_input_of_eval_is_explained(capsys):
    text = refusal(capsys, "concept=violence", "prompts=gone.csv", command=cli.evaluate)
    assert "'prompts'" in text and "'gone.csv'" in text
    text = refusal(capsys, "concept=violence", "sets=[benign,benign]", command=cli.evaluate)
    assert "option 'sets': expected each at most once" in text
    text = refusal(capsys, "concept=violence", "sets=[]", command=cli.evaluate)
    assert "option 'sets': expected one set at least" in text
    for unread in ("seed=3", "metrics.images_per_set=2", "metrics.enabled=false"):
        assert f"unknown option '{unread.partition('=')[0]}'" in refusal(
            capsys, "concept=violence", unread, command=cli.evaluate
        )
    assert "textual" in refusal(capsys, "textual.eta=1", command=cli.evaluate)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: x\nterms: {a: [b\n", "well-formed YAML"),
        (b"name: x\ntermz: {a: b}\n", "'termz'"),
        (b"name: x\nterms: {a gun: a gun}\n", "a gun"),
        (b"- a\n", "a list"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"", "concept.name"),
    ],
)
def test_wrong_concept_file_is_explained(content, expected, capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    text = refusal(capsys, f"concept={path}")
    assert expected in text and str(path) in text


def test_refusal_leaves_nothing_behind(capsys, empty_folder):
    refusal(capsys, "concept=violence", "seed=-1")
    refusal(capsys, "concept=violense")
    assert not list(empty_folder.iterdir())
    assert sys.argv == ["train.py"]


def test_read_only_output_is_refused(capsys, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "'output'" in refusal(capsys, "concept=violence", f"output={folder}/run")


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("TRCE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown option"):
        cli.train(["exprt=delta"])


def unpack_too_few():
    _, _ = (1,)


def zip_unequal():
    list(zip((1,), (), strict=True))


@pytest.mark.parametrize(
    "fault", [unpack_too_few, zip_unequal, partial(int, "a"), partial(shard, (), 2, 2), {}.popitem]
)
def test_a_fault_of_the_program_keeps_its_traceback(fault):
    """Wherever it is raised, in our modules too: only an ``InputError`` is the user's to mend."""
    with pytest.raises((ValueError, KeyError)) as raised, cli.expected_failures():
        fault()
    assert not isinstance(raised.value, InputError)


@pytest.mark.parametrize(
    "argv",
    [
        ["trainer.devices=2", "plan=true", "seed=3"],
        ["--trainer.devices", "2", "--plan", "--seed", "3"],
        ["--trainer.devices=2", "--plan=true", "--seed=3"],
        ["--plan", "true", "trainer.devices=2", "--seed", "3"],
    ],
)
def test_spellings_are_equal(argv, capsys):
    config = composed(capsys, "concept=violence", *argv)
    assert (config["trainer"]["devices"], config["plan"], config["seed"]) == (2, True, 3)


def test_a_single_export_needs_no_brackets(capsys):
    assert composed(capsys, "concept=violence")["export"] == ["pipeline"]
    assert composed(capsys, "concept=violence", "export=delta")["export"] == ["delta"]
    several = composed(capsys, "concept=violence", "export=[delta,single_file]")["export"]
    assert several == ["delta", "single_file"]


def test_a_single_file_needs_its_configuration(capsys, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    text = refusal(capsys, "concept=violence", f"model.path={file}")
    assert "'model.config'" in text and "got none" in text
    # A preset's hub id is one; the file itself is read, and refused, only then.
    text = refusal(capsys, "concept=violence", "model=sd14", f"model.path={file}")
    assert "model.config" not in text and "readable .safetensors" in text


def test_hydra_flags_pass_unchanged():
    argv = ["--cfg", "job", "-m", "--config-name", "eval", "--info", "defaults", "--resolve", "-p", "model"]
    assert rewrite(argv, TrainConfig, ["concept"]) == argv


def test_concepts_are_all_kept(capsys, tmp_path):
    mine = tmp_path / "my, own (1).yaml"
    mine.write_text("name: mine\nterms: {a knife: a spoon}\n")
    assert list(composed(capsys, "concept=violence")["concept"]) == ["violence"]
    assert list(composed(capsys, "concept=[violence,horror]")["concept"]) == ["violence", "horror"]
    assert composed(capsys, f"concept={mine}")["concept"]["mine"]["terms"] == {"a knife": "a spoon"}
    plain = mine.rename(tmp_path / "violence.yaml")
    assert list(composed(capsys, f"concept=[violence,{plain}]")["concept"]) == ["violence", "mine"]
    assert list(tmp_path.glob("*.yaml")) == [plain]


def test_free_words_are_the_only_concept(capsys):
    concepts = composed(capsys, "concept.terms=[knife,gun]")["concept"]
    assert [list(concept["terms"]) for concept in concepts.values()] == [["knife", "gun"]]
    concepts = composed(capsys, "--concept.terms", "{a knife: a spoon}", "concept.name=cutlery")["concept"]
    assert {name: concept["terms"] for name, concept in concepts.items()} == {
        "cutlery": {"a knife": "a spoon"}
    }


def test_chosen_concept_can_be_changed(capsys):
    argv = ["concept=violence", "concept.violence.templates=['a {}']", "+concept.violence.terms.knife=spoon"]
    concept = composed(capsys, *argv)["concept"]["violence"]
    assert concept["templates"] == ["a {}"]
    assert concept["terms"]["knife"] == "spoon" and len(concept["terms"]) > 1


@pytest.mark.parametrize(
    "typed",
    [
        ["concept.violence.terms={cleaver: spoon}"],
        ["+concept.violence.terms.cleaver=spoon"],
        ["concept.violence.terms={knife: spoon}", "concept.violence.wordings={knife: [a cleaver]}"],
    ],
)
def test_aliases_that_a_changed_term_names_are_left_out(typed, caplog):
    shipped = compose("violence").concept["violence"]
    with caplog.at_level("WARNING"):
        config = compose("violence", *typed)
    concept = config.concept["violence"]
    assert concept.aliases == [alias for alias in shipped.aliases if alias != "a cleaver"]
    assert concept.descriptions == shipped.descriptions and "['a cleaver']" in caplog.text
    checks.check(config)
    kept = compose("violence", *typed, "concept.violence.aliases=[a cleaver]")
    with pytest.raises(InputError, match=r"concept\.violence\.aliases: .* 'a cleaver'"):
        checks.check(kept)


def test_descriptions_that_a_changed_term_names_are_left_out():
    config = compose("violence", "concept.violence.terms={soldier: dancer}")
    concept, shipped = config.concept["violence"], compose("violence").concept["violence"]
    assert concept.descriptions == [text for text in shipped.descriptions if "soldier" not in text]
    assert len(concept.descriptions) < len(shipped.descriptions) and concept.aliases == shipped.aliases


@pytest.mark.parametrize("text", ["no", "1e3", "a=b, (c)", "it's", "[x", "a:b", "back\\"])
def test_text_is_taken_as_typed(text, capsys):
    assert composed(capsys, "concept=violence", f"output={text}")["output"] == text
    assert composed(capsys, "concept=violence", "--output", text)["output"] == text


def test_prompts_take_one_file_or_several(capsys):
    for typed, expected in [("a.csv", ["a.csv"]), ("[a.csv,b.csv]", ["a.csv", "b.csv"])]:
        config = composed(capsys, "concept=violence", f"prompts={typed}", command=cli.evaluate)
        assert config["prompts"] == expected


def test_sweep_values_stay_apart():
    argv = ["-m", "concept=violence,horror", "textual.eta=0.1,1", "export=delta,pipeline"]
    assert rewrite(argv, TrainConfig, ["concept"]) == argv
    assert rewrite(["prompts=a,b"], EvalConfig, []) == ["prompts=['a,b']"]


WORDS = [
    "café",
    "rock & roll",
    "枪",
    "हिन्दी बंदूक",
    "🔫",
    "it's",
    "10:30",
    "C#",
    "a (b)",
    "50% off",
    "a=b",
    "what?!",
]
WORDS += ["“x”; y", "cafe\u0301", "a $5 bill", "a\\b"]


def stored(*argv):
    """The one concept that these words put in Hydra's store, under a name that Hydra reads."""
    (override,) = rewrite(list(argv), TrainConfig, ["concept"])
    choice = OverridesParser.create().parse_overrides([override])[0].value()
    return ConfigStore.instance().load(f"concept/{choice}.yaml").node


@pytest.mark.parametrize("word", WORDS)
def test_free_words_are_taken_as_typed(word):
    for typed in (f"concept.terms=[{word}]", f"concept.terms={word}", f"concept.terms=['b, c',{word}]"):
        if "c'," in typed and set("'?") & set(word):
            continue  # quotes of both kinds in a list: quote all
        assert list(stored(typed).terms)[-1] == word


def test_all_of_them_make_one_configuration(capsys):
    words = [word for word in WORDS if "'" not in word]
    ((name, concept),) = composed(capsys, f"concept.terms=[{', '.join(words)}]")["concept"].items()
    assert list(concept["terms"]) == words and concept["name"] == name


@pytest.mark.parametrize(
    "word", [*WORDS, "a, b", "a {b}", "[x]", "a: b", '"x"', "#1", "- y", "*z", "no", "3"]
)
def test_words_in_quotes_may_hold_anything(word):
    for quote in "'\"":
        if quote not in word:
            assert list(stored(f"concept.terms=[{quote}{word}{quote}]").terms) == [word]


def test_maps_and_lists_of_a_concept_take_words_of_any_script(capsys):
    argv = ["concept.terms={枪: 花, café: rock & roll}", "concept.wordings={枪: [手枪, it's]}"]
    argv += ["concept.related=[C#, naïve art]", "concept.templates=['{}','à {}, é']"]
    argv += ["concept.source=ü: 'x', [y", "concept.name=épée"]
    concept = composed(capsys, *argv)["concept"]["épée"]
    assert concept["terms"] == {"枪": "花", "café": "rock & roll"}
    assert concept["wordings"] == {"枪": ["手枪", "it's"]}
    assert concept["related"] == ["C#", "naïve art"] and concept["templates"] == ["{}", "à {}, é"]
    assert concept["source"] == "ü: 'x', [y"


ODD_PATHS = ["mañana.yaml", "a b, c=d (1).yaml", "枪/x & y.yaml", "it's #1.yaml"]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_paths_of_concepts_are_taken_as_typed(path, empty_folder):
    file = empty_folder / path
    file.parent.mkdir(exist_ok=True)
    file.write_text("name: mañana\nterms: {a knife: a spoon}\n", encoding="utf-8")
    quoted = f'"{path}"'
    for typed in (path, quoted, f"[{quoted}]", f"[{path}]"):
        if typed[0] != "[" or quoted in typed or "," not in path:
            (override,) = rewrite([f"concept={typed}"], TrainConfig, ["concept"])
            assert override in ("concept='own_mañana'", "concept=['own_mañana']")
    for concept in (path, ["violence", path]):
        assert compose(concept).concept["mañana"].terms == {"a knife": "a spoon"}


@pytest.mark.parametrize("path", ODD_PATHS)
def test_other_paths_are_taken_as_typed(path, capsys):
    options = ("output", "runs", "previous", "model.path", "expected.source")
    config = composed(capsys, "concept=violence", *(f"{option}={path}" for option in options))
    assert {config["output"], config["runs"], config["previous"], config["model"]["path"]} == {path}
    assert config["expected"]["source"] == path
    for typed in (path, f'["{path}"]', f'["{path}",b.csv]'):
        (override,) = rewrite([f"prompts={typed}"], EvalConfig, [])
        assert OverridesParser.create().parse_overrides([override])[0].value()[0] == path


def test_a_list_of_paths_needs_no_quotes_where_it_is_clear(capsys):
    typed = "prompts=[mañana.csv,a b=c (1).csv, it's.csv]"
    prompts = composed(capsys, "concept=violence", typed, command=cli.evaluate)["prompts"]
    assert prompts == ["mañana.csv", "a b=c (1).csv", "it's.csv"]


def test_names_of_free_words_are_folders():
    names = [
        Concept.from_terms([word]).name
        for word in (*"枪🔫🗡", "ปืน", "ปีน", "हिन", "हीन", "a/b", "..x", "é" * 90)
    ]
    assert len(set(names)) == len(names)
    assert all(regex.fullmatch(r"[\w-]+", name) and len(name.encode()) < 200 for name in names)


def python(*argv, cwd):
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_is_fast_and_complete(script, empty_folder):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = python(ROOT / script, "--help", cwd=empty_folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # whatever else is running
    assert result.returncode == 0 and result.stderr == ""
    assert "violence" in result.stdout and "precision: auto" in result.stdout
    assert seconds < 1.0
    assert not list(empty_folder.iterdir())


COMMANDS = [
    (cli.train, "train", TrainConfig),
    (cli.evaluate, "eval", EvalConfig),
    (cli.demonstrate, "demo", DemoConfig),
]


@pytest.mark.parametrize(("command", "name", "schema"), COMMANDS)
def test_help_lists_the_groups_that_the_command_takes(command, name, schema, capsys):
    command(["--help"])
    listed = set(re.findall(r"^(\w+): \w+(?:, \w+)*$", capsys.readouterr().out.split("Set with")[0], re.M))
    for folder in (ROOT / "configs").iterdir():
        if folder.is_dir():
            choice = next(folder.glob("*.yaml")).stem
            taken = contextlib.nullcontext() if folder.name in listed else pytest.raises(ValueError)
            with taken:
                cli.overrides(name, schema, [f"{folder.name}={choice}"])
    assert {"concept", "model", "trainer"} <= listed
    assert ("robustness" in listed, "logger" in listed) == (name == "eval", name in ("train", "eval"))


@pytest.mark.parametrize(("command", "name", "schema"), COMMANDS)
def test_help_is_what_hydra_would_print_of_these_groups(command, name, schema, capsys, monkeypatch):
    # Files of concepts that other tests have named stay in Hydra's store.
    monkeypatch.delitem(ConfigStore.instance().repo, "concept", raising=False)
    texts = []
    for ours in (cli._HELP, frozenset()):
        monkeypatch.setattr(cli, "_HELP", ours)
        with contextlib.suppress(SystemExit):  # Hydra's way out
            command(["--help", "model.resolution=8", "model=sd14"])
        texts.append(capsys.readouterr().out)
    refused = {f.name for f in (ROOT / "configs").iterdir()} - set(cli.config_groups(ROOT / "configs", name))
    head, options = texts[1].split("Set with")
    kept = [line for line in head.splitlines(keepends=True) if line.partition(":")[0] not in refused]
    texts[1] = "Set with".join(["".join(kept), options])
    assert texts[0] == texts[1] and "resolution: 8" in texts[0] and "name: sd14" in texts[0]


@pytest.mark.parametrize("argv", [["--help"], ["concept=violence", "seed=-1"], ["concept=violense"]])
def test_torch_is_not_imported(argv, empty_folder):
    code = (
        "import sys\n"
        "from trce_lightning import cli\n"
        f"try: cli.train({argv!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty_folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr


def test_figures_are_drawn_whatever_backend_is_set(empty_folder, monkeypatch):
    """matplotlib itself fails at import where it doesn't know the variable's."""
    monkeypatch.setenv("MPLBACKEND", "bogus")
    figure = "from matplotlib.figure import Figure; Figure().savefig('figure.png')"
    assert python("-c", figure, cwd=empty_folder).returncode != 0
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom trce_lightning import cli\n"
    result = python("-c", f"{code}cli.train(['--help'])\n{figure}", cwd=empty_folder)
    assert result.returncode == 0 and (empty_folder / "figure.png").exists(), result.stderr


def test_script_refuses_with_exit_code_two(empty_folder):
    result = python(ROOT / "train.py", "concept=violense", cwd=empty_folder)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no concept named 'violense'. Did you mean 'violence'?")
    assert "Traceback" not in result.stderr and result.stdout == ""


@pytest.mark.slow
def test_sweep_runs_every_job(empty_folder):
    result = python(
        ROOT / "train.py", "-m", "concept=violence,horror", "plan=true", "output=out", cwd=empty_folder
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "violence" in said and "horror" in said


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, expected):
    code = "import os, sys, trce_lightning.commands\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: text for name, text in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [expected, "False"]


def test_a_command_loads_no_8_bit_optimizer_and_says_nothing_of_one(tmp_path):
    """diffusers would, and on a machine without a GPU its library's warning would be the first line."""
    job = "from trce_lightning.commands import train; train()"
    ask = "import sys; sys.stdout.write(f\"loaded: {'bitsandbytes' in sys.modules}\")"
    options = ["concept=violence", "plan=true", "trainer=cpu", "metrics.enabled=false"]
    ran = subprocess.run(
        [sys.executable, "-c", f"{job}\n{ask}\nimport bitsandbytes.optim", *options, f"runs={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "loaded: False"
    assert "erasing violence from emoji" in ran.stderr.splitlines()[0], ran.stderr


def test_a_hidden_package_comes_back():
    with cli.hidden("json.tool"):
        assert importlib.util.find_spec("json.tool") is None
    assert importlib.util.find_spec("json.tool") is not None
    with cli.hidden("json"):  # is there already, and stays
        import json
    assert json is sys.modules["json"]
