"""The prompt sets of a concept: what any model is scored on, and what a domain makes its own of."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions, shows
from trce_lightning.errors import InputError
from trce_lightning.prompts.keep import class_names
from trce_lightning.prompts.phrasings import (
    CLASS_FRAMES,
    OBJECT_FRAMES,
    STYLE_FRAMES,
    TOPIC_FRAMES,
    Split,
    Stream,
    half,
    together,
    units,
)
from trce_lightning.prompts.records import (
    BENIGN,
    DIRECT,
    IMPLICIT,
    MIXED,
    NEIGHBOURS,
    PromptRecord,
    PromptSet,
)

__all__ = ["Split", "Streams", "concept_prompt_sets", "open_streams"]

Streams = Mapping[str, Sequence[Stream]]
"""The texts of each prompt set by its name; several streams of a set take turns."""
_log = logging.getLogger(__name__)


def concept_prompt_sets(
    concepts: Sequence[Concept],
    streams: Callable[[Sequence[Concept], Split], Streams],
    *,
    size: int,
    split: Split,
    names: Sequence[str] = (DIRECT, IMPLICIT, BENIGN),
) -> list[PromptSet]:
    """Return the sets that tell what erasing ``concepts`` did.

    Direct prompts name the concept and implicit ones hint at it. All other sets are labelled with what their
    prompts show. A set without any prompts, such as the implicit one of a concept without related phrases,
    is left out, and the log says so.

    Args:
        concepts: what is erased.
        streams: makes the texts of the sets for the concepts and a split.
        size: records per set; a larger set begins with the smaller one. Units (subjects, terms, class names)
            take turns. Texts repeat, under other ids, only when their supply is used up.
        split: sets for tuning and for reporting share no id and no text.
        names: the sets wanted.

    Raises:
        InputError: no concept, ``size`` below 1, another split, or what ``streams`` refuses.
    """
    concept_names = [concept.name for concept in concepts]
    if not concept_names or size < 1 or split not in get_args(Split):
        raise InputError(
            "concept_prompt_sets: expected one or more concepts, size of 1 or more, split tune or report, "
            f"got {concept_names}, {size}, {split!r}"
        )
    texts, sets = streams(concepts, split), []
    for name in names:
        if usable := [part for part in texts.get(name, []) if part.units and part.frames]:
            labelled = name not in (DIRECT, IMPLICIT)
            sets.append(PromptSet(name, tuple(_records(f"{name}-{split}", size, usable, labelled))))
        else:
            _log.warning("no %s prompts for concept %s", name, ", ".join(concept_names))
    return sets


def _records(prefix: str, size: int, streams: Sequence[Stream], labelled: bool) -> Iterator[PromptRecord]:
    """Yield records of the streams in turn."""
    for index in range(size):
        unit, text = streams[index % len(streams)].text(index // len(streams))
        yield PromptRecord(f"{prefix}-{index:04d}", text, label=unit if labelled else None)


def open_streams(concepts: Sequence[Concept], split: Split) -> Streams:
    """Return prompts for a model that draws anything.

    Direct prompts hold a term, implicit ones a related phrase, benign ones a class name of ImageNet or COCO.
    ``neighbours`` are the concepts' own. ``mixed`` prompts name a class, their label, and a term beside it;
    there are none for styles alone. No training or kept prompt has their phrasings.
    """
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
            streams[name].append(Stream(units(phrases), half(unused, split)))
    # "the" goes before any class, also one in the plural; terms have their articles.
    both = together({name: f"the {name}" for name in classes}, things, bare=False)
    alike = {text for concept in concepts for text in concept.neighbours if not mentions(text, concepts)}
    return {
        **streams,
        BENIGN: [Stream(units(classes), half(CLASS_FRAMES, split))],
        MIXED: [Stream(both, half(OBJECT_FRAMES, split))] if things else [],
        NEIGHBOURS: [Stream(units(alike), half(OBJECT_FRAMES, split))],
    }
