"""Choose every method's options with the same number of trials, on the tuning prompts and their noise.

``configs/method_space/NAME.yaml`` says which options of a method, or of a rule of guidance, are searched. The
first trial takes their starting values. The others lie on a scrambled Halton sequence, which is the same for
every machine. So trials don't depend on each other, run in any number of processes, and a larger number of
trials only adds some. Each trial erases, generates the tuning prompts' images, and appends a line to a
journal. Trials that the journal holds are not run again.

A trial's loss is the mean of the direct and the implicit ASR, plus :func:`penalty`. The trial of least loss
is chosen.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from filelock import FileLock
from omegaconf import OmegaConf
from scipy.stats import qmc
from tqdm.auto import tqdm

from trce_lightning.config.arguments import did_you_mean
from trce_lightning.config.checks import READS, TRCE, check_values
from trce_lightning.config.composition import compose, config_folder
from trce_lightning.config.schema import ALL, EvalConfig, TrainConfig, TrainerConfig, TuneConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.scored import Scores
from trce_lightning.evaluation.scorer import score_on_all_ranks
from trce_lightning.jobs import announce
from trce_lightning.jobs.erase import run_of
from trce_lightning.jobs.runs import cache_folder
from trce_lightning.jobs.session import Session, base_name, concepts_of
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.runtime.locks import claimed, own_lock
from trce_lightning.runtime.logs import set_up_logging
from trce_lightning.runtime.signals import stop
from trce_lightning.runtime.storage import reading, write_text

log = logging.getLogger(__name__)
ORIGINAL = "original"
"""The name of the trial that changes nothing. The others' penalties refer to it."""
LEAST_ACCURACY_LOST = 0.02
"""The share of benign accuracy that may be lost without a penalty: one image of 64."""
FID_SHARE = 0.05
"""The share of the original's FID that ``fid_margin`` is."""
PLANNED = "TRCE_TUNE_PLANNED"
"""The environment variable of a process whose parent has planned, and names the methods in order of cost."""
POLL_SECONDS = 1.0
"""The time between two looks at the journal."""
DIGITS = 3
"""The significant digits of a searched number."""
HEAD = (
    *("method", "trial", "chosen", "loss", "asr_direct", "asr_implicit", "fid", "clip_score"),
    *("benign_accuracy", "network_evaluations", "seconds", "device", "options", "refused"),
)
"""The columns of the table of all trials."""
Options = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Dimension:
    """One option that is searched: a number between ``low`` and ``high``, or one of ``choices``."""

    start: Any
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    choices: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.choices:
            if self.start not in self.choices or self.low is not None or self.high is not None:
                raise ValueError(f"expected no range, and start among {self.choices}, got {self}")
        elif self.low is None or self.high is None or not self.low <= self.start <= self.high:
            raise ValueError(f"expected choices, or low <= start <= high, got {self}")
        elif self.log and self.low <= 0:
            raise ValueError(f"expected low above 0 on a logarithmic scale, got {self.low}")

    def at(self, share: float) -> Any:
        """Return the value at a share in [0, 1) of the range."""
        if self.choices:
            return self.choices[int(share * len(self.choices))]
        assert self.low is not None and self.high is not None
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Space:
    """The options of a method that are searched, and those that are the same in all trials."""

    name: str
    search: Mapping[str, Dimension]
    fixed: Mapping[str, Any]

    @property
    def changes_weights(self) -> bool:
        """Return whether this is a method, and not a rule of guidance."""
        return not any(key.startswith("guidance.") for key in (*self.search, *self.fixed))

    def options(self, count: int) -> list[Options]:
        """Return the options of the first ``count`` trials."""
        shares = qmc.Halton(len(self.search), scramble=True, seed=0).random(max(0, count - 1))
        rows = [{key: dimension.start for key, dimension in self.search.items()}]
        for row in shares:
            values = zip(self.search.items(), row.tolist(), strict=True)
            rows.append({key: dimension.at(share) for (key, dimension), share in values})
        return [dict(self.fixed) | row for row in rows[:count]]


def spaces_folder() -> Path:
    """Return the folder of all search spaces."""
    return config_folder() / "method_space"


