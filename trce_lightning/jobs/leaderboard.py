"""Erase, score and attack with all methods, and write one page.

The work is a list of cells: a method or a rule of guidance, concepts, and a seed. A cell is a folder whose
name holds a hash of its configuration, so the same command finds what is done, and continues what isn't. One
process works at a cell, and others take the next one. The original's scores and the attacks on the references
are made once for each set of concepts, before its cells.

    OUTPUT/CONCEPTS/references-HASH/references.json      the original, never-learnt and re-initialised models
    OUTPUT/CONCEPTS/METHOD/SEED-HASH/erase/              the run of train.py
    OUTPUT/CONCEPTS/METHOD/SEED-HASH/HASH/cell.json      scores, attacks and cost; it comes last
    OUTPUT/leaderboard.html, .json, .csv
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm.auto import tqdm

from trce_lightning import __version__
from trce_lightning.adapters import Adapter
from trce_lightning.concepts import load_concept
from trce_lightning.config.arguments import did_you_mean
from trce_lightning.config.checks import check, check_method_options
from trce_lightning.config.composition import compose, config_folder
from trce_lightning.config.schema import (
    ALL,
    ConceptConfig,
    DeviceConfig,
    EvalConfig,
    ExpectedConfig,
    LeaderboardConfig,
    TrainConfig,
    TrainerConfig,
)
from trce_lightning.errors import InputError
from trce_lightning.evaluation.pooled import image_values
from trce_lightning.evaluation.scored import Detections, Scored
from trce_lightning.evaluation.scorer import Scorer, score_on_all_ranks
from trce_lightning.export import load_deltas
from trce_lightning.jobs import announce, runs
from trce_lightning.jobs.attack import ORIGINAL, Attacked, Attacks
from trce_lightning.jobs.erase import method_defaults, reads_seed, run_of, train, unread_options
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.train import TrainingRun
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.report.leaderboard import CONCEPTS, Published, rows_of, write_leaderboard
from trce_lightning.runtime.checkout import commit
from trce_lightning.runtime.locks import LOCK, claimed
from trce_lightning.runtime.logs import set_up_logging
from trce_lightning.runtime.storage import reading, replacing_folder, write_json

log = logging.getLogger(__name__)
SCHEMA = 1
"""The version of a cell's content, and of the defaults of all options. It is part of the cells' names."""
CELL, REFERENCES = "cell.json", "references.json"
METHOD, GUIDANCE = "method", "guidance"
LEAST_IMAGES = 2
"""The images a set of the tuning prompts, whose scores a cell doesn't need. FID takes two."""
NOT_IN_HASH = ("runs", "cache", "output", "plan", "fresh", "checkpoint_minutes", "logger", "trainer")
"""Options that don't decide a result, or by rounding alone. So cells of other machines are found."""
OWN_OPTIONS = frozenset(
    (
        "concept",
        "model",
        "runs",
        "cache",
        "output",
        "trainer",
        "seed",
        "export",
        "attack",
        "attacked_prompts",
        "models",
    )
)
OWN_METRICS = frozenset(("images_per_set", "final_images_per_set", "batch_size"))
"""Options of ``train.py`` and ``eval.py`` that the leaderboard sets, and of their ``metrics``."""
Json = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The network evaluations of a cell, from nothing."""

    erase: Mapping[str, int]
    """``forward`` and ``backward``, as the method's own cost."""
    scores: int
    attacks: int

    @property
    def passes(self) -> float:
        """Return the work in forward passes."""
        weighed = self.erase["forward"] + announce.TRAINING_COST * self.erase["backward"]
        return weighed + self.scores + self.attacks


