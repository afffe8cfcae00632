"""Attacks as ``eval.py`` runs them: on the embedded model, beside their references, stored and continued."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import wandb
from attack_targets import RECORDS, target_of
from conftest import build_tiny_pipeline
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_flow import build

from trce_lightning import cli
from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.attacks.findings import load_findings, save_findings
from trce_lightning.attacks.inverse_edit import InverseEdit
from trce_lightning.attacks.noise import Noise
from trce_lightning.attacks.protocol import ChecksTarget, ControlTeaches, Cost, Door, Finding, Way
from trce_lightning.attacks.state_pgd import StatePgd
from trce_lightning.config.schema import EvalConfig
from trce_lightning.emoji.package import weights_folder
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate_to
from trce_lightning.generation.variation import LatentStart, Variation
from trce_lightning.jobs import attack as job
from trce_lightning.jobs.attack import (
    NEVER_LEARNT,
    ORIGINAL,
    REINITIALISED,
    Attacks,
    Judging,
    distinct,
    make_attack,
    reinitialise,
    told,
    unattacked_options,
)
from trce_lightning.jobs.evaluate import evaluate, sources
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.report.attacks import Attacks as Section

ROOT = Path(__file__).parents[1]
OPTIONS = (
    "concept=violence",
    "attacks=[inverse_edit,completion]",
    "attacked_prompts=4",
    "metrics.final_images_per_set=2",
    "sets=[direct,benign]",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model behind an invertible edit of its K and V: it hides the concept, and has a key."""
    adapter = load_adapter(weights_folder())
    stream = adapter.streams()["context"]
    turn, _ = torch.linalg.qr(
        torch.randn(stream.width, stream.width, generator=torch.Generator().manual_seed(0))
    )
    for entry in stream.entries.values():
        entry.module.weight.data = entry.module.weight.data @ turn
    adapter.pipeline.save_pretrained(folder := tmp_path_factory.mktemp("locked"))
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("clean_process")
def test_a_key_is_found_and_a_run_goes_on(locked: Path, tmp_path: Path) -> None:
    options = [
        *OPTIONS,
        "attack.completion.num_steps=8",
        "attack.completion.steps=[2]",
        f"model.path={locked}",
        f"output={tmp_path / 'out'}",
        f"cache={tmp_path / 'cache'}",
    ]
    cli.evaluate(options)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = metrics["attacks"]
    assert set(rows) == {locked.name, "original", "never-learnt", "re-initialised"}
    assert all(set(by_attack) == {"inverse_edit", "completion"} for by_attack in rows.values())
    key = rows[locked.name]["inverse_edit"]
    assert (key["pre"], key["rate"], key["network_evaluations"]) == (0, 1, {"forward": 0, "backward": 0})
    assert key["control"]["seeds"]["rate"] == 0 and key["positive_control"]["holds"]
    assert rows["original"]["completion"]["rate"] == 1 and rows["re-initialised"]["completion"]["rate"] == 0
    # 4 prompts, 2 of 8 steps by the original, with guidance.
    assert rows[locked.name]["completion"]["network_evaluations"]["forward"] == 4 * 2 * 2
    page = (tmp_path / "out" / "report.html").read_text()
    # Four prompts of four are not significant.
    assert "Embeddings: 100.0 % by inverse_edit." in page and "No attack on" in page

    folder, cache = tmp_path / "out" / "attacks", tmp_path / "cache" / "attacks"
    own = list(folder.glob(f"{locked.name}-*/inverse_edit-*/found/0*"))
    assert len(own) == 2 and len(list(cache.glob("*/inverse_edit-*/found/0*"))) == 3 * 2
    shared = list(cache.glob("completion-*/0*"))
    assert len(shared) == 2, "one search of the original serves all models"
    found = {file: file.stat().st_mtime_ns for file in [*own, *shared, *cache.glob("*/*/found/0*")]}
    cli.evaluate(options)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["attacks"] == rows
    assert {file: file.stat().st_mtime_ns for file in found} == found, "it was searched for again"

    cli.evaluate([*options, "attacks=[completion]", "attack.completion.steps=[1]"])
    changed = json.loads((tmp_path / "out" / "metrics.json").read_text())["attacks"][locked.name][
        "completion"
    ]
    assert changed["network_evaluations"]["forward"] == 4 * 1 * 2, "other options are another search"
    assert len(list(cache.glob("completion-*"))) == 2


