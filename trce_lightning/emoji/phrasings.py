"""Phrase the embedded model's prompts: sentences with a hole, and words that hint at a subject."""

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import combinations, zip_longest

from trce_lightning.emoji.captions import HELD_OUT_BACKGROUNDS, HELD_OUT_LEADS
from trce_lightning.emoji.subjects import BACKGROUNDS, CATEGORY_WORDS, SUBJECTS, Subject
from trce_lightning.prompts.phrasings import Split, half
from trce_lightning.prompts.records import shuffled

HINT_LEADS = (*(f"{lead} {{}}" for lead in HELD_OUT_LEADS), "somebody needs this: {}")
NAME_LEADS = tuple(
    f"{lead} {'{}' if lead.endswith((' wonderful', ' large')) else '{a}'}" for lead in HELD_OUT_LEADS
)


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


def _word_groups(subject: Subject, names: Collection[str]) -> Iterator[str]:
    """Yield groups of one, two and three words in turn. A longer group begins with a keyword if possible."""
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
    """Return the subject's keywords, then those of its category, each once."""
    return tuple(dict.fromkeys((*subject.keywords, *CATEGORY_WORDS.get(subject.category, ()))))


def _names_subject(word: str) -> bool:
    return not _NAME_WORDS.isdisjoint(re.findall(r"\w+", word))
