"""A draft of a concept file: the request to a language model, and the parts of its replies that fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trce_lightning.concepts import Concept
from trce_lightning.concepts.defaults import DEFAULT_TEMPLATES
from trce_lightning.concepts.naming import contents_of, mentions
from trce_lightning.errors import InputError

__all__ = ["ALSO", "Draft", "Entry", "Reply", "Wanted", "parse"]

ALSO = {
    "wordings": "Give each term 2 to 4 wordings too: other words for it or hints at it.",
    "neighbours": "Under neighbours list 15 harmless things that look like the concept but are not it.",
    "related": "Under related list 30 further words that name the concept.",
}
_PHRASE = re.compile(r"(?=.*\w)[^\x00-\x1f{}$<>\[\]]{1,80}")


class Form(BaseModel):
    """A part of a reply; its schema goes to the model's server."""

    model_config = ConfigDict(str_strip_whitespace=True)


class Entry(Form):
    """A term as the model gives it."""

    term: str
    counterpart: str
    wordings: list[str] = []


class Reply(Form):
    """The answer that the model is asked for."""

    terms: list[Entry]
    neighbours: list[str] = []
    related: list[str] = []


@dataclass(frozen=True)
class Wanted:
    """The properties that the user wants the concept to have.

    Args:
        concept: the concept in free words.
        name: the concept's name. If it is empty, the name is made of the words.
        terms: the number of terms.
        templates: the number of templates, from the kind's own.
        also: any of "wordings", "neighbours" and "related".
        kind: ``subject``, or ``style`` for a way of drawing.

    Raises:
        InputError: a value is out of range.
    """

    concept: str
    name: str = ""
    terms: int = 20
    templates: int = len(DEFAULT_TEMPLATES["subject"])
    also: frozenset[str] = frozenset()
    kind: str = "subject"

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise InputError(f"--terms: expected at least 1, got {self.terms}")
        available = len(self.itself.templates)
        if not 1 <= self.templates <= available:
            raise InputError(f"--templates: expected 1 to {available}, got {self.templates}")
        if unknown := self.also - set(ALSO):
            raise InputError(f"--also: expected {', '.join(ALSO)}, got {sorted(unknown)}")

    @cached_property
    def itself(self) -> Concept:
        """Return the concept with its own words as its only term and all templates of its kind."""
        concept = Concept.from_terms([self.concept], counterpart="that", kind=self.kind)
        return replace(concept, name=self.name or concept.name)


class Draft:
    """A concept that grows with each reply. It takes the terms that fit, and says why others don't."""

    def __init__(self, wanted: Wanted, source: str) -> None:
        self._wanted, self._source = wanted, source
        self._concept: Concept | None = None
        self._wordings: list[tuple[str, str]] = []  # (term, wording)
        self._neighbours: list[str] = []
        self._related: list[str] = []

    @property
    def terms(self) -> list[str]:
        return list(self._concept.terms) if self._concept else []

    def take(self, text: str) -> list[str]:
        """Take a reply's terms until there are as many as wanted. Return why others were refused."""
        try:
            reply = parse(text)
        except InputError as error:
            return [str(error)]
        self._neighbours += reply.neighbours
        self._related += reply.related
        refused = [] if reply.terms else ["terms: expected at least one, got none"]
        listed = [entry.term for entry in reply.terms if _PHRASE.fullmatch(entry.term)]
        for entry in reply.terms:
            if len(self.terms) == self._wanted.terms:
                break
            try:
                self._concept = self._with(entry.term, entry.counterpart, listed)
                self._wordings += [(entry.term, wording) for wording in entry.wordings]
            except InputError as error:
                refused.append(str(error))
        return refused

    def finished(self) -> Concept:
        """Return the concept with its wordings, neighbours and related phrases, if wanted and if they fit."""
        assert self._concept is not None
        concept, also = self._concept, self._wanted.also
        for term, wording in self._wordings if "wordings" in also else ():
            names = (*concept.names(term)[1:], wording)
            concept = _with_phrase(concept, wording, {"wordings": {**concept.wordings, term: names}})
        for phrase in self._related if "related" in also else ():
            concept = _with_phrase(concept, phrase, {"related": (*concept.related, phrase)})
        neighbours = {
            phrase.casefold(): phrase
            for phrase in (self._neighbours if "neighbours" in also else ())
            if _PHRASE.fullmatch(phrase) and not (mentions(phrase, [concept]) or self._shares_a_word(phrase))
        }
        return replace(concept, neighbours=tuple(neighbours.values()))

    def _shares_a_word(self, phrase: str) -> bool:
        """Return whether a phrase has a word of the user's request."""
        return not contents_of(phrase).isdisjoint(contents_of(self._wanted.concept))

    def _with(self, term: str, counterpart: str, listed: Sequence[str]) -> Concept:
        """Return the concept with one more term. Raise ``InputError`` if the term doesn't fit.

        ``listed`` are all terms of the reply.
        """
        for phrase in (term, counterpart):
            if not _PHRASE.fullmatch(phrase):
                raise InputError(f"expected short plain phrases, got {phrase!r} in {term!r}: {counterpart!r}")
        if self._shares_a_word(counterpart) or any(_names(counterpart, name) for name in listed):
            raise InputError(
                f"expected a counterpart that names neither {self._wanted.concept!r} nor a term, got "
                f"{counterpart!r} for {term!r}"
            )
        itself = self._wanted.itself
        templates = itself.templates[: self._wanted.templates]
        concept = replace(itself, terms={term: counterpart}, templates=templates, source=self._source)
        if self._concept is None:
            return concept
        if concept.phrases & self._concept.phrases:
            raise InputError(f"expected different terms, got {term!r} again")
        if any(_names(safe, term) for safe in self._concept.terms.values()):
            raise InputError(f"expected a term that no counterpart names, got {term!r}")
        return replace(self._concept, terms={**self._concept.terms, term: counterpart})


def parse(text: str) -> Reply:
    """Return the content of a reply's JSON object.

    The object may stand in a code fence or after a reasoning model's thoughts.

    Raises:
        InputError: the reply has no JSON object, or one of another form.
    """
    shown = " ".join(text.split())[:100]
    found = re.search(r"\{.*\}", text.rpartition("</think>")[2], re.DOTALL)
    if not found:
        raise InputError(f"reply: expected a JSON object, got {shown!r}")
    try:
        return Reply.model_validate_json(found[0])
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "JSON"
        raise InputError(
            f"reply: expected a JSON object of the given form, got {shown!r} ({place}: {detail['msg']})"
        ) from error


def _with_phrase(concept: Concept, phrase: str, changes: Mapping[str, Any]) -> Concept:
    """Return the concept with ``changes``, which add a phrase. If it doesn't fit, return ``concept``."""
    try:
        new = Concept(concept.name, {phrase: "that"}).phrases.isdisjoint(concept.phrases)
        return replace(concept, **changes) if new and _PHRASE.fullmatch(phrase) else concept
    except InputError:  # a counterpart names the phrase
        return concept


def _names(counterpart: str, term: str) -> bool:
    try:
        Concept("pair", {term: counterpart})
    except InputError:
        return True
    return False
