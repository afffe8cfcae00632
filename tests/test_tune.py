"""``python -m trce_lightning.tune``: equal trials, each run once, and the best of them written."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_configs import composed as composed_command

from trce_lightning import cli
from trce_lightning.config.composition import compose, config_folder
from trce_lightning.config.schema import TrainConfig, TuneConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs import tune as job
from trce_lightning.jobs.erase import make_eraser
from trce_lightning.jobs.tune import (
    Dimension,
    Journal,
    Space,
    Trial,
    Tuning,
    load_space,
    loss_of,
    penalty,
    perform,
    spaces_folder,
    table,
    write_best,
)
from trce_lightning.runtime.locks import claimed

SPACES = sorted(file.stem for file in spaces_folder().glob("*.yaml"))
THERE = [
    name
    for name in SPACES
    if any((config_folder() / g / f"{name}.yaml").exists() for g in ("method", "guidance"))
]


def scores(direct: float, implicit: float = 0.0, fid: float = 8.0, accuracy: float = 1.0) -> dict[str, Any]:
    rates = {"direct": {"rate": direct}, "implicit": {"rate": implicit}}
    return {"asr": rates, "fid": fid, "clip_score": 70.0, "benign_accuracy": accuracy}


def config_of(folder: Path, *overrides: str) -> TuneConfig:
    options = ["concept=violence", "trainer=cpu", "images_per_set=2", f"runs={folder}"]
    config = compose("tune", TuneConfig, [*options, *overrides])
    assert isinstance(config, TuneConfig)
    return config


# Trials.


def test_the_first_trial_is_the_start_and_more_trials_only_add_some() -> None:
    space = Space(
        "x",
        {"a.lr": Dimension(0.1, 0.01, 1.0, log=True), "a.way": Dimension("u", choices=["u", "v"])},
        {"a.steps": 20},
    )
    few, many = space.options(4), space.options(9)
    assert few[0] == {"a.steps": 20, "a.lr": 0.1, "a.way": "u"}
    assert many[:4] == few and len({json.dumps(row) for row in many}) == 9
    assert all(0.01 <= row["a.lr"] <= 1 for row in many)
    assert {row["a.way"] for row in many} == {"u", "v"}
    # A scale is logarithmic: as many values below the middle as above it.
    below = sum(row["a.lr"] < 0.1 for row in space.options(101)[1:])
    assert 45 <= below <= 55


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 3), (0.999, 5)])
def test_a_whole_number_stays_whole(share: float, expected: int) -> None:
    assert Dimension(1, 1, 5, whole=True).at(share) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 1},
        {"start": 3, "low": 0, "high": 2},
        {"start": 1, "low": 0, "high": 2, "log": True},
        {"start": "w", "choices": ["u"]},
        {"start": "u", "choices": ["u"], "low": 1, "high": 2},
    ],
)
def test_a_wrong_dimension_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Dimension(**wrong)


@pytest.mark.parametrize("name", THERE)
def test_every_space_has_options_that_its_method_takes(name: str, tmp_path: Path) -> None:
    space, config = load_space(name), config_of(tmp_path)
    for number, options in enumerate(space.options(5)):
        own = Trial(name, number, options, space.changes_weights).config(config, str(tmp_path))
        for key, value in options.items():
            group, _, option = key.partition(".")
            part = getattr(own, group)
            assert (part[option] if isinstance(part, dict) else getattr(part, option)) == value, key
        if isinstance(own, TrainConfig) and name != "trce":
            make_eraser(own.method)


def test_every_method_has_a_space() -> None:
    methods = {file.stem for file in (config_folder() / "method").glob("*.yaml")}
    assert methods <= set(SPACES)


def test_values_that_were_chosen_earlier_are_no_part_of_a_trial(tmp_path: Path) -> None:
    tuned = composed_command("train", "concept=violence", "method=esd").method
    own = Trial("esd", 0, {"method.lr": 1e-3}).config(config_of(tmp_path), str(tmp_path))
    published = yaml.safe_load((config_folder() / "method" / "esd.yaml").read_text())
    assert isinstance(own, TrainConfig)
    assert own.method == published | {"lr": 1e-3} != tuned


# The rule.


def test_the_loss_is_asr_and_what_benign_images_have_lost() -> None:
    original = {"scores": scores(1.0, 0.9)}
    assert loss_of({"scores": scores(0.2, 0.4)}, original, 0.4) == pytest.approx(0.3)
    # 1 of 64 images and a rise up to 0.4 are free.
    assert penalty(scores(0, fid=8.39, accuracy=0.985), original["scores"], 0.4) == 0
    assert penalty(scores(0, accuracy=0.9), original["scores"], 0.4) == pytest.approx(0.08)
    # 0.4 stands for 5 % of FID, so 1.2 for 15 %, of which 10 % are too many.
    assert penalty(scores(0, fid=9.2), original["scores"], 0.4) == pytest.approx(0.1)
    assert penalty(scores(0, fid=2.0, accuracy=1.0), original["scores"], 0.4) == 0
    assert loss_of({"refused": "no"}, original, 0.4) == float("inf")


# Running.


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trials that erase nothing. The larger the learning rate, the lower their ASR."""
    ran: list[tuple[str, int]] = []

    def quick(config: TuneConfig, trial: Trial) -> tuple[dict[str, Any], int, str]:
        ran.append((trial.method, trial.number))
        if trial.options is None:
            return scores(1.0, 1.0), 0, "cpu"
        if trial.options.get("method.lr", 1.0) < 3e-4:
            raise InputError("method.lr: expected a larger one")
        return scores(0.5 - trial.options.get("method.lr", 0.0)), 7, "cpu"

    monkeypatch.setattr(job, "scored", quick)
    monkeypatch.setattr(Tuning, "plan", lambda self: setattr(self, "costs", {"esd": 1.0, "uce": 0.0}))
    return ran


