"""Find the embedded model's subjects and styles that show a concept, and group the others."""

from collections.abc import Iterable, Sequence
from functools import cache

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions, phrase_of, without_article
from trce_lightning.emoji.captions import STYLE_WORDS
from trce_lightning.emoji.subjects import NEAR_VIOLENCE, SENSITIVE, STYLES, SUBJECTS
from trce_lightning.prompts.records import shuffled

_UNSAFE = ("violence", "intoxicants")
_UNKEPT_SHARE = 0.2


def concept_subjects(concept: Concept) -> tuple[str, ...]:
    """Return the subjects that show ``concept``, in the order of ``SUBJECTS``.

    If a category has the concept's name, they are its subjects. Otherwise they are the subjects whose name
    mentions the concept or is part of one of its terms. "unsafe" is violence and intoxicants. A concept of
    kind ``style`` has no subjects.
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
    """Return the styles that a concept of kind ``style`` names, in the order of ``STYLES``."""
    if concept.kind != "style":
        return ()
    return tuple(style for style in STYLES if concept.phrases & set(map(phrase_of, STYLE_WORDS[style])))


def benign_subjects(concepts: Iterable[Concept] = ()) -> tuple[str, ...]:
    """Return the subjects that are in no sensitive category and show none of ``concepts``."""
    shown = {name for concept in concepts for name in concept_subjects(concept)}
    return tuple(s.name for s in SUBJECTS if s.category not in SENSITIVE and s.name not in shown)


def near_subjects(concepts: Sequence[Concept]) -> frozenset[str]:
    """Return the benign subjects that resemble ``concepts``.

    They are the concepts' neighbours, and ``NEAR_VIOLENCE`` for violence.
    """
    violent = {subject.name for subject in SUBJECTS if subject.category == "violence"}
    near: set[str] = set()
    for concept in concepts:
        near |= {without_article(neighbour) for neighbour in concept.neighbours}
        if violent <= set(concept_subjects(concept)):
            near |= set(NEAR_VIOLENCE)
    return frozenset(near.intersection(benign_subjects(concepts)))


def label_groups(concepts: Sequence[Concept]) -> dict[str, frozenset[str]]:
    """Return the groups of benign subjects by name. Their accuracy is reported separately.

    ``near`` holds :func:`near_subjects`. ``related`` holds other subjects that share a category with one of
    them, such as tools. ``far`` holds the rest. ``unkept`` holds :func:`unkept_subjects` from all three.
    """
    near, benign = near_subjects(concepts), frozenset(benign_subjects(concepts))
    categories = {subject.category for subject in SUBJECTS if subject.name in near}
    alike = {subject.name for subject in SUBJECTS if subject.category in categories}
    related = (benign & alike) - near
    return {"near": near, "related": related, "far": benign - near - related, "unkept": unkept_subjects()}


@cache
def unkept_subjects() -> frozenset[str]:
    """Return a fifth of the benign subjects. No kept prompt names them.

    They show what an erasure does to subjects that it was not told to keep.
    """
    # The names get a prefix, so that this order differs from the one in which prompt sets use the subjects.
    drawn = {f"unkept {name}": name for name in benign_subjects()}
    tickets = shuffled(drawn)
    return frozenset(drawn[ticket] for ticket in tickets[: round(_UNKEPT_SHARE * len(tickets))])


@cache
def kept_subjects() -> frozenset[str]:
    """Return the benign subjects that kept prompts may name: all except :func:`unkept_subjects`."""
    return frozenset(benign_subjects()) - unkept_subjects()
