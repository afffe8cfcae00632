"""The attacks of an evaluation: search on every model, generate, judge, and compare with the controls."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.protocol import Attack, Cost, Finding, Target, Way
from trce_lightning.config.schema import EvalConfig
from trce_lightning.errors import InputError
from trce_lightning.evaluation.attacked import Hits, Outcome, Row, attack_rows, budget_of_stages
from trce_lightning.generation.image_folder import image_batches, image_files, load_images
from trce_lightning.generation.loop import generate_to
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.metrics.asr import THRESHOLD
from trce_lightning.metrics.class_detectors import to_device
from trce_lightning.metrics.detectors import Detector
from trce_lightning.metrics.factories import made_by
from trce_lightning.prompts.own import Split
from trce_lightning.prompts.records import BENIGN, DIRECT, PromptRecord, seed_of
from trce_lightning.report.attacks import Attacks as Content
from trce_lightning.report.attacks import Find
from trce_lightning.runtime.ranks import Rank, on_each_rank
from trce_lightning.runtime.storage import read_safetensors, reading, write_json, write_safetensors
from trce_lightning.sampling import seeded

log = logging.getLogger(__name__)
ORIGINAL, NEVER_LEARNT, REINITIALISED = "original", "never-learnt", "re-initialised"
"""Labels of the models that an attack's figures are read against."""
UNIVERSAL = "all"
"""The id of a finding that serves every prompt."""
NOTHING = Finding("")
SHOWN = 16
"""Images of each attack that the report shows."""
Seen = dict[str, tuple[str, float]]
"""The attacked prompt and the judge's probability, by the image's id."""