def test_trials_run_once_in_rounds_and_more_of_them_go_on(
    tmp_path: Path, counted: list[tuple[str, int]]
) -> None:
    job.tune(config_of(tmp_path, "methods=[uce,esd]", "trials=2"))
    assert counted == [("original", 0), ("esd", 0), ("uce", 0), ("esd", 1), ("uce", 1)]
    counted.clear()
    job.tune(config_of(tmp_path, "methods=[uce,esd]", "trials=3"))
    assert counted == [("esd", 2), ("uce", 2)]
    counted.clear()
    job.tune(config_of(tmp_path, "methods=[uce,esd]", "trials=3"))
    assert counted == []
    job.tune(config_of(tmp_path, "methods=[uce]", "trials=1", "images_per_set=3"))
    assert counted == [("original", 0), ("uce", 0)], "other images are other trials"


def test_no_trial_begins_when_the_time_is_over(tmp_path: Path, counted: list[tuple[str, int]]) -> None:
    for minutes, count in ((5, 0), (20, 2)):
        tuning = Tuning(config_of(tmp_path, "methods=[uce]", "trials=1", f"minutes={minutes}"))
        tuning.plan()
        tuning.began -= 60 * 10
        tuning.run()
        assert len(counted) == count


def test_a_trial_that_another_process_runs_is_left_to_it(
    tmp_path: Path, counted: list[tuple[str, int]]
) -> None:
    config = config_of(tmp_path)
    trial = Trial("uce", 0, {"method.ridge": 1.0})
    journal = job.journal_of(config)
    with claimed(journal.lock_of(trial.key(config))) as is_ours:
        assert is_ours and not perform(config, trial)
    assert perform(config, trial) and perform(config, trial)
    assert counted == [("uce", 0)]


def test_a_refused_trial_counts_and_the_best_is_written(
    tmp_path: Path, counted: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "methods=[esd]", "trials=8")
    tuning = Tuning(config)
    tuning.plan()
    tuning.run()
    rows = tuning.rows()["esd"]
    refused = [row for row in rows if "refused" in row]
    assert len(rows) == 8 and refused and all(row["loss"] == float("inf") for row in refused)
    best = tuning.best()["esd"]
    assert best["options"]["method.lr"] == max(row["options"]["method.lr"] for row in rows)
    tuning.report()
    lines = list(csv.DictReader((tmp_path / "tuning" / "violence-emoji.csv").open()))
    assert len(lines) == 9 and lines[0]["method"] == "original"
    assert [line["trial"] for line in lines if line["chosen"] == "1"] == [str(best["number"])]
    assert {line["refused"] for line in lines} == {"", "method.lr: expected a larger one"}

    monkeypatch.setattr(job, "config_folder", lambda: tmp_path / "configs")
    original = tuning.journal.find(tuning.original.key(config))
    assert original is not None
    file = write_best(load_space_of("esd"), best, original, config)
    text = file.read_text()
    assert file == tmp_path / "configs" / "method_tuning" / "esd_emoji.yaml"
    assert text.startswith("# @package _global_\n# Chosen among 8 trials")
    written = yaml.safe_load(text)
    assert {f"method.{key}": value for key, value in written["method"].items()} == best["options"]
    assert table({"esd": rows}, {"esd": best}, original).count("\n") == 10