def config_of(*options: str) -> EvalConfig:
    """The configuration of an evaluation with these options."""
    ConfigStore.instance().store(name="eval_schema", node=EvalConfig)
    with initialize_config_dir(config_dir=str(cli.config_folder()), version_base="1.3"):
        config = OmegaConf.to_object(compose("eval", ["concept=violence", *options]))
    assert isinstance(config, EvalConfig)
    return config


def options_of(choice: str) -> dict[str, dict[str, object]]:
    """The attacks' options that a choice gives, by name."""
    return config_of(f"attacks={choice}").attack


@pytest.mark.parametrize(
    ("options", "original"),
    [
        (["model.path=/x/erased"], ("original", None)),
        (["models=[/x/erased]"], ("original", None)),
        (["model.path=/y/base", "models=[/x/erased]"], ("original", "/y/base")),
        ([], ("emoji", None)),
    ],
)
def test_the_original_is_the_model_beside_others(
    options: list[str], original: tuple[str, str | None], tmp_path: Path
) -> None:
    config = config_of(*options, "never_learnt=/z/never")
    attacks = Attacks(config, sources(config), tmp_path)
    label, path = original
    assert attacks.original_label == label
    assert attacks.sources == sources(config) | {
        label: path,
        NEVER_LEARNT: "/z/never",
        REINITIALISED: path,
    }
    assert attacks.attacked == list(sources(config))


@pytest.mark.parametrize("label", ["original", "never-learnt", "re-initialised"])
def test_a_model_can_not_have_a_references_name(label: str, tmp_path: Path) -> None:
    config = config_of(f"model.path=/x/{label}", "never_learnt=/z/never")
    with pytest.raises(InputError, match=f"models: expected folders of other names .* '{label}' for /x/"):
        Attacks(config, sources(config), tmp_path)


def test_other_options_and_other_models_have_other_folders(tiny_adapter, tmp_path: Path) -> None:
    chosen = "attacks=[state_pgd,mma]", "attack.mma.finalists=0"
    config = config_of("model.path=/x/erased", f"cache={tmp_path / 'cache'}", *chosen)
    attacks = Attacks(config, sources(config), tmp_path / "out")
    edited = StableDiffusionAdapter(build_tiny_pipeline())
    edited.denoiser.conv_in.weight.data += 1
    target = target_of(edited, tiny_adapter)
    changed = [
        replace(target, seed=1),
        replace(target, records=target.records[:2]),
        replace(target, benign=target.records[:1]),
        replace(target, examples=target.records[:1]),
        replace(target, original=edited),
        replace(target, adapter=tiny_adapter),
    ]
    folders = [attacks._place("x", other) for other in (target, *changed)]
    assert len(set(folders)) == len(folders) and attacks._place("x", replace(target)) == folders[0]
    assert {folder.parent for folder in folders} == {tmp_path / "out" / "attacks"}
    assert attacks._place("original", target).parent == tmp_path / "cache" / "attacks"
    pgd, mma = attacks.attacks
    assert attacks._found("x", pgd, target).is_relative_to(folders[0])
    # The search in the text encoder doesn't see the denoiser.
    shared = [
        attacks._found(label, mma, other) for label in ("x", "original") for other in (target, changed[-1])
    ]
    assert len(set(shared)) == 1 and shared[0] != attacks._found("x", mma, changed[0])


