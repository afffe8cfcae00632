"""Several runs in one table: what is tested, and refusals in a line."""

import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trce_lightning import compare
from trce_lightning.evaluation.scored import Scored
from trce_lightning.metrics.collateral import Detection

SETS = ("direct", "benign")


def scored(hits: int) -> Scored:
    """Return scores of 20 images a set, the first of which show the concept."""
    return Scored({}, {name: {str(i): Detection(float(i < hits)) for i in range(20)} for name in SETS})


def finished_run(folder: Path, stages: list[str], hits: int) -> Path:
    scored(20).save(folder / "scored" / "original.json")
    scored(hits).save(folder / "scored" / "erased.json")
    OmegaConf.save({"stages": stages}, folder / "config.yaml")
    return folder


def test_each_run_is_tested_against_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    textual = finished_run(tmp_path / "t", ["textual"], 5)
    both = finished_run(tmp_path / "tv", ["textual", "trajectory"], 1)
    compare.main([str(textual), str(both)])
    said = caplog.messages[-1].splitlines()
    # Four discordant images on one side: 2 · 0.5⁴. Of benign prompts they are false alarms, not accuracy.
    assert "- direct: TRCE (T) against TRCE (T+V), p = 0.12" in said
    assert "- benign, false alarms: TRCE (T) against TRCE (T+V), p = 0.12" in said
    assert not any(line.startswith("- benign:") for line in said)


def test_a_folder_without_a_finished_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        compare.main([str(tmp_path / "gone")])
    said = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "finished run" in said and "gone" in said and "Traceback" not in said
