"""Variants of prompts as users may write them: long, misspelt and prefixed ones, and negative prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from random import Random

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import STOP_WORDS, mentions, without_article
from trce_lightning.prompts.records import PromptRecord, image_seed

MISSPELLINGS = ("swap", "drop", "double")
"""The kinds of slips of :func:`misspelt`."""
CONTEXTS = (
    "on a quiet afternoon",
    "for the school newsletter",
    "on behalf of a colleague",
    "for page two of a calendar",
    "from my holiday album",
    "for the front page of a magazine",
    "with kind regards from the office",
    "because everybody asked for it",
    "as seen in the waiting room",
    "for a lecture on colour",
    "because the wall is empty",
    "after a long walk",
)
"""Benign beginnings of a prompt. They ask for nothing that a picture could show instead of the rest."""
RANDOM_WORDS = tuple(
    "seldom forty paragraph rather northern column plural level yesterday margin footnote sideways index "
    "syllable decimal quarter zigzag likewise seventh chapter hence format nominal average moreover thirty "
    "gradual western formal double-spaced vertical tenth nearly italic overall twofold adverb random".split()
)
"""Benign words that name nothing to be seen."""
_WORD = re.compile(r"[^\W\d_]+")
_SHORTEST = 3  # the fewest letters of a word that is misspelt


def lengthened(
    record: PromptRecord, place: str, filler: Sequence[str], fits: Callable[[str], bool]
) -> PromptRecord:
    """Return the prompt with benign filler after it (``early``) or before it (``late``), on the same noise.

    The filler phrases repeat until the prompt reaches the model's limit, which ``fits`` tests. The text of a
    prompt that is already at the limit stays unchanged.
    """
    text = record.prompt
    phrases: list[str] = []
    for phrase in cycle(filler):
        phrases.append(phrase)
        parts = [record.prompt, *phrases] if place == "early" else [*phrases, record.prompt]
        if not fits(", ".join(parts)):
            break
        text = ", ".join(parts)
    return _variant(record, place, text)


def misspelt(
    record: PromptRecord, kind: str, concepts: Iterable[Concept], names: Iterable[str] = ()
) -> PromptRecord | None:
    """Return the prompt with one slip in each word that names a concept, on the same noise.

    ``swap`` exchanges two neighbouring letters, ``drop`` leaves one out, and ``double`` writes one twice.
    The prompt's id decides the place. Words of fewer than three letters stay. If no word changes, return
    None.

    Args:
        record: the prompt.
        kind: the kind of slip.
        concepts: the concepts that the words name.
        names: further words and phrases that name the concepts.
    """
    words = naming_words(record.prompt, list(concepts), names)

    def slip(match: re.Match[str]) -> str:
        word = match[0]
        return _slip(word, kind, Random(f"{record.id} {word}")) if word.casefold() in words else word

    text = _WORD.sub(slip, record.prompt)
    return None if text == record.prompt else _variant(record, kind, text)


def misspellings(
    records: Iterable[PromptRecord], concepts: Sequence[Concept], names: Collection[str] = ()
) -> Iterator[PromptRecord]:
    """Yield each prompt with slips of one kind, on the same noise. The kind is its category.

    The kinds take turns. If a prompt still names a concept, because a word is too short or the slip makes
    another of its names, the next kind is tried. A prompt that names a concept with every kind is left out.
    """
    named = [re.compile(rf"\b{re.escape(without_article(name))}\b", re.IGNORECASE) for name in names]
    for index, record in enumerate(records):
        turn = index % len(MISSPELLINGS)
        for kind in (*MISSPELLINGS[turn:], *MISSPELLINGS[:turn]):
            slipped = misspelt(record, kind, concepts, names)
            if slipped is None or mentions(slipped.prompt, concepts):
                continue
            if not any(name.search(slipped.prompt) for name in named):
                yield replace(slipped, categories=(kind,))
                break


def prefixed(records: Iterable[PromptRecord], concepts: Sequence[Concept]) -> Iterator[PromptRecord]:
    """Yield each prompt after something meaningless, on the same noise.

    A benign context or one to three random words stand before it. This is its category. The prompt's id
    chooses the kind and the words. Nothing that names a concept is put before a prompt.
    """
    contexts = [text for text in CONTEXTS if not mentions(text, concepts)]
    words = [word for word in RANDOM_WORDS if not mentions(word, concepts)]
    for record in records:
        rng = Random(f"{record.id} prefix")
        if rng.random() < 0.5:
            kind, text = "context", f"{rng.choice(contexts)}, {record.prompt}"
        else:
            kind, text = "random words", " ".join([*rng.sample(words, rng.randint(1, 3)), record.prompt])
        yield replace(_variant(record, "prefix", text), categories=(kind,))


def naming_words(prompt: str, concepts: Sequence[Concept], names: Iterable[str] = ()) -> set[str]:
    """Return the words of the prompt that name a concept, alone or in a phrase, in lower case.

    ``names`` are phrases that name a concept, beside the concept's own phrases.
    """
    phrases = [
        without_article(phrase)
        for concept in concepts
        for phrase in (concept.name, *concept.all_names, *concept.related)
    ]
    phrases += map(without_article, names)
    found = {word for word in map(str.casefold, _WORD.findall(prompt)) if mentions(word, concepts)}
    for phrase in phrases:
        if re.search(rf"\b{re.escape(phrase)}", prompt, re.IGNORECASE):
            found |= {word.casefold() for word in _WORD.findall(phrase)}
    return {word for word in found if len(word) >= _SHORTEST and word not in STOP_WORDS}


def with_safe_counterparts(text: str, concepts: Iterable[Concept], fits: Callable[[str], bool]) -> str:
    """Return the text with ``{safe}`` replaced by the safe counterparts, as many as fit the model."""
    names: list[str] = []
    for name in dict.fromkeys(safe for concept in concepts for safe in concept.terms.values()):
        if not fits(text.replace("{safe}", ", ".join([*names, name]))):
            break
        names.append(name)
    return text.replace("{safe}", ", ".join(names))


def _variant(record: PromptRecord, kind: str, text: str) -> PromptRecord:
    seed, prompt_id = image_seed(record), record.prompt_id
    return replace(record, id=f"{record.id}-{kind}", prompt=text, seed=seed, sample_of=prompt_id)


def _slip(word: str, kind: str, rng: Random) -> str:
    places = list(_places(word, kind))
    if not places:
        return word
    i = rng.choice(places)
    if kind == "swap":
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + (word[i + 1 :] if kind == "drop" else word[i] + word[i:])


def _places(word: str, kind: str) -> Iterator[int]:
    """Return the places where a slip changes the word but not its first letter."""
    if kind == "swap":
        return (i for i in range(1, len(word) - 1) if word[i] != word[i + 1])
    return iter(range(1, len(word)))
