"""The prompt sets of a concept, on which models are scored. A domain can bring its own texts for them."""

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
"""The texts of each prompt set by its name. If a set has several streams, they take turns."""
_log = logging.getLogger(__name__)


def concept_prompt_sets(
    concepts: Sequence[Concept],
    streams: Callable[[Sequence[Concept], Split], Streams],
    *,
    size: int,
    split: Split,
    names: Sequence[str] = (DIRECT, IMPLICIT, BENIGN),
) -> list[PromptSet]:
    """Return the prompt sets that measure the effect of erasing ``concepts``.

    Direct prompts name the concept, and implicit prompts hint at it. The prompts of all other sets are
    labelled with the thing that they show. If a set has no prompts, it is left out and logged. The implicit
    set of a concept without related phrases is an example.

    Args:
        concepts: the concepts that are erased.
        streams: the function that makes the texts of the sets from the concepts and a split.
        size: the number of records per set. A larger set begins with the smaller one. Units (subjects, terms,
            class names) take turns. Texts repeat, under other ids, only after all were used.
        split: ``tune`` or ``report``. The sets of the two splits share no id and no text.
        names: the names of the wanted sets.

    Raises:
        InputError: there is no concept, ``size`` is below 1, the split is unknown, or ``streams`` raises it.
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
    """Return prompts for a model that generates images of anything.

    Direct prompts contain a term, implicit prompts a related phrase, and benign prompts a class name of
    ImageNet or COCO. ``neighbours`` prompts name the concepts' neighbours. ``mixed`` prompts name a class,
    which is their label, and a term. If all concepts are styles, there are no ``mixed`` prompts. No training
    prompt and no kept prompt has the same phrasings.
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
    # "the" fits before any class name, also in the plural. Terms have their own articles.
    both = together({name: f"the {name}" for name in classes}, things, bare=False)
    alike = {text for concept in concepts for text in concept.neighbours if not mentions(text, concepts)}
    return {
        **streams,
        BENIGN: [Stream(units(classes), half(CLASS_FRAMES, split))],
        MIXED: [Stream(both, half(OBJECT_FRAMES, split))] if things else [],
        NEIGHBOURS: [Stream(units(alike), half(OBJECT_FRAMES, split))],
    }
