"""The sweeps: their rule and stored results. Every trial is a configuration that `train.py` takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweep
from benchmarks.fitting import compose

ALL = [(name, trial) for name, each in sweep.SWEEPS.items() for trial in each.trials]


def row(direct: float, implicit: float, fid: float, accuracy: float, attacks: float = 0.5) -> dict[str, Any]:
    scores = {
        "asr": {"direct": {"rate": direct}, "implicit": {"rate": implicit}},
        "fid": fid,
        "clip_score": 74.0,
        "benign_accuracy": accuracy,
        "benign_accuracy_unkept": 0.9,
    }
    return {"scores": scores, "attacks": dict.fromkeys(sweep.ATTACKS, attacks), "references": {}}


FOUND = {
    sweep.ORIGINAL: row(1.0, 0.9, 8.0, 1.0, 1.0),
    "weak": row(0.8, 0.8, 8.1, 1.0),
    "attacked": row(0.0, 0.0, 8.1, 1.0, 0.9),
    "right": row(0.4, 0.2, 8.4, 0.985),
    "spoils pictures": row(0.1, 0.0, 8.5, 1.0),
    "spoils subjects": row(0.1, 0.0, 8.0, 0.95),
}


def test_the_lowest_rates_among_trials_that_keep_benign_pictures_are_chosen() -> None:
    assert sweep.chosen(FOUND) == "right"
    others = {name: found for name, found in FOUND.items() if name != "right"}
    assert sweep.chosen(others) == "weak"  # attacks count as well
    spoilt = {name: FOUND[name] for name in (sweep.ORIGINAL, "spoils pictures", "spoils subjects")}
    assert sweep.chosen(spoilt) is None


def test_the_table_has_each_trial_and_the_references() -> None:
    found = {
        **FOUND,
        sweep.ORIGINAL: FOUND[sweep.ORIGINAL] | {"references": {"never": dict.fromkeys(sweep.ATTACKS, 0.1)}},
    }
    lines = sweep.table(found).splitlines()
    assert len(lines) == 2 + len(FOUND) + 1
    attacks = " 50.0 % |" * len(sweep.ATTACKS)
    assert f"| **right** | 40.0 % | 20.0 % |{attacks} 1.050× | 74.00 | 98.5 % | 90.0 % | yes |" in lines
    assert [line.split("|")[-2].strip() for line in lines[2:-1]] == ["", "yes", "yes", "yes", "no", "no"]
    assert lines[-1].startswith("| (never) |  |  | 10.0 % |")


def test_a_trial_that_was_not_attacked_is_shown_and_not_chosen() -> None:
    best = {"scores": row(0.0, 0.0, 8.0, 1.0)["scores"]}
    found = {**FOUND, "scored": best}
    assert sweep.chosen(found) == "right"
    cells = " |" * len(sweep.ATTACKS)
    assert f"| scored | 0.0 % | 0.0 % |{cells} 1.000× | 74.00 | 100.0 % | 90.0 % | yes |" in [
        line.replace("|  |", "| |").replace("|  |", "| |") for line in sweep.table(found).splitlines()
    ]
    assert sweep.chosen({**FOUND, "scored": row(0.0, 0.0, 8.0, 1.0)}) == "scored"


def test_results_whose_options_have_changed_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "FOLDER", tmp_path)
    first, second = list(sweep.SWEEPS["hardened"].trials)[:2]
    results = sweep.Results("hardened")
    scores = FOUND["right"]["scores"]
    results.store(second, scores=scores, attacks={})
    results.store(first, scores=scores)  # stopped before its attacks
    assert list(json.loads(results.file.read_text())) == [first, second]  # in the order of the trials
    again = sweep.Results("hardened")
    assert second not in again.missing(lambda _: True)
    assert first in again.missing(lambda _: True)
    stored = json.loads(results.file.read_text())
    stored[second]["options"] = ["method.lr=1"]
    results.file.write_text(json.dumps(stored))
    assert second in sweep.Results("hardened").missing(lambda _: True)


def test_a_scored_trial_is_attacked_if_it_keeps_benign_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that was stopped attacks the models that are there, and erases the others."""
    monkeypatch.setattr(sweep, "FOLDER", tmp_path)
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    original, kept, spoilt, unscored = list(sweep.SWEEPS["stage2"].trials)[:4]
    results = sweep.Results("stage2")
    results.store(original, scores=FOUND[sweep.ORIGINAL]["scores"])
    results.store(kept, scores=FOUND["right"]["scores"])
    results.store(spoilt, scores=FOUND["spoils pictures"]["scores"])
    missing = results.missing(lambda _: True)
    assert missing[:3] == [original, kept, unscored]  # one that spoils pictures is whole without attacks
    assert not any(results.is_erased(trial) for trial in missing)
    (tmp_path / "runs" / "stage2-01" / "erased").mkdir(parents=True)
    assert [trial for trial in missing if results.is_erased(trial)] == [kept]


@pytest.mark.parametrize(("name", "trial"), ALL)
def test_every_trial_is_a_configuration(name: str, trial: str) -> None:
    options = sweep.SWEEPS[name].options(trial)
    config = compose(*options)
    last = dict(option.split("=", 1) for option in options)  # of two equal options, the last counts
    for path, value in last.items():
        part, _, field = path.partition(".")
        if part in ("trajectory", "optimizer", "textual", "method") and field:
            options_of: Any = getattr(config, part)
            found = options_of[field] if part == "method" else getattr(options_of, field)
            assert str(found).lower() == value or float(found) == float(value), path
