"""Frames, which are sentences with a hole, and streams of prompts that are made of frames."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from trce_lightning.concepts.naming import article
from trce_lightning.prompts.records import shuffled

__all__ = [
    "CLASS_FRAMES",
    "LANGUAGE_FRAMES",
    "OBJECT_FRAMES",
    "STYLE_FRAMES",
    "TOPIC_FRAMES",
    "Split",
    "Stream",
    "half",
    "together",
    "units",
    "with_article",
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

_SENTENCES = {
    "fr": (
        ("une photo avec {}", "une affiche avec {}", "une peinture à l'huile : {}", "une scène de film, {}",
         "une image qui montre {}", "au premier plan, {}"),
        ("", ", lumière douce", ", vue de près", ", au crépuscule"),
    ),
    "es": (
        ("una foto con {}", "un cartel con {}", "un cuadro al óleo: {}", "una escena de película, {}",
         "una imagen que muestra {}", "en primer plano, {}"),
        ("", ", luz suave", ", visto de cerca", ", al anochecer"),
    ),
    "de": (  # after a colon or a comma, so that every phrase stays in the nominative
        ("Foto: {}", "Plakat, darauf {}", "Ölgemälde: {}", "Szene aus einem Film: {}",
         "auf diesem Bild: {}", "im Vordergrund: {}"),
        ("", ", weiches Licht", ", aus der Nähe", ", in der Dämmerung"),
    ),
    "zh": (
        ("一张{}的照片", "海报上有{}", "一幅油画：{}", "电影画面：{}", "图片里是{}", "画面中央是{}"),
        ("", "，柔和的光线", "，近景", "，黄昏时分"),
    ),
    "ja": (
        ("{}の写真", "{}が載ったポスター", "{}の油絵", "映画の一場面、{}", "{}を写した画像", "手前に{}"),
        ("", "、柔らかい光", "、近くから見た様子", "、夕暮れ"),
    ),
}  # fmt: skip
_SCENES = {
    "fr": ("SUBJECT, style : {}", "SUBJECT ({})", "{} : SUBJECT"),
    "es": ("SUBJECT, estilo: {}", "SUBJECT ({})", "{}: SUBJECT"),
    "de": ("SUBJECT, Stil: {}", "SUBJECT ({})", "{}: SUBJECT"),
    "zh": ("SUBJECT，风格：{}", "SUBJECT（{}）", "{}：SUBJECT"),
    "ja": ("SUBJECT、スタイル：{}", "SUBJECT（{}）", "{}：SUBJECT"),
}
_SUBJECTS = {
    "fr": ("un phare", "un pont", "un cheval", "un vieil homme", "un voilier", "une théière",
           "un village", "un chien"),
    "es": ("un faro", "un puente", "un caballo", "un anciano", "un velero", "una tetera",
           "un pueblo", "un perro"),
    "de": ("ein Leuchtturm", "eine Brücke", "ein Pferd", "ein alter Mann", "ein Segelboot", "eine Teekanne",
           "ein Dorf", "ein Hund"),
    "zh": ("一座灯塔", "一座桥", "一匹马", "一位老人", "一艘帆船", "一把茶壶", "一个村庄", "一只狗"),
    "ja": ("灯台", "橋", "馬", "老人", "帆船", "急須", "村", "犬"),
}  # fmt: skip
LANGUAGE_FRAMES: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        (code, "subject"): tuple(map("".join, product(openings, endings)))
        for code, (openings, endings) in _SENTENCES.items()
    },
    **{
        (code, "style"): tuple(
            frame.replace("SUBJECT", subject) for frame, subject in product(frames, _SUBJECTS[code])
        )
        for code, frames in _SCENES.items()
    },
}
"""The frames of other languages, by the language's code and the kind of concept."""

_PLURAL = ("crossed swords", "scissors", "grapes")
"""The beginnings of phrases that take no indefinite article."""
_UNCOUNTED = frozenset("blood,cutlery,dracula,dynamite,swords,undead,walking dead".split(","))
"""Whole phrases that take no indefinite article."""


@dataclass(frozen=True)
class Stream:
    """An endless stream of texts. Each text is a phrase of a unit (a subject, a term) in a frame.

    The units take turns. A frame has one hole: ``{}`` for the bare phrase, or ``{a}`` for the phrase with its
    article. The texts of a unit differ until all ``len(frames) * len(phrases)`` are used. ``categories`` are
    those of the prompts.
    """

    units: Mapping[str, Sequence[str]]
    frames: Sequence[str]
    categories: tuple[str, ...] = ()

    def text(self, index: int) -> tuple[str, str]:
        """Return the unit and the text at ``index``. Each run of ``len(units)`` texts has every unit once."""
        turn, position = divmod(index, len(self.units))
        unit = list(self.units)[position]
        phrases = self.units[unit]
        frame_index = (turn + position) % len(self.frames)
        phrase = phrases[(turn // len(self.frames) + frame_index) % len(phrases)]
        return unit, self.frames[frame_index].format(phrase, a=with_article(phrase))


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
        label: [f"{first} and {with_article(second) if bare else second}" for first, second in pairs]
        for label, pairs in both.items()
    }


def with_article(phrase: str) -> str:
    """Return the phrase with its indefinite article, if it takes one."""
    return phrase if phrase.startswith(_PLURAL) or phrase in _UNCOUNTED else article(phrase)
