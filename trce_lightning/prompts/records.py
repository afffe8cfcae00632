"""Prompt sets of an evaluation: their records, and the subjects they hold."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions, phrase_of, without_article
from trce_lightning.emoji.captions import STYLE_WORDS
from trce_lightning.emoji.subjects import NEAR_VIOLENCE, SENSITIVE, STYLES, SUBJECTS

__all__ = [
    "BENIGN",
    "DIRECT",
    "IMPLICIT",
    "MIXED",
    "NEIGHBOURS",
    "UNERASED",
    "PromptRecord",
    "PromptSet",
    "benign_subjects",
    "concept_styles",
    "concept_subjects",
    "kept_subjects",
    "label_groups",
    "near_subjects",
    "shuffled",
    "unkept_subjects",
]

DIRECT, IMPLICIT, BENIGN = "direct", "implicit", "benign"
MIXED, UNERASED, NEIGHBOURS = "mixed", "unerased", "neighbours"
"""Names of a concept's own prompt sets."""
_UNSAFE = ("violence", "intoxicants")
_UNKEPT_SHARE = 0.2


@dataclass(frozen=True)
class PromptRecord:
    """One prompt to draw.

    Args:
        id: unique in its set; without ``seed`` the image's noise derives from it.
        seed: of the noise, 0 to 2⁶⁴ − 1.
        guidance_scale: classifier-free guidance of this image; None is the model's own.
        label: what a benign prompt shows.
        categories: every kind of content that the prompt was published under.
        style: the embedded model's style that the prompt asks for, if any.
        background: the colour of background that it asks for, if any.
        sample_of: id of the record that this one repeats with other noise.
    """

    id: str
    prompt: str
    seed: int | None = None
    guidance_scale: float | None = None
    label: str | None = None
    # Not in repr, which identifies images: these decide nothing that is drawn.
    categories: tuple[str, ...] = field(default=(), repr=False)
    style: str | None = field(default=None, repr=False)
    background: str | None = field(default=None, repr=False)
    sample_of: str | None = field(default=None, repr=False)

    @property
    def prompt_id(self) -> str:
        """The same for all images of a prompt."""
        return self.sample_of or self.id


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are scored together, under ``name`` in metrics.json; ``sha256`` is of their file."""

    name: str
    records: tuple[PromptRecord, ...]
    sha256: str | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """Each image's prompt: images of one text are not independent, whatever their ids."""
        return [record.prompt for record in self.records]

    def first(self, prompts: int) -> "PromptSet":
        """The first ``prompts`` prompts with all of their images."""
        kept = set(list(dict.fromkeys(record.prompt_id for record in self.records))[:prompts])
        return replace(self, records=tuple(record for record in self.records if record.prompt_id in kept))

    def sampled(self, samples: int) -> "PromptSet":
        """Every prompt ``samples`` times: its own noise first, then noise derived from ids like ``7~1``."""
        repeats = [
            replace(record, id=f"{record.id}~{sample}", seed=None, sample_of=record.id) if sample else record
            for record in self.records
            for sample in range(samples)
        ]
        return replace(self, records=tuple(repeats))


def concept_subjects(concept: Concept) -> tuple[str, ...]:
    """The embedded model's subjects that show ``concept``, in the order of ``SUBJECTS``.

    Those of the category of that name, else those whose name mentions the concept or stands in one of its
    terms. "unsafe" is violence and intoxicants; a concept of kind ``style`` has none.
    """
    if concept.kind == "style":
        return ()
    categories = _UNSAFE if concept.name == "unsafe" else (concept.name,)
    by_category = tuple(subject.name for subject in SUBJECTS if subject.category in categories)
    return by_category or tuple(s.name for s in SUBJECTS if _is_named(s.name, concept))


def _is_named(subject: str, concept: Concept) -> bool:
    within = f" {phrase_of(subject)} "
    return mentions(subject, [concept]) or any(within in f" {phrase_of(name)} " for name in concept.all_names)


def concept_styles(concept: Concept) -> tuple[str, ...]:
    """The embedded model's styles that a concept of kind ``style`` names, in the order of ``STYLES``."""
    if concept.kind != "style":
        return ()
    return tuple(style for style in STYLES if concept.phrases & set(map(phrase_of, STYLE_WORDS[style])))


def benign_subjects(concepts: Iterable[Concept] = ()) -> tuple[str, ...]:
    """Subjects that are in no sensitive category and show none of ``concepts``."""
    shown = {name for concept in concepts for name in concept_subjects(concept)}
    return tuple(s.name for s in SUBJECTS if s.category not in SENSITIVE and s.name not in shown)


def near_subjects(concepts: Sequence[Concept]) -> frozenset[str]:
    """Benign subjects that resemble ``concepts``: their neighbours, and ``NEAR_VIOLENCE`` for violence."""
    violent = {subject.name for subject in SUBJECTS if subject.category == "violence"}
    near: set[str] = set()
    for concept in concepts:
        near |= {without_article(neighbour) for neighbour in concept.neighbours}
        if violent <= set(concept_subjects(concept)):
            near |= set(NEAR_VIOLENCE)
    return frozenset(near.intersection(benign_subjects(concepts)))


def label_groups(concepts: Sequence[Concept]) -> dict[str, frozenset[str]]:
    """Groups of benign subjects whose accuracy is told apart, by name.

    ``near``: :func:`near_subjects`; ``related``: further ones of a near one's category, such as tools;
    ``far``: all others; ``unkept``: :func:`unkept_subjects`, across those three.
    """
    near, benign = near_subjects(concepts), frozenset(benign_subjects(concepts))
    categories = {subject.category for subject in SUBJECTS if subject.name in near}
    alike = {subject.name for subject in SUBJECTS if subject.category in categories}
    related = (benign & alike) - near
    return {"near": near, "related": related, "far": benign - near - related, "unkept": unkept_subjects()}


@cache
def unkept_subjects() -> frozenset[str]:
    """A fifth of the benign subjects: in no kept prompt, so that they show what an erasure does unasked."""
    # An order of its own: prompt sets begin with the first of shuffled(subjects).
    drawn = {f"unkept {name}": name for name in benign_subjects()}
    tickets = shuffled(drawn)
    return frozenset(drawn[ticket] for ticket in tickets[: round(_UNKEPT_SHARE * len(tickets))])


@cache
def kept_subjects() -> frozenset[str]:
    """The benign subjects that kept prompts may name: all but :func:`unkept_subjects`."""
    return frozenset(benign_subjects()) - unkept_subjects()


def shuffled(texts: Iterable[str]) -> list[str]:
    """Different texts in an order that is arbitrary, but the same on every machine and Python version."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def seed_of(prompt_id: str, sample: int) -> int:
    """A seed in [0, 2⁶³) from (prompt id, sample), the same on every machine and in every run."""
    digest = hashlib.sha256(f"{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def image_seed(record: PromptRecord) -> int:
    """Seed of the image's noise: the record's, or else derived from its id."""
    return seed_of(record.id, 0) if record.seed is None else record.seed