class Board:
    """A leaderboard: its cells, and what they share."""

    def __init__(self, config: LeaderboardConfig) -> None:
        self.config = config
        self.folder = Path(config.output or Path(config.runs) / "leaderboard")
        names = {METHOD: names_of(METHOD, config.methods), GUIDANCE: names_of(GUIDANCE, config.guidances)}
        if others := config.overrides.keys() - {name for own in names.values() for name in own}:
            raise InputError(
                f"option 'overrides': expected names of chosen methods, got {', '.join(sorted(others))}"
            )
        for name, changes in config.overrides.items():
            _check_overrides(name, changes)
            if name in names[METHOD]:
                typed = [f"method={name}", f"model={config.model.name}", *_paths(changes)]
                check_method_options(typed, config_folder())
        self.groups = [Group(self, concepts, names) for concepts in config.concepts]
        self.cells = [cell for group in self.groups for cell in group.cells]
        for cell in self.cells:
            check(cell.train_config if cell.kind == METHOD else cell.eval_config)

    @property
    def own(self) -> list[Cell]:
        """The cells of this process's shard."""
        return self.cells[self.config.shard :: self.config.shards]

    def plan(self) -> None:
        """Log the cells, and the network evaluations and minutes ahead."""
        left = [cell for cell in self.own if not cell.is_done]
        log.info(
            "%d cells, %d of them of this shard, %d done",
            len(self.cells),
            len(self.own),
            len(self.own) - len(left),
        )
        if not left:
            return
        seconds = self.seconds_per_pass()
        work = {cell: own for cell in left if (own := self.work_of(cell)) is not None}
        for kind, count in {
            "erasing": sum(sum(each.erase.values()) for each in work.values()),
            "scores": sum(each.scores for each in work.values()),
            "attacks, about": sum(each.attacks for each in work.values()),
        }.items():
            log.info("ahead: %-16s %10d network evaluations", kind, count)
        total = sum(self.seconds_of(cell, each, seconds) for cell, each in work.items())
        log.info("ahead: about %.0f min in this process, measured from %s", total / 60, self.measured_from())

    def work_of(self, cell: Cell) -> Work | None:
        """Return what is left of a cell's work, or None with an error in the log if its method refuses it."""
        try:
            return cell.work_left
        except InputError as error:
            log.error("%s: will be refused: %s", cell.title, error)
            return None

    def seconds_of(self, cell: Cell, work: Work, seconds_per_pass: float) -> float:
        """Return the seconds that a cell takes: those of its method's finished cells, or its passes'."""
        alike = [each.seconds for each in self.finished if each.method == cell.method]
        measured = bool(alike) and not cell.is_erased
        return sum(alike) / len(alike) if measured else work.passes * seconds_per_pass

    @property
    def finished(self) -> list[Cell]:
        """The cells that are done."""
        return [cell for cell in self.cells if cell.is_done]

    def seconds_per_pass(self) -> float:
        """Return the seconds of a forward pass, images and judging included, from finished cells.

        If there are none, the network alone is timed.
        """
        done = self.finished
        if done:
            return sum(cell.seconds for cell in done) / sum(cell.work.passes for cell in done)
        group = self.groups[0]
        measured = announce.seconds_per_evaluation(group.planned_run(group.scoring_config()))
        if measured is None:
            raise InputError(
                "leaderboard: expected room for one latent beside the model, got too little memory"
            )
        return measured

    def measured_from(self) -> str:
        """Return what the estimate of time is measured from."""
        done = len(self.finished)
        return f"{done} finished cells" if done else "the network alone; images and judging come on top"

    def run(self) -> dict[str, str]:
        """Run the missing cells of this shard. Return why cells were refused, by their title."""
        refused: dict[str, str] = {}
        left = [cell for cell in self.own if not cell.is_done]
        with tqdm(total=len(self.own), initial=len(self.own) - len(left), unit="cell", desc="cells") as bar:
            for cell in left:
                try:
                    if not cell.run():
                        log.info("%s: another process is at it", cell.title)
                except InputError as error:
                    log.error("%s: refused: %s", cell.title, error)
                    refused[cell.title] = str(error)
                gc.collect()
                bar.update()
        return refused

    def assemble(self) -> None:
        """Write the page from the finished cells of all shards."""
        done = self.finished
        groups = [
            (group.references, [cell.result for cell in group.cells if cell.is_done]) for group in self.groups
        ]
        rows = [row for references, cells in groups if references for row in rows_of(references, cells)]
        if not rows:
            log.info("no cell is done, so there is no page")
            return
        facts = {
            "command": shlex.join(["python", "-m", "trce_lightning.leaderboard", *sys.argv[1:]]),
            "version": __version__,
            "commit": commit(),
            "model": self.config.model.name,
            "seeds": self.config.seeds,
            "images a set": self.config.images_per_set,
            "attacked prompts": self.config.attacked_prompts,
            "cells": f"{len(done)} of {len(self.cells)}",
        }
        write_leaderboard(self.folder, rows, published(), facts, [cell.result for cell in done])
        log.info("%s: %d of %d cells", self.folder / "leaderboard.html", len(done), len(self.cells))


