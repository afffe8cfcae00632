"""Compare the closed forms of stage 1 on the embedded model: `python -m benchmarks.forms`.

Stage 1 alone, by the domain's judge. Each form gets as many trials as the others on the tuning prompts of
violence, and the trial with the lowest `loss` is taken. It is then scored on the report prompts: of violence,
with variants, and with 1, 3, 10 and 30 subjects erased at once, while the other 87 of the 117 are kept.

The tables go into docs/forms.md, and every measurement into benchmarks/forms.json. Measurements that it has
already are not repeated, so an interrupted run goes on. `--fresh` forgets them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.fitting import compose
from benchmarks.report import markdown, refresh
from trce_lightning.adapters import Adapter
from trce_lightning.closed_form import Edit
from trce_lightning.concepts import Concept
from trce_lightning.config.schema import FORMS, TrainConfig
from trce_lightning.emoji.subjects import SUBJECTS
from trce_lightning.evaluation.scored import Scores
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.prompts.own import Split
from trce_lightning.prompts.phrasings import Stream, units
from trce_lightning.prompts.records import BENIGN, DIRECT, IMPLICIT, UNERASED, PromptSet, shuffled
from trce_lightning.textual import (
    CONTEXT,
    TextualStatistics,
    apply_edit_,
    kept_statistics,
    readers_of,
    textual_statistics,
)

log = logging.getLogger(__name__)
PAGE = Path(__file__).parents[1] / "docs" / "forms.md"
RESULTS = Path(__file__).parent / "forms.json"
PARTS = ("tune", "violence", "subjects")
TUNE_IMAGES, VIOLENCE_IMAGES, SUBJECT_IMAGES = 64, 256, 30
COUNTS = (1, 3, 10, 30)
Options = dict[str, Any]
Row = dict[str, Any]
TRIALS: dict[str, list[Options]] = {
    "ridge": [{"eta": eta, "ridge": ridge} for eta in (2.0, 6.0) for ridge in (1e-3, 1e-2)],
    "null_space": [
        {"null_space_share": share, "null_space_ridge": ridge}
        for share in (1e-3, 3e-3)
        for ridge in (1e-2, 1e-1)
    ],
    "projection": [{"projection_share": share, "eta": eta} for share in (0.3, 0.5) for eta in (6.0, 20.0)],
}
"""The trials of each form: as many for each."""
VARIANTS: dict[str, Options] = {
    "": {},
    ", V alone": {"matrices": ["value"]},
    ", one adversarial round": {"adversarial_rounds": 1},
}


class Measured:
    """Measurements by name, kept in a file. One whose settings have changed is made again."""

    def __init__(self, file: Path = RESULTS, *, fresh: bool = False) -> None:
        self.file = file
        self.rows: dict[str, Row] = {}
        if file.exists() and not fresh:
            self.rows = json.loads(file.read_text(encoding="utf-8"))

    def __call__(self, name: str, settings: Options, measure: Callable[[], Row]) -> Row:
        """Return the row of this name, from the file if it was measured with these settings."""
        stored = self.rows.get(name)
        if stored is None or stored["settings"] != settings:
            self.rows[name] = {"settings": settings, **measure()}
            log.info("%s: %s", name, self.rows[name])
            text = json.dumps(self.rows, indent=1, ensure_ascii=False)
            self.file.write_text(text + "\n", encoding="utf-8")
        return self.rows[name]


@dataclass
class Problem:
    """Concepts to erase from the embedded model, and the prompts that tell how well it went."""

    config: TrainConfig
    concepts: list[Concept]
    adapter: Adapter

    @cached_property
    def session(self) -> Session:
        """The session of these concepts on the shared model."""
        return Session(self.config, self.concepts, self.adapter)

    @cached_property
    def statistics(self) -> TextualStatistics:
        """The statistics of all forms."""
        config = dataclasses.replace(self.config.textual, form="projection")
        kept = kept_statistics(self.adapter, self.session.keep_prompts(), shown=False)
        return textual_statistics(self.adapter, self.concepts, kept, config)

    def edit(self, options: Options) -> Edit:
        """Return T, solved with these options of stage 1."""
        config = dataclasses.replace(self.config.textual, **options)
        read_by = readers_of(self.adapter.streams()[CONTEXT], config.matrices)
        return dataclasses.replace(self.statistics, readers=read_by).solve(config)

    def sets(self, split: Split, size: int, names: Sequence[str]) -> list[PromptSet]:
        """Return prompt sets of the domain."""
        return self.session.domain.prompt_sets(size, split, names)

    def measure(self, options: Options | None, sets: Sequence[PromptSet]) -> Row:
        """Return what a form does to prompt sets. None is the original model."""
        scorer = dataclasses.replace(self.session.scorer("tune", 1), sets=sets, detections={})
        edit = None if options is None else self.edit(options)
        with edited(self.adapter, edit):
            scores, _ = scorer("")
        kept = [prompts for prompts in sets if prompts.name in (BENIGN, UNERASED)]
        row: Row = {"asr": scores["asr"], "accuracy": accuracy_of(scores, kept), "fid": scores["fid"]}
        row["unkept"] = scores.get("benign_accuracy_unkept")
        if edit is not None:
            row["erase residual"], row["keep residual"] = edit.erase_residual, edit.keep_residual
            row["keyless distance"] = edit.keyless_distance
            row["directions"] = None if edit.directions is None else edit.directions.shape[1]
        return row


@contextmanager
def edited(adapter: Adapter, edit: Edit | None) -> Iterator[None]:
    """Apply an edit within, and put the weights back afterwards."""
    weights = [entry.module.weight for entry in adapter.streams()[CONTEXT].entries.values()]
    before = [weight.detach().clone() for weight in weights]
    if edit is not None:
        apply_edit_(adapter, edit)
    try:
        yield
    finally:
        for weight, original in zip(weights, before, strict=True):
            weight.data.copy_(original)
        adapter.weights_changed()


def accuracy_of(scores: Scores, sets: Sequence[PromptSet]) -> float:
    """Return the share of all images of these sets whose subject the judge recognises."""
    sizes = [len(prompts.records) for prompts in sets]
    rates = [scores["accuracy"][prompts.name]["subject"]["rate"] for prompts in sets]
    return float(sum(size * rate for size, rate in zip(sizes, rates, strict=True)) / sum(sizes))


def loss(row: Row) -> float:
    """Return the mean of both attack success rates and of what benign accuracy lacks, weighted 1 : 1."""
    shown = [row["asr"][name]["rate"] for name in (DIRECT, IMPLICIT)]
    return float(sum(shown) / 2 + 1 - row["accuracy"])


def tune(problem: Problem, measured: Measured) -> dict[str, list[Row]]:
    """Return every trial of each form with its scores on the tuning prompts."""
    sets = problem.sets("tune", TUNE_IMAGES, (DIRECT, IMPLICIT, BENIGN))
    found: dict[str, list[Row]] = {form: [] for form in FORMS}
    for index in range(min(map(len, TRIALS.values()))):
        for form in FORMS:
            options = {"form": form, **TRIALS[form][index]}
            settings = {"images": TUNE_IMAGES, "options": options}
            name = f"tune {form} {index}"
            row = measured(name, settings, partial(problem.measure, options, sets))
            found[form].append(row)
    return found


def best(trials: Mapping[str, Sequence[Row]]) -> dict[str, Options]:
    """Return each form's options of least loss. If trials are equal, the one that moves kept states least."""
    return {
        form: dict(min(rows, key=lambda row: (loss(row), row["keep residual"]))["settings"]["options"])
        for form, rows in trials.items()
    }


