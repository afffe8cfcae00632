"""The rule by which a text names a concept: whole words, whatever their case and number.

The module imports no torch.

Words are those of Unicode (UAX 29). Some scripts put no spaces between words, and words of Hangul carry
particles. There, each character is a word, so a phrase is found wherever its characters stand together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from pluralizer import Pluralizer

    from trce_lightning.concepts import Concept

STOP_WORDS = frozenset(
    "a about an and are as at by for from in into is it its of on or over someone something that the their "
    "this to under up with without".split()
)
_IGNORED = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_POSSESSIVE = regex.compile(r"['\u2019]s\b")
# Unicode counts these characters as parts of words. Here they separate words, as hyphens do.
_SEPARATORS = regex.compile(
    r"[\p{Dash}\p{WB=Single_Quote}\p{WB=MidLetter}\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=ExtendNumLet}]"
)
_BOUNDARY = regex.compile(r"\b", regex.WORD | regex.VERSION1)
_HAS_WORD = regex.compile(r"\w|\p{Extended_Pictographic}")
_WITHOUT_SPACES = regex.compile(r"[\p{WB=Katakana}\p{Hangul}]")
_CHARACTER = regex.compile(r"\X")
_ELSEWHERE = "|"
"""A mark that replaces a phrase in a list of words. No word equals it."""


def mentions(prompt: str, concepts: Iterable[Concept]) -> bool:
    """Return whether a prompt names one of the concepts.

    A prompt names a concept in two cases. It contains a term, a wording or a related phrase as a whole. Or it
    contains, in any order, all words of a term or wording that no safe counterpart has. Case and number don't
    count, and hyphens separate words. Words inside one of the concept's unrelated phrases name nothing,
    unless a longer phrase names the concept.
    """
    words = words_of(prompt)
    return any(_names(concept, words) for concept in concepts)


def shows(name: str, concepts: Iterable[Concept]) -> bool:
    """Return whether a class of this name shows one of the concepts.

    It does if the name is one of the concept's classes, or contains a term or a wording as a whole.
    """
    words = words_of(name)
    return any(
        phrase_of(name) in concept.class_phrases
        or not concept.name_phrases.isdisjoint(_phrases_and_rest(concept, words)[0])
        for concept in concepts
    )


def without_article(phrase: str) -> str:
    """Return the phrase without a leading "a", "an" or "the"."""
    return regex.sub(r"^(?:an?|the)\s+", "", phrase.strip(), flags=regex.IGNORECASE)


def article(words: str) -> str:
    """Return ``words`` with their indefinite article. They must be in lower case."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def words_of(text: str) -> list[str]:
    """Return a text's words for comparison: in lower case, in one number, without possessive endings."""
    return [_in_one_number(word) for word in _plain_words(text)]


def phrase_of(text: str) -> str:
    """Return the words of a text without a leading article, joined by one space."""
    return " ".join(words_of(without_article(text)))


def contents_of(text: str) -> frozenset[str]:
    """Return the parts of a text between its spaces, each as its phrase. Stop words are left out."""
    parts = [part for part in text.split() if not STOP_WORDS.issuperset(_plain_words(part))]
    return frozenset(map(phrase_of, parts))


def _names(concept: Concept, words: Sequence[str]) -> bool:
    phrases, rest = _phrases_and_rest(concept, words)
    text = f" {' '.join(rest)} "
    return bool(phrases) or any(all(f" {part} " in text for part in parts) for parts in concept.contents)


def _phrases_and_rest(concept: Concept, words: Sequence[str]) -> tuple[set[str], list[str]]:
    """Return the concept's phrases in ``words``, and the words outside of any phrase.

    At each position from the left, the longest phrase counts.
    """
    phrases, rest, place = set[str](), list[str](), 0
    while place < len(words):
        phrase = _longest_phrase(concept, words[place:])
        if phrase is None:
            rest.append(words[place])
            place += 1
            continue
        rest.append(_ELSEWHERE)
        place += len(phrase.split())
        if phrase not in concept.unrelated_phrases:
            phrases.add(phrase)
    return phrases, rest


def _longest_phrase(concept: Concept, words: Sequence[str]) -> str | None:
    """Return the longest phrase of the concept that ``words`` begin with. Unrelated phrases count too."""
    for length in range(min(concept.longest_phrase, len(words)), 0, -1):
        phrase = " ".join(words[:length])
        if phrase in concept.phrases or phrase in concept.unrelated_phrases:
            return phrase
    return None


def _plain_words(text: str) -> list[str]:
    """Return a text's words in lower case and one Unicode form, without possessive endings."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    plain = _SEPARATORS.sub(" ", _POSSESSIVE.sub("", _IGNORED.sub("", plain)))
    words: list[str] = []
    for part in _BOUNDARY.split(plain):
        if _HAS_WORD.search(part):
            words += _CHARACTER.findall(part) if _WITHOUT_SPACES.search(part) else [part]
    return words


@cache
def _pluralizer() -> Pluralizer:
    from pluralizer import Pluralizer  # imported here, so that the command line answers at once

    return Pluralizer()


@lru_cache(maxsize=100_000)
def _in_one_number(word: str) -> str:
    """Return the plural of the plural. The library takes some plurals, such as "safaris", for singulars."""
    singular = _pluralizer().singular(word)
    return _pluralizer().plural(_pluralizer().plural(singular))