def test_a_model_that_one_attack_can_not_be_made_on_is_refused_before_the_first(
    tiny_adapter, tmp_path: Path
) -> None:
    """The searches and images of the attacks before it would take hours."""
    config = config_of("model.path=/x/erased", f"cache={tmp_path}", "attacks=[completion,mma,state_pgd]")
    attacks = Attacks(config, sources(config), tmp_path)
    quantised = StableDiffusionAdapter(build_tiny_pipeline())
    weight = quantised.denoiser.conv_in.weight
    quantised.denoiser.conv_in.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"attack\.state_pgd: expected weights that gradients go through"):
        attacks._outcomes("erased", target_of(quantised, tiny_adapter))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["completion", "inversion", "single_token", "mma", "p4d", "relearning"])
def test_a_search_checks_its_model_itself(name: str, tiny_adapter, monkeypatch) -> None:
    """Whoever calls an attack without the job gets the same sentence."""
    (options,) = config_of(f"attacks=[{name}]").attack.values()
    attack = make_attack(name, options)
    assert isinstance(attack, ChecksTarget)

    def refuse(self: object, target: object) -> None:
        raise InputError("not this model")

    monkeypatch.setattr(type(attack), "check", refuse)
    with pytest.raises(InputError, match="not this model"):
        attack.search(target_of(tiny_adapter), RECORDS, torch.Generator(), lambda _: None)


def test_evaluations_that_share_a_folder_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "POLL_SECONDS", 0.01)
    config = config_of("model.path=/x/erased")
    attacks = Attacks(config, sources(config), tmp_path)
    attacks.trainer = make_trainer(config.trainer, tmp_path)
    inside = threading.Event()

    def enter() -> None:
        with attacks._alone(tmp_path / "shared"):
            inside.set()

    second = threading.Thread(target=enter)
    with attacks._alone(tmp_path / "shared"):
        second.start()
        assert not inside.wait(0.3)
        with attacks._alone(tmp_path / "other"):
            pass
    assert inside.wait(10)
    second.join()


def test_wrong_options_are_refused_before_a_model_is_opened() -> None:
    with pytest.raises(InputError, match=r"attack\.p4d\.steps: expected"):
        evaluate(config_of("model.path=/gone", "attacks=[p4d]", "attack.p4d.steps=0"))


@pytest.mark.parametrize("family", ["sd35", "flux_dev"])
def test_no_trained_weight_is_left_in_the_floor(family: str) -> None:
    """Some layers of diffusers can't reset themselves."""
    denoiser = build(family).transformer
    for parameter in denoiser.parameters():
        parameter.data.fill_(7.0)
    reinitialise(denoiser)
    assert not [name for name, parameter in denoiser.named_parameters() if (parameter == 7.0).any()]


def test_the_bar_counts_what_a_search_tells_it(tiny_adapter) -> None:
    target = target_of(tiny_adapter)
    pgd = StatePgd(steps=2, samples=3)
    for records in (target.records[1:], target.records):
        seen: list[int] = []
        pgd.search(target, records, torch.Generator(), seen.append)
        assert told(pgd.cost(replace(target, records=records))) == sum(seen) == 6 * len(records)
    assert told(Cost(text=5)) == 5, "a search that evaluates nothing tells the texts"


def test_other_seeds_are_sampled_as_the_attacks_images_are(tiny_adapter) -> None:
    usual = {
        "num_steps": 5,
        "batch_size": 2,
        "variation": Variation("DPMSolverMultistepScheduler", "trailing"),
    }
    target = target_of(tiny_adapter, variation=usual["variation"])

    def plain(way: Way) -> tuple[int, Variation]:
        options = unattacked_options(usual, way)
        assert options.keys() == usual.keys() and options["batch_size"] == 2
        return options["num_steps"], options["variation"]

    pgd, noise = StatePgd(steps=1), Noise(etas=(1.0,), scales=(1.0,), num_steps=20)
    *_, way = pgd.ways(
        target, {f.prompt_id: f for f in pgd.random(target, target.records, torch.Generator())}
    )
    assert plain(way) == (5, usual["variation"])
    assert plain(replace(way, num_steps=20)) == (20, usual["variation"])
    noisy = {f.prompt_id: f for f in noise.search(target, target.records, torch.Generator(), lambda _: None)}
    assert [plain(way) for way in noise.ways(target, noisy)] == [(20, Variation())]
    started = replace(way, variation=Variation(start=LatentStart(1)), num_steps=20)
    assert plain(started) == (20, Variation())