class Group:
    """The cells of one set of concepts, and their references."""

    def __init__(self, board: Board, concepts: str, names: Mapping[str, Sequence[str]]) -> None:
        self.board, self.config = board, board.config
        self.concepts = concept_configs(concepts)
        self.folder = board.folder / "+".join(self.concepts)
        self.known: Mapping[str, Attacked] = {}
        self._cold = tempfile.TemporaryDirectory()
        self._adapter: Adapter | None = None
        methods = [Cell(self, METHOD, name, seed) for name in names[METHOD] for seed in self.seeds_of(name)]
        # No random number enters a rule of guidance.
        self.cells = methods + [Cell(self, GUIDANCE, name, board.config.seeds[0]) for name in names[GUIDANCE]]

    def seeds_of(self, method: str) -> Sequence[int]:
        """Return the seeds with which a method's results differ."""
        seeds = self.config.seeds
        return seeds if reads_seed(self.train_config(method, seeds[0])) else seeds[:1]

    def parts(self) -> Json:
        """Return the options that all of the group's configurations share."""
        return {
            "concept": self.concepts,
            "model": self.config.model,
            "runs": str(self.folder),
            "cache": str(self.cache),
        }

    @property
    def cache(self) -> Path:
        """The folder of caches, which all runs share."""
        return runs.cache_folder(self.config)

    def train_config(self, method: str, seed: int) -> TrainConfig:
        """Return the configuration of ``train.py`` for a method."""
        composed: TrainConfig = self.composed("train", TrainConfig, "method", method)
        metrics = dataclasses.replace(
            composed.metrics,
            images_per_set=LEAST_IMAGES,
            final_images_per_set=self.config.images_per_set,
            batch_size=self.config.batch_size,
        )
        trainer = TrainerConfig(**dataclasses.asdict(self.trainer))
        export = ["delta"]  # the pipeline that is attacked is made of it
        own = dataclasses.replace(composed, **self.parts(), metrics=metrics, trainer=trainer)
        return dataclasses.replace(own, seed=seed, export=export)

    def eval_config(self, guidance: str = "cfg") -> EvalConfig:
        """Return the configuration of ``eval.py`` with the attacks, or with a rule of guidance."""
        composed: EvalConfig = self.composed("eval", EvalConfig, "guidance", guidance)
        metrics = dataclasses.replace(
            composed.metrics,
            final_images_per_set=self.config.images_per_set,
            batch_size=self.config.batch_size,
        )
        return dataclasses.replace(
            composed,
            **self.parts(),
            metrics=metrics,
            trainer=self.trainer,
            attack=self.config.attack if guidance == "cfg" else {},
            attacked_prompts=self.config.attacked_prompts,
            # Beside another model, `model` is the original. The attacks are given the models themselves.
            models=[ORIGINAL] if guidance == "cfg" else [],
        )

    def composed(self, command: str, schema: type, group: str, name: str) -> Any:
        """Return the configuration of a command with a method or a rule, and the overrides for it."""
        changes = json.dumps(self.config.overrides.get(name, {}))
        return composed_with(command, schema, self.config.model.name, f"{group}={name}", changes)

    @property
    def trainer(self) -> DeviceConfig:
        """The options of each run's Trainer. A run has one device."""
        return dataclasses.replace(self.config.trainer, devices=1)

    def scoring_config(self) -> TrainConfig:
        """Return the configuration of a run that scores the original. It trains nothing."""
        own = self.train_config("trce", self.config.seeds[0])
        return dataclasses.replace(own, stages=["textual"])

    def planned_run(self, config: TrainConfig) -> TrainingRun:
        """Return a run as it would be without any cache. It erases nothing."""
        cold = dataclasses.replace(config, cache=self._cold.name)
        run = run_of(cold, concepts_of(cold), self._adapter)
        self._adapter = run.adapter
        return run

    @cached_property
    def attack_evaluations(self) -> int:
        """The evaluations of all attacks on one model, those of the references if they were made."""
        if not self.config.attack:
            return 0
        references = self.references
        if references and references["attack_evaluations"]:
            return int(references["attack_evaluations"])
        config = self.eval_config()
        attacks = Attacks(config, {ORIGINAL: self.config.model.path}, self.folder)
        searches = sum(cost.forward + cost.backward for cost in attacks.costs().values())
        # Without and with each attack, and with its two controls.
        images = self.config.attacked_prompts * (2 + 3 * len(self.config.attack))
        scorer = Session(config, concepts_of(config)).scorer("report", self.config.images_per_set)
        return searches + int(images * evaluations_per_image(scorer))

    @cached_property
    def references_file(self) -> Path:
        """The file of the references' results."""
        return self.folder / f"references-{hash_of(self.eval_config())}" / REFERENCES

    @property
    def references(self) -> Json | None:
        """The references' results, or None if there are none yet."""
        return read(self.references_file)

    def refer(self) -> None:
        """Score the original and attack the references, once for all cells. Other processes wait."""
        if self.known or (not self.config.attack and self.references is not None):
            return
        file = self.references_file
        with claimed(file.with_name(".lock"), wait=True):
            start = time.monotonic()
            own = self.scoring_config()
            run = run_of(own, concepts_of(own))
            run.score_original()
            scorer, scored = run.scorers["final"], run.original["final"].scored
            result: Json = {
                "schema": SCHEMA,
                CONCEPTS: list(self.concepts),
                "scores": scored.scores,
                "values": values_of(scorer, scored.detections),
                "evaluations_per_image": evaluations_per_image(scorer),
                "attacks": {},
                "hits": {},
            }
            del run, scorer
            gc.collect()
            if self.config.attack:
                attacks = Attacks(self.eval_config(), {ORIGINAL: self.config.model.path}, file.parent)
                attacks.run()
                self.known = attacks.attacked_models
                evaluations = [each.network_evaluations for each in self.known.values()]
                result |= {
                    "attacks": attacks.rows,
                    "hits": {label: hits_of(each) for label, each in self.known.items()},
                    "attack_evaluations": max(evaluations),
                }
            if self.references is None:
                write_json(file, result | {"seconds": round(time.monotonic() - start, 1)})


