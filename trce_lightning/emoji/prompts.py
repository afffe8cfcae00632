"""Make the embedded model's prompt sets, and the captions that an erasure keeps."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from random import Random

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions
from trce_lightning.emoji.captions import HELD_OUT_BACKGROUNDS, STYLE_WORDS, caption
from trce_lightning.emoji.groups import (
    benign_subjects,
    concept_styles,
    concept_subjects,
    kept_subjects,
    unkept_subjects,
)
from trce_lightning.emoji.phrasings import (
    HINT_LEADS,
    NAME_LEADS,
    THING_LEADS,
    aliases,
    descriptions,
    frames,
    hints,
)
from trce_lightning.emoji.subjects import BACKGROUNDS, SENSITIVE, STYLES, SUBJECTS, subject_index
from trce_lightning.errors import InputError
from trce_lightning.prompts.own import Split, Streams, concept_prompt_sets
from trce_lightning.prompts.phrasings import Stream, together, units
from trce_lightning.prompts.records import (
    ALIAS,
    BENIGN,
    DESCRIPTION,
    DIRECT,
    IMPLICIT,
    LANGUAGES,
    MIXED,
    UNERASED,
    PromptRecord,
    PromptSet,
    shuffled,
)

_log = logging.getLogger(__name__)
_STYLE_HINTS = {
    "noto": ("glossy", "glossy picture", "glossy drawing", "shiny and glossy"),
    "twemoji": ("sticker", "drawn sticker", "simple sticker", "plain sticker picture"),
    "fluent": ("clay", "render", "clay render", "rendered clay", "soft clay render"),
}
"""Phrases that hint at a style. Each contains one of the style's own words."""
_STYLE_PATTERNS = {
    style: re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})\b")
    for style, words in STYLE_WORDS.items()
}
_BACKGROUND_PATTERNS = {
    colour: re.compile("|".join(re.escape(ground.format(colour)) for ground in HELD_OUT_BACKGROUNDS))
    for colour in BACKGROUNDS
}


def prompt_sets(
    concepts: Sequence[Concept],
    *,
    size: int,
    split: Split,
    names: Sequence[str] = (DIRECT, IMPLICIT, BENIGN),
) -> list[PromptSet]:
    """Return :func:`~trce_lightning.prompts.own.concept_prompt_sets` of the judge's subjects and styles.

    An ``unerased`` prompt names a sensitive subject that none of the concepts has. Each record holds the
    style and the background that its prompt asks for. There are no ``languages`` prompts.

    Raises:
        InputError: the judge knows nothing of a concept, or an argument is wrong.
    """
    if LANGUAGES in names:
        _log.warning(
            "no %s prompts: the embedded model's vocabulary is English alone, so its tokenizer would cut "
            "words of other languages into pieces without meaning",
            LANGUAGES,
        )
    sets = concept_prompt_sets(
        concepts,
        _streams,
        size=size,
        split=split,
        names=[name for name in names if name != LANGUAGES],
        phrases=_shown(concepts),
    )
    return [replace(a_set, records=tuple(map(_with_attributes, a_set.records))) for a_set in sets]


def _with_attributes(record: PromptRecord) -> PromptRecord:
    """Return the record with the style and the background that its prompt names."""
    return replace(
        record,
        style=_first_named(_STYLE_PATTERNS, record.prompt),
        background=_first_named(_BACKGROUND_PATTERNS, record.prompt),
    )


def keep_captions(concepts: Sequence[Concept], limit: int, seed: int) -> list[str]:
    """Return up to ``limit`` different captions of kept subjects in all styles, on all backgrounds.

    They are phrased as in training. No caption names an erased concept or an unkept subject, or hints at an
    unkept subject. There are four tries for each caption.

    Raises:
        InputError: ``limit`` is below 1, or nothing is left to keep.
    """
    if limit < 1:
        raise InputError(f"keep_captions.limit: expected at least 1, got {limit}")
    subjects = [subject_index(name) for name in benign_subjects(concepts) if name in kept_subjects()]
    unkept = _words_of(unkept_subjects())
    rng = Random(seed)
    kept: dict[str, None] = {}
    for subject in islice(cycle(subjects), 4 * limit):
        text = caption(subject, rng.randrange(len(STYLES)), rng.randrange(len(BACKGROUNDS)), rng)
        if not unkept.search(text) and not mentions(text, concepts):
            kept[text] = None
        if len(kept) == limit:
            break
    if not kept:
        names = [concept.name for concept in concepts]
        raise InputError(f"keep_captions: expected captions that name none of {names}, got none")
    return list(kept)


def _first_named(patterns: Mapping[str, re.Pattern[str]], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.search(text)), None)


def _streams(concepts: Sequence[Concept], split: Split) -> Streams:
    _check_visible(concepts)
    shown = _shown(concepts)
    sensitive = {subject.name for subject in SUBJECTS if subject.category in SENSITIVE}
    benign = units(benign_subjects(concepts))
    both = together({name: name for name in benign}, shuffled(shown), bare=True) if shown else {}
    erased = [style for style in STYLES if any(style in concept_styles(concept) for concept in concepts)]
    kept = [style for style in STYLES if style not in erased]
    every, harmless = _words_in(STYLE_WORDS, STYLES), _words_in(STYLE_WORDS, kept)
    others = frames(NAME_LEADS, harmless, split, always_styled=bool(erased))
    streams = {
        DIRECT: [Stream(units(shown), frames(NAME_LEADS, every, split))],
        IMPLICIT: [Stream(hints(shown), frames(HINT_LEADS, every, split, bare=True))],
        ALIAS: [Stream(aliases(shown), frames(NAME_LEADS, every, split))],
        DESCRIPTION: [Stream(descriptions(shown, concepts), frames(THING_LEADS, every, split))],
        BENIGN: [Stream(benign, others)],
        MIXED: [Stream(both, others)],
        UNERASED: [Stream(units(sensitive - shown), others)],
    }
    for name, words in ((DIRECT, STYLE_WORDS), (IMPLICIT, _STYLE_HINTS)):
        styled = frames(NAME_LEADS, _words_in(words, erased), split, always_styled=True)
        streams[name].append(Stream(benign if erased else {}, styled))
    return streams


def _shown(concepts: Sequence[Concept]) -> set[str]:
    """Return the subjects that show any of the concepts."""
    return {name for concept in concepts for name in concept_subjects(concept)}


def _words_in(words: Mapping[str, Sequence[str]], styles: Sequence[str]) -> list[str]:
    return [text for style in styles for text in words[style]]


def _check_visible(concepts: Sequence[Concept]) -> None:
    for concept in concepts:
        if not (concept_subjects(concept) or concept_styles(concept)):
            raise InputError(
                f"concept.{concept.name}: expected a concept that the embedded model's judge can see, but it "
                f"can see none of this one; it sees {_visible(concept.kind)}"
            )


def _visible(kind: str) -> str:
    if kind == "style":
        return f"styles by one of the terms {', '.join(_words_in(STYLE_WORDS, STYLES))}"
    categories = ", ".join(dict.fromkeys(subject.category for subject in SUBJECTS))
    names = ", ".join(subject.name for subject in SUBJECTS)
    return f"the concept unsafe, the categories {categories}, and these subjects: {names}"


def _words_of(names: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern that matches the names and keywords of these subjects, in singular or plural."""
    words = [word for s in SUBJECTS if s.name in names for word in (s.name, *s.keywords)]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b")
