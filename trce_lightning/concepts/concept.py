"""Concepts to erase: malicious terms, their safe counterparts, and the prompt pairs made of them.

A concept of 20 terms and 15 templates gives the 300 contextually similar prompt pairs that stage 1 of TRCE
(arXiv 2503.07389) needs. Terms and counterparts are whole noun phrases. If English wants an article, they
include it ("a dagger", "bloodshed"), so that one set of templates fits all of them. The module imports no
torch.
"""

import logging
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import regex

from trce_lightning.concepts.defaults import DEFAULT_COUNTERPART, DEFAULT_TEMPLATES, KINDS
from trce_lightning.concepts.fields import (
    check_aliases,
    check_phrases,
    check_references,
    check_templates,
    check_translations,
    check_wordings,
    field_values,
    read_mapping,
    text_tuple,
)
from trce_lightning.concepts.naming import contents_of, mentions, phrase_of, without_article, words_of
from trce_lightning.errors import InputError

__all__ = [
    "Concept",
    "PromptPair",
    "load_concept",
    "prompt_pairs",
]

_log = logging.getLogger(__name__)


class PromptPair(NamedTuple):
    """A malicious prompt, a prompt with something safe in the same context, and the words that differ."""

    malicious: str
    safe: str
    term: str
    """The words of ``malicious`` that ``safe`` replaces by the counterpart."""


@dataclass(frozen=True)
class Concept:
    """A concept to erase, and the safe counterparts that replace it.

    Args:
        name: letters, digits, ``_`` and ``-``. It names the run folder.
        terms: malicious term → safe counterpart that fits the same sentence. No counterpart may name a term.
        wordings: term → other words for it. The templates take the term and its wordings in turns.
        templates: sentences with exactly one ``{}`` each.
        neighbours: benign things that resemble the concept and must survive. They are scored apart.
        related: further phrases that name the concept. No prompt to keep contains one. On models other than
            the embedded one, the implicit prompts are made of them.
        aliases: other names of the terms, which contain no term and no wording. Stage 1 isn't given them.
        descriptions: phrases that describe the concept and don't mention it.
        translations: language code → names of the concept in that language.
        unrelated: phrases that contain words of the concept but mean something else, such as "bow tie".
        classes: names of ImageNet's and COCO's classes that show the concept, beside its terms.
        kind: ``subject``, or ``style`` for a way of drawing. A style's evaluation prompts name subjects.
        source: the origin of the list.

    Raises:
        InputError: one of these conditions does not hold.
    """

    name: str
    terms: Mapping[str, str]
    wordings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    templates: tuple[str, ...] = DEFAULT_TEMPLATES["subject"]
    neighbours: tuple[str, ...] = ()
    related: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    translations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unrelated: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    kind: str = "subject"
    source: str = ""

    def __post_init__(self) -> None:
        if not regex.fullmatch(r"\w[\w-]*", self.name):
            raise InputError(f"concept.name: expected letters, digits, '_' and '-', got {self.name!r}")
        option = f"concept.{self.name}"
        if self.kind not in KINDS:
            raise InputError(f"{option}.kind: expected {' or '.join(KINDS)}, got {self.kind!r}")
        check_references(option, asdict(self))
        check_phrases(f"{option}.terms", list(self.terms))
        for key in ("related", "descriptions", "unrelated", "classes"):
            check_phrases(f"{option}.{key}", getattr(self, key), may_be_empty=True)
        check_templates(f"{option}.templates", self.templates)
        check_wordings(f"{option}.wordings", self.wordings, self.terms)
        check_aliases(f"{option}.aliases", self.aliases, self.name_phrases)
        check_translations(f"{option}.translations", self.translations)
        for text in self.descriptions:
            if mentions(text, [self]):
                raise InputError(
                    f"{option}.descriptions: expected phrases that don't name the concept, got {text!r}"
                )
        for term, counterpart in self.terms.items():
            if not words_of(counterpart) or mentions(counterpart, [self]):
                raise InputError(
                    f"{option}.terms: expected a safe counterpart that names no erased term, "
                    f"got {counterpart!r} for {term!r}"
                )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> "Concept":
        """Build a concept from a parsed YAML file. Errors name ``source`` as the mapping's origin.

        If the mapping has no templates, the concept gets those of its kind.

        Raises:
            InputError: a key is unknown or missing, a type is wrong, or a condition of :class:`Concept` does
                not hold.
        """
        allowed = [entry.name for entry in fields(cls)]
        for key in mapping:
            if key not in allowed:
                raise InputError(f"{source}: expected only the keys {', '.join(allowed)}, got {key!r}")
        try:
            values = field_values(mapping)
            templates = DEFAULT_TEMPLATES.get(values.get("kind", "subject"), ())
            return cls(**{"templates": templates, **values})
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def from_terms(
        cls, words: Sequence[str], counterpart: str | None = None, kind: str = "subject"
    ) -> "Concept":
        """Build a concept from free words, with one ``counterpart`` for all and the kind's templates.

        If ``counterpart`` is None, the concept gets the kind's counterpart.

        The name is made of the words. A checksum replaces the part beyond 48 characters, and words without
        letters.

        Raises:
            InputError: there are no words, a word occurs twice, words name the counterpart itself, or the
                kind is unknown.
        """
        terms = [word.strip() for word in text_tuple("concept.terms", words)]
        check_phrases("concept.terms", terms)
        name = _name_of(terms)
        safe = DEFAULT_COUNTERPART.get(kind, "") if counterpart is None else counterpart
        templates = DEFAULT_TEMPLATES.get(kind, ())
        return cls(name, dict.fromkeys(terms, safe), templates=templates, kind=kind, source="free words")

    def pairs(self) -> list[PromptPair]:
        """Return all ``len(terms) * len(templates)`` pairs, ordered by term and then by template.

        A term and its wordings take turns.
        """
        return [
            PromptPair(template.replace("{}", name), template.replace("{}", counterpart), name)
            for term, counterpart in self.terms.items()
            for name, template in zip(cycle(self.names(term)), self.templates, strict=False)
        ]

    def names(self, term: str) -> tuple[str, ...]:
        """Return a term, followed by its wordings."""
        return (term, *self.wordings.get(term, ()))

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """Return every term with its wordings."""
        return tuple(name for term in self.terms for name in self.names(term))

    @cached_property
    def contents(self) -> frozenset[frozenset[str]]:
        """Return the malicious words of each term and wording: those that no safe counterpart has."""
        kept = frozenset[str]().union(*map(contents_of, self.terms.values()))
        return frozenset(contents_of(name) - kept for name in self.all_names) - {frozenset()}

    @cached_property
    def name_phrases(self) -> frozenset[str]:
        """Return terms and wordings in the form in which :func:`~.naming.shows` compares them."""
        return frozenset(map(phrase_of, self.all_names))

    @cached_property
    def class_phrases(self) -> frozenset[str]:
        """Return the classes in the form in which :func:`~.naming.shows` compares them."""
        return frozenset(map(phrase_of, self.classes))

    @cached_property
    def phrases(self) -> frozenset[str]:
        """Return terms, wordings and related phrases as :func:`~.naming.mentions` compares them."""
        return self.name_phrases.union(map(phrase_of, self.related))

    @cached_property
    def unrelated_phrases(self) -> frozenset[str]:
        """Return the unrelated phrases in the form in which :func:`~.naming.mentions` compares them."""
        return frozenset(map(phrase_of, self.unrelated))

    @cached_property
    def longest_phrase(self) -> int:
        """Return the number of words of the longest phrase, unrelated phrases included."""
        return max(len(phrase.split()) for phrase in self.phrases | self.unrelated_phrases)


