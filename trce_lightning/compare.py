"""``python -m trce_lightning.compare RUN [RUN …]``: one table of several runs, with paired tests.

The runs must have scored the same prompts with the same noise, because images are paired one by one.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf

from trce_lightning.cli import expected_failures
from trce_lightning.config.schema import STAGES
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import Scored
from trce_lightning.metrics.asr import paired_test
from trce_lightning.metrics.scores import NO_ATTACKS
from trce_lightning.report.tables import results_table
from trce_lightning.runtime.signals import stop
from trce_lightning.runtime.storage import reading
from trce_lightning.runtime.streams import keep_speaking

log = logging.getLogger(__name__)
ERASE_AGAIN = "leave that run out, or make it again"
TITLES = {
    ("textual",): "TRCE (T)",
    ("trajectory",): "TRCE (V)",
    ("textual", "trajectory"): "TRCE (T+V)",
    ("trajectory", "textual"): "TRCE (V+T)",
}


def load_runs(folders: list[Path]) -> dict[str, Scored]:
    """Return the original model's scores from the first run, then each run's scores by its stages' name.

    If a folder holds no finished run, or the runs disagree on the original model, raise ``InputError``.
    """
    columns: dict[str, Scored] = {}
    for folder in folders:
        scored = folder / "scored"
        if not (scored / "erased.json").is_file():
            raise InputError(f"compare: expected the folder of a finished run, got '{folder}'")
        original = Scored.load(scored / "original.json", ERASE_AGAIN)
        if columns.setdefault("original", original) != original:
            raise InputError(f"compare: expected runs that scored the same prompts, '{folder}' did not")
        erased = Scored.load(scored / "erased.json", ERASE_AGAIN)
        config = folder / "config.yaml"
        with reading(config, "a run's configuration", ERASE_AGAIN):
            stages = tuple(OmegaConf.load(config).stages)
            if not set(stages) <= set(STAGES):
                raise ValueError(f"stages {stages}")
        title = TITLES.get(stages, folder.name)
        columns[title if title not in columns else f"{title} {folder.name}"] = erased
    return columns


def paired_tests(columns: dict[str, Scored]) -> list[str]:
    """Return exact McNemar tests of each column against the one before it, as Markdown list items.

    The tests compare how often images show the concept. If the prompts don't ask for the concept, these are
    false alarms.
    """
    tests = [
        (name, before, after, paired_test(columns[before].hits(name), columns[after].hits(name)))
        for before, after in pairwise(columns)
        for name in columns[after].detections
    ]
    return [f"- {_tested(name)}: {before} against {after}, p = {p:.2g}" for name, before, after, p in tests]


def _tested(set_name: str) -> str:
    return f"{set_name}, false alarms" if set_name in NO_ATTACKS else set_name


def main(argv: Sequence[str] | None = None) -> None:
    """Log the table and the tests. An expected failure exits with code 2."""
    keep_speaking()
    with stop.installed(""), expected_failures():
        options = _parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        columns = load_runs(options.runs)
        log.info(results_table({title: scored.scores for title, scored in columns.items()}))
        log.info("\n".join(["", "Exact McNemar tests, paired by image:", *paired_tests(columns)]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    return parser


if __name__ == "__main__":
    main()
