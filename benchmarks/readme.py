"""`python -m benchmarks.readme RUN STAGE_RUN …`: the README's tables of results, from finished runs.

The first run makes the table of results; all of them make the table by stage.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.report import refresh
from trce_lightning.compare import load_runs
from trce_lightning.report import results_table

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
README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Put both tables between their marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    runs = parser.parse_args().runs
    (original, erased) = load_runs(runs[:1]).values()
    columns = {"original": original.scores, "erased": erased.scores}
    refresh(results_table(columns, RESULTS), README, "results")
    by_stage = {title: scored.scores for title, scored in load_runs([*runs[1:], runs[0]]).items()}
    refresh(results_table(by_stage, STAGES), README, "stages")


if __name__ == "__main__":
    main()
