"""The attacks of an evaluation: search on every model, generate, judge, and compare with the controls."""

from __future__ import annotations

import gc
import hashlib
import importlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, count
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from diffusers.models.normalization import RMSNorm
from lightning.pytorch.loggers import Logger, WandbLogger
from torch import Tensor, nn
from tqdm.auto import tqdm

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.diversity import Diversity, diversity
from trce_lightning.attacks.findings import load_findings, save_findings
from trce_lightning.attacks.protocol import (
    UNIVERSAL,
    Attack,
    ChecksTarget,
    ControlTeaches,
    Cost,
    Finding,
    KeepsSearches,
    LearnsFromPictures,
    NeedsBenign,
    Progress,
    Reads,
    ReadsFile,
    SearchesInParts,
    Target,
    TeachesExamples,
    Way,
    total,
)
from trce_lightning.config.checks import check_arguments
from trce_lightning.config.schema import OWN_NEVER_LEARNT, EvalConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.attacked import (
    Hits,
    Outcome,
    Row,
    attack_rows,
    budget_of_stages,
    pooled,
    rate_of,
)
from trce_lightning.evaluation.scored import log_scores
from trce_lightning.generation.image_folder import image_batches, image_files, load_images
from trce_lightning.generation.loop import generate_to
from trce_lightning.generation.variation import NoisyDdim
from trce_lightning.jobs.runs import cache_folder
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.jobs.wandb_runs import log_attacks
from trce_lightning.metrics.asr import THRESHOLD
from trce_lightning.metrics.class_detectors import to_device
from trce_lightning.metrics.detectors import Detector
from trce_lightning.metrics.factories import made_by
from trce_lightning.metrics.scores import ImageJudge
from trce_lightning.prompts.own import Split
from trce_lightning.prompts.records import BENIGN, DIRECT, PromptRecord, seed_of
from trce_lightning.report.attacks import Attacks as Content
from trce_lightning.report.attacks import Find
from trce_lightning.runtime.locks import LOCK, claimed
from trce_lightning.runtime.ranks import Rank, on_each_rank, threads_of_idle_ranks
from trce_lightning.runtime.storage import write_json
from trce_lightning.sampling import seeded

log = logging.getLogger(__name__)
ORIGINAL, NEVER_LEARNT, REINITIALISED = "original", "never-learnt", "re-initialised"
"""Labels of the models that an attack's figures are read against."""
NOTHING = Finding("")
SEARCHED_TOGETHER = 16
"""The most prompts of one search. A stopped evaluation continues after it, and ranks share such searches."""
EXAMPLES = 25
"""Prompts beside those under attack, whose pictures may be taught: the most that published attacks take."""
SHOWN = 16
"""Images of each attack that the report shows."""
POLL_SECONDS = 1.0
"""The time between two looks at a folder that another evaluation has locked."""
LOGGED = ("rate", "low", "high", "pre", "post", "control", "rho", "network_evaluations", "prompts_encoded")
"""The parts of a row that are numbers, for loggers."""
Seen = dict[str, tuple[str, float]]
"""The attacked prompt and the judge's probability, by the image's id."""