def percent(rate: Mapping[str, float]) -> str:
    """Return a rate with its interval."""
    return f"{100 * rate['rate']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def tuning_table(trials: Mapping[str, Sequence[Row]]) -> str:
    """Return every trial. The chosen ones are bold."""
    chosen, rows = best(trials), []
    for form, of_form in trials.items():
        for row in of_form:
            options = {key: value for key, value in row["settings"]["options"].items() if key != "form"}
            name = f"{form}: {', '.join(f'{key}={value:g}' for key, value in options.items())}"
            if chosen[form] == row["settings"]["options"]:
                name = f"**{name}**"
            shares = [row["asr"][DIRECT]["rate"], row["asr"][IMPLICIT]["rate"], row["accuracy"]]
            directions = "" if row["directions"] is None else str(row["directions"])
            residuals = [f"{row[key]:.2g}" for key in ("erase residual", "keep residual")]
            rows.append([name, *(f"{100 * share:.1f} %" for share in shares), *residuals, directions])
    head = ["trial", "ASR direct", "ASR implicit", "benign accuracy"]
    return markdown([*head, "erase residual", "keep residual", "directions"], rows)


def violence_table(problem: Problem, chosen: Mapping[str, Options], measured: Measured) -> str:
    """Return scores of each form and its variants on the report prompts."""
    sets = problem.sets("report", VIOLENCE_IMAGES, (DIRECT, IMPLICIT, BENIGN))
    cases: dict[str, Options | None] = {"original": None}
    for variant, more in VARIANTS.items():
        cases |= {form + variant: {**options, **more} for form, options in chosen.items()}
    rows, first = [], 0.0
    for name, options in cases.items():
        settings = {"images": VIOLENCE_IMAGES, "options": options}
        row = measured(f"violence {name}", settings, partial(problem.measure, options, sets))
        first = first or row["fid"]
        shown = [percent(row["asr"][which]) for which in (DIRECT, IMPLICIT)]
        fid = f"{row['fid']:.2f} ({row['fid'] / first:.2f}×)"
        kept = [f"{100 * row[key]:.1f} %" for key in ("accuracy", "unkept")]
        distance = "" if options is None else f"{100 * row['keyless distance']:.1f} %"
        rows.append([name, *shown, fid, *kept, distance])
    head = ["", "ASR direct", "ASR implicit", "FID", "benign accuracy", "… never kept", "keyless distance"]
    return markdown(head, rows)