@dataclass(eq=False)
class Cell:
    """A method or a rule of guidance, on the concepts of its group, with one seed."""

    group: Group
    kind: str
    method: str
    seed: int
    _result: Json | None = field(default=None, init=False)

    @property
    def title(self) -> str:
        """The cell's name in the log."""
        return f"{self.method}, {'+'.join(self.group.concepts)}, seed {self.seed}"

    @cached_property
    def train_config(self) -> TrainConfig:
        """The configuration of the erasing."""
        return self.group.train_config(self.method, self.seed)

    @cached_property
    def eval_config(self) -> EvalConfig:
        """The configuration of the attacks, or of the images with a rule of guidance."""
        return self.group.eval_config("cfg" if self.kind == METHOD else self.method)

    @cached_property
    def folder(self) -> Path:
        """The folder of the erased model, which cells with other attacks share."""
        if self.kind == METHOD:
            name = hash_of(self.train_config, unread=unread_options(self.train_config))
        else:
            name = hash_of(self.eval_config)
        return self.group.folder / self.method / f"{self.seed}-{name}"

    @cached_property
    def place(self) -> Path:
        """The cell's own folder."""
        return self.folder / hash_of(self.eval_config)

    @property
    def run_folder(self) -> Path:
        """The folder of the run that erases."""
        return self.folder / "erase"

    @property
    def file(self) -> Path:
        """The file of the cell's result."""
        return self.place / CELL

    @property
    def is_erased(self) -> bool:
        """Return whether nothing is left to erase and to score."""
        return self.kind == METHOD and (self.run_folder / runs.FINISHED).exists()

    @property
    def is_done(self) -> bool:
        """Return whether the cell's result is there."""
        return self.file.exists()

    @property
    def result(self) -> Json:
        """The cell's result."""
        if self._result is None:
            self._result = read(self.file)
            assert self._result is not None, "the cell is done"
        return self._result

    @property
    def seconds(self) -> float:
        """The seconds of all of the cell's work."""
        return float(sum(self.result["seconds"].values()))

    @cached_property
    def work(self) -> Work:
        """The work of the cell from nothing."""
        if self.kind == GUIDANCE:
            return Work({"forward": 0, "backward": 0}, self._guided_scorer().planned_evaluations, 0)
        run = self.planned_run
        scores = run.scorers["final"].planned_evaluations
        if "epochs" in run.scorers:
            scores += run.tuning_passes * run.scorers["epochs"].planned_evaluations
        return Work(cost_of(run), scores, self.group.attack_evaluations)

    @property
    def work_left(self) -> Work:
        """The work without that of a finished erasing."""
        nothing = {"forward": 0, "backward": 0}
        return dataclasses.replace(self.work, erase=nothing, scores=0) if self.is_erased else self.work

    @property
    def planned_run(self) -> TrainingRun:
        """The cell's run as it would be without any cache."""
        return self.group.planned_run(self.train_config)

    def run(self) -> bool:
        """Erase, score and attack. Return False if another process is at it."""
        with claimed(self.place / LOCK) as is_ours:
            if not is_ours:
                return False
            if not self.is_done:
                log.info("%s: %s", self.title, self.folder)
                self.group.refer()
                result = self._erased() if self.kind == METHOD else self._guided()
                write_json(self.file, self._facts() | result)
                if not self.group.config.keep:
                    self._clean_up()
            return True

    def _facts(self) -> Json:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "method": self.method,
            CONCEPTS: list(self.group.concepts),
            "seed": self.seed,
            "model": self.group.config.model.name,
            "version": __version__,
            "commit": commit(),
        }

    def _erased(self) -> Json:
        """Erase and attack."""
        planned = self.planned_run
        # A cell with other attacks may be erasing with this method. Then this one waits for it.
        with claimed(self.folder / LOCK, wait=True):
            self._erase(planned)
        folder = self.run_folder
        metrics = read(folder / runs.FINISHED)
        assert metrics is not None, "the run has written its metrics"
        seconds, start = {"erase and score": round(sum(metrics["seconds"].values()), 1)}, time.monotonic()
        config = self.group.config
        pipeline = self._pipeline() if config.attack or config.keep else None
        attacked = self._attacked(pipeline) if pipeline and config.attack else {}
        seconds["attack"] = round(time.monotonic() - start, 1)
        scored, scorer = Scored.load(folder / "scored" / "erased.json"), planned.scorers["final"]
        return {
            "scores": metrics["erased"],
            "values": values_of(scorer, scored.detections),
            "evaluations_per_image": evaluations_per_image(scorer),
            "network_evaluations": dict(self.work.erase),
            "erase_seconds": erase_seconds(metrics, self.work),
            "trainable": planned.trainable_numbers(),
            "cache_bytes": planned.stored_bytes(),
            "delta_bytes": sum(file.stat().st_size for file in folder.glob("delta*.safetensors")),
            **attacked,
            "seconds": seconds,
        }

    def _erase(self, planned: TrainingRun) -> None:
        """Erase and score, unless that is done. The changed tensors, scores and the report stay."""
        folder = self.run_folder
        if not self.is_erased:
            # A run that was begun with another Trainer or cache begins again.
            begun = (folder / runs.CONFIG).exists()
            own = dataclasses.replace(self.train_config, output=str(folder))
            # The run wrote the configuration that its method makes of it.
            written = dataclasses.replace(planned.config, output=own.output, cache=own.cache)
            train(dataclasses.replace(own, fresh=begun and not runs.is_equal(folder, written)))
        if not self.group.config.keep:
            for name in ("images", "tuning", "checkpoints"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def _pipeline(self) -> Path:
        """Make the erased pipeline of the changed tensors, and return its folder."""
        pipeline = self.place / "erased"
        if not pipeline.exists():
            adapter = Session(self.eval_config, concepts_of(self.eval_config)).adapter
            load_deltas(self.run_folder, adapter)
            with replacing_folder(pipeline) as aside:
                adapter.pipeline.save_pretrained(aside)
        return pipeline

    def _attacked(self, pipeline: Path) -> Json:
        sources = {ORIGINAL: self.group.config.model.path, self.method: str(pipeline)}
        attacks = Attacks(self.eval_config, sources, self.place)
        attacks.run(self.group.known)
        hits = hits_of(attacks.attacked_models[self.method])
        return {"attacks": attacks.rows[self.method], "hits": hits}

    def _guided_scorer(self) -> Scorer:
        session = Session(self.eval_config, concepts_of(self.eval_config))
        return session.scorer("report", self.group.config.images_per_set)

    def _guided(self) -> Json:
        """Score the original's images with a rule of guidance."""
        scorer, start = self._guided_scorer(), time.monotonic()
        trainer = make_trainer(self.eval_config.trainer, self.folder)
        with scorer.adapter.unchanged():
            scores = score_on_all_ranks(trainer, scorer, self.place / "images", self.method)
        return {
            "scores": scores,
            "values": values_of(scorer, scorer.detections),
            "evaluations_per_image": evaluations_per_image(scorer),
            "seconds": {"score": round(time.monotonic() - start, 1)},
        }

    def _clean_up(self) -> None:
        """Delete the pipeline, which the changed tensors make again, and all images."""
        for name in ("erased", "attacks", "images"):
            shutil.rmtree(self.place / name, ignore_errors=True)


def _check_overrides(name: str, changes: Any) -> None:
    """Raise ``InputError`` on an override of what the leaderboard sets for all methods alike."""
    if not isinstance(changes, Mapping):
        raise InputError(f"option 'overrides.{name}': expected options by their names, got {changes!r}")
    own = changes.keys() & OWN_OPTIONS
    if isinstance(metrics := changes.get("metrics"), Mapping):
        own |= {f"metrics.{option}" for option in metrics.keys() & OWN_METRICS}
    if own:
        raise InputError(
            f"option 'overrides.{name}': expected options in which methods may differ, got "
            f"{', '.join(sorted(own))}, which the leaderboard sets for all"
        )


def _paths(changes: Mapping[str, Any], parent: str = "") -> Iterator[str]:
    """Yield the options of nested maps as they are typed: ``method.lr=1``."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{parent}{key}.")
        else:
            yield f"{parent}{key}={value}"


def names_of(kind: str, given: Sequence[str]) -> list[str]:
    """Return the names of methods or of rules of guidance. ``InputError`` if there is none of a name."""
    names = sorted(file.stem for file in (config_folder() / kind).glob("*.yaml"))
    takes_all = kind == METHOD and ALL in given
    for name in given:
        if name not in names and not (takes_all and name == ALL):
            raise InputError(
                f"option '{kind}s': expected names among {', '.join(names)}, got {name!r}."
                f"{did_you_mean(name, names)}"
            )
    return names if takes_all else list(given)


@cache
def composed_with(name: str, schema: type, model: str, choice: str, changes: str) -> Any:
    """Return the configuration of a command with a model, one more choice, and changes as JSON.

    Callers share it, so they must not change it.
    """
    return compose(name, schema, [f"model={model}", choice], json.loads(changes))


def concept_configs(name: str) -> dict[str, ConceptConfig]:
    """Return the concepts of ``concepts``, such as ``violence+horror``, by name: shipped ones, or files.

    ``InputError`` if a name is unknown or given twice.
    """
    found: dict[str, ConceptConfig] = {}
    shipped = {file.stem: file for file in sorted((config_folder() / "concept").glob("*.yaml"))}
    for part in name.split("+"):
        file = shipped.get(part, Path(part))
        if not file.is_file():
            raise InputError(
                f"option 'concepts': expected names among {', '.join(shipped)}, files, or several with + "
                f"between them, got {part!r}.{did_you_mean(part, shipped)}"
            )
        concept = load_concept(file)
        if concept.name in found:
            raise InputError(f"option 'concepts': expected each concept once, got {name!r}")
        values = {key: _plain(value) for key, value in dataclasses.asdict(concept).items()}
        found[concept.name] = ConceptConfig(**values)
    return found


def _plain(value: Any) -> Any:
    """Return tuples as lists, also within maps. OmegaConf knows no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def hash_of(config: TrainConfig | EvalConfig, unread: Sequence[str] = ()) -> str:
    """Return a hash of what decides the results of a configuration, without its options that aren't read.

    Options that have the default of their class are left out. So a new option, whose default changes nothing,
    leaves all cells where they are. If the default of an old option changes, raise ``SCHEMA``.
    """
    content: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(type(config)))
    if isinstance(config, TrainConfig):
        defaults["method"] = method_defaults(config)
    content["metrics"].pop("batch_size")  # an image's noise doesn't depend on its batch
    read = {key: value for key, value in content.items() if key not in (*NOT_IN_HASH, *unread)}
    text = json.dumps([SCHEMA, changed(read, defaults)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def changed(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> Json:
    """Return the options whose values aren't their defaults, in maps within it too."""
    return {
        key: changed(value, defaults[key])
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        else value
        for key, value in content.items()
        if key not in defaults or value != defaults[key]
    }


def read(file: Path) -> Json | None:
    """Return the content of a JSON file, or None if there is no file."""
    if not file.exists():
        return None
    with reading(file, "a result of the leaderboard"):
        content: Json = json.loads(file.read_text("utf-8"))
        return content


def values_of(scorer: Scorer, detections: Detections) -> Json:
    """Return :func:`image_values` for JSON."""
    values = image_values(scorer.sets, detections, scorer.label_groups)
    return {name: dataclasses.asdict(each) for name, each in values.items()}


def hits_of(attacked: Attacked) -> Json:
    """Return which images of each prompt show the concept, by attack."""
    return {name: dict(outcome.attacked) for name, outcome in attacked.outcomes.items()}


def evaluations_per_image(scorer: Scorer) -> float:
    """Return the network evaluations that an image takes."""
    return scorer.planned_evaluations / sum(len(prompts.records) for prompts in scorer.sets)


def cost_of(run: TrainingRun) -> dict[str, int]:
    """Return the network evaluations of a run's method, ``forward`` and ``backward``, without any cache."""
    parts = run.method_parts().values()
    forward, backward = sum(part.forward for part in parts), sum(part.backward for part in parts)
    if run.plan is not None:
        forward += announce.missing_evaluations(run)
        backward += run.plan.training_evaluations(run.config.trajectory, run.config.seed)
    return {"forward": forward, "backward": backward}


def erase_seconds(metrics: Json, work: Work) -> float | None:
    """Return the seconds of erasing alone, or None if a cache or an earlier start did a part of it."""
    scoring = ("original", "epochs", "final")
    made = sum(count for part, count in metrics["network_evaluations"].items() if part not in scoring)
    if made < sum(work.erase.values()):
        return None
    return float(sum(seconds for part, seconds in metrics["seconds"].items() if part not in scoring))


def published() -> list[Published]:
    """Return the figures of the paper that this project knows, from the experiments that expect them."""
    found = []
    for file in sorted((config_folder() / "experiment").glob("*.yaml")):
        content: Any = OmegaConf.load(file)
        if "expected" in content:
            expected = OmegaConf.to_object(
                OmegaConf.merge(OmegaConf.structured(ExpectedConfig), content.expected)
            )
            assert isinstance(expected, ExpectedConfig)
            found.append(
                Published(file.stem, expected.source, expected.asr, expected.fid, expected.clip_score)
            )
    return found


def leaderboard(config: LeaderboardConfig) -> None:
    """Run the missing cells of this shard, and write the page from the finished ones of all shards.

    ``InputError`` at the end if a method refused its cell.
    """
    set_up_logging()
    board = Board(config)
    board.plan()
    if config.plan:
        return
    refused = board.run()
    board.assemble()
    if refused:
        title, reason = next(iter(refused.items()))
        raise InputError(f"leaderboard: {len(refused)} cells were refused, such as {title}: {reason}")