class Attacks:
    """The attacks that a configuration names, on each of its models and on the references.

    Args:
        config: the evaluation's options.
        sources: path of each model by label; None is the model that ``model`` names itself.
        folder: folder of the evaluation. Attacks on its own models are stored in its folder ``attacks``.
            Those on the references are stored in the cache, for other evaluations.

    Raises:
        InputError: a wrong option of an attack, a model with the label of a reference, or an unknown label in
            ``transfer``.
    """

    def __init__(self, config: EvalConfig, sources: Mapping[str, str | None], folder: Path) -> None:
        self.config, self.folder = config, folder / "attacks"
        self.cache = cache_folder(config) / "attacks"
        self.attacks = [make_attack(name, options) for name, options in config.attack.items()]
        self.concepts = concepts_of(config)
        # Beside other models, ``model`` is the original, wherever it lies. Alone, it is under attack.
        self.original_path = config.model.path if config.models else None
        self.sources: dict[str, str | None] = {**sources}
        if self.original_path not in sources.values():
            self._refer(ORIGINAL, self.original_path)
        if config.never_learnt == OWN_NEVER_LEARNT:
            if self._original.domain.never_learnt() is not None:
                self._refer(NEVER_LEARNT, self.original_path)
        elif config.never_learnt is not None:
            self._refer(NEVER_LEARNT, config.never_learnt)
        self._refer(REINITIALISED, self.original_path)
        for label in config.transfer:
            if label not in self.sources:
                raise InputError(f"transfer: expected models among {', '.join(self.sources)}, got {label!r}")
        self.original_label = next(
            label for label, path in self.sources.items() if path == self.original_path
        )
        self.attacked = list(sources)
        """Labels of the models that the evaluation is about; the others are references."""
        self.rows: dict[str, dict[str, Row]] = {}
        self.transferred: dict[str, dict[str, dict[str, Row]]] = {}
        self.pooled: list[Row] = []
        self.picture_folders: dict[tuple[PromptRecord, ...], Path] = {}
        self.finds: dict[str, list[Find]] = {label: [] for label in self.attacked}
        self.origins: dict[str, Origin] = {}
        self.attacked_models: dict[str, Attacked] = {}

    def _refer(self, label: str, path: str | None) -> None:
        """Add a reference. ``InputError`` if one of the evaluation's own models has its label."""
        if label in self.sources and self.sources[label] != path:
            raise InputError(
                f"models: expected folders of other names than those of the references, got '{label}' for "
                f"{self.sources[label]}; rename the folder"
            )
        self.sources[label] = path

    def run(self, known: Mapping[str, Attacked] | None = None) -> None:
        """Attack every model and compute the rows.

        ``known`` are results by label of an earlier run with the same attacks, prompts and original.
        """
        self.trainer = make_trainer(self.config.trainer, self.folder)
        self.attacked_models = dict(known or {})
        for label in self.sources:
            if label in self.attacked_models:
                continue
            target = self._target(label)
            log.info("attacks on %s: %d prompts", label, len(target.records))
            outcomes, alarm = self._outcomes(label, target)
            self.attacked_models[label] = Attacked(outcomes, alarm, target.adapter.network_evaluations)
            del target
            gc.collect()
        self.rows = attack_rows(
            {label: of_label.outcomes for label, of_label in self.attacked_models.items()},
            original=self.original_label,
            never_learnt=NEVER_LEARNT,
            false_alarms={label: of_label.false_alarm for label, of_label in self.attacked_models.items()},
        )
        for by_attack in self.rows.values():
            for attack in self.attacks:
                by_attack[attack.name]["door"] = str(attack.door)
        self.pooled = [
            {"models": [first, second]}
            | pooled(self.attacked_models[first].outcomes, self.attacked_models[second].outcomes)
            for first, second in combinations(self.erased if self.attacks else (), 2)
        ]
        for label in self.sources if self.config.transfer else ():
            self.transferred[label] = self._transferred(label)
        if self.trainer.is_global_zero:
            write_json(
                self.folder / "attacks.json",
                {"rows": self.rows, "transfer": self.transferred, "pooled": self.pooled},
            )

    def costs(self) -> dict[str, Cost]:
        """Return the exact cost of the search of each attack on one model, by the attack's name.

        ``InputError`` if an attack can't be made on the original.
        """
        target = self._target(self.original_label, pictures=False)
        self._check(target)
        return {attack.name: attack.cost(target) for attack in self.attacks}

    def _check(self, target: Target) -> None:
        """Raise ``InputError`` if an attack can't be made on a model, before the first one takes its time."""
        for attack in self.attacks:
            if isinstance(attack, ChecksTarget):
                attack.check(target)

    def announce(self) -> None:
        """Log the exact cost of every search, and which models it serves."""
        serves = {
            Reads.MODEL: f"for each of {len(self.sources)} models",
            Reads.TEXT_ENCODER: "for all models of one text encoder",
            Reads.ORIGINAL: "for all models",
        }
        for attack, cost in zip(self.attacks, self.costs().values(), strict=True):
            log.info(
                "ahead: search of %s, %s: %d evaluations forward, %d with a backward pass, "
                "%d prompts through the text encoder",
                attack.name,
                serves[attack.reads],
                cost.forward,
                cost.backward,
                cost.text,
            )

    @cached_property
    def _original(self) -> Session:
        return self._session(self.original_path)

    def _session(self, path: str | None) -> Session:
        model = replace(self.config.model, path=path)
        return Session(replace(self.config, model=model), self.concepts)

    @cached_property
    def _usual(self) -> dict[str, Any]:
        """The settings of the judged images."""
        return self._original.sampling().options()

    @cached_property
    def _selector(self) -> Detector:
        """The detector that searches choose by. ``InputError`` where there is none beside the judge."""
        selector = self._original.second_detector()
        if selector is None:
            raise InputError(
                "attacks: expected a second detector, which chooses among an attack's tries and doesn't "
                f"judge, got none for model.domain={self.config.model.domain}, model.judge="
                f"{self.config.model.judge}; with a detector in model.judge, model.clip gives one"
            )
        return selector

    def _records(self, name: str, first: int, count: int) -> tuple[PromptRecord, ...]:
        """Return ``count`` prompts of one of the concepts' own sets from ``first`` on."""
        split = cast(Split, self.config.attacked_split)
        sets = self._original.domain.prompt_sets(first + count, split, [name])
        if not sets:
            raise InputError(
                f"attacks: expected {name} prompts of model.domain={self.config.model.domain}, got none"
            )
        return sets[0].records[first : first + count]

    def _own_never_learnt(self) -> Mapping[str, Tensor] | None:
        """Return the weights that the domain ships, None where the option names another model."""
        return self._original.domain.never_learnt() if self.config.never_learnt == OWN_NEVER_LEARNT else None

    def _target(self, label: str, *, pictures: bool = True) -> Target:
        """Return all that the attacker of a model has. Without pictures, the models stay on the CPU."""
        session = self._session(self.sources[label])
        adapter, original = session.adapter, self._original.adapter
        if label == REINITIALISED:
            reinitialise(adapter.denoiser)
            adapter.weights_changed()
        elif label == NEVER_LEARNT and (weights := self._own_never_learnt()) is not None:
            adapter.denoiser.load_state_dict(weights)
            adapter.weights_changed()
        adapter.name = label
        device = self.trainer.strategy.root_device if pictures else torch.device("cpu")
        for model in (adapter, original):
            model.to(device)
        sampling, count = session.sampling(), self.config.attacked_prompts
        # The statistics take prompts as independent, and images of one text are not.
        records = distinct(self._records(DIRECT, 0, count))
        examples = self._records(DIRECT, count, EXAMPLES)
        needed = [attack.benign_prompts for attack in self.attacks if isinstance(attack, NeedsBenign)]

        def shown(rows: Sequence[PromptRecord]) -> Tensor:
            if pictures:
                return self._pictures(original, rows, sampling.options())
            # A cost depends on how many pictures there are, and not on what they show.
            return torch.zeros((len(rows), 3, adapter.side, adapter.side), dtype=torch.uint8)

        are_taught = any(isinstance(attack, TeachesExamples) for attack in self.attacks)
        return Target(
            adapter=adapter,
            original=original,
            records=records,
            concepts=self.concepts,
            pictures=shown(records),
            selector=self._selector,
            guidance_scale=sampling.guidance_scale,
            num_steps=sampling.num_steps,
            batch_size=sampling.batch_size,
            autocast_dtype=sampling.autocast_dtype,
            seed=self.config.attack_seed,
            variation=sampling.variation,
            benign=self._records(BENIGN, 0, max([count, *needed])),
            examples=examples,
            example_pictures=shown(examples) if are_taught else None,
        )

    def _pictures(
        self, original: Adapter, records: Sequence[PromptRecord], options: Mapping[str, Any]
    ) -> Tensor:
        """Return the original's pictures of the prompts, from noise that no judged image has."""
        drawn = attackers(records)
        folder = self.cache / f"pictures-{digest(original.fingerprint(), settings_of(options), drawn)}"
        self._generate(folder, original, drawn, options, "pictures for the attacker")
        self.picture_folders[tuple(records)] = folder
        return load_images(folder, drawn)

    def _generate(
        self,
        folder: Path,
        adapter: Adapter,
        records: Sequence[PromptRecord],
        options: Mapping[str, Any],
        title: str,
    ) -> None:
        """Fill a folder with images; each rank makes its share."""

        def generate(rank: Rank) -> None:
            adapter.to(rank.device)
            shared = {**options, "rank": rank.index, "world_size": rank.world_size}
            description = title if rank.index == 0 else None
            generate_to(folder, adapter, records, **shared, description=description)

        on_each_rank(self.trainer, generate)

    def _outcomes(self, label: str, target: Target) -> tuple[dict[str, Outcome], float]:
        """Return the outcome of each attack on a model, and the judge's share of false alarms."""
        self._check(target)
        place, judge = self._place(label, target), self._judging()

        def shown(name: str, records: Sequence[PromptRecord], options: Mapping[str, Any]) -> Seen:
            self._generate(place / name, target.adapter, records, options, f"{label}: {name}")
            return judge.seen(place / name, records)

        unattacked = shown("unattacked", target.records, self._usual)
        benign = shown("benign", target.benign[: len(target.records)], self._usual)
        found_in = {attack.name: self._found(label, attack, target) for attack in self.attacks}
        self.origins[label] = Origin(target.adapter.fingerprint(), found_in)
        outcomes = {}
        for attack in self.attacks:
            own = place / self._stored_as(attack)
            # Evaluations share a reference's folder, and models share findings.
            with self._alone(place):
                with self._alone(found_in[attack.name]):
                    findings, by_chance = self._search(
                        found_in[attack.name], own / "control", label, attack, target
                    )
                ways = self._generated(own / "images", label, attack, target, findings, judge)
                result = ways[-1].seen
                tries = max(map(len, hits_of(result).values()))
                control = self._generated(
                    own / "random", label, attack, target, by_chance, judge, result=True
                )
                options = unattacked_options(self._usual, ways[-1].way)
                name = (
                    f"seeds {tries}"
                    if options == self._usual
                    else f"seeds {tries} {digest(settings_of(options))}"
                )
                seeds = shown(name, other_seeds(target.records, tries), options)
                copies = None
                if isinstance(attack, LearnsFromPictures):
                    copies = self._diversity(ways[-1], attack.learnt_from(target))
                chance = hits_of(control[-1].seen)
                settings = {stage.way.name: hits_of(stage.seen) for stage in ways if not stage.way.on_curve}
                if isinstance(attack, ControlTeaches):
                    settings[attack.control] = chance
                spent = total(finding.spent for finding in findings.values())
                outcomes[attack.name] = Outcome(
                    attacked=hits_of(result),
                    unattacked=hits_of(unattacked),
                    seeds=hits_of(seeds),
                    random=None if isinstance(attack, ControlTeaches) else chance,
                    tries=tries,
                    forward=spent.forward,
                    backward=spent.backward,
                    text=spent.text,
                    settings=settings,
                    diversity=None if copies is None else copies._asdict(),
                    by_budget=budget_of_stages(
                        (stage.way.spent, hits_of(stage.seen)) for stage in ways if stage.way.on_curve
                    ),
                    benign_by_budget=[
                        (stage.way.spent, stage.right) for stage in ways if stage.right is not None
                    ],
                )
                if label in self.attacked:
                    self.finds[label] += self._finds(attack, target, ways[-1], findings)
                log.info("%s: %s %s", label, attack.name, percent(hits_of(result)))
        alarms = [hit for tried in hits_of(benign).values() for hit in tried]
        return outcomes, sum(alarms) / len(alarms)

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """Let one evaluation at a time work in a folder. Those that wait find its files afterwards.

        The first rank locks for all ranks of its evaluation.
        """
        for waited in count():
            first = self.trainer.is_global_zero
            with claimed(folder / LOCK) if first else nullcontext(True) as is_ours:
                if self.trainer.strategy.broadcast(is_ours):
                    yield
                    return
            if waited == 0:
                log.info("%s: another evaluation is at it; waiting", folder)
            time.sleep(POLL_SECONDS)

    def _diversity(self, stage: Stage, pictures: Tensor) -> Diversity | None:
        """Return how new the result's images are beside the pictures learnt from; None beside one alone."""
        images = load_images(stage.folder, stage.way.records)
        if min(len(images), len(pictures)) < 2:
            return None
        device = self.trainer.strategy.root_device
        features = self._original.features()
        if features is not None:
            features.to(device)
        return diversity(images.to(device), pictures.to(device), features)

    def _generated(
        self,
        folder: Path,
        label: str,
        attack: Attack,
        target: Target,
        findings: Mapping[str, Finding],
        judge: Judging,
        *,
        result: bool = False,
    ) -> list[Stage]:
        """Generate and judge the images of an attack's ways, or of its result alone, which comes last."""
        stages, ways = [], attack.ways(target, findings)
        for way in [next(way for way in ways if not way.name)] if result else ways:
            place = folder / (way.name or "result")
            steps = {} if way.num_steps is None else {"num_steps": way.num_steps}
            options = self._usual | {"variation": way.variation} | steps
            title = f"{label}: {attack.name} {way.name}".rstrip()
            benign = () if result or judge.names is None else way.benign
            beside = place.with_name(f"{place.name} benign")
            with way.entered() if way.entered else nullcontext():
                self._generate(place, way.adapter, way.records, options, title)
                if benign:
                    self._generate(beside, way.adapter, benign, options, f"{title}, benign")
            right = judge.right(beside, benign) if benign else None
            stages.append(Stage(way, place, judge.seen(place, way.records, way.judged), right))
        return sorted(stages, key=lambda stage: not stage.way.name)

    def _finds(
        self, attack: Attack, target: Target, stage: Stage, findings: Mapping[str, Finding]
    ) -> list[Find]:
        """Return the first images of an attack's result, beside the attacker's pictures of the prompts."""
        pictures = image_files(self.picture_folders[target.records], attackers(target.records))
        originals = {record.prompt_id: file for record, file in zip(target.records, pictures, strict=True)}
        prompts = {record.prompt_id: record.prompt for record in target.records}
        files = image_files(stage.folder, stage.way.records)
        return [
            Find(
                attack=attack.name,
                prompt=prompts[record.prompt_id],
                found=str(
                    findings.get(record.prompt_id, findings.get(UNIVERSAL, NOTHING)).facts.get("text", "")
                ),
                image=file,
                original=originals[record.prompt_id],
                probability=stage.seen[record.id][1],
                hit=stage.seen[record.id][1] >= THRESHOLD,
            )
            for record, file in list(zip(stage.way.records, files, strict=True))[:SHOWN]
        ]

    @property
    def erased(self) -> list[str]:
        """Return the labels of the attacked models, the original left out beside others."""
        return [label for label in self.attacked if label != self.original_label] or self.attacked

    def sections(self) -> list[Content]:
        """Return the report's section on each attacked model, the original left out beside others."""
        doors = {attack.name: str(attack.door) for attack in self.attacks}
        return [
            Content(
                label,
                self.rows,
                doors,
                self.finds[label],
                self.original_label,
                transfer=self.transferred.get(label, {}),
                pooled=[row for row in self.pooled if label in row["models"]],
            )
            for label in self.erased
        ]

    def log(self, loggers: Sequence[Logger]) -> None:
        """Send the rows to the loggers. W&B also gets them as a table, and what was found with its images."""
        for label, by_attack in self.rows.items():
            for name, row in by_attack.items():
                shown = {key: value for key, value in row.items() if key in LOGGED}
                log_scores(loggers, shown, step=0, prefix=f"attacks/{label}/{name}/")
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                log_attacks(logger, self.rows, self.finds)

    def _judging(self) -> Judging:
        session = self._original
        return Judging(session.detector(), session.domain.judge(), self.trainer.strategy.root_device)

    def _generator(self, attack: Attack, purpose: str) -> torch.Generator:
        return seeded(seed_of(f"{attack.name} {purpose}", self.config.attack_seed))

    def _place(self, label: str, target: Target) -> Path:
        """Return the folder of all that an evaluation does with a model under attack.

        Another model, and other prompts, seeds or settings, have another folder.
        """
        own = self.sources[label] != self.original_path and label in self.attacked
        name = f"{label}-{digest(target.adapter.fingerprint(), *self._facts(target))}"
        return (self.folder if own else self.cache) / name

    def _found(self, label: str, attack: Attack, target: Target) -> Path:
        """Return the folder of an attack's findings on a model, which models may share."""
        name = self._stored_as(attack)
        if attack.reads == Reads.MODEL:
            return self._place(label, target) / name / "found"
        read = target.adapter.text_fingerprint() if attack.reads == Reads.TEXT_ENCODER else ""
        return self.cache / f"{name}-{digest(read, *self._facts(target))}"

    def _facts(self, target: Target) -> tuple[object, ...]:
        """Return what decides a search besides the attack and the model."""
        original, clip = target.original.fingerprint(), self.config.model.clip
        # More benign prompts than these follow from an attack's own options.
        benign = target.benign[: len(target.records)]
        prompts = target.records, target.examples, benign
        chosen_by = () if clip is None else (f"selector {clip}",)
        searched = min(target.batch_size, SEARCHED_TOGETHER)
        return original, settings_of(self._usual), searched, *prompts, self.concepts, target.seed, *chosen_by

    def _stored_as(self, attack: Attack) -> str:
        """Return the name of an attack's folder. Other options have another one, and another file does."""
        facts: list[object] = sorted(self.config.attack[attack.name].items())
        if isinstance(attack, ReadsFile):
            facts.append(attack.file_digest())
        return f"{attack.name}-{digest(facts)}"

    def _transferred(self, label: str) -> dict[str, dict[str, Row]]:
        """Return by other model and attack how what was found there serves on this model."""
        target, judge = self._target(label), self._judging()
        rows: dict[str, dict[str, Row]] = {}
        for source in self.config.transfer:
            if source == label:
                continue
            origin = self.origins[source]
            for attack in self.attacks:
                findings = self._stored(origin.found_in[attack.name], attack, target)
                place = self._place(label, target) / self._stored_as(attack)
                folder = place / f"from {source}-{digest(origin.fingerprint)}"
                (*_, result) = self._generated(folder, label, attack, target, findings, judge, result=True)
                own = self.rows[label][attack.name]["rate"]
                at_source = self.rows[source][attack.name]["rate"]
                rate = rate_of(hits_of(result.seen)) | {"searched_here": own, "at_its_source": at_source}
                rows.setdefault(source, {})[attack.name] = rate
        return rows

    def _stored(self, folder: Path, attack: Attack, target: Target) -> dict[str, Finding]:
        """Return the findings of all tasks by prompt id; those of parts are joined."""
        tasks = self._tasks(folder, attack, target)
        findings = [finding for task in tasks for finding in load_findings(task.stem)]
        if isinstance(attack, SearchesInParts):
            findings = [attack.joined(findings)]
        return {finding.prompt_id: finding for finding in findings}

    def _tasks(self, folder: Path, attack: Attack, target: Target) -> list[Task]:
        """Return the searches of an attack that know nothing of each other: its parts, or batches of prompts.

        They don't depend on the number of ranks, so that two ranks find what one finds.
        """
        if isinstance(attack, SearchesInParts):
            return [
                Task(
                    folder / f"part {part}",
                    told(attack.cost_of_part(target, part)),
                    partial(self._search_part, attack, target, part),
                )
                for part in range(attack.parts(target))
            ]
        return [
            Task(
                folder / f"{index:05d}",
                told(attack.cost(replace(target, records=rows))),
                partial(self._search_batch, attack, target, index, rows),
            )
            for index, rows in enumerate(batches_of(attack, target))
        ]

    def _search_part(self, attack: Attack, target: Target, part: int, tell: Progress) -> list[Finding]:
        assert isinstance(attack, SearchesInParts)
        return [attack.search_part(target, part, self._generator(attack, "batch 0"), tell)]

    def _search_batch(
        self, attack: Attack, target: Target, index: int, rows: Sequence[PromptRecord], tell: Progress
    ) -> list[Finding]:
        return attack.search(target, rows, self._generator(attack, f"batch {index}"), tell)

    def _search(
        self, folder: Path, control: Path, label: str, attack: Attack, target: Target
    ) -> tuple[dict[str, Finding], dict[str, Finding]]:
        """Return what an attack finds, and what it finds without a search in the folder ``control``.

        Both are by prompt id. Stored findings are not made again. Each rank takes its share of the tasks.
        """
        if isinstance(attack, KeepsSearches):
            attack.keep_in(self.cache / f"{self._stored_as(attack)}-texts")
        tasks, by_chance = self._tasks(folder, attack, target), control / "00000"
        # A control that teaches takes as long as a search. Others take a moment.
        busy = len(tasks) + isinstance(attack, ControlTeaches)

        def make(rank: Rank) -> None:
            own = tasks[rank.index :: rank.world_size]
            left = [task for task in own if not task.stem.with_suffix(".json").exists()]
            evaluations, title = sum(task.evaluations for task in left), f"{label}: {attack.name}"
            hidden = rank.index > 0 or not evaluations
            with (
                threads_of_idle_ranks(rank, busy, self.trainer.num_devices),
                torch.enable_grad(),  # predicting goes without
            ):
                with tqdm(total=evaluations, desc=f"{title}, search", unit="eval", disable=hidden) as bar:
                    for task in left:
                        save_findings(task.stem, task.search(bar.update))
                its_turn = rank.index == len(tasks) % rank.world_size
                if its_turn and not by_chance.with_suffix(".json").exists():
                    generator = self._generator(attack, "random")
                    with tqdm(desc=f"{title}, control", unit="eval", delay=1, disable=rank.index > 0) as bar:
                        made = attack.random(target, target.records, generator, bar.update)
                    save_findings(by_chance, made)

        on_each_rank(self.trainer, make)
        controls = {finding.prompt_id: finding for finding in load_findings(by_chance)}
        return self._stored(folder, attack, target), controls