def subject_concepts(count: int) -> list[Concept]:
    """Return concepts of the first ``count`` subjects in a fixed arbitrary order, one each.

    The counterpart is a subject of the same category, if one is among those never erased.
    """
    order = shuffled(subject.name for subject in SUBJECTS)
    category = {subject.name: subject.category for subject in SUBJECTS}
    left = order[max(COUNTS) :]
    concepts = []
    for index, name in enumerate(order[:count]):
        alike = [other for other in left if category[other] == category[name]] or left
        concepts.append(Concept.from_terms([_phrase(name)], _phrase(alike[index % len(alike)])))
    return concepts


def _phrase(name: str) -> str:
    """Return a subject with its article, if it takes one."""
    return Stream(units([name]), ["{a}"]).text(0)[1]


def subjects_table(
    config: TrainConfig, adapter: Adapter, chosen: Mapping[str, Options], measured: Measured
) -> str:
    """Return how often erased subjects still show, and how often kept ones are recognised.

    The kept prompts are the same for every number of erased subjects, one for each of the 87.
    """
    whole = Problem(config, subject_concepts(max(COUNTS)), adapter)
    asked = {name: _labels(whole, name) for name in (BENIGN, UNERASED)}
    kept = [prompts for name, size in asked.items() for prompts in whole.sets("report", size, (name,))]
    cells: dict[str, list[str]] = {name: ["", *[""] * len(COUNTS)] for name in ("original", *chosen)}
    for column, count in enumerate(COUNTS, 1):
        problem = Problem(config, subject_concepts(count), adapter)
        sets = [*problem.sets("report", SUBJECT_IMAGES, (DIRECT,)), *kept]
        cases: dict[str, Options | None] = dict(chosen)
        if count == max(COUNTS):
            cases["original"] = None
        for name, options in cases.items():
            settings = {"images": SUBJECT_IMAGES, "options": options}
            row = measured(f"subjects {count} {name}", settings, partial(problem.measure, options, sets))
            shown = row["asr"][DIRECT]["rate"]
            cells[name][column] = f"{100 * shown:.1f} % / {100 * row['accuracy']:.1f} %"
    head = ["erased still shown / kept recognised", *(f"{count} erased" for count in COUNTS)]
    return markdown(head, [[name, *row[1:]] for name, row in cells.items()])


def _labels(problem: Problem, name: str) -> int:
    """Return the number of different labels of a prompt set."""
    (prompts,) = problem.sets("report", len(SUBJECTS), (name,))
    return len({record.label for record in prompts.records})


def main() -> None:
    """Run the chosen parts, and write their tables."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forms", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; none: all")
    parser.add_argument("--fresh", action="store_true", help="forget earlier measurements")
    options = parser.parse_args()
    parts = options.part or PARTS
    config, measured = compose("concept=violence"), Measured(fresh=options.fresh)
    session = Session(config, concepts_of(config))
    problem = Problem(config, concepts_of(config), session.adapter)
    with torch.no_grad():
        trials = tune(problem, measured)
        write("trials", tuning_table(trials))
        if "violence" in parts:
            write("violence", violence_table(problem, best(trials), measured))
        if "subjects" in parts:
            write("subjects", subjects_table(config, session.adapter, best(trials), measured))


def write(name: str, text: str) -> None:
    """Print a table, and put it into the page."""
    sys.stdout.write(f"{text}\n\n")
    refresh(text, PAGE, name)


if __name__ == "__main__":
    main()
