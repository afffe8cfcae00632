"""Concepts to erase: malicious terms, their safe counterparts, and the prompt pairs made of them.

A concept of 20 terms and 15 templates gives the 300 contextually similar prompt pairs that stage 1 of TRCE
(arXiv 2503.07389) needs. Terms and counterparts are whole noun phrases, with their article where English
wants one ("a dagger", "bloodshed"), so that one set of templates serves all of them. Imports no torch.
"""

import logging
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = [
    "DEFAULT_COUNTERPART",
    "DEFAULT_TEMPLATES",
    "KINDS",
    "STOP_WORDS",
    "Concept",
    "PromptPair",
    "load_concept",
    "mentions",
    "prompt_pairs",
    "without_article",
]

DEFAULT_COUNTERPART = "a flower"
KINDS = ("subject", "style")
DEFAULT_TEMPLATES = (
    "{}",
    "a picture of {}",
    "{} on a white background",
    "a 3d render of {} on red",
    "{} as a flat sticker",
    "a cartoon of {} on a blue background",
    "an icon of {}",
    "look at this: {}",
    "{} in front of green",
    "flat style, {}, black background",
    "{} in 3d style on a pink background",
    "please draw {} in cartoon style",
    "a drawing of {}, cartoon, orange background",
    "{} with a purple background",
    "{}, seen from the front, on yellow",
)
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about an and are as at by for from in into is it its of on or over someone something that the "
        "their this to under up with without",
    )
)
_log = logging.getLogger(__name__)


class PromptPair(NamedTuple):
    """A malicious prompt, the prompt that says something safe in the same context, and what it replaces."""

    malicious: str
    safe: str
    term: str
    """The words of ``malicious`` in whose place ``safe`` has the counterpart."""


@dataclass(frozen=True)
class Concept:
    """What to erase, and what to put in its place.

    Args:
        name: letters, digits, ``_`` and ``-``; names the run folder.
        terms: malicious term → safe counterpart that fits the same sentence. No counterpart may name a term.
        wordings: term → other words for it; the templates take them and the term in turns.
        templates: sentences with exactly one ``{}`` each.
        neighbours: benign things that resemble the concept and must survive; for reports.
        related: further phrases that name the concept; only :func:`mentions` reads them.
        kind: ``subject``, or ``style`` for a way of drawing, whose evaluation prompts have subjects.
        source: where the list comes from.

    Raises:
        ValueError: where one of these conditions does not hold.
    """

    name: str
    terms: Mapping[str, str]
    wordings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    neighbours: tuple[str, ...] = ()
    related: tuple[str, ...] = ()
    kind: str = "subject"
    source: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w-]*", self.name):
            raise ValueError(f"concept.name: expected letters, digits, '_' and '-', got {self.name!r}")
        option = f"concept.{self.name}"
        if self.kind not in KINDS:
            raise ValueError(f"{option}.kind: expected {' or '.join(KINDS)}, got {self.kind!r}")
        _check_phrases(f"{option}.terms", list(self.terms))
        _check_phrases(f"{option}.related", self.related, may_be_empty=True)
        _check_templates(f"{option}.templates", self.templates)
        _check_wordings(f"{option}.wordings", self.wordings, self.terms)
        for term, counterpart in self.terms.items():
            if not _words(counterpart) or mentions(counterpart, [self]):
                raise ValueError(
                    f"{option}.terms: expected a safe counterpart that names no erased term, "
                    f"got {counterpart!r} for {term!r}"
                )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> "Concept":
        """Builds a concept from a parsed YAML file; ``source`` says in errors where the mapping came from.

        Raises:
            ValueError: unknown or missing key, wrong type, or a condition of :class:`Concept` broken.
        """
        allowed = [entry.name for entry in fields(cls)]
        for key in mapping:
            if key not in allowed:
                raise ValueError(f"{source}: expected only the keys {', '.join(allowed)}, got {key!r}")
        try:
            values: dict[str, Any] = {
                "name": _text("concept.name", mapping.get("name")),
                "terms": _text_map("concept.terms", mapping.get("terms")),
            }
            if mapping.get("wordings"):
                values["wordings"] = _text_lists("concept.wordings", mapping["wordings"])
            for key in ("templates", "neighbours", "related"):
                if key in mapping:
                    values[key] = _text_tuple(f"concept.{key}", mapping[key])
            for key in ("kind", "source"):
                if mapping.get(key):
                    values[key] = _text(f"concept.{key}", mapping[key])
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_terms(cls, words: Sequence[str], counterpart: str = DEFAULT_COUNTERPART) -> "Concept":
        """Builds a concept from free words, with one ``counterpart`` for all and the default templates.

        The name is made of the words, with a checksum in place of what exceeds 48 characters.

        Raises:
            ValueError: no words, a word twice, or words that name the counterpart itself.
        """
        terms = [word.strip() for word in _text_tuple("concept.terms", words)]
        _check_phrases("concept.terms", terms)
        name = re.sub(r"\W+", "_", "_".join(without_article(term) for term in terms)).strip("_").lower()
        if len(name) > 48:
            name = f"{name[:39]}_{zlib.crc32(name.encode()):08x}"
        return cls(name=name, terms=dict.fromkeys(terms, counterpart), source="free words")

    def pairs(self) -> list[PromptPair]:
        """All ``len(terms) * len(templates)`` pairs, terms outermost; a term's wordings take turns."""
        return [
            PromptPair(template.replace("{}", name), template.replace("{}", counterpart), name)
            for term, counterpart in self.terms.items()
            for name, template in zip(cycle(self.names(term)), self.templates, strict=False)
        ]

    def names(self, term: str) -> tuple[str, ...]:
        """A term, then its wordings."""
        return (term, *self.wordings.get(term, ()))

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """Every term with its wordings."""
        return tuple(name for term in self.terms for name in self.names(term))

    @cached_property
    def content_words(self) -> frozenset[str]:
        """The words that make terms and wordings malicious: those of them that no safe counterpart keeps."""
        kept = {word for counterpart in self.terms.values() for word in _words(counterpart)}
        return frozenset(word for name in self.all_names for word in _words(name)) - kept - STOP_WORDS

    @cached_property
    def phrases(self) -> frozenset[str]:
        """Terms, wordings and related phrases as :func:`mentions` compares them."""
        return frozenset(_phrase(without_article(text)) for text in (*self.all_names, *self.related))