@dataclass(frozen=True)
class Task:
    """A search of an attack that one rank makes alone."""

    stem: Path
    """The path of its findings' files without suffix."""
    evaluations: int
    """The sum of what it tells its progress bar."""
    search: Callable[[Progress], list[Finding]]


@dataclass(frozen=True)
class Attacked:
    """The results of all attacks on one model."""

    outcomes: Mapping[str, Outcome]
    false_alarm: float
    network_evaluations: int
    """Evaluations of this model in this process: of searches and images. Stored ones are not counted."""


@dataclass(frozen=True)
class Stage:
    """The judged images of one way."""

    way: Way
    folder: Path
    seen: Seen
    right: float | None = None
    """The share of the way's benign images that show what their prompts ask for."""


@dataclass(frozen=True)
class Origin:
    """A model on which attacks have found something."""

    fingerprint: str
    found_in: Mapping[str, Path]
    """The folder of the findings by the attack's name."""


class Judging:
    """The judges of all images, on their device.

    Args:
        detector: the judge of the concept.
        names: the judge that names what an image shows, or None.
    """

    def __init__(self, detector: Detector | None, names: ImageJudge | None, device: torch.device) -> None:
        if detector is None:
            raise InputError("option 'model.judge': expected a detector, which judges attacks, got none")
        self.detector, self.place = detector, to_device(detector, device)
        self.names, self.names_place = names, to_device(names, device)

    def seen(
        self,
        folder: Path,
        records: Sequence[PromptRecord],
        judged: Callable[[Sequence[PromptRecord], Tensor], Tensor] | None = None,
    ) -> Seen:
        """Return the attacked prompt of each image, and the probability that it shows the concept.

        ``judged`` is :attr:`~.protocol.Way.judged`.
        """
        found: Seen = {}
        for rows, images in image_batches(folder, records):
            part = images if judged is None else judged(rows, images)
            chances = self.detector(part.to(self.place)).cpu().tolist()
            for record, chance in zip(rows, chances, strict=True):
                found[record.id] = record.prompt_id, float(chance)
        return found

    def right(self, folder: Path, records: Sequence[PromptRecord]) -> float | None:
        """Return the share of images that show their prompts' labels; None where no prompt has one."""
        assert self.names is not None
        subjects, right = self.names.vocabulary["subject"], []
        for rows, images in image_batches(folder, records):
            named = self.names(images.to(self.names_place))["subject"].argmax(-1).tolist()
            pairs = zip(rows, named, strict=True)
            right += [subjects[index] == record.label for record, index in pairs if record.label is not None]
        return sum(right) / len(right) if right else None


