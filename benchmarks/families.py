"""Write the tables of the model families: `python -m benchmarks.families [FOLDER]`.

FOLDER (`runs/families`) has three evaluations of each family, as `make bench-families` leaves them:
`NAME/scores` of the usual sets, `NAME/scenes` of scenes, and `NAME/attacks`. They have the original, each
stage alone, both, and the hardened model; stages alone are not attacked. ``docs/families.md`` gets a table
for each family, and the README one for all of them, if all were evaluated.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.readme import Rows, broken_cell
from benchmarks.report import markdown, refresh
from trce_lightning.jobs.attack import ORIGINAL
from trce_lightning.report.tables import Scores, results_rows

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]
FAMILIES = {"xl": "SDXL", "sd3": "SD3", "flux": "FLUX.1"}
"""The families of the siblings, by the name in `model=emoji_NAME`."""
COLUMNS = {
    ORIGINAL: "original",
    "textual": "T",
    "trajectory": "V",
    "both": "T+V",
    "hardened": "hardened",
}
"""The models of an evaluation, and their headings."""
ROWS = {
    "ASR direct": "ASR direct",
    "ASR implicit": "ASR implicit",
    "FID": "FID",
    "CLIP-S": "CLIP-S",
    "benign accuracy": "benign accuracy",
    "benign accuracy, never kept": "… never kept",
    "ASR mixed": "**a violent and a harmless subject** (`mixed`): violence shown",
    "mixed accuracy": "harmless subject shown",
    "mixed accuracy, never kept": "… never kept",
    "mixed accuracy, background colour": "background colour",
    "mixed accuracy, style": "style",
    "scenes accuracy, both subjects shown": "**two harmless subjects** (`scenes`): both shown",
    "scenes accuracy, on the left as asked": "left one on the left",
    "scenes accuracy, on the right as asked": "right one on the right",
    "scenes accuracy, in their places, where all are shown": "in the asked order, where both are shown",
    "scenes accuracy, background colour": "background colour",
    "scenes accuracy, style": "style",
}
"""The rows of :func:`results_rows` that are shown, and their headings."""
PARTS = ("scores", "scenes")
"""The evaluations that a family's table needs. It has rows of attacks if there is a third."""
BRIEF = ("ASR direct", "ASR implicit", "FID", "CLIP-S", "benign accuracy", "ASR mixed", "mixed accuracy")
"""The rows of the README's table."""
Metrics = Mapping[str, Any]
"""An evaluation's `metrics.json`."""


def load(folder: Path) -> Metrics:
    """Return the `metrics.json` of an evaluation."""
    found: Metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def scores_of(usual: Metrics, scenes: Metrics) -> dict[str, Scores]:
    """Return the scores of each model on the usual sets and on scenes, by the model's name."""
    merged = {}
    for name in COLUMNS:
        first, second = (
            each["scores"] if name == ORIGINAL else each["models"][name]["scores"] for each in (usual, scenes)
        )
        further = {kind: first[kind] | second[kind] for kind in ("asr", "accuracy")}
        merged[name] = first | further
    return merged


def cells_of(scores: Mapping[str, Scores]) -> dict[str, list[str]]:
    """Return the cells of each row of :data:`ROWS`, a column each model."""
    found = {title: cells for title, *cells in results_rows(scores)}
    return {title: found[title] for title in ROWS if title in found}


def attack_rows(rows: Rows) -> dict[str, list[str]]:
    """Return for each attack the share of prompts that it breaks, a column each model."""
    return {
        f"attacked, {row['door']}: `{name}`": [broken_cell(rows, label, name) for label in COLUMNS]
        for name, row in rows.get(ORIGINAL, {}).items()
    }


def family_table(usual: Metrics, scenes: Metrics, attacks: Rows) -> str:
    """Return the table of a family: a row each score and each attack, a column each model."""
    found = cells_of(scores_of(usual, scenes))
    rows = [[heading, *found[title]] for title, heading in ROWS.items() if title in found]
    rows += [[title, *cells] for title, cells in attack_rows(attacks).items()]
    return markdown(["", *COLUMNS.values()], rows)


def brief_table(families: Mapping[str, Sequence[Metrics]]) -> str:
    """Return a table of all families: a cell has the original, then TRCE with both stages, then hardened."""
    found = {name: cells_of(scores_of(usual, scenes)) for name, (usual, scenes) in families.items()}
    shown = [list(COLUMNS).index(name) for name in (ORIGINAL, "both", "hardened")]
    rows = [
        [
            ROWS[title],
            *(" → ".join(_plain(cells[title][index]) for index in shown) for cells in found.values()),
        ]
        for title in BRIEF
    ]
    return markdown(["original → T+V → hardened", *(FAMILIES[name] for name in families)], rows)


def _plain(cell: str) -> str:
    """Return a cell without its interval."""
    before, _, rest = cell.partition(" [")
    return before + rest.partition("]")[2]


def main() -> None:
    """Write the tables of the families that were evaluated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs") / "families", metavar="FOLDER")
    folder = parser.parse_args().folder
    families = {
        name: [load(folder / name / part) for part in PARTS]
        for name in FAMILIES
        if all((folder / name / part / "metrics.json").is_file() for part in PARTS)
    }
    if not families:
        parser.error(
            f"expected evaluations of families as `make bench-families` makes them, got none in '{folder}'"
        )
    for name, (usual, scenes) in families.items():
        attacked = (folder / name / "attacks" / "metrics.json").is_file()
        attacks = load(folder / name / "attacks")["attacks"] if attacked else {}
        refresh(family_table(usual, scenes, attacks), ROOT / "docs" / "families.md", f"family {name}")
    if missing := FAMILIES.keys() - families.keys():
        log.warning("README's table stays, since these families were not evaluated: %s", sorted(missing))
    else:
        refresh(brief_table(families), ROOT / "README.md", "families")


if __name__ == "__main__":
    main()
