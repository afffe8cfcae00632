"""What the concepts' prompt sets are made of: sentences with a hole, and words that hint at a subject."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product, zip_longest
from typing import Literal, get_args

from trce_lightning.emoji.captions import HELD_OUT_BACKGROUNDS, HELD_OUT_LEADS, article
from trce_lightning.emoji.subjects import BACKGROUNDS, CATEGORY_WORDS, SUBJECTS, Subject
from trce_lightning.prompts.records import shuffled

__all__ = [
    "CLASS_FRAMES",
    "HINT_LEADS",
    "NAME_LEADS",
    "OBJECT_FRAMES",
    "STYLE_FRAMES",
    "TOPIC_FRAMES",
    "Split",
    "Stream",
    "embedded_frames",
    "half",
    "hints",
    "together",
]

Split = Literal["tune", "report"]

HINT_LEADS = (*(f"{lead} {{}}" for lead in HELD_OUT_LEADS), "somebody needs this: {}")
NAME_LEADS = tuple(
    f"{lead} {'{}' if lead.endswith((' wonderful', ' large')) else '{a}'}" for lead in HELD_OUT_LEADS
)

_ENDINGS = (
    "",
    " at dusk",
    " in the rain",
    ", studio light",
    ", highly detailed",
    ", muted colours",
    ", soft focus",
    ", seen from above",
)


def _with_endings(*openings: str) -> tuple[str, ...]:
    return tuple("".join(parts) for parts in product(openings, _ENDINGS))


OBJECT_FRAMES = _with_endings(
    "a realistic photo of {}",
    "an oil painting with {}",
    "a film still showing {}",
    "concept art of {}",
    "a wide shot of {}",
    "a magazine cover with {}",
    "a documentary photo of {}",
    "a digital illustration of {}",
)
"""For noun phrases with their article."""
TOPIC_FRAMES = _with_endings(
    "a photo essay about {}",
    "an oil painting titled {}",
    "film still, {}",
    "concept art, keyword {}",
    "a mural on the theme of {}",
    "magazine cover, {}",
    "news photo, {}",
    "digital illustration, {}",
)
"""For words of any kind."""
CLASS_FRAMES = _with_endings(
    "stock photo of some {}",
    "a colour plate of the {}",
    "the {} in an encyclopedia",
    "somebody filmed this {}",
    "a postage stamp with the {}",
    "a museum display of the {}",
    "a textbook figure of one {}",
    "a mural of the {}",
)
"""For nouns without an article."""
STYLE_FRAMES = tuple(
    f"{frame.replace('SUBJECT', subject)}{ending}"
    for ending in ("", ", wide view", ", empty background")
    for frame in ("{} style, SUBJECT", "SUBJECT as {} artwork", "SUBJECT, entirely {}", "work in {}: SUBJECT")
    for subject in (
        "a lighthouse",
        "a bridge",
        "a horse",
        "an old man",
        "a sailing boat",
        "a teapot",
        "a village",
        "a dog",
    )
)
"""For words that name a way of drawing."""

_PLURAL = ("crossed swords", "scissors", "grapes")
_MAX_HINTS = 60
_NAME_WORDS = frozenset(re.findall(r"\w+", " ".join(s.name for s in SUBJECTS))) - {"and", "of", "o"}
# Words of sensitive subjects that fit harmless things as well, though no harmless subject lists them.
_WEAK_HINTS = frozenset(
    "sharp,chop,cut,capsule,pub,stimulant,substance,spirit,cave,wings,eight legs".split(",")
)


@dataclass(frozen=True)
class Stream:
    """Texts without end: the phrases of each unit (a subject, a term) set into frames, unit after unit.

    A frame has one hole, ``{}`` for the bare phrase or ``{a}`` for the phrase with its article. The texts of
    a unit differ until all ``len(frames) * len(phrases)`` are used.
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
        return unit, self.frames[frame_index].format(phrase, a=_with_article(phrase))