def test_the_judges_see_a_part_and_the_benign_images_that_are_right(tiny_adapter, tmp_path: Path) -> None:
    target = target_of(tiny_adapter)
    labels = ("cat", "dog", None)
    benign = [replace(record, label=label) for record, label in zip(target.records, labels, strict=True)]
    generate_to(tmp_path, tiny_adapter, benign, guidance_scale=1.0, num_steps=1, batch_size=2)

    class Names:
        vocabulary = MappingProxyType({"subject": ("cat", "dog")})

        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"subject": torch.tensor([[0.9, 0.1]]).expand(len(images), -1)}

    judge = Judging(lambda images: images.float().amax((1, 2, 3)) / 255, Names(), torch.device("cpu"))
    assert judge.right(tmp_path, benign) == 0.5 and judge.right(tmp_path, benign[2:]) is None
    dark = judge.seen(tmp_path, benign, lambda records, images: images * 0)
    assert {chance for _, chance in dark.values()} == {0.0}
    assert all(chance > 0 for _, chance in judge.seen(tmp_path, benign).values())


def test_a_domain_without_the_prompts_is_refused(tmp_path: Path) -> None:
    config = config_of()
    with pytest.raises(
        InputError, match=r"attacks: expected languages prompts of model\.domain=.*, got none"
    ):
        Attacks(config, sources(config), tmp_path)._records("languages", 0, 1)


def test_every_attack_is_made_from_its_file() -> None:
    files = {file.stem for file in (cli.config_folder() / "attacks").glob("*.yaml")}
    files -= {"all", "quick", "quick_no_words"}
    options = options_of("all")
    assert set(options) == files
    attacks = {name: make_attack(name, own) for name, own in options.items()}
    assert all(attack.name == name for name, attack in attacks.items())
    teaching = {name for name, attack in attacks.items() if isinstance(attack, ControlTeaches)}
    assert teaching == {"relearning", "relearning_lora"}
    doors = {
        group: {attacks[name].door for name in options_of(group)} for group in ("quick", "quick_no_words")
    }
    assert doors == {"quick": set(Door), "quick_no_words": set(Door) - {Door.WORDS}}