def hits_of(seen: Seen) -> dict[str, list[bool]]:
    """Return for each attacked prompt which of its images show the concept."""
    hits: dict[str, list[bool]] = {}
    for prompt_id, probability in seen.values():
        hits.setdefault(prompt_id, []).append(probability >= THRESHOLD)
    return hits


def digest(*facts: object) -> str:
    """Return a hash of facts by their representations."""
    return hashlib.blake2b("\n".join(map(repr, facts)).encode(), digest_size=4).hexdigest()


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides an image. Its noise doesn't depend on the batch that it is generated in."""
    return {name: value for name, value in options.items() if name != "batch_size"}


def batches_of(attack: Attack, target: Target) -> list[tuple[PromptRecord, ...]]:
    """Return the prompts that are searched for together. A universal attack is one batch of all prompts.

    The batches don't depend on the number of ranks, so that two ranks find what one finds.
    """
    size = len(target.records) if attack.universal else min(target.batch_size, SEARCHED_TOGETHER)
    return [target.records[i : i + size] for i in range(0, len(target.records), size)]


def told(cost: Cost) -> int:
    """Return what a search of this cost tells its progress bar in all."""
    return cost.forward + cost.backward or cost.text


def make_attack(name: str, options: Mapping[str, Any]) -> Attack:
    """Return the attack that ``attack.NAME`` describes. ``InputError`` names a wrong option."""
    if not isinstance(options, Mapping):
        raise InputError(f"attack.{name}: expected options by their names, got {options!r}")
    given = dict(options)
    path = given.pop("_target_", None)
    if path is None:
        raise InputError(f"attack.{name}: expected an attack chosen by attacks=[{name}], got options alone")
    _check_options(name, path, given)
    attack = made_by(f"attack.{name}", path, Attack, **given)  # type: ignore[type-abstract]
    if attack.name != name:
        raise InputError(
            f"attack.{name}: expected an attack of that name, got '{path}', which is {attack.name}"
        )
    return attack


