"""Make the embedded model's prompt sets, and the captions that an erasure keeps."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from random import Random

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions
from trce_lightning.emoji.captions import (
    HELD_OUT_BACKGROUNDS,
    STYLE_WORDS,
    caption,
    is_held_out_pair,
    scene_caption,
    scene_template,
)
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
from trce_lightning.prompts.phrasings import Stream, together, units, with_article
from trce_lightning.prompts.records import (
    ALIAS,
    BENIGN,
    DESCRIPTION,
    DIRECT,
    IMPLICIT,
    LANGUAGES,
    MIXED,
    SCENES,
    UNERASED,
    PromptRecord,
    PromptSet,
    shuffled,
)

_SCENE_PHRASES = (
    "{0} and {1}",
    "{0} on the left and {1} on the right",
    "{1} on the right and {0} on the left",
)
"""The phrases that name the subjects on the left and on the right of a scene, as training captions do."""
_PARTNERS = 5
"""The number of partners of each subject in scenes, on each side."""
_ON_THE_RIGHT = " on the right"
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
_SUBJECT_NAMES = re.compile(
    rf"\b(?:{'|'.join(sorted((re.escape(subject.name) for subject in SUBJECTS), key=len, reverse=True))})\b"
)
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

    An ``unerased`` prompt names a sensitive subject that none of the concepts has, and a ``scenes`` prompt
    two benign subjects. Each record holds the style, the background and the benign subjects by side that its
    prompt asks for. There are no ``languages`` prompts.

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
    benign = frozenset(benign_subjects(concepts))
    return [
        replace(a_set, records=tuple(_with_attributes(record, benign) for record in a_set.records))
        for a_set in sets
    ]


def _with_attributes(record: PromptRecord, benign: frozenset[str]) -> PromptRecord:
    """Return the record with the style, the background and the sides of benign subjects that it names."""
    left, right = _sides(record.prompt)
    return replace(
        record,
        left=left if left in benign else None,
        right=right if right in benign else None,
        style=_first_named(_STYLE_PATTERNS, record.prompt),
        background=_first_named(_BACKGROUND_PATTERNS, record.prompt),
    )


def _sides(prompt: str) -> tuple[str | None, str | None]:
    """Return the subjects on the left and on the right of a scene, or None twice for one subject.

    Captions name the subject on the left first, unless they say that the first one is on the right.
    """
    found = list(_SUBJECT_NAMES.finditer(prompt))
    if len(found) != len(("left", "right")):
        return None, None
    first, second = (match[0] for match in found)
    reverse = prompt[found[0].end() :].startswith(_ON_THE_RIGHT)
    return (second, first) if reverse else (first, second)


def _scenes(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the phrases of scenes of two different subjects by the name of one of them.

    The subject is on the left and on the right in turn, each time beside another one.
    """
    phrases: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        others = [names[(index + step) % len(names)] for step in range(1, 2 * _PARTNERS + 1)]
        pairs = [(name, other) if turn % 2 else (other, name) for turn, other in enumerate(others)]
        phrases[name] = [
            _SCENE_PHRASES[turn % len(_SCENE_PHRASES)].format(*_with_second_article(turn, pair))
            for turn, pair in enumerate(pairs)
        ]
    return phrases


def _with_second_article(turn: int, pair: tuple[str, str]) -> tuple[str, str]:
    """Return a pair whose subject that is named second has its article. The frame gives the first one."""
    left, right = pair
    reverse = turn % len(_SCENE_PHRASES) == len(_SCENE_PHRASES) - 1
    return (with_article(left), right) if reverse else (left, with_article(right))


def keep_captions(concepts: Sequence[Concept], limit: int, seed: int, *, scenes: bool = False) -> list[str]:
    """Return up to ``limit`` different captions of kept subjects in all styles, on all backgrounds.

    They are phrased as in training. No caption names an erased concept or an unkept subject, or hints at an
    unkept subject. There are four tries for each caption. With ``scenes``, every second one names two
    subjects, a pair that training has shown, if the first of them has such a partner.

    Raises:
        InputError: ``limit`` is below 1, or nothing is left to keep.
    """
    if limit < 1:
        raise InputError(f"keep_captions.limit: expected at least 1, got {limit}")
    subjects = [subject_index(name) for name in benign_subjects(concepts) if name in kept_subjects()]
    unkept = _words_of(unkept_subjects())
    rng = Random(seed)
    kept: dict[str, None] = {}
    for turn, subject in enumerate(islice(cycle(subjects), 4 * limit)):
        look = rng.randrange(len(STYLES)), rng.randrange(len(BACKGROUNDS))
        # Each subject takes turns, alone and on the left of a scene.
        round_, place = divmod(turn, len(subjects))
        partners = [other for other in subjects if _shown_together(subject, other)] if scenes else []
        if partners and (round_ + place) % 2:
            text = scene_caption(subject, rng.choice(partners), *look, rng)
        else:
            text = caption(subject, *look, rng)
        if not unkept.search(text) and not mentions(text, concepts):
            kept[text] = None
        if len(kept) == limit:
            break
    if not kept:
        names = [concept.name for concept in concepts]
        raise InputError(f"keep_captions: expected captions that name none of {names}, got none")
    return list(kept)


def scene_templates(concepts: Sequence[Concept], count: int, seed: int) -> list[str]:
    """Return up to ``count`` different sentences with ``{}`` beside a kept subject, in the looks to keep.

    Subjects take turns in a random order, and change their side from one round to the next. No sentence names
    a concept, such as a style. There are four tries for each sentence.

    Raises:
        InputError: no subject is left to keep.
    """
    rng = Random(seed)
    kept = [name for name in benign_subjects(concepts) if name in kept_subjects()]
    subjects = [subject_index(name) for name in kept if not mentions(name, concepts)]
    if count and not subjects:
        raise InputError(
            "option 'scene_templates': expected 0 where no subject to keep is left beside the concepts, got "
            f"{count}"
        )
    rng.shuffle(subjects)
    templates: dict[str, None] = {}
    for turn in range(4 * count):
        round_, place = divmod(turn, len(subjects))
        look = rng.randrange(len(STYLES)), rng.randrange(len(BACKGROUNDS))
        text = scene_template(subjects[place], (round_ + place) % 2 == 1, *look, rng)
        if not mentions(text, concepts):
            templates[text] = None
        if len(templates) == count:
            break
    return list(templates)


def _shown_together(left: int, right: int) -> bool:
    return left != right and not is_held_out_pair(left, right)


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
        SCENES: [Stream(_scenes(list(benign)), others)],
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
