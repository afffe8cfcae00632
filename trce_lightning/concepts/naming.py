"""The rule by which a text names a concept: whole words, whatever their case and number.

The module imports no torch.

Words are Unicode's (UAX 29). In scripts that put no spaces between words, and in Hangul, whose words carry
particles, each character is a word, so that a phrase is found wherever its characters stand together.
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
# Inside words for Unicode; here they separate them, as hyphens do.
_SEPARATORS = regex.compile(
    r"[\p{Dash}\p{WB=Single_Quote}\p{WB=MidLetter}\p{WB=MidNum}\p{WB=MidNumLet}\p{WB=ExtendNumLet}]"
)
_BOUNDARY = regex.compile(r"\b", regex.WORD | regex.VERSION1)
_HAS_WORD = regex.compile(r"\w|\p{Extended_Pictographic}")
_WITHOUT_SPACES = regex.compile(r"[\p{WB=Katakana}\p{Hangul}]")
_CHARACTER = regex.compile(r"\X")
_ELSEWHERE = "|"
"""In place of a phrase; no word is like it."""


def mentions(prompt: str, concepts: Iterable[Concept]) -> bool:
    """Return whether a prompt names one of the concepts.

    It does where it holds a term, a wording or a related phrase as a whole, or all that a term or wording has
    and no safe counterpart keeps, in any order. Case and number don't count; hyphens separate words. Words
    inside one of the concept's unrelated phrases name nothing, unless a longer phrase names it.
    """
    words = words_of(prompt)
    return any(_names(concept, words) for concept in concepts)


def shows(name: str, concepts: Iterable[Concept]) -> bool:
    """Return whether what a class name names shows one of the concepts.

    The name is one of the concept's classes, or holds a term or a wording as a whole.
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
    """Return ``words``, which are in lower case, with their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def words_of(text: str) -> list[str]:
    """Return a text's words as they are compared: lower case, in one number, without possessive endings."""
    return [_in_one_number(word) for word in _plain_words(text)]


def phrase_of(text: str) -> str:
    """Return the words of a text without a leading article, joined by one space."""
    return " ".join(words_of(without_article(text)))


def contents_of(text: str) -> frozenset[str]:
    """Return what a text has between spaces, each as its phrase, without stop words."""
    parts = [part for part in text.split() if not STOP_WORDS.issuperset(_plain_words(part))]
    return frozenset(map(phrase_of, parts))


def _names(concept: Concept, words: Sequence[str]) -> bool:
    phrases, rest = _phrases_and_rest(concept, words)
    text = f" {' '.join(rest)} "
    return bool(phrases) or any(all(f" {part} " in text for part in parts) for parts in concept.contents)


def _phrases_and_rest(concept: Concept, words: Sequence[str]) -> tuple[set[str], list[str]]:
    """Return the concept's phrases in ``words``, the longest from the left, and words outside of any."""
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
    """Return the longest phrase of the concept that ``words`` begin with, unrelated ones included."""
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
    from pluralizer import Pluralizer  # not at the top: the command line answers at once

    return Pluralizer()


@lru_cache(maxsize=100_000)
def _in_one_number(word: str) -> str:
    """Return the plural's plural: the library takes some plurals, as "safaris", for singulars."""
    singular = _pluralizer().singular(word)
    return _pluralizer().plural(_pluralizer().plural(singular))