def _check_options(name: str, path: str, given: Mapping[str, Any]) -> None:
    """Raise ``InputError`` on an option that a class, and what it passes its options to, don't take."""
    module, _, attribute = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError):  # `made_by` explains it
        return
    known: dict[str, Any] = {}
    for each in kind.__mro__[:-1] if isinstance(kind, type) else ():
        parameters = inspect.signature(each).parameters.values()
        try:
            types = get_type_hints(cast(Any, each).__init__)
        except NameError:  # a user's class may import names for type checkers alone, and takes any value
            types = {}
        known |= {
            parameter.name: types.get(parameter.name, Any)
            for parameter in parameters
            if parameter.kind != parameter.VAR_KEYWORD
        }
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    else:
        return
    if unknown := [option for option in given if option not in known]:
        raise InputError(
            f"attack.{name}: expected options among {', '.join(sorted(known))}, got '{unknown[0]}'"
        )
    check_arguments(known, given, f"attack.{name}")


def other_seeds(records: Sequence[PromptRecord], tries: int) -> list[PromptRecord]:
    """Return each prompt ``tries`` times with noise that nothing else has."""
    return [
        replace(record, id=f"{record.id}~seed {i}", seed=None, sample_of=record.prompt_id)
        for record in records
        for i in range(tries)
    ]


