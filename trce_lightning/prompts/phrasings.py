"""Frames, which are sentences with a hole, and streams of prompts that are made of frames."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from trce_lightning.concepts.naming import article
from trce_lightning.prompts.records import shuffled

__all__ = [
    "CLASS_FRAMES",
    "OBJECT_FRAMES",
    "STYLE_FRAMES",
    "TOPIC_FRAMES",
    "Split",
    "Stream",
    "half",
    "together",
    "units",
]

Split = Literal["tune", "report"]


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
"""The frames for noun phrases with their article."""
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
"""The frames for words of any kind."""
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
"""The frames for nouns without an article."""
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
"""The frames for words that name a way of drawing."""

_PLURAL = ("crossed swords", "scissors", "grapes")
"""The beginnings of phrases that take no indefinite article."""


@dataclass(frozen=True)
class Stream:
    """An endless stream of texts. Each text is a phrase of a unit (a subject, a term) in a frame.

    The units take turns. A frame has one hole: ``{}`` for the bare phrase, or ``{a}`` for the phrase with its
    article. The texts of a unit differ until all ``len(frames) * len(phrases)`` are used.
    """

    units: Mapping[str, Sequence[str]]
    frames: Sequence[str]

    def text(self, index: int) -> tuple[str, str]:
        """Return the unit and the text at ``index``. Each run of ``len(units)`` texts has every unit once."""
        turn, position = divmod(index, len(self.units))
        unit = list(self.units)[position]
        phrases = self.units[unit]
        frame_index = (turn + position) % len(self.frames)
        phrase = phrases[(turn // len(self.frames) + frame_index) % len(phrases)]
        return unit, self.frames[frame_index].format(phrase, a=_with_article(phrase))


def half(frames: Sequence[str], split: Split) -> list[str]:
    """Return the frames of one split: every other one in a fixed arbitrary order. The splits share none."""
    return shuffled(frames)[get_args(Split).index(split) :: 2]


def units(phrases: Iterable[str]) -> dict[str, list[str]]:
    """Return units of one phrase each, in a fixed arbitrary order. The phrase is also the unit's name."""
    return {phrase: [phrase] for phrase in shuffled(phrases)}


def together(others: Mapping[str, str], erased: Sequence[str], *, bare: bool) -> dict[str, list[str]]:
    """Return phrases that name one of ``others`` and one of ``erased``. The two orders take turns.

    Args:
        others: phrases by name. The result has the same names.
        erased: phrases.
        bare: True if no phrase has its article. The second phrase then gets one here, and the first gets one
            from its frame.
    """
    # The order changes after every two phrases: frames with style words and with a background alternate.
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
    """Return the phrase with its indefinite article, if it takes one."""
    return phrase if phrase.startswith(_PLURAL) else article(phrase)