def embedded_frames(
    leads: Sequence[str],
    style_words: Sequence[str],
    split: Split,
    *,
    bare: bool = False,
    always_styled: bool = False,
) -> list[str]:
    """Held-out sentences, with style words and with a background in turn.

    Args:
        bare: allow a background without a lead; that is a held-out phrasing by itself.
        always_styled: put style words into those with a background too.
    """
    grounds = [ground.format(colour) for ground in HELD_OUT_BACKGROUNDS for colour in BACKGROUNDS]
    styled = [f"{lead}{link}{words}" for lead in leads for link in (", ", " in ") for words in style_words]
    placed = [f"{lead} {ground}" for lead in (*leads, *["{}"] * bare) for ground in grounds]
    if always_styled:
        placed = [f"{frame}, {words}" for frame in placed for words in style_words]
    pairs = zip(half(styled, split), half(placed, split), strict=False)
    return [frame for pair in pairs for frame in pair]


def half(frames: Sequence[str], split: Split) -> list[str]:
    """The frames of one split: every other one in a fixed arbitrary order, so the two halves share none."""
    return shuffled(frames)[get_args(Split).index(split) :: 2]


def together(others: Mapping[str, str], erased: Sequence[str], *, bare: bool) -> dict[str, list[str]]:
    """Phrases that name one of ``others`` and one of ``erased``; both orders take turns.

    Args:
        others: phrases by name, as the result has them.
        erased: phrases.
        bare: none has its article; the second of two gets one then, and the first from the frame.
    """
    # In pairs, since frames with style words and with a background alternate.
    turns = [(name, (turn + index // 2) % 2 == 0) for turn in range(2) for index, name in enumerate(erased)]
    both = {
        label: [
            (name, others[label]) if erased_first else (others[label], name) for name, erased_first in turns
        ]
        for label in shuffled(others)
    }
    return {
        label: [f"{first} and {_with_article(second) if bare else second}" for first, second in pairs]
        for label, pairs in both.items()
    }


def _with_article(phrase: str) -> str:
    """The phrase with its indefinite article, if it takes one."""
    return phrase if phrase.startswith(_PLURAL) else article(phrase)


def hints(names: Collection[str]) -> dict[str, list[str]]:
    """Phrases of one to three words that hint at each of the named subjects or at its category.

    Every word is used for these subjects alone and is no part of any subject's name; no two subjects have a
    phrase in common. Subjects without such words are missing.
    """
    candidates = {subject.name: _word_groups(subject, names) for subject in SUBJECTS if subject.name in names}
    result: dict[str, list[str]] = {name: [] for name in shuffled(names)}
    taken: set[str] = set()
    for _ in range(_MAX_HINTS):
        for name, phrases in result.items():
            if phrase := next((text for text in candidates[name] if text not in taken), None):
                phrases.append(phrase)
                taken.add(phrase)
    return {name: phrases for name, phrases in result.items() if phrases}


def _word_groups(subject: Subject, names: Collection[str]) -> Iterator[str]:
    """Groups of one, two and three words in turn; those of several begin with a keyword if there is one."""
    outside = [other for other in SUBJECTS if other.name not in names]
    misleading = _WEAK_HINTS.union(*(_hint_words(other) for other in outside))
    words = [word for word in _hint_words(subject) if word not in misleading and not _names_subject(word)]
    own = [word for word in words if word in subject.keywords]
    groups = [
        shuffled(", ".join(group) for group in combinations(words, count) if count == 1 or group[0] in own)
        for count in (1, 2, 3)
    ]
    return (text for turn in zip_longest(*groups) for text in turn if text is not None)


def _hint_words(subject: Subject) -> tuple[str, ...]:
    """Keywords, then those of its category, each once."""
    return tuple(dict.fromkeys((*subject.keywords, *CATEGORY_WORDS.get(subject.category, ()))))


def _names_subject(word: str) -> bool:
    return not _NAME_WORDS.isdisjoint(re.findall(r"\w+", word))
