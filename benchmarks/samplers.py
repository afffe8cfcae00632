"""Measures what fewer steps cost the embedded model: `python -m benchmarks.samplers [train.py's OPTION …]`.

Scores of one model on the tuning prompts, drawn by several samplers from the same noise; the table goes into
docs/performance.md. `model.path=RUN/erased` scores another model, and prints its table only.
"""

from __future__ import annotations

import dataclasses
import logging
import sys

from benchmarks.fitting import compose
from benchmarks.readme import RESULTS
from benchmarks.report import refresh
from trce_lightning.evaluation.scorer import Sampling, Scorer
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.report.tables import Scores, one_line, results_table

log = logging.getLogger(__name__)
IMAGES_PER_SET = 256
DDIM = Variation()
DPM_SOLVER = Variation(scheduler="DPMSolverMultistepScheduler", timestep_spacing="trailing")
COMPARED = ((DDIM, 20), (DDIM, 10), (DDIM, 6), (DPM_SOLVER, 10), (DPM_SOLVER, 6), (DPM_SOLVER, 5))
TITLES = RESULTS[:5]


def scores(scorer: Scorer, sampling: Sampling) -> Scores:
    """Return the scores of images drawn so."""
    found, _ = dataclasses.replace(scorer, sampling=sampling, detections={})(str(sampling))
    log.info("%s: %s", sampling, one_line(found))
    return found


def main() -> None:
    """The table, on stdout."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = compose("concept=violence", *sys.argv[1:])
    scorer = Session(config, concepts_of(config)).scorer("tune", IMAGES_PER_SET)
    columns = {}
    for variation, steps in COMPARED:
        sampling = dataclasses.replace(scorer.sampling, num_steps=steps, variation=variation)
        name = "DDIM" if variation is DDIM else "DPM-Solver++"
        columns[f"{steps} steps, {name}"] = scores(scorer, sampling)
    text = results_table(columns, TITLES)
    if config.model.path is None:
        refresh(text, name="samplers")
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