def unattacked_options(usual: Mapping[str, Any], way: Way) -> dict[str, Any]:
    """Return the settings of a way's images without what makes them an attack.

    Sampler and steps stay. Latents that sampling starts from, and noise that the sampler adds, go.
    """
    noisy = isinstance(way.variation.scheduler, NoisyDdim)
    plain = replace(way.variation, start=None, scheduler=None if noisy else way.variation.scheduler)
    steps = usual["num_steps"] if way.num_steps is None else way.num_steps
    return {**usual, "variation": plain, "num_steps": steps}


def attackers(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Return the records of the pictures that an attacker has of these prompts."""
    return [replace(record, seed=seed_of(f"{record.id} for the attacker", 0)) for record in records]


def reinitialise(denoiser: nn.Module) -> None:
    """Give all weights their initial values, from a fixed seed. They are random, and a scale is 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in denoiser.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            elif isinstance(module, RMSNorm) and module.weight is not None:
                nn.init.ones_(module.weight)


def distinct(records: Sequence[PromptRecord]) -> tuple[PromptRecord, ...]:
    """Return the first prompt of each text."""
    first: dict[str, PromptRecord] = {}
    for record in records:
        first.setdefault(record.prompt, record)
    return tuple(first.values())


def percent(hits: Hits) -> str:
    """Return the share of broken prompts, for the log."""
    return f"{100 * sum(any(tried) for tried in hits.values()) / len(hits):.1f} %"


def attacks_table(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """Return a Markdown table: the success of each attack on each model, and its controls."""
    lines = ["| attack | model | success | without attack | other seeds | random | ρ | |", "| --- " * 8 + "|"]
    for name in next(iter(rows.values()), {}):
        for label, by_attack in rows.items():
            row = by_attack[name]
            controls = [row["control"].get(control, {}).get("rate") for control in ("seeds", "random")]
            cells = [name, label, f"{rate(row['rate'])} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"]
            cells += [rate(row["pre"]), *map(rate, controls)]
            cells += [f"{row['rho']['value']:.2f}" if "rho" in row else "–", row["verdict"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rate(share: float | None) -> str:
    """Return a share in percent, a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"
