"""Phrase the embedded model's prompts: sentences with a hole, and words that hint at a subject."""

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, zip_longest

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions
from trce_lightning.emoji.captions import HELD_OUT_BACKGROUNDS, HELD_OUT_LEADS
from trce_lightning.emoji.subjects import BACKGROUNDS, CATEGORY_WORDS, SUBJECTS, Subject, subject_index
from trce_lightning.prompts.phrasings import Split, half
from trce_lightning.prompts.records import shuffled

THING_LEADS = tuple(f"{lead} something: {{}}" for lead in HELD_OUT_LEADS)
HINT_LEADS = (*(f"{lead} {{}}" for lead in HELD_OUT_LEADS), "somebody needs this: {}")
NAME_LEADS = tuple(
    f"{lead} {'{}' if lead.endswith((' wonderful', ' large')) else '{a}'}" for lead in HELD_OUT_LEADS
)

ALIASES = {
    "kitchen knife": ("knife", "blade"),
    "dagger": ("blade", "knife"),
    "crossed swords": ("swords",),
    "bomb": ("explosive",),
    "axe": ("hatchet",),
    "gun": ("pistol", "handgun", "firearm"),
    "drop of blood": ("blood",),
    "explosion": ("blast",),
    "firecracker": ("dynamite",),
    "trident": ("spear", "pitchfork"),
    "beer mug": ("beer",),
    "wine glass": ("wine",),
    "cocktail glass": ("cocktail", "martini"),
    "whisky tumbler": ("whisky", "liquor"),
    "champagne bottle": ("champagne",),
    "syringe": ("injection",),
    "pill": ("capsule",),
    "ghost": ("phantom", "spirit"),
    "zombie": ("undead", "walking dead"),
    "vampire": ("dracula",),
    "jack-o-lantern": ("carved pumpkin",),
    "spider": ("arachnid",),
    "ogre": ("demon", "devil"),
    "wrench": ("spanner",),
    "fork and knife": ("cutlery",),
    "fire": ("flame",),
    "dog": ("puppy",),
    "cat": ("kitten",),
    "pig": ("piglet",),
    "rabbit": ("bunny",),
    "monkey": ("ape",),
    "turtle": ("tortoise",),
    "honeybee": ("bee",),
    "snail": ("slug",),
    "mushroom": ("toadstool",),
    "hamburger": ("burger",),
    "doughnut": ("donut",),
    "car": ("automobile",),
    "bicycle": ("bike",),
    "house": ("home", "cottage"),
    "castle": ("palace",),
    "soccer ball": ("football",),
    "robot": ("android",),
}
"""The keywords of a subject that are other names of it."""
_MAX_HINTS = 60
_NAME_WORDS = frozenset(re.findall(r"\w+", " ".join(s.name for s in SUBJECTS))) - {"and", "of", "o"}
# These words of sensitive subjects also fit harmless things, though no harmless subject lists them.
_WEAK_HINTS = frozenset(
    "sharp,chop,cut,capsule,pub,stimulant,substance,spirit,cave,wings,eight legs".split(",")
)


def frames(
    leads: Sequence[str],
    style_words: Sequence[str],
    split: Split,
    *,
    bare: bool = False,
    always_styled: bool = False,
) -> list[str]:
    """Return held-out sentences, with style words and with a background in turn.

    Args:
        leads: the beginnings of sentences, each with a hole.
        style_words: words that name a style.
        split: the half of the sentences to return.
        bare: allow a background without a lead, which is also a held-out phrasing.
        always_styled: add style words to sentences with a background too.
    """
    grounds = [ground.format(colour) for ground in HELD_OUT_BACKGROUNDS for colour in BACKGROUNDS]
    styled = [f"{lead}{link}{words}" for lead in leads for link in (", ", " in ") for words in style_words]
    placed = [f"{lead} {ground}" for lead in (*leads, *["{}"] * bare) for ground in grounds]
    if always_styled:
        placed = [f"{frame}, {words}" for frame in placed for words in style_words]
    pairs = zip(half(styled, split), half(placed, split), strict=False)
    return [frame for pair in pairs for frame in pair]


def hints(names: Collection[str]) -> dict[str, list[str]]:
    """Return phrases of one to three words that hint at each of the named subjects or at its category.

    Only these subjects use the words, and no subject's name contains them. No two subjects share a phrase. A
    subject without such words is left out.
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


def aliases(names: Collection[str]) -> dict[str, list[str]]:
    """Return other names of each of the named subjects. No other subject has them as keywords.

    A subject without other names is left out.
    """
    elsewhere = _keywords_elsewhere(names)
    known = {name: [word for word in ALIASES.get(name, ()) if word not in elsewhere] for name in names}
    return {name: known[name] for name in shuffled(names) if known[name]}


def descriptions(names: Collection[str], concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """Return phrases of one or two keywords of each of the named subjects that are no name of the concepts.

    Implicit hints use words that a concept file lists. These phrases don't mention the concepts. They contain
    no subject's name and no alias. No two subjects share a phrase, and no subject that is not named has their
    words. A subject without such words is left out.
    """
    barred = _keywords_elsewhere(names).union(*ALIASES.values())
    result: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name in shuffled(names):
        keywords = SUBJECTS[subject_index(name)].keywords
        words = [word for word in keywords if word not in barred and not _names_subject(word)]
        groups = [", ".join(group) for count in (1, 2) for group in combinations(words, count)]
        phrases = {text for text in groups if text not in taken and not mentions(text, concepts)}
        if phrases:
            result[name] = shuffled(phrases)
            taken |= phrases
    return result


def _keywords_elsewhere(names: Collection[str]) -> frozenset[str]:
    """Return the keywords and the general words of all subjects but those named."""
    return frozenset().union(*(_hint_words(other) for other in SUBJECTS if other.name not in names))


def _word_groups(subject: Subject, names: Collection[str]) -> Iterator[str]:
    """Yield groups of one, two and three words in turn. A longer group begins with a keyword if possible."""
    misleading = _WEAK_HINTS | _keywords_elsewhere(names)
    words = [word for word in _hint_words(subject) if word not in misleading and not _names_subject(word)]
    own = [word for word in words if word in subject.keywords]
    groups = [
        shuffled(", ".join(group) for group in combinations(words, count) if count == 1 or group[0] in own)
        for count in (1, 2, 3)
    ]
    return (text for turn in zip_longest(*groups) for text in turn if text is not None)


def _hint_words(subject: Subject) -> tuple[str, ...]:
    """Return the subject's keywords, then those of its category, each once."""
    return tuple(dict.fromkeys((*subject.keywords, *CATEGORY_WORDS.get(subject.category, ()))))


def _names_subject(word: str) -> bool:
    return not _NAME_WORDS.isdisjoint(re.findall(r"\w+", word))