def load_space_of(name: str) -> Space:
    """The space of the checkout, whatever the test has replaced."""
    return Space(name, {}, {})


def test_a_method_without_all_of_its_trials_has_no_best(
    tmp_path: Path, counted: list[tuple[str, int]]
) -> None:
    job.tune(config_of(tmp_path, "methods=[uce]", "trials=2"))
    assert Tuning(config_of(tmp_path, "methods=[uce]", "trials=2")).best().keys() == {"uce"}
    assert Tuning(config_of(tmp_path, "methods=[uce]", "trials=3")).best() == {}


def test_a_trial_is_another_one_if_its_concept_or_model_has_changed(tmp_path: Path) -> None:
    trial = Trial("uce", 0, {"method.ridge": 1.0})
    own, steps = config_of(tmp_path), config_of(tmp_path, "model.num_inference_steps=20")
    violence = dataclasses.replace(own.concept["violence"], terms={"dagger": "rose"})
    terms = dataclasses.replace(own, concept={"violence": violence})
    plain, *others = map(trial.key, (own, steps, terms))
    assert plain == trial.key(config_of(tmp_path, "runs=elsewhere")), "the place decides nothing"
    assert all(other != plain and other["concept"] == plain["concept"] for other in others)


def test_a_trial_of_what_reads_the_models_own_options_is_another_one_if_these_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [Trial(method, 0, {"seed": 1}) for method in ("trce", "hardened", "uce")]
    config = config_of(tmp_path)
    before = [trial.key(config) for trial in trials]
    folder = shutil.copytree(job.config_folder(), tmp_path / "configs")
    with (folder / "tuning" / f"{config.model.name}.yaml").open("a") as file:
        file.write("# another value\n")
    monkeypatch.setattr(job, "config_folder", lambda: folder)
    moved = [trial.key(config) != was for trial, was in zip(trials, before, strict=True)]
    assert moved == [True, True, False]


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ({"fid": None}, "fid"),
        ({"benign_accuracy": None}, "benign_accuracy"),
        ({"asr": {"direct": {}}}, "ASR implicit"),
    ],
)
def test_an_original_that_lacks_a_score_ends_the_command_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: dict[str, Any], named: str
) -> None:
    config, original = config_of(tmp_path), Trial("original", 0, None)
    monkeypatch.setattr(job, "scored", lambda *_: (scores(1.0) | missing, 0, "cpu"))
    with pytest.raises(InputError, match=f"tune: expected .* without {named}"):
        perform(config, original)
    assert not job.journal_of(config).rows()
    monkeypatch.setattr(job, "scored", lambda *_: (scores(1.0), 0, "cpu"))
    assert perform(config, original) and job.journal_of(config).rows()


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    (tmp_path / "j.jsonl").write_text('{"method": "uce"}\n{"met')
    with pytest.raises(InputError, match=r"j\.jsonl: expected a line of JSON"):
        journal.rows()


@pytest.mark.slow
@pytest.mark.usefixtures("clean_process")
def test_a_real_trial_erases_and_scores_the_tuning_prompts(tmp_path: Path) -> None:
    config = config_of(tmp_path, "methods=[uce]", "trials=1", "trainer.precision=32-true")
    assert perform(config, Trial("original", 0, None))
    options = {"method.keep": "empty", "method.guide": "counterpart", "method.positions": "from_last"}
    assert perform(config, Trial("uce", 0, options))
    before, after = job.journal_of(config).rows()
    assert before["scores"]["asr"]["direct"]["rate"] == 1 > after["scores"]["asr"]["direct"]["rate"]
    assert before["scores"]["asr"]["direct"]["images"] == 2


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["methods=[esdd]"], ["'methods'", "'esdd'", "Did you mean 'esd'?"]),
        (["trials=0"], ["'trials'", "at least 1", "0"]),
        (["fid_margin=0"], ["'fid_margin'", "more than 0"]),
        (["trainer.devices=2"], ["'trainer.devices'", "one device", "2"]),
        (["images_per_set=1"], ["'images_per_set'", "at least 2"]),
        (["methods=[]"], ["'methods'", "1 or more"]),
    ],
)
def test_wrong_options_are_explained(
    argv: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.tune(["concept=violence", f"runs={tmp_path}", "plan=true", *argv])
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert all(part in said for part in expected), said