def _name_of(terms: Sequence[str]) -> str:
    words = "_".join(without_article(term) for term in terms)
    # \w of the regex package matches letters with their combining marks. The standard library's does not.
    name = regex.sub(r"\W+", "_", unicodedata.normalize("NFC", words)).strip("_").lower()
    if 0 < len(name) <= 48:
        return name
    return f"{name[:39] or 'concept'}_{zlib.crc32((name or words).encode()):08x}"


def load_concept(path: str | Path) -> Concept:
    """Return the concept that a YAML file describes.

    Raises:
        InputError: the file cannot be read, is not YAML (the message names file and line), or does not
            describe a valid concept.
    """
    return Concept.from_mapping(read_mapping(path), source=str(path))


def prompt_pairs(concepts: Sequence[Concept]) -> dict[str, list[PromptPair]]:
    """Return the pairs of each concept by its name, for concepts that are erased together.

    If the safe prompt of a pair names any of the erased concepts, the pair is left out: it would keep what
    another pair erases.

    Raises:
        InputError: there are no concepts, two have one name, or one is left without pairs.
    """
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names):
        raise InputError(f"concept: expected one or more concepts of different names, got {names}")
    result: dict[str, list[PromptPair]] = {}
    for concept in concepts:
        pairs = concept.pairs()
        result[concept.name] = [pair for pair in pairs if not mentions(pair.safe, concepts)]
        if not result[concept.name]:
            raise InputError(
                f"concept.{concept.name}: expected safe prompts that name none of {names}, got none"
            )
        if dropped := len(pairs) - len(result[concept.name]):
            _log.warning(
                "%d of %d pairs of concept %s left out: their safe prompts name an erased concept",
                dropped,
                len(pairs),
                concept.name,
            )
    return result
