"""The tables of the model families, from the `metrics.json` of three evaluations each."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import families
from trce_lightning.metrics.uncertainty import wilson_rate

SHOWN = dict(zip(families.COLUMNS, (99, 20, 30, 5, 1), strict=True))
"""The number of 100 images that show the concept, by model."""


def evaluation(scores: dict[str, dict[str, Any]], **further: Any) -> dict[str, Any]:
    """A `metrics.json` with the scores of all models."""
    models = {name: {"scores": own} for name, own in scores.items() if name != "original"}
    return {"scores": scores["original"], "models": models, **further}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The evaluations of SD3's sibling alone. Stages alone were not attacked."""
    usual, scenes, attacks = {}, {}, {}
    for name, shown in SHOWN.items():
        usual[name] = {
            "asr": {"direct": wilson_rate(shown, 100), "implicit": wilson_rate(shown, 100)},
            "fid": 8.0 + shown / 100,
            "clip_score": 70.0,
            "accuracy": {"benign": {"subject": wilson_rate(100 - shown // 10, 100)}},
        }
        scenes[name] = {
            "asr": {"mixed": wilson_rate(shown, 200)},
            "accuracy": {"mixed": {"subject": wilson_rate(180 - shown, 200)}},
        }
        attacks[name] = {
            "words": {
                "door": "embeddings",
                "broken": shown / 100,
                "images": 100,
                "false_alarm": {"tries": 1},
            }
        }
    del attacks["textual"], attacks["trajectory"]
    for folder, content in (
        ("scores", evaluation(usual)),
        ("scenes", evaluation(scenes)),
        ("attacks", {"attacks": attacks}),
    ):
        (tmp_path / "sd3" / folder).mkdir(parents=True)
        (tmp_path / "sd3" / folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_a_family_has_a_column_for_each_model_and_rows_of_all_evaluations(runs: Path) -> None:
    usual, scenes, attacks = (families.load(runs / "sd3" / name) for name in ("scores", "scenes", "attacks"))
    table = families.family_table(usual, scenes, attacks["attacks"])
    header, _, *lines = table.splitlines()
    assert header == "|  | original | T | V | T+V | hardened |"
    rows = {cells[1]: cells[2:7] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert [cell.split()[0] for cell in rows["ASR direct"]] == ["99.0", "20.0", "30.0", "5.0", "1.0"]
    mixed = rows["**a violent and a harmless subject** (`mixed`): violence shown"]
    assert [cell.split()[0] for cell in mixed] == ["49.5", "10.0", "15.0", "2.5", "0.5"]
    attacked = rows["attacked, embeddings: `words`"]
    assert [cell.split()[0] for cell in attacked] == ["99.0", "–", "–", "5.0", "1.0"]


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose pages have old tables between their marks."""
    root = tmp_path_factory.mktemp("project")
    (root / "docs").mkdir()
    for page, names in (("README.md", ["families"]), ("docs/families.md", ["family sd3", "family xl"])):
        tables = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in names]
        (root / page).write_text(f"before\n{''.join(tables)}after\n", "utf-8")
    monkeypatch.setattr(families, "ROOT", root)
    return root


def test_the_tables_go_between_their_marks(
    runs: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", {"sd3": "SD3"})
    monkeypatch.setattr(sys, "argv", ["families", str(runs)])
    families.main()
    brief = (project / "README.md").read_text("utf-8")
    assert brief.startswith("before\n") and brief.endswith("\nafter\n") and "old" not in brief
    assert "| original → T+V → hardened | SD3 |" in brief
    assert "| ASR direct | 99.0 % → 5.0 % → 1.0 % |" in brief
    assert "| FID | 8.99 → 8.05 (0.90×) → 8.01 (0.89×) |" in brief
    assert "harmless subject shown | 40.5 % → 87.5 % → 89.5 % |" in brief
    assert "| ASR direct | 99.0 % [" in (project / "docs" / "families.md").read_text("utf-8")


def test_one_family_alone_leaves_the_readmes_table(
    runs: Path, project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(families, "FAMILIES", {"sd3": "SD3", "xl": "SDXL"})
    monkeypatch.setattr(sys, "argv", ["families", str(runs)])
    families.main()
    assert "\nold\n" in (project / "README.md").read_text("utf-8")
    assert "these families were not evaluated: ['xl']" in caplog.text
    page = (project / "docs" / "families.md").read_text("utf-8")
    assert "| ASR direct | 99.0 % [" in page and page.count("old") == 1


def test_a_folder_without_evaluations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["families", str(tmp_path)])
    with pytest.raises(SystemExit):
        families.main()
    assert (
        f"expected evaluations of families as `make bench-families` makes them, got none in '{tmp_path}'"
        in (capsys.readouterr().err)
    )
