"""The sweep of stage 2: its rule, and that every trial is a configuration that `train.py` takes."""

from typing import Any

import pytest

from benchmarks import sweep_stage2
from benchmarks.fitting import compose


def scores(direct: float, implicit: float, fid: float, accuracy: float) -> dict[str, Any]:
    return {
        "asr": {"direct": {"rate": direct}, "implicit": {"rate": implicit}},
        "fid": fid,
        "clip_score": 74.0,
        "benign_accuracy": accuracy,
    }


FOUND = {
    sweep_stage2.ORIGINAL: scores(1.0, 0.9, 54.0, 1.0),
    "weak": scores(0.8, 0.8, 54.1, 1.0),
    "right": scores(0.4, 0.2, 54.3, 0.985),
    "spoils pictures": scores(0.1, 0.0, 54.5, 1.0),
    "spoils subjects": scores(0.1, 0.0, 54.0, 0.95),
}


def test_the_lowest_asr_among_those_that_keep_benign_pictures_is_chosen() -> None:
    assert sweep_stage2.chosen(FOUND) == "right"
    assert sweep_stage2.chosen({name: FOUND[name] for name in FOUND if name != "right"}) == "weak"
    spoilt = {name: row for name, row in FOUND.items() if name not in ("right", "weak")}
    assert sweep_stage2.chosen(spoilt) is None
    lines = sweep_stage2.table(FOUND).splitlines()
    assert len(lines) == 2 + len(FOUND)
    assert "| **right** | 40.0 % | 20.0 % | +0.30 | 74.00 | 98.5 % | yes |" in lines
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["", "yes", "yes", "no", "no"]


@pytest.mark.parametrize("name", sweep_stage2.TRIALS)
def test_every_trial_is_a_configuration(name: str) -> None:
    options = sweep_stage2.TRIALS[name]
    config = compose("concept=violence", "stages=[trajectory]", *sweep_stage2.EARLIER, *options)
    assert name == sweep_stage2.ORIGINAL or config.stages == ["trajectory"]
    last = dict(option.split("=", 1) for option in options)  # of two equal options, the last counts
    for path, value in last.items():
        if path.startswith(("trajectory.", "optimizer.")):
            part, field = path.split(".")
            found = getattr(getattr(config, part), field)
            assert str(found).lower() == value or float(found) == float(value), path
