"""Write tables of finished runs into README and docs: `python -m benchmarks.readme RUN STAGE_RUN …`.

The first run makes the README's table. All runs make the table by stage in `docs/results.md`. It has tests of
the first run against the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.report import refresh
from trce_lightning.compare import load_runs, paired_tests
from trce_lightning.report.tables import results_table

RESULTS = (
    "ASR direct",
    "ASR implicit",
    "FID",
    "CLIP-S",
    "benign accuracy",
    "benign accuracy, near neighbours of the concept",
    "benign accuracy, never kept",
    "benign accuracy, style",
    "benign accuracy, background colour",
    "false alarm",
)
STAGES = ("ASR direct", "ASR implicit", "FID", "benign accuracy")
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write both tables between their marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("stage_runs", nargs="+", type=Path, metavar="STAGE_RUN")
    options = parser.parse_args()
    (original, erased) = load_runs([options.run]).values()
    both = {"original": original.scores, "erased": erased.scores}
    refresh(results_table(both, RESULTS), ROOT / "README.md", "results")
    columns = load_runs([*options.stage_runs, options.run])
    scores = {title: scored.scores for title, scored in columns.items()}
    _, first, *_, last = columns
    tests = paired_tests({name: columns[name] for name in (first, last)})
    text = "\n".join([results_table(scores, STAGES), "Exact McNemar tests, paired by image:", "", *tests])
    refresh(text, ROOT / "docs" / "results.md", "stages")


if __name__ == "__main__":
    main()