def load_space(name: str) -> Space:
    """Return the search space of a method or a rule of guidance.

    ``InputError`` if it has none, or if its file is wrong.
    """
    names = sorted(file.stem for file in spaces_folder().glob("*.yaml"))
    if name not in names:
        raise InputError(
            f"option 'methods': expected {ALL} or names among {', '.join(names)}, got {name!r}."
            f"{did_you_mean(name, names)}"
        )
    file = spaces_folder() / f"{name}.yaml"
    with reading(file, "a search space", "correct it"):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        search = {key: Dimension(**values) for key, values in content["search"].items()}
        return Space(name, search, content.get("fixed") or {})


@dataclass(frozen=True)
class Trial:
    """One trial. Its options are None for the original model."""

    method: str
    number: int
    options: Mapping[str, Any] | None
    changes_weights: bool = True

    def overrides(self) -> list[str]:
        """Return Hydra's overrides of the trial."""
        if self.options is None:
            return []
        group = "method" if self.changes_weights else "guidance"
        values = [f"{key}={_written(value)}" for key, value in self.options.items()]
        # Values that were chosen earlier are no part of a trial.
        chosen = [f"{group}_tuning=[]"] if (config_folder() / f"{group}_tuning").is_dir() else []
        return [f"{group}={self.method}", *chosen, *values]

    def config(self, config: TuneConfig, folder: str) -> TrainConfig | EvalConfig:
        """Return the configuration with which the trial erases, or generates images with a rule."""
        parts: dict[str, Any] = {
            "concept": config.concept,
            "model": config.model,
            "runs": folder,
            "cache": str(cache_folder(config)),
        }
        device = dataclasses.replace(config.trainer, devices=1, enable_progress_bar=False)
        if self.options is not None and self.changes_weights:
            composed = compose("train", TrainConfig, [f"model={config.model.name}", *self.overrides()])
            metrics = dataclasses.replace(
                composed.metrics,
                enabled=False,
                batch_size=config.batch_size,
                final_images_per_set=config.images_per_set,
            )
            trainer = TrainerConfig(**dataclasses.asdict(device))
            return dataclasses.replace(
                composed, **parts, metrics=metrics, trainer=trainer, seed=config.seed, export=["delta"]
            )
        composed = compose("eval", EvalConfig, [f"model={config.model.name}", *self.overrides()])
        metrics = dataclasses.replace(composed.metrics, batch_size=config.batch_size)
        return dataclasses.replace(composed, **parts, metrics=metrics, trainer=device)

    def key(self, config: TuneConfig) -> Row:
        """Return what decides the trial's result."""
        return {
            "concept": sorted(config.concept),
            "model": base_name(config.model),
            "contents": contents_of(config, self.method),
            "images": config.images_per_set,
            "seed": config.seed,
            "method": self.method,
            "options": None if self.options is None else dict(self.options),
        }