def test_findings_come_back_as_they_were(tmp_path: Path) -> None:
    findings = [
        Finding("a", {"x": torch.arange(3.0)}, {"text": "ünïcode", "losses": [1.5]}, Cost(1, 2, 3)),
        Finding("b", {}, {}, Cost()),
    ]
    save_findings(tmp_path / "0", findings)
    again = list(load_findings(tmp_path / "0"))
    assert [(f.prompt_id, f.facts, f.spent) for f in again] == [
        (f.prompt_id, f.facts, f.spent) for f in findings
    ]
    assert torch.equal(again[0].tensors["x"], findings[0].tensors["x"]) and not again[1].tensors


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: make_attack("mine", {"steps": 1}), r"attack\.mine: expected an attack chosen by attacks="),
        (
            lambda: make_attack("mine", {"_target_": "gone.X"}),
            r"attack\.mine: expected the dotted name .* Attack",
        ),
        (
            lambda: make_attack("mine", {"_target_": "pathlib.Path"}),
            r"attack\.mine: expected what makes a Attack",
        ),
        (
            lambda: make_attack("mine", {"_target_": "trce_lightning.attacks.p4d.P4D"}),
            r"attack\.mine: expected an attack of that name, got '.*P4D', which is p4d",
        ),
        (
            lambda: make_attack("p4d", {"_target_": "trce_lightning.attacks.p4d.P4D", "step": 3}),
            r"attack\.p4d: expected options among batch_size, .*, weight_decay, got 'step'",
        ),
        (
            lambda: make_attack(
                "inversion_n", {"_target_": "trce_lightning.attacks.inversion.InversionN", "step": 3}
            ),
            r"attack\.inversion_n: expected options among .*, steps, tries, vectors, .*, got 'step'",
        ),
        (
            lambda: make_attack("p4d", {"_target_": "trce_lightning.attacks.p4d.P4D", "steps": 0}),
            r"attack\.p4d\.steps",
        ),
    ],
)
def test_wrong_attacks_are_refused_by_a_sentence(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("attacks=[nope]", ["nope", "choices", "inversion"]),
        ("attack.inversion.steps=0", ["attack.inversion", "attacks=[inversion]"]),
        ("attacked_prompts=0", ["'attacked_prompts'", "at least 1"]),
        ("transfer=[original]", ["'transfer'", "attacks="]),
        ("never_learnt=nowhere", ["'never_learnt'", "no file or folder 'nowhere'"]),
    ],
)
def test_wrong_options_of_attacks_are_refused(
    option: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.evaluate(["concept=violence", option, f"output={tmp_path}", "trainer.accelerator=cpu"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in said for word in words), said


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("relearning", "pictures", 25, "a list"),
        ("relearning", "pictures", [2.5], "a whole number"),
        ("relearning", "steps", 30, "a list"),
        ("noise", "etas", 1.0, "a list"),
        ("inversion", "checkpoints", 50, "a list"),
        ("mma", "steps", None, "a whole number"),
        ("mma", "steps", 6.5, "a whole number"),
        ("mma", "blocked", "no", "true or false"),
        ("p4d", "lr", "x", "a number"),
        ("ring_a_bell", "eta", "x", "a number"),
        ("single_token", "sampling_steps", 2.5, "a whole number"),
    ],
)
def test_an_option_of_another_type_is_refused(name: str, option: str, value: object, expected: str) -> None:
    shipped = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "attacks" / f"{name}.yaml"))
    with pytest.raises(InputError, match=rf"'attack\.{name}\.{option}': expected {expected}, got"):
        make_attack(name, {**shipped, option: value})


@pytest.mark.parametrize("options", [None, 5, "x", [1]])
def test_options_of_an_attack_have_names(options: object) -> None:
    with pytest.raises(InputError, match=r"attack\.relearning: expected options by their names"):
        make_attack("relearning", options)


def test_a_class_whose_annotations_are_for_type_checkers_alone_takes_any_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begin(self: Noise, *, strange: "OnlyForTypeCheckers") -> None:  # noqa: F821
        self.strange = strange

    monkeypatch.setattr(Noise, "__init__", begin)
    made = make_attack("noise", {"_target_": "trce_lightning.attacks.noise.Noise", "strange": 1.5})
    assert isinstance(made, Noise) and vars(made) == {"strange": 1.5}


def test_a_text_is_attacked_once() -> None:
    records = [PromptRecord(f"p{i}", text) for i, text in enumerate(("a gun", "an axe", "a gun", "a bomb"))]
    assert [record.id for record in distinct(records)] == ["p0", "p1", "p3"]


def test_an_edits_file_is_known_by_its_content(tmp_path: Path) -> None:
    file, digests = tmp_path / "edit.safetensors", []
    for seed in (0, 1, 0):
        save_file({"transform": torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))}, file)
        digests.append(InverseEdit(edit=str(file)).file_digest())
    assert digests[0] == digests[2] != digests[1]
    assert InverseEdit().file_digest() not in digests