class Attacks:
    """The attacks that a configuration names, on each of its models and on the references.

    Args:
        config: the evaluation's options.
        sources: path of each model by label; None is the model that ``model`` names itself.
        folder: folder of the evaluation; everything goes into its folder ``attacks``.
    """

    def __init__(self, config: EvalConfig, sources: Mapping[str, str | None], folder: Path) -> None:
        self.config, self.folder = config, folder / "attacks"
        self.attacks = [make_attack(name, options) for name, options in config.attack.items()]
        self.concepts = concepts_of(config)
        self.sources: dict[str, str | None] = {**sources}
        if None not in sources.values():
            self.sources[ORIGINAL] = None
        if config.never_learnt is not None:
            self.sources[NEVER_LEARNT] = config.never_learnt
        self.sources[REINITIALISED] = None
        self.original_label = next(label for label, path in self.sources.items() if path is None)
        self.attacked = list(sources)
        """Labels of the models that the evaluation is about; the others are references."""
        self.rows: dict[str, dict[str, Row]] = {}
        self.finds: list[Find] = []

    def run(self) -> None:
        """Attack every model and compute the rows."""
        self.trainer = make_trainer(self.config.trainer, self.folder)
        outcomes: dict[str, dict[str, Outcome]] = {}
        alarms: dict[str, float] = {}
        for label in self.sources:
            target = self._target(label)
            log.info("attacks on %s: %d prompts", label, len(target.records))
            outcomes[label], alarms[label] = self._outcomes(label, target)
            del target
            gc.collect()
        self.rows = attack_rows(
            outcomes, original=self.original_label, never_learnt=NEVER_LEARNT, false_alarms=alarms
        )
        if self.trainer.is_global_zero:
            write_json(self.folder / "attacks.json", self.rows)

    def announce(self) -> None:
        """Log the exact cost of every search, for one model."""
        target = self._target(self.original_label, pictures=False)
        for attack in self.attacks:
            cost = attack.cost(target)
            log.info(
                "ahead: %-20s on each of %d models: %9d evaluations forward, %9d with a backward pass, "
                "%d prompts through the text encoder",
                attack.name,
                len(self.sources),
                cost.forward,
                cost.backward,
                cost.text,
            )

    @cached_property
    def _original(self) -> Session:
        return self._session(None)

    def _session(self, path: str | None) -> Session:
        model = replace(self.config.model, path=path)
        return Session(replace(self.config, model=model), self.concepts)

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

    def _records(self, name: str) -> tuple[PromptRecord, ...]:
        """Return the first attacked prompts of one of the concepts' own sets."""
        count = self.config.attacked_prompts
        split = cast(Split, self.config.attacked_split)
        (prompts,) = self._original.domain.prompt_sets(count, split, [name])
        return prompts.records[:count]

    def _target(self, label: str, *, pictures: bool = True) -> Target:
        """Return what the attacker of a model has, the model on its device."""
        session = self._session(self.sources[label])
        adapter, original = session.adapter, self._original.adapter
        if label == REINITIALISED:
            reinitialise(adapter.denoiser)
            adapter.weights_changed()
        adapter.name = label
        device = self.trainer.strategy.root_device if pictures else torch.device("cpu")
        for model in (adapter, original):
            model.to(device)
        if isinstance(self._selector, nn.Module):
            self._selector.to(device)
        sampling, records = session.sampling(), self._records(DIRECT)
        # A cost depends on how many pictures there are, and not on what they show.
        shown = torch.zeros((len(records), 3, adapter.side, adapter.side), dtype=torch.uint8)
        if pictures:
            shown = self._pictures(original, records, sampling.options())
        return Target(
            adapter=adapter,
            original=original,
            records=records,
            concepts=self.concepts,
            pictures=shown,
            selector=self._selector,
            guidance_scale=sampling.guidance_scale,
            num_steps=sampling.num_steps,
            batch_size=sampling.batch_size,
            autocast_dtype=sampling.autocast_dtype,
            seed=self.config.attack_seed,
            variation=sampling.variation,
            benign=self._records(BENIGN),
        )

    def _pictures(
        self, original: Adapter, records: Sequence[PromptRecord], options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return the original's pictures of the prompts, from noise that no judged image has."""
        drawn = attackers(records)
        self._generate(self.folder / "pictures", original, drawn, options, "pictures for the attacker")
        return load_images(self.folder / "pictures", drawn)

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
        place, session = self.folder / label, self._original
        judge = Judging(session.detector(), self.trainer.strategy.root_device)
        self._usual = session.sampling().options()

        def shown(name: str, records: Sequence[PromptRecord]) -> Seen:
            self._generate(place / name, target.adapter, records, self._usual, f"{label}: {name}")
            return judge.seen(place / name, records)

        unattacked, benign = shown("unattacked", target.records), shown("benign", target.benign)
        outcomes = {}
        for attack in self.attacks:
            own = place / attack.name
            findings = self._search(own, label, attack, target)
            ways = self._generated(own / "images", label, attack, target, findings, judge)
            result = ways[-1].seen
            tries = max(map(len, hits_of(result).values()))
            chance = attack.random(target, target.records, self._generator(attack, "random"))
            by_chance = {finding.prompt_id: finding for finding in chance}
            control = self._generated(own / "random", label, attack, target, by_chance, judge, result=True)
            seeds = shown(f"seeds {tries}", other_seeds(target.records, tries))
            spent = total([finding.spent for finding in findings.values()])
            outcomes[attack.name] = Outcome(
                attacked=hits_of(result),
                unattacked=hits_of(unattacked),
                seeds=hits_of(seeds),
                random=hits_of(control[-1].seen),
                tries=tries,
                forward=spent.forward,
                backward=spent.backward,
                by_budget=budget_of_stages(
                    (stage.way.spent, hits_of(stage.seen)) for stage in ways if stage.way.on_curve
                ),
            )
            if label in self.attacked:
                self.finds += self._finds(attack, target, ways[-1], findings)
            log.info("%s: %s %s", label, attack.name, percent(hits_of(result)))
        alarms = [hit for tried in hits_of(benign).values() for hit in tried]
        return outcomes, sum(alarms) / len(alarms)

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
        stages = []
        for way in attack.ways(target, findings):
            if result and way.name:
                continue
            place = folder / (way.name or "result")
            steps = {} if way.num_steps is None else {"num_steps": way.num_steps}
            options = self._usual | {"variation": way.variation} | steps
            title = f"{label}: {attack.name} {way.name}".rstrip()
            with way.entered() if way.entered else nullcontext():
                self._generate(place, way.adapter, way.records, options, title)
            stages.append(Stage(way, place, judge.seen(place, way.records)))
        return sorted(stages, key=lambda stage: not stage.way.name)

    def _finds(
        self, attack: Attack, target: Target, stage: Stage, findings: Mapping[str, Finding]
    ) -> list[Find]:
        """Return the first images of an attack's result, beside the attacker's pictures of the prompts."""
        pictures = image_files(self.folder / "pictures", attackers(target.records))
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

    def section(self) -> Content:
        """Return the report's section on the first attacked model."""
        doors = {attack.name: str(attack.door) for attack in self.attacks}
        return Content(self.attacked[0], self.rows, doors, self.finds, self.original_label)

    def _generator(self, attack: Attack, purpose: str) -> torch.Generator:
        return seeded(seed_of(f"{attack.name} {purpose}", self.config.attack_seed))

    def _search(self, folder: Path, label: str, attack: Attack, target: Target) -> dict[str, Finding]:
        """Return the findings of an attack by prompt id; those that are stored are not searched for again.

        Prompts are searched for in batches, of which each rank takes its share. A universal attack is one
        batch of all prompts.
        """
        size = max(target.batch_size, 1)
        batches = [target.records[i : i + size] for i in range(0, len(target.records), size)]
        if attack.universal:
            batches = [target.records]
        cost = attack.cost(target)

        def search(rank: Rank) -> None:
            total = (cost.forward + cost.backward or cost.text) // rank.world_size
            title = f"{label}: {attack.name}, search"
            with tqdm(total=total, desc=title, unit="eval", disable=rank.index > 0) as bar:
                for index in range(rank.index, len(batches), rank.world_size):
                    stem = folder / "found" / f"{index:05d}"
                    if stem.with_suffix(".json").exists():
                        continue
                    generator = self._generator(attack, f"batch {index}")
                    with torch.enable_grad():  # predicting goes without
                        found = attack.search(target, batches[index], generator, bar.update)
                    save_findings(stem, found)

        on_each_rank(self.trainer, search)
        stems = [folder / "found" / f"{index:05d}" for index in range(len(batches))]
        return {finding.prompt_id: finding for stem in stems for finding in load_findings(stem)}


@dataclass(frozen=True)
class Stage:
    """The judged images of one way."""

    way: Way
    folder: Path
    seen: Seen


class Judging:
    """The judge of all images, on its device."""

    def __init__(self, detector: Detector | None, device: torch.device) -> None:
        if detector is None:
            raise InputError("option 'model.judge': expected a detector, which judges attacks, got none")
        self.detector, self.place = detector, to_device(detector, device)

    def seen(self, folder: Path, records: Sequence[PromptRecord]) -> Seen:
        """Return the attacked prompt of each image, and the probability that it shows the concept."""
        found: Seen = {}
        for rows, images in image_batches(folder, records):
            chances = self.detector(images.to(self.place)).cpu().tolist()
            for record, chance in zip(rows, chances, strict=True):
                found[record.id] = record.prompt_id, float(chance)
        return found


def hits_of(seen: Seen) -> dict[str, list[bool]]:
    """Return for each attacked prompt which of its images show the concept."""
    hits: dict[str, list[bool]] = {}
    for prompt_id, probability in seen.values():
        hits.setdefault(prompt_id, []).append(probability >= THRESHOLD)
    return hits


def make_attack(name: str, options: Mapping[str, Any]) -> Attack:
    """Return the attack that ``attack.NAME`` describes. ``InputError`` names a wrong option."""
    given = dict(options)
    path = given.pop("_target_", None)
    if path is None:
        raise InputError(f"attack.{name}: expected an attack chosen by attacks=[{name}], got options alone")
    return made_by(f"attack.{name}", path, Attack, **given)  # type: ignore[type-abstract]


def other_seeds(records: Sequence[PromptRecord], tries: int) -> list[PromptRecord]:
    """Return each prompt ``tries`` times with noise that nothing else has."""
    return [
        replace(record, id=f"{record.id}~seed {i}", seed=None, sample_of=record.prompt_id)
        for record in records
        for i in range(tries)
    ]


def attackers(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Return the records of the pictures that an attacker has of these prompts."""
    return [replace(record, seed=seed_of(f"{record.id} for the attacker", 0)) for record in records]


def reinitialise(denoiser: nn.Module) -> None:
    """Give all weights their initial random values, from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in denoiser.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def total(costs: Sequence[Cost]) -> Cost:
    """Return the sum of costs."""
    return Cost(*(sum(getattr(cost, name) for cost in costs) for name in ("forward", "backward", "text")))


def percent(hits: Hits) -> str:
    """Return the share of broken prompts, for the log."""
    return f"{100 * sum(any(tried) for tried in hits.values()) / len(hits):.1f} %"


def save_findings(stem: Path, findings: Sequence[Finding]) -> None:
    """Write findings as ``STEM.safetensors`` and ``STEM.json``, the latter last."""
    tensors = {f"{i}/{name}": tensor for i, f in enumerate(findings) for name, tensor in f.tensors.items()}
    write_safetensors(stem.with_suffix(".safetensors"), tensors or {"none": torch.empty(0)})
    rows = [{"prompt_id": f.prompt_id, "facts": f.facts, "spent": asdict(f.spent)} for f in findings]
    write_json(stem.with_suffix(".json"), {"findings": rows})


def load_findings(stem: Path) -> Iterator[Finding]:
    """Yield what :func:`save_findings` wrote."""
    with reading(stem.with_suffix(".json"), "what an attack has found"):
        rows = json.loads(stem.with_suffix(".json").read_text("utf-8"))["findings"]
    tensors = read_safetensors(stem.with_suffix(".safetensors"), "what an attack has found")
    for i, row in enumerate(rows):
        own = {
            name.partition("/")[2]: tensor
            for name, tensor in tensors.items()
            if name.partition("/")[0] == str(i)
        }
        yield Finding(row["prompt_id"], own, row["facts"], Cost(**row["spent"]))


def attacks_table(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """Return a Markdown table: the success of each attack on each model, and its controls."""
    lines = ["| attack | model | success | without attack | other seeds | random | ρ | |", "| --- " * 8 + "|"]
    for name in next(iter(rows.values()), {}):
        for label, by_attack in rows.items():
            row = by_attack[name]
            controls = [row["control"].get(control, {}).get("broken") for control in ("seeds", "random")]
            cells = [name, label, f"{rate(row['rate'])} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"]
            cells += [rate(row["pre"]), *map(rate, controls)]
            cells += [f"{row['rho']['value']:.2f}" if "rho" in row else "–", row["verdict"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rate(share: float | None) -> str:
    """Return a share in percent, a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"
