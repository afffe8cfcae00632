"""Make captions of composites from a small random grammar of subject, style, background and filler words.

No training caption uses a phrasing of ``HELD_OUT_LEADS`` or ``HELD_OUT_BACKGROUNDS``. The prompt sets that
measure the model use only these.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from trce_lightning.concepts.naming import article
from trce_lightning.emoji.subjects import BACKGROUNDS, CATEGORY_WORDS, STYLES, SUBJECTS, Subject

if TYPE_CHECKING:
    from torch import Tensor

STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "noto": ("cartoon", "glossy cartoon", "cartoon style"),
    "twemoji": ("flat", "flat sticker", "flat style"),
    "fluent": ("3d", "3d render", "3d style", "clay 3d"),
}
LEADS: tuple[str, ...] = (
    "",
    "",
    "",
    "a picture of",
    "a photo of",
    "an image of",
    "a drawing of",
    "an icon of",
    "an emoji of",
    "picture of",
    "image of",
    "photo of",
    "a rendering of",
    "an illustration of",
    "this is",
    "here is",
    "there is",
    "we see",
    "you can see",
    "look at",
    "show me",
    "draw",
    "please draw",
    "i want",
    "i like",
    "i need",
    "my",
    "our",
    "one",
    "some",
    "the",
    "big",
    "a big",
    "small",
    "a small",
    "a nice",
    "a good",
    "a new",
    "an old",
    "a close up of",
    "a simple",
    "a view of",
    "a scene with",
    "nothing but",
    "only",
    "just",
    "everybody likes",
    "he has",
    "she has",
    "they have",
    "it looks like",
    "the man with",
    "the woman with",
    "someone with",
    "something with",
    "something about",
    "all about",
    "made for",
    "used for",
    "ready for",
    "think of",
)
"""The openings of captions. The empty one is there three times, so bare names are frequent."""
TAILS: tuple[str, ...] = (
    "",
    "",
    "",
    "",
    "",
    "",
    "today",
    "in the middle",
    "in the center",
    "at home",
    "on the table",
    "in the city",
    "for you",
    "for my friend",
    "and nothing else",
    "up close",
    "in good quality",
    "is here",
    "is what i need",
    "in this picture",
    "again",
    "for the people",
    "as always",
    "needs it",
    "of the day",
)
HELD_OUT_LEADS: tuple[str, ...] = (
    "a postcard of",
    "a poster with",
    "a sketch of",
    "a wonderful",
    "could you paint",
    "an artwork showing",
    "we hope to see",
    "a large",
    "this card shows",
    "imagine",
)
BACKGROUND_PHRASES: tuple[str, ...] = (
    "on a {} background",
    "on {}",
    "{} background",
    "with a {} background",
    "over a {} backdrop",
    "in front of {}",
)
HELD_OUT_BACKGROUNDS: tuple[str, ...] = (
    "against a {} background",
    "on a plain {} background",
    "with {} behind it",
)
COLOURS: tuple[str, ...] = tuple(BACKGROUNDS)


def hint(subject: Subject, rng: Random) -> str:
    """Return one to three keywords or category words that hint at ``subject`` without its name."""
    general = CATEGORY_WORDS.get(subject.category, ())
    count = rng.choice((1, 1, 1, 2, 2, 3))
    words = [
        rng.choice(general if general and rng.random() < 0.5 else subject.keywords) for _ in range(count)
    ]
    return rng.choice((", ", " ", " and ")).join(dict.fromkeys(words))


def subject_phrase(subject: Subject, rng: Random) -> str:
    """Return the subject's name, its name with a hint, or a hint alone.

    A sensitive subject gets a hint alone in half of the cases, and another subject in a fifth.
    """
    hint_share = 0.5 if subject.category in CATEGORY_WORDS else 0.2
    if rng.random() < hint_share:
        return hint(subject, rng)
    name = article(subject.name) if rng.random() < 0.5 else subject.name
    return f"{name}, {hint(subject, rng)}" if rng.random() < 0.1 else name


def caption(subject: int, style: int, background: int, rng: Random) -> str:
    """Return a training caption.

    It names the style in about six of ten cases, and the background likewise.
    """
    phrase = f"{rng.choice(LEADS)} {subject_phrase(SUBJECTS[subject], rng)} {rng.choice(TAILS)}".strip()
    return _described(phrase, style, background, rng)


def _described(phrase: str, style: int, background: int, rng: Random) -> str:
    if rng.random() < 0.6:
        phrase = f"{phrase} {rng.choice(BACKGROUND_PHRASES).format(COLOURS[background])}"
    if rng.random() < 0.6:
        words = rng.choice(STYLE_WORDS[STYLES[style]])
        phrase = rng.choice((f"{words} {phrase}", f"{phrase}, {words}", f"{phrase} in {words}"))
    return phrase


def captions(labels: Sequence[Tensor], rng: Random) -> list[str]:
    """Return one training caption for each row of the three label columns, ``[B]`` each."""
    subject, style, background = (column.tolist() for column in labels)
    return [caption(*row, rng) for row in zip(subject, style, background, strict=True)]


JOINS: tuple[str, ...] = (
    "{0} and {1}",
    "{0} and {1}",
    "{0} and {1}",
    "{0} and {1}",
    "{0} next to {1}",
    "{0} beside {1}",
    "{0} with {1}",
    "{0}, {1}",
    "{0} on the left and {1} on the right",
    "{1} on the right and {0} on the left",
    "{0} left of {1}",
    "{1} right of {0}",
)
"""The ways in which a caption names the subjects on the left and on the right of a scene."""


def is_held_out_pair(left: int, right: int) -> bool:
    """Return True for every 20th pair of subjects, in either order. They are left out of all training."""
    first, second = sorted((left, right))
    return (first * 7 + second * 3) % 20 == 0


def scene_caption(left: int, right: int, style: int, background: int, rng: Random) -> str:
    """Return a training caption of a scene, which names both subjects. The rest is like :func:`caption`."""
    names = [SUBJECTS[index].name for index in (left, right)]
    phrase = rng.choice(JOINS).format(*(article(name) if rng.random() < 0.7 else name for name in names))
    return _described(f"{rng.choice(LEADS)} {phrase} {rng.choice(TAILS)}".strip(), style, background, rng)


def scene_template(other: int, other_first: bool, style: int, background: int, rng: Random) -> str:
    """Return a caption of a scene with ``{}`` in the place of one of the subjects, without lead and tail."""
    pair = (article(SUBJECTS[other].name), "{}")
    phrase = rng.choice(JOINS).format(*(pair if other_first else pair[::-1]))
    return _described(phrase, style, background, rng)
