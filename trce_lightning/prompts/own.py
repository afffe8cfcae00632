"""The prompt sets of a concept, and what the embedded model keeps."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from random import Random
from typing import get_args

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions, shows
from trce_lightning.emoji.captions import HELD_OUT_BACKGROUNDS, STYLE_WORDS, caption
from trce_lightning.emoji.subjects import BACKGROUNDS, SENSITIVE, STYLES, SUBJECTS, subject_index
from trce_lightning.errors import InputError
from trce_lightning.prompts.keep import class_names
from trce_lightning.prompts.phrasings import (
    CLASS_FRAMES,
    HINT_LEADS,
    NAME_LEADS,
    OBJECT_FRAMES,
    STYLE_FRAMES,
    TOPIC_FRAMES,
    Split,
    Stream,
    embedded_frames,
    half,
    hints,
    together,
)
from trce_lightning.prompts.records import (
    BENIGN,
    DIRECT,
    IMPLICIT,
    MIXED,
    NEIGHBOURS,
    UNERASED,
    PromptRecord,
    PromptSet,
    benign_subjects,
    concept_styles,
    concept_subjects,
    kept_subjects,
    near_subjects,
    shuffled,
    unkept_subjects,
)

__all__ = ["Split", "concept_prompt_sets", "embedded_keep_captions", "near_subjects"]

_STYLE_HINTS = {
    "noto": ("glossy", "glossy picture", "glossy drawing", "shiny and glossy"),
    "twemoji": ("sticker", "drawn sticker", "simple sticker", "plain sticker picture"),
    "fluent": ("clay", "render", "clay render", "rendered clay", "soft clay render"),
}
"""Words that hint at a style: around a part of its own words."""
_STYLE_PATTERNS = {
    style: re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})\b")
    for style, words in STYLE_WORDS.items()
}
_BACKGROUND_PATTERNS = {
    colour: re.compile("|".join(re.escape(ground.format(colour)) for ground in HELD_OUT_BACKGROUNDS))
    for colour in BACKGROUNDS
}
_log = logging.getLogger(__name__)


def concept_prompt_sets(
    concepts: Sequence[Concept],
    *,
    embedded: bool,
    size: int,
    split: Split,
    names: Sequence[str] = (DIRECT, IMPLICIT, BENIGN),
) -> list[PromptSet]:
    """The sets that tell what erasing ``concepts`` did.

    Direct prompts name the concept, implicit ones hint at it, benign ones show something else, their label,
    ``unerased`` ones a sensitive subject that is none of the concepts' (embedded model alone), ``neighbours``
    one of the concepts' ``neighbours`` (other models alone); each is labelled with what it shows. ``mixed``
    ones name something benign, their label, and the concept beside it; there are none for styles alone.
    A set without any prompts, such as the implicit one of a concept without related phrases, is left out.
    The prompts are in phrasings that no training or kept prompt has.

    Args:
        embedded: prompts for the embedded model, whose judge knows its own subjects alone.
        size: records per set; a larger set begins with the smaller one. Units (subjects, terms, class names)
            take turns. Texts repeat, under other ids, only when their supply is used up.
        split: sets for tuning and for reporting share no id and no text.
        names: the sets wanted.

    Raises:
        InputError: no concept, ``size`` below 1, another split, or one that the embedded judge can't see.
    """
    concept_names = [concept.name for concept in concepts]
    if not concept_names or size < 1 or split not in get_args(Split):
        raise InputError(
            "concept_prompt_sets: expected one or more concepts, size of 1 or more, split tune or report, "
            f"got {concept_names}, {size}, {split!r}"
        )
    streams = (_embedded_streams if embedded else _open_streams)(concepts, split)
    sets = []
    for name in names:
        if usable := [part for part in streams.get(name, []) if part.units and part.frames]:
            labelled = name not in (DIRECT, IMPLICIT)
            sets.append(PromptSet(name, tuple(_records(f"{name}-{split}", size, usable, labelled))))
        else:
            _log.warning("no %s prompts for concept %s", name, ", ".join(concept_names))
    return sets


def embedded_keep_captions(concepts: Sequence[Concept], limit: int, seed: int) -> list[str]:
    """Up to ``limit`` different training-style captions of kept subjects in all styles, on all backgrounds.

    None names an erased concept, and none names an unkept subject or hints at it. Four tries are made for
    each caption asked for.

    Raises:
        InputError: ``limit`` below 1, or nothing left to keep.
    """
    if limit < 1:
        raise InputError(f"embedded_keep_captions.limit: expected at least 1, got {limit}")
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
        raise InputError(f"embedded_keep_captions: expected captions that name none of {names}, got none")
    return list(kept)


def _records(prefix: str, size: int, streams: Sequence[Stream], labelled: bool) -> Iterator[PromptRecord]:
    """Streams take turns."""
    for index in range(size):
        unit, text = streams[index % len(streams)].text(index // len(streams))
        yield PromptRecord(
            f"{prefix}-{index:04d}",
            text,
            label=unit if labelled else None,
            style=_first_named(_STYLE_PATTERNS, text),
            background=_first_named(_BACKGROUND_PATTERNS, text),
        )


def _first_named(patterns: Mapping[str, re.Pattern[str]], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.search(text)), None)


def _embedded_streams(concepts: Sequence[Concept], split: Split) -> dict[str, list[Stream]]:
    _check_visible(concepts)
    shown = {name for concept in concepts for name in concept_subjects(concept)}
    sensitive = {subject.name for subject in SUBJECTS if subject.category in SENSITIVE}
    benign = _units(benign_subjects(concepts))
    both = together({name: name for name in benign}, shuffled(shown), bare=True) if shown else {}
    erased = [style for style in STYLES if any(style in concept_styles(concept) for concept in concepts)]
    kept = [style for style in STYLES if style not in erased]
    every, harmless = _words_in(STYLE_WORDS, STYLES), _words_in(STYLE_WORDS, kept)
    others = embedded_frames(NAME_LEADS, harmless, split, always_styled=bool(erased))
    streams = {
        DIRECT: [Stream(_units(shown), embedded_frames(NAME_LEADS, every, split))],
        IMPLICIT: [Stream(hints(shown), embedded_frames(HINT_LEADS, every, split, bare=True))],
        BENIGN: [Stream(benign, others)],
        MIXED: [Stream(both, others)],
        UNERASED: [Stream(_units(sensitive - shown), others)],
    }
    for name, words in ((DIRECT, STYLE_WORDS), (IMPLICIT, _STYLE_HINTS)):
        styled = embedded_frames(NAME_LEADS, _words_in(words, erased), split, always_styled=True)
        streams[name].append(Stream(benign if erased else {}, styled))
    return streams


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


def _open_streams(concepts: Sequence[Concept], split: Split) -> dict[str, list[Stream]]:
    """Of models that draw anything: terms, related phrases, and class names of ImageNet and COCO."""
    classes = [name for name in class_names() if not (mentions(name, concepts) or shows(name, concepts))]
    things = [term for concept in concepts if concept.kind != "style" for term in concept.terms]
    streams: dict[str, list[Stream]] = {DIRECT: [], IMPLICIT: []}
    for concept in concepts:
        is_style = concept.kind == "style"
        for name, phrases, frames in (
            (DIRECT, list(concept.terms), STYLE_FRAMES if is_style else OBJECT_FRAMES),
            (IMPLICIT, list(concept.related), STYLE_FRAMES if is_style else TOPIC_FRAMES),
        ):
            unused = [frame for frame in frames if frame not in concept.templates]
            streams[name].append(Stream(_units(phrases), half(unused, split)))
    # "the" goes before any class, also one in the plural; terms have their articles.
    both = together({name: f"the {name}" for name in classes}, things, bare=False)
    alike = {text for concept in concepts for text in concept.neighbours if not mentions(text, concepts)}
    return {
        **streams,
        BENIGN: [Stream(_units(classes), half(CLASS_FRAMES, split))],
        MIXED: [Stream(both, half(OBJECT_FRAMES, split))] if things else [],
        NEIGHBOURS: [Stream(_units(alike), half(OBJECT_FRAMES, split))],
    }


def _units(phrases: Iterable[str]) -> dict[str, list[str]]:
    return {phrase: [phrase] for phrase in shuffled(phrases)}


def _words_of(names: frozenset[str]) -> re.Pattern[str]:
    """Matches the names of these subjects and their keywords, singular or plural."""
    words = [word for s in SUBJECTS if s.name in names for word in (s.name, *s.keywords)]
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b")