def contents_of(config: TuneConfig, method: str) -> str:
    """Return a hash of the concepts and the model, which may change under their names.

    The model's own options count as well: a method that reads TRCE's begins with them, and all may read the
    scenes of ``scene_templates``.
    """
    facts: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    contents = [facts["concept"], facts["model"]]
    tuned = config_folder() / "tuning" / f"{config.model.name}.yaml"
    if tuned.is_file():
        options = tuned.read_text("utf-8")
        scenes = yaml.safe_load(options).get("scene_templates", 0)
        contents += [options] if method in (TRCE, *READS) else [scenes] if scenes else []
    text = json.dumps(contents, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Journal:
    """A file with a line of JSON for each finished trial. Several processes may append to it."""

    def __init__(self, file: Path) -> None:
        self.file, self.locks = file, file.with_name(f"{file.name}.locks")

    def rows(self) -> list[Row]:
        """Return all lines, in the order in which the trials ended."""
        if not self.file.exists():
            return []
        with reading(self.file, "a line of JSON for each trial", "delete the wrong line"):
            return [json.loads(line) for line in self.file.read_text("utf-8").splitlines() if line.strip()]

    def find(self, key: Row) -> Row | None:
        """Return the line of a trial, or None."""
        return next((row for row in self.rows() if row.items() >= key.items()), None)

    def append(self, row: Row) -> None:
        """Add a line. It appears whole or not at all."""
        with FileLock(self.locks / "journal"), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")

    def lock_of(self, key: Row) -> Path:
        """Return the file whose lock a process holds while it runs a trial."""
        text = json.dumps(key, sort_keys=True)
        return self.locks / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def journal_of(config: TuneConfig) -> Journal:
    """Return the configured journal."""
    name = f"{'+'.join(config.concept)}-{config.model.name}.jsonl"
    file = Path(config.journal) if config.journal else Path(config.runs) / "tuning" / name
    journal = Journal(file)
    journal.locks.mkdir(parents=True, exist_ok=True)
    return journal


def perform(config: TuneConfig, trial: Trial) -> bool:
    """Run a trial unless it is in the journal, or another process runs it. Return whether it is there now.

    If the method refuses its options, the trial counts, and the line has the reason.

    ``InputError`` if the original can't be scored, or lacks a score that trials are compared by.
    """
    journal, key = journal_of(config), trial.key(config)
    with claimed(journal.lock_of(key)) as is_ours:
        if not is_ours:
            return False
        if journal.find(key) is not None:
            return True
        start, device = time.monotonic(), "unknown"
        row: Row = {**key, "number": trial.number}
        try:
            with own_lock():
                scores, evaluations, device = scored(config, trial)
            row |= {"scores": scores, "network_evaluations": evaluations}
            if trial.options is None:
                check_scores(scores, config.model.name)
        except InputError as error:
            if trial.options is None:
                raise
            row |= {"refused": str(error)}
        journal.append(row | {"seconds": round(time.monotonic() - start, 1), "device": device})
        return True


def scored(config: TuneConfig, trial: Trial) -> tuple[Scores, int, str]:
    """Erase, and return scores on the tuning prompts, the erasure's network evaluations, and the device."""
    with tempfile.TemporaryDirectory() as folder:
        own = trial.config(config, folder)
        pl.seed_everything(config.seed, workers=True, verbose=False)
        evaluations = 0
        if isinstance(own, TrainConfig):
            run = run_of(own, concepts_of(own))
            run.open()
            run.erase_and_score()
            session, trainer, evaluations = run.session, run.trainer, sum(run.evaluations.values())
        else:
            session = Session(own, concepts_of(own))
            trainer = make_trainer(own.trainer, Path(folder))
        scorer = session.scorer("tune", config.images_per_set)
        with session.adapter.unchanged():
            title = f"{trial.method} {trial.number}"
            scores = score_on_all_ranks(trainer, scorer, Path(folder) / "images", title)
        return scores, evaluations, trainer.strategy.root_device.type


def check_scores(scores: Scores, model: str) -> None:
    """Raise ``InputError`` unless all scores of :func:`loss_of` are there."""
    found = {name for name in ("fid", "benign_accuracy") if scores.get(name) is not None}
    found |= {f"ASR {name}" for name in scores.get("asr", {})}
    if missing := {"fid", "benign_accuracy", "ASR direct", "ASR implicit"} - found:
        raise InputError(
            "tune: expected a model and a concept with FID, benign accuracy, direct and implicit prompts, "
            f"got '{model}' without {', '.join(sorted(missing))}; see model.real_images, model.judge and the "
            "concept's related phrases"
        )


def penalty(scores: Scores, original: Scores, fid_margin: float) -> float:
    """Return what a trial pays for benign images that it has spoilt.

    Benign accuracy may fall by 0.02, and FID rise by ``fid_margin``, which stands for 5 % of the original's
    FID on many images. What exceeds these counts like as much ASR: a share of benign accuracy, and a share of
    the original's FID. FID of few images is mostly a constant of their number, so a ratio to the original's
    on as few would hide what a trial does.
    """
    lost = original["benign_accuracy"] - scores["benign_accuracy"]
    rise = (scores["fid"] - original["fid"]) / fid_margin * FID_SHARE
    return max(0.0, lost - LEAST_ACCURACY_LOST) + max(0.0, rise - FID_SHARE)


def mean_asr(scores: Scores) -> float:
    """Return the mean of the direct and the implicit ASR."""
    return float(sum(scores["asr"][name]["rate"] for name in ("direct", "implicit")) / 2)


def loss_of(row: Row, original: Row, fid_margin: float) -> float:
    """Return a trial's loss, which is infinite if the method has refused its options."""
    if "scores" not in row:
        return math.inf
    return mean_asr(row["scores"]) + penalty(row["scores"], original["scores"], fid_margin)


class Children:
    """The processes of this command that it has started itself."""

    def __init__(self) -> None:
        self.procs: list[subprocess.Popen[bytes]] = []


class Tuning:
    """All trials of a configuration."""

    def __init__(self, config: TuneConfig) -> None:
        self.config, self.journal, self.began = config, journal_of(config), time.monotonic()
        every = sorted(file.stem for file in spaces_folder().glob("*.yaml"))
        self.spaces = [load_space(name) for name in (every if ALL in config.methods else config.methods)]
        self.original = Trial(ORIGINAL, 0, None)
        self.costs: dict[str, float] = {}
        self.trials = {
            space.name: [
                Trial(space.name, number, options, space.changes_weights)
                for number, options in enumerate(space.options(config.trials))
            ]
            for space in self.spaces
        }

    def missing(self) -> list[Trial]:
        """Return the trials that the journal lacks: a round of each method's first trial, then its second.

        So methods have equally many trials at any time. A round begins with the most expensive method. Before
        :meth:`plan`, their order is that of ``methods``.
        """
        rows = self.journal.rows()
        left = [
            trial
            for trials in self.trials.values()
            for trial in trials
            if not any(row.items() >= trial.key(self.config).items() for row in rows)
        ]
        return sorted(left, key=lambda trial: (trial.number, -self.costs.get(trial.method, 0.0)))

    def plan(self) -> None:
        """Log how many trials are ahead, and what the first one of each method costs."""
        adapter = None
        for name, (first, *_) in self.trials.items():
            self.costs[name] = 0.0
            own = first.config(self.config, self.config.runs)
            if isinstance(own, TrainConfig):
                run = run_of(own, concepts_of(own), adapter)
                adapter = run.adapter
                self.costs[name] = sum(announce.expected_seconds(announce.ahead(run), 1.0).values())
        left = self.missing()
        for name, trials in self.trials.items():
            log.info(
                "%-12s %d of %d trials done; one costs about %d forward passes before its images",
                name,
                len(trials) - sum(trial.method == name for trial in left),
                len(trials),
                self.costs[name],
            )

    def run(self) -> None:
        """Run the missing trials in ``jobs`` processes."""
        left = self.missing()
        if self.journal.find(self.original.key(self.config)) is None:
            left.insert(0, self.original)
        if self.config.jobs > 1 and len(left) > 1:
            self._share(left)
            return
        elsewhere, skipped = 0, 0
        for trial in tqdm(left, desc="trials", unit="trial", smoothing=0):
            if self.is_late():
                skipped += 1
            else:
                elsewhere += not perform(self.config, trial)
        if elsewhere:
            log.info("%d trials are run by other processes", elsewhere)
        if skipped:
            log.info("%d trials were not begun after %g minutes", skipped, self.config.minutes)

    def is_late(self) -> bool:
        """Return whether the time is over in which trials begin."""
        minutes = self.config.minutes
        return minutes is not None and time.monotonic() - self.began >= 60 * minutes

    def _share(self, left: Sequence[Trial]) -> None:
        """Start this command several times. Each process takes the next trial that no other one has."""
        jobs, done = min(self.config.jobs, len(left)), len(self.journal.rows())
        threads = max(1, (os.cpu_count() or 1) // jobs)
        methods = ",".join(sorted(self.trials, key=lambda name: -self.costs.get(name, 0.0)))
        own = ["jobs=1", f"methods=[{methods}]"]
        command = [sys.executable, "-m", "trce_lightning.tune", *sys.argv[1:], *own]
        logs = [self.journal.locks / f"process {number}.log" for number in range(jobs)]
        with ExitStack() as opened:
            children = Children()
            stop.launchers.append(children)  # so that a signal ends them too
            opened.callback(stop.launchers.remove, children)
            for file in logs:
                stream = opened.enter_context(file.open("w", encoding="utf-8"))
                environment = os.environ | {"OMP_NUM_THREADS": str(threads), PLANNED: "1"}
                children.procs.append(
                    subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
            bar = opened.enter_context(tqdm(total=len(left), desc="trials", unit="trial", smoothing=0))
            started = list(children.procs)
            while any(child.poll() is None for child in started):
                time.sleep(POLL_SECONDS)
                bar.update(len(self.journal.rows()) - done - bar.n)
        failed = [file for file, child in zip(logs, started, strict=True) if child.returncode]
        if failed:
            raise ChildProcessError(f"{len(failed)} of {jobs} processes failed; '{failed[0]}' says why")

    def rows(self) -> dict[str, list[Row]]:
        """Return the stored trials of each method with their losses, by number."""
        original = self.journal.find(self.original.key(self.config))
        if original is None:
            return {}
        found = {}
        for name, trials in self.trials.items():
            rows = [(trial, self.journal.find(trial.key(self.config))) for trial in trials]
            found[name] = [
                row | {"number": trial.number, "loss": loss_of(row, original, self.config.fid_margin)}
                for trial, row in rows
                if row is not None
            ]
        return found

    def best(self) -> dict[str, Row]:
        """Return the trial of least loss of each method that has all of its trials."""
        return {
            name: min(rows, key=lambda row: row["loss"])
            for name, rows in self.rows().items()
            if len(rows) == self.config.trials and any(math.isfinite(row["loss"]) for row in rows)
        }

    def report(self) -> None:
        """Write the table of all trials, and the chosen options if ``write`` asks for them."""
        rows, best = self.rows(), self.best()
        original = self.journal.find(self.original.key(self.config))
        if original is None:
            return
        summary = Path(self.config.summary or self.journal.file.with_suffix(".csv"))
        write_text(summary, table(rows, best, original))
        log.info("%s has all trials", summary)
        for name, row in best.items():
            chosen = {key: row["options"][key] for key in load_space(name).search}
            log.info("%-12s loss %.3f, trial %d: %s", name, row["loss"], row["number"], chosen)
            if self.config.write:
                space = next(space for space in self.spaces if space.name == name)
                log.info("%s", write_best(space, row, original, self.config))
        for name in self.trials.keys() - best.keys():
            log.info("%-12s has %d of %d trials", name, len(rows[name]), self.config.trials)


def table(rows: Mapping[str, Sequence[Row]], best: Mapping[str, Row], original: Row) -> str:
    """Return all trials as CSV. A refused trial has its reason in place of scores."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEAD)
    for name, of_method in {ORIGINAL: [original | {"number": 0, "loss": None}], **rows}.items():
        for row in of_method:
            cells: list[Any] = [name, row["number"], int(row == best.get(name))]
            scores = row.get("scores")
            numbers = [""] * 6
            if scores is not None:
                rates = [scores["asr"][part]["rate"] for part in ("direct", "implicit")]
                loss = "" if row["loss"] is None else round(row["loss"], 4)
                others = [round(scores[part], 3) for part in ("fid", "clip_score", "benign_accuracy")]
                numbers = [loss, *(round(rate, 4) for rate in rates), *others]
            options = json.dumps(row["options"] or {}, ensure_ascii=False)
            cost = [row.get("network_evaluations", ""), row["seconds"], row["device"]]
            writer.writerow([*cells, *numbers, *cost, options, row.get("refused", "")])
    return stream.getvalue()


def write_best(space: Space, row: Row, original: Row, config: TuneConfig) -> Path:
    """Write the chosen options where ``train.py`` or ``eval.py`` finds them, and return the file."""
    group = "method_tuning" if space.changes_weights else "guidance_tuning"
    nested: dict[str, dict[str, Any]] = {}
    for key, value in row["options"].items():
        part, _, option = key.partition(".")
        nested.setdefault(part, {})[option] = value
    scores, before = row["scores"], original["scores"]
    remark = (
        f"# @package _global_\n"
        f"# Chosen among {config.trials} trials by python -m trce_lightning.tune on the tuning prompts of "
        f"{'+'.join(config.concept)},\n# {config.images_per_set} images a set: direct "
        f"{_share(scores, 'direct')} and implicit {_share(scores, 'implicit')} (original "
        f"{_share(before, 'direct')} and {_share(before, 'implicit')}),\n# FID "
        f"{scores['fid']:.1f} from {before['fid']:.1f}, benign accuracy "
        f"{100 * scores['benign_accuracy']:.0f} % from {100 * before['benign_accuracy']:.0f} %.\n"
    )
    file = config_folder() / group / f"{space.name}_{config.model.name}.yaml"
    write_text(file, remark + yaml.safe_dump(nested, sort_keys=False))
    return file


def _share(scores: Scores, name: str) -> str:
    return f"{100 * scores['asr'][name]['rate']:.0f} %"


def tune(config: TuneConfig) -> None:
    """Run the missing trials, and write the table of all trials and the chosen options."""
    set_up_logging()
    check_values(config)
    tuning = Tuning(config)
    if PLANNED not in os.environ:
        tuning.plan()
    if config.plan:
        return
    tuning.run()
    tuning.report()
