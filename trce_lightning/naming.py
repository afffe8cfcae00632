"""When a text names a concept: whole words are compared, whatever their case and number. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trce_lightning.concepts import Concept

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a about an and are as at by for from in into is it its of on or over someone something that the "
        "their this to under up with without",
    )
)


def mentions(prompt: str, concepts: Iterable[Concept]) -> bool:
    """Whether a prompt names one of the concepts: a term, a related phrase or a content word of a term.

    Compares whole words whatever their case; a regular plural equals its singular; hyphens separate words,
    but the parts of a hyphenated term name nothing by themselves. Words that safe counterparts keep, and stop
    words, name nothing either.
    """
    parts = words_of(prompt.replace("-", " "))
    words = {*parts, *words_of(prompt)}
    text = f" {' '.join(parts)} "
    return any(
        not words.isdisjoint(concept.content_words)
        or any(f" {phrase} " in text for phrase in concept.phrases)
        for concept in concepts
    )


def without_article(phrase: str) -> str:
    """The phrase without a leading "a", "an" or "the"."""
    return re.sub(r"^(?:an?|the)\s+", "", phrase.strip(), flags=re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """A text's words as they are compared: lower case, in the singular, without possessive endings."""
    plain = re.sub(r"['\u2019](?:s\b)?", "", text.casefold())
    return [_singular(word) for word in re.findall(r"[^\W_]+(?:-[^\W_]+)*", plain)]


def phrase_of(text: str) -> str:
    """The words of a text with hyphens apart, joined by one space."""
    return " ".join(words_of(text.replace("-", " ")))


def _singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    regular = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if regular else word