def test_the_section_names_the_references_as_the_job_does() -> None:
    own = (Section.original, Section.never_learnt, Section.reinitialised)
    assert own == (ORIGINAL, NEVER_LEARNT, REINITIALISED)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """20 prompts are two searches, one for each process. So are two numbers of pictures."""
    options = [
        *(option for option in OPTIONS if not option.startswith(("attacks=", "attacked_prompts="))),
        "attacks=[state_pgd,relearning]",
        "attack.state_pgd.steps=2",
        "attack.state_pgd.samples=1",
        "attack.relearning.pictures=[1,3]",
        "attack.relearning.steps=[5]",
        "attack.relearning.batch_size=3",
        "attacked_prompts=20",
        "never_learnt=null",
    ]
    rows = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        command = [
            sys.executable,
            ROOT / "eval.py",
            *options,
            f"trainer.devices={devices}",
            f"output={folder}",
            f"cache={folder / 'cache'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows.append(json.loads((folder / "metrics.json").read_text())["attacks"])
        for attack in ("state_pgd", "relearning"):
            assert len(list(folder.glob(f"cache/attacks/emoji-*/{attack}-*/found/*.json"))) == 2
            assert len(list(folder.glob(f"cache/attacks/emoji-*/{attack}-*/control/*.json"))) == 1
        share = {1: 20, 2: 16}[devices]  # of prompts, since 16 are searched together
        assert f"/{share * 2} " in done.stderr, "the bar of the first process shows its own share"
        assert f"relearning, search: 100%|██████████| {30 // devices}/" in done.stderr
    # Distances between images are sums of many numbers, whose order the number of processes changes.
    distances = [of["emoji"]["relearning"].pop("diversity") for of in rows]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4)
    assert rows[0] == rows[1]


@pytest.mark.usefixtures("clean_process")
def test_what_was_found_on_one_model_is_tried_on_others_which_are_compared_and_told_to_dashboards(
    locked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = shutil.copytree(locked, tmp_path / "twin")
    cli.evaluate(
        [
            *OPTIONS,
            "attacks=[inverse_edit]",
            "transfer=[original]",
            "logger.tensorboard=true",
            "logger.wandb=true",
            "never_learnt=null",
            f"models=[{locked},{twin}]",
            f"output={tmp_path / 'out'}",
            f"cache={tmp_path / 'cache'}",
        ]
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    own, transferred = metrics["attacks"][locked.name], metrics["transfer"][locked.name]["original"]
    # The original's key changes nothing, so that it opens nothing.
    assert own["inverse_edit"]["rate"] == 1 and transferred["inverse_edit"]["rate"] == 0
    assert transferred["inverse_edit"]["searched_here"] == transferred["inverse_edit"]["at_its_source"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"What was found on one model, tried on “{locked.name}”" in page
    counts = {"attacks": 1, "searches": 4, "broken_first": 4, "broken_second": 4, "p_value": 1}
    assert metrics["attacks_pooled"] == [{"models": [locked.name, "twin"], **counts}]
    names = f"4 break “{locked.name}” and 4 break “twin”"
    sentence = f"Of 4 searches of 1 attacks, {names} (p = 1, paired by prompt)."
    assert sentence in capsys.readouterr().err and page.count(sentence) == 2
    (events,) = (tmp_path / "out" / "tensorboard").glob("events*")
    assert b"attacks/original/inverse_edit/rate" in events.read_bytes()
    wandb.finish()
    wandb.teardown()  # waits for what writes
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"attacks/original/inverse_edit/rate" in run.read_bytes()
    tables = [file.name for file in run.parent.rglob("*.table.json")]
    assert {name.partition("_")[0] for name in tables} == {"attacks", "budget", "found"}


def test_a_model_that_nobody_attacks_has_no_findings_to_transfer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.evaluate([*OPTIONS, "transfer=[nobody]", f"output={tmp_path}"])
    assert "transfer: expected models among emoji" in capsys.readouterr().err