def load_concept(path: str | Path) -> Concept:
    """Reads a concept's YAML file.

    Raises:
        ValueError: the file cannot be read, is no YAML (the message has file and line), or no valid concept.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True, throw_on_missing=True)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: expected well-formed YAML, got: {error.problem}") from error
    except (OSError, UnicodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: expected a readable concept file in UTF-8, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a map with the keys name and terms, got a {type(content).__name__}"
        )
    return Concept.from_mapping({str(key): value for key, value in content.items()}, source=str(path))


def mentions(prompt: str, concepts: Iterable[Concept]) -> bool:
    """Whether a prompt names one of the concepts: a term, a related phrase or a content word of a term.

    Compares whole words whatever their case; a regular plural equals its singular; hyphens separate words,
    but the parts of a hyphenated term name nothing by themselves. Words that safe counterparts keep, and stop
    words, name nothing either.
    """
    parts = _words(prompt.replace("-", " "))
    words = {*parts, *_words(prompt)}
    text = f" {' '.join(parts)} "
    return any(
        not words.isdisjoint(concept.content_words)
        or any(f" {phrase} " in text for phrase in concept.phrases)
        for concept in concepts
    )


def prompt_pairs(concepts: Sequence[Concept]) -> dict[str, list[PromptPair]]:
    """The pairs of each concept when all are erased together, by concept name.

    Pairs whose safe side names any of the erased concepts are left out: they would keep what another erases.

    Raises:
        ValueError: no concept, two of one name, or a concept that is left without pairs.
    """
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"concept: expected one or more concepts of different names, got {names}")
    result: dict[str, list[PromptPair]] = {}
    for concept in concepts:
        pairs = concept.pairs()
        result[concept.name] = [pair for pair in pairs if not mentions(pair.safe, concepts)]
        if not result[concept.name]:
            raise ValueError(
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


def without_article(phrase: str) -> str:
    """The phrase without a leading "a", "an" or "the"."""
    return re.sub(r"^(?:an?|the)\s+", "", phrase.strip(), flags=re.IGNORECASE)


def _words(text: str) -> list[str]:
    plain = re.sub(r"['\u2019](?:s\b)?", "", text.casefold())
    return [_singular(word) for word in re.findall(r"[^\W_]+(?:-[^\W_]+)*", plain)]


def _singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    regular = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if regular else word


def _phrase(text: str) -> str:
    return " ".join(_words(text.replace("-", " ")))


def _check_phrases(option: str, phrases: Sequence[str], may_be_empty: bool = False) -> None:
    if not phrases and not may_be_empty:
        raise ValueError(f"{option}: expected at least one term, got none")
    seen: set[str] = set()
    for phrase in phrases:
        if not _words(phrase) or phrase.casefold() in seen:
            raise ValueError(f"{option}: expected different terms with words in them, got {phrase!r}")
        seen.add(phrase.casefold())


def _check_templates(option: str, templates: Sequence[str]) -> None:
    if not templates or len(set(templates)) < len(templates):
        raise ValueError(f"{option}: expected one or more templates, each once, got {list(templates)}")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{option}: expected exactly one {{}} in a template, got {template!r}")


def _check_wordings(option: str, wordings: Mapping[str, Sequence[str]], terms: Mapping[str, str]) -> None:
    for term, names in wordings.items():
        if term not in terms:
            raise ValueError(f"{option}: expected keys that are terms of the concept, got {term!r}")
        _check_phrases(f"{option}: {term}", [term, *names])


def _text(option: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{option}: expected a text (in YAML, quote words like no and 3), got {value!r}")
    return value


def _text_tuple(option: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{option}: expected a list of texts, got {value!r}")
    return tuple(_text(option, item) for item in value)


def _text_map(option: str, value: object) -> dict[str, str]:
    rows = _mapping(option, value, "from malicious term to safe counterpart")
    return {_text(option, term): _text(f"{option}: {term}", safe) for term, safe in rows.items()}


def _text_lists(option: str, value: object) -> dict[str, tuple[str, ...]]:
    rows = _mapping(option, value, "from term to a list of wordings")
    return {_text(option, term): _text_tuple(f"{option}: {term}", names) for term, names in rows.items()}


def _mapping(option: str, value: object, kind: str) -> Mapping[Any, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{option}: expected a map {kind}, got {value!r}")
    return value
