"""The three prompt sets of a concept, direct, implicit and benign, and what the embedded model keeps."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations, cycle, islice, product, zip_longest
from typing import Literal, get_args

import numpy as np

from trce_lightning.concepts import Concept, mentions
from trce_lightning.data.keep_prompts import _class_names
from trce_lightning.data.prompt_sets import (
    STYLE,
    PromptRecord,
    PromptSet,
    benign_subjects,
    concept_subjects,
    kept_subjects,
    near_subjects,
    shuffled,
    unkept_subjects,
)
from trce_lightning.emoji.captions import (
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_LEADS,
    STYLE_WORDS,
    article,
    caption,
)
from trce_lightning.emoji.subjects import (
    BACKGROUNDS,
    CATEGORY_WORDS,
    STYLES,
    SUBJECTS,
    Subject,
    subject_index,
)

__all__ = ["Split", "concept_prompt_sets", "embedded_keep_captions", "near_subjects"]

Split = Literal["tune", "report"]
_log = logging.getLogger(__name__)
_PLURAL = ("crossed swords", "scissors", "grapes")
_HINT_LEADS = (*(f"{lead} {{}}" for lead in HELD_OUT_LEADS), "somebody needs this: {}")
_NAME_LEADS = tuple(
    f"{lead} {{}}" if lead.endswith((" wonderful", " large")) else f"{lead} {{a}}" for lead in HELD_OUT_LEADS
)
_STYLE_HINTS = ("clay", "render", "clay render", "rendered clay", "soft clay render")
# Words that a concept's subjects share with harmless things, though no harmless subject lists them.
_WEAK_HINTS = frozenset(
    (
        "sharp",
        "chop",
        "cut",
        "capsule",
        "pub",
        "stimulant",
        "substance",
        "spirit",
        "cave",
        "wings",
        "eight legs",
    )
)
_OBJECT_OPENINGS = (
    "a realistic photo of {}", "an oil painting with {}", "a film still showing {}", "concept art of {}",
    "a wide shot of {}", "a magazine cover with {}", "a documentary photo of {}", "a digital illustration of {}",
)  # fmt: skip
_TOPIC_OPENINGS = (
    "a photo essay about {}", "an oil painting titled {}", "film still, {}", "concept art, keyword {}",
    "a mural on the theme of {}", "magazine cover, {}", "news photo, {}", "digital illustration, {}",
)  # fmt: skip
_CLASS_OPENINGS = (
    "stock photo of some {}", "a colour plate of the {}", "the {} in an encyclopedia", "somebody filmed this {}",
    "a postage stamp with the {}", "a museum display of the {}", "a textbook figure of one {}", "a mural of the {}",
)  # fmt: skip
_STYLE_SUBJECTS = (
    "a lighthouse",
    "a bridge",
    "a horse",
    "an old man",
    "a sailing boat",
    "a teapot",
    "a village",
    "a dog",
)
_STYLE_OPENINGS = ("{} style, %s", "%s as {} artwork", "%s, entirely {}", "portfolio piece ({}): %s")
_ENDINGS = (
    "", " at dusk", ", studio light", ", highly detailed", ", muted colours", ", seen from above", " in the rain",
    ", soft focus",
)  # fmt: skip


_MAX_HINTS = 60
_NAME_WORDS = frozenset(re.findall(r"\w+", " ".join(s.name for s in SUBJECTS))) - {"and", "of", "o"}
_UNKEPT = re.compile(
    r"\b(?:{})s?\b".format(
        "|".join(
            re.escape(word) for s in SUBJECTS if s.name in unkept_subjects() for word in (s.name, *s.keywords)
        )
    )
)
"""Names of unkept subjects and words that hint at them."""


@dataclass(frozen=True)
class _Stream:
    """Texts without end: ``phrases`` of each unit, a subject or term, set into ``frames``, unit after unit.

    A frame has one hole, ``{}`` for the bare phrase or ``{a}`` for the phrase with its article. The texts of a
    unit differ until all ``len(frames) * len(phrases)`` are used.
    """

    units: Mapping[str, Sequence[str]]
    frames: Sequence[str]

    def text(self, index: int) -> tuple[str, str]:
        """Unit and prompt number ``index``; each run of ``len(units)`` has every unit once."""
        turn, position = divmod(index, len(self.units))
        unit = list(self.units)[position]
        phrases = self.units[unit]
        frame_index = (turn + position) % len(self.frames)
        phrase = phrases[(turn // len(self.frames) + frame_index) % len(phrases)]
        with_article = phrase if phrase in _PLURAL else article(phrase)
        return unit, self.frames[frame_index].format(phrase, a=with_article)


def concept_prompt_sets(
    concepts: Sequence[Concept], *, embedded: bool, size: int, split: Split
) -> list[PromptSet]:
    """The sets ``direct``, ``implicit`` and ``benign`` that tell what erasing ``concepts`` did.

    Direct prompts name the concept, implicit ones hint at it, benign ones show something else, their label.
    A set without any prompts, such as the implicit one of a concept without related phrases, is left out. The
    prompts are in phrasings that no training or kept prompt has.

    Args:
        embedded: prompts for the embedded model, whose judge knows its own subjects alone.
        size: records per set; a larger set begins with the smaller one. Units (subjects, terms, class names)
            take turns. Texts repeat, under other ids, only when their supply is used up.
        split: sets for tuning and for reporting share no id and no text.

    Raises:
        ValueError: no concept, ``size`` below 1, another split, or a concept that the embedded judge can't see.
    """
    if not concepts or size < 1 or split not in get_args(Split):
        raise ValueError(
            "concept_prompt_sets: expected one or more concepts, size of 1 or more, split tune or report, "
            f"got {[concept.name for concept in concepts]}, {size}, {split!r}"
        )
    streams = (_embedded_streams if embedded else _open_streams)(concepts, split)
    sets = []
    for name, parts in streams.items():
        usable = [part for part in parts if part.units]
        if usable:
            sets.append(PromptSet(name, tuple(_records(name, split, size, usable))))
        else:
            _log.warning("no %s prompts for %s", name, ", ".join(concept.name for concept in concepts))
    return sets


def embedded_keep_captions(concepts: Sequence[Concept], limit: int, seed: int) -> list[str]:
    """About ``limit`` different training-style captions of kept subjects, in all styles and on all backgrounds.

    None names an erased concept, or names or hints at an unkept subject.

    Raises:
        ValueError: ``limit`` below 1, or nothing left to keep.
    """
    if limit < 1:
        raise ValueError(f"embedded_keep_captions.limit: expected at least 1, got {limit}")
    subjects = [subject_index(name) for name in benign_subjects(concepts) if name in kept_subjects()]
    rng = np.random.default_rng(seed)
    kept: dict[str, None] = {}
    for subject in islice(cycle(subjects), 4 * limit):
        text = caption(subject, int(rng.integers(len(STYLES))), int(rng.integers(len(BACKGROUNDS))), rng)
        if not _UNKEPT.search(text) and not mentions(text, concepts):
            kept[text] = None
        if len(kept) == limit:
            break
    if not kept:
        names = [concept.name for concept in concepts]
        raise ValueError(f"embedded_keep_captions: expected captions that name none of {names}, got none")
    return list(kept)


def _records(name: str, split: str, size: int, streams: Sequence[_Stream]) -> Iterator[PromptRecord]:
    """Streams take turns."""
    for index in range(size):
        unit, text = streams[index % len(streams)].text(index // len(streams))
        yield PromptRecord(f"{name}-{split}-{index:04d}", text, label=unit if name == "benign" else None)


def _embedded_streams(concepts: Sequence[Concept], split: Split) -> dict[str, list[_Stream]]:
    _check_visible(concepts)
    shown = {name for concept in concepts for name in concept_subjects(concept)}
    subjects = [subject for subject in SUBJECTS if subject.name in shown]
    benign = {name: [name] for name in shuffled(benign_subjects(concepts))}
    styles = [words for style in STYLES for words in STYLE_WORDS[style]]
    direct = [_Stream({name: [name] for name in shuffled(shown)}, _frames(_NAME_LEADS, styles, split))]
    implicit = [_Stream(_hints(subjects), _frames(_HINT_LEADS, styles, split, bare=True))]
    if STYLE not in {concept.name for concept in concepts}:
        return {
            "direct": direct,
            "implicit": implicit,
            "benign": [_Stream(benign, _frames(_NAME_LEADS, styles, split))],
        }
    erased = STYLE_WORDS["fluent"]
    others = [words for words in styles if words not in erased]
    by_style = (erased, _STYLE_HINTS, others)
    drawn = [_Stream(benign, _frames(_NAME_LEADS, words, split, styled=True)) for words in by_style]
    return {"direct": [*direct, drawn[0]], "implicit": [*implicit, drawn[1]], "benign": [drawn[2]]}


def _check_visible(concepts: Sequence[Concept]) -> None:
    for concept in concepts:
        if concept.name != STYLE and not concept_subjects(concept):
            raise ValueError(
                f"concept: expected one that the embedded model's judge can see, got {concept.name}; it sees "
                f"{STYLE}, unsafe, the categories {', '.join(dict.fromkeys(s.category for s in SUBJECTS))}, and "
                f"the subjects {', '.join(subject.name for subject in SUBJECTS)}"
            )


def _frames(
    leads: Sequence[str],
    style_words: Sequence[str],
    split: Split,
    *,
    bare: bool = False,
    styled: bool = False,
) -> list[str]:
    """Sentences with a style and with a background in turn; ``styled``: the latter with a style as well.

    ``bare`` allows a background without a lead, a held-out phrasing by itself.
    """
    grounds = [ground.format(colour) for ground in HELD_OUT_BACKGROUNDS for colour in BACKGROUNDS]
    drawn = [f"{lead}{link}{words}" for lead in leads for link in (", ", " in ") for words in style_words]
    placed = [f"{lead} {ground}" for lead in (*leads, *["{}"] * bare) for ground in grounds]
    if styled:
        placed = [f"{frame}, {words}" for frame in placed for words in style_words]
    return [frame for pair in zip(_half(drawn, split), _half(placed, split), strict=False) for frame in pair]


def _half(frames: Sequence[str], split: Split) -> list[str]:
    return shuffled(frames)[get_args(Split).index(split) :: 2]


def _hints(subjects: Sequence[Subject]) -> dict[str, list[str]]:
    """Phrases of one to three words per subject that hint at it or its category; none belongs to two subjects."""
    names = {subject.name for subject in subjects}
    candidates = {subject.name: iter(_word_groups(subject, names)) for subject in subjects}
    hints: dict[str, list[str]] = {name: [] for name in shuffled(names)}
    taken: set[str] = set()
    for _ in range(_MAX_HINTS):
        for name, phrases in hints.items():
            if (phrase := next((text for text in candidates[name] if text not in taken), None)) is not None:
                phrases.append(phrase)
                taken.add(phrase)
    return {name: phrases for name, phrases in hints.items() if phrases}


def _word_groups(subject: Subject, names: Set[str]) -> list[str]:
    """Groups of one, two and three words in turn, each with a keyword of the subject where it has one to use."""
    outside = [other for other in SUBJECTS if other.name not in names]
    misleading = {
        word for other in outside for word in (*other.keywords, *CATEGORY_WORDS.get(other.category, ()))
    }
    general = CATEGORY_WORDS.get(subject.category, ())
    own, words = (
        [
            word
            for word in dict.fromkeys(source)
            if word not in misleading | _WEAK_HINTS and not _names_subject(word)
        ]
        for source in (subject.keywords, (*subject.keywords, *general))
    )
    groups = [
        shuffled(
            ", ".join(group)
            for group in combinations(words, count)
            if group[0] in own or not own or count == 1
        )
        for count in (1, 2, 3)
    ]
    return [text for turn in zip_longest(*groups) for text in turn if text is not None]


def _names_subject(word: str) -> bool:
    return not _NAME_WORDS.isdisjoint(re.findall(r"\w+", word))


def _open_streams(concepts: Sequence[Concept], split: Split) -> dict[str, list[_Stream]]:
    """Of models that draw anything: terms, related phrases, and class names of ImageNet and COCO."""
    classes = {name: [name] for name in shuffled(_class_names()) if not mentions(name, concepts)}
    streams: dict[str, list[_Stream]] = {"direct": [], "implicit": []}
    for concept in concepts:
        for name, phrases, openings in (
            ("direct", concept.terms, _OBJECT_OPENINGS), ("implicit", concept.related, _TOPIC_OPENINGS)
        ):  # fmt: skip
            if concept.name == STYLE:
                openings = tuple(o.replace("%s", thing) for o in _STYLE_OPENINGS for thing in _STYLE_SUBJECTS)
            frames = [f"{opening}{ending}" for opening, ending in product(openings, _ENDINGS)]
            unused = [frame for frame in frames if frame not in concept.templates]
            streams[name].append(
                _Stream({phrase: [phrase] for phrase in shuffled(phrases)}, _half(unused, split))
            )
    endings = product(_CLASS_OPENINGS, _ENDINGS)
    return {**streams, "benign": [_Stream(classes, _half(["".join(parts) for parts in endings], split))]}
