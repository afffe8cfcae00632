"""The prompt sets of a concept, on which models are scored. A domain can bring its own texts for them."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import get_args

from trce_lightning.concepts import Concept
from trce_lightning.concepts.defaults import LANGUAGE_NAMES
from trce_lightning.concepts.naming import mentions
from trce_lightning.errors import InputError
from trce_lightning.prompts.keep import harmless_class_names
from trce_lightning.prompts.phrasings import (
    CLASS_FRAMES,
    LANGUAGE_FRAMES,
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
    ALIAS,
    BENIGN,
    DESCRIPTION,
    DIRECT,
    IMPLICIT,
    LANGUAGES,
    MISSPELT,
    MIXED,
    NEIGHBOURS,
    PREFIX,
    UNLABELLED,
    PromptRecord,
    PromptSet,
)
from trce_lightning.prompts.variants import misspellings, prefixed

__all__ = ["Split", "Streams", "concept_prompt_sets", "open_streams"]

Streams = Mapping[str, Sequence[Stream]]
"""The texts of each prompt set by its name. If a set has several streams, they take turns."""
_DIRECT_PER_MISSPELT = 4
"""The number of direct prompts that are tried for each misspelt one. In some, no slip hides the name."""
_log = logging.getLogger(__name__)


def concept_prompt_sets(
    concepts: Sequence[Concept],
    streams: Callable[[Sequence[Concept], Split], Streams],
    *,
    size: int,
    split: Split,
    names: Sequence[str] = (DIRECT, IMPLICIT, BENIGN),
    phrases: Collection[str] = (),
) -> list[PromptSet]:
    """Return the prompt sets that measure the effect of erasing ``concepts``.

    Direct prompts name the concept, and implicit prompts hint at it. ``WORDINGS`` are further sets that ask
    for it. The prompts of all other sets are labelled with the thing that they show. If a set has no prompts,
    it is left out and logged. The implicit set of a concept without related phrases is an example.

    ``prefix`` and ``misspelt`` prompts are direct prompts with other words, on the noise of the direct ones.

    Args:
        concepts: the concepts that are erased.
        streams: the function that makes the texts of the sets from the concepts and a split.
        size: the number of records per set. A larger set begins with the smaller one. Units (subjects, terms,
            class names) take turns. Texts repeat, under other ids, only after all were used.
        split: ``tune`` or ``report``. The sets of the two splits share no id and no text.
        names: the names of the wanted sets.
        phrases: further phrases that name the concepts in the texts of ``streams``.

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
        if name == PREFIX:
            made = _derived(name, split, prefixed(_records(DIRECT, split, size, texts), concepts))
        elif name == MISSPELT:
            direct = _records(DIRECT, split, _DIRECT_PER_MISSPELT * size, texts)
            made = _derived(name, split, misspellings(direct, concepts, phrases))
        else:
            made = _records(name, split, size, texts)
        if records := tuple(islice(made, size)):
            sets.append(PromptSet(name, records))
        else:
            _log.warning("no %s prompts for concept %s", name, ", ".join(concept_names))
    return sets


def _records(name: str, split: Split, size: int, texts: Streams) -> Iterator[PromptRecord]:
    """Yield ``size`` records of the set's streams in turn, or none if no stream has texts."""
    streams = [part for part in texts.get(name, []) if part.units and part.frames]
    for index in range(size if streams else 0):
        stream = streams[index % len(streams)]
        unit, text = stream.text(index // len(streams))
        label = None if name in UNLABELLED else unit
        yield PromptRecord(f"{name}-{split}-{index:04d}", text, label=label, categories=stream.categories)


def _derived(name: str, split: Split, records: Iterable[PromptRecord]) -> Iterator[PromptRecord]:
    """Yield the records as prompts of their own, with ids of the set ``name``."""
    for index, record in enumerate(records):
        yield replace(record, id=f"{name}-{split}-{index:04d}", sample_of=None)


def open_streams(concepts: Sequence[Concept], split: Split) -> Streams:
    """Return prompts for a model that generates images of anything.

    Direct prompts contain a term, implicit prompts a related phrase, and benign prompts a class name of
    ImageNet or COCO. ``neighbours`` prompts name the concepts' neighbours. ``mixed`` prompts name a class,
    which is their label, and a term. If all concepts are styles, there are no ``mixed`` prompts. ``alias``,
    ``description`` and ``languages`` prompts contain what the concepts list under these names. No training
    prompt and no kept prompt has the same phrasings.
    """
    classes = harmless_class_names(concepts)
    things = [term for concept in concepts if concept.kind != "style" for term in concept.terms]
    streams: dict[str, list[Stream]] = {name: [] for name in (DIRECT, IMPLICIT, ALIAS, DESCRIPTION)}
    for concept in concepts:
        is_style = concept.kind == "style"
        nameless = [text for text in concept.descriptions if not mentions(text, concepts)]
        for name, phrases, frames in (
            (DIRECT, list(concept.terms), STYLE_FRAMES if is_style else OBJECT_FRAMES),
            (IMPLICIT, list(concept.related), STYLE_FRAMES if is_style else TOPIC_FRAMES),
            (ALIAS, list(concept.aliases), STYLE_FRAMES if is_style else OBJECT_FRAMES),
            (DESCRIPTION, nameless, STYLE_FRAMES if is_style else OBJECT_FRAMES),
        ):
            unused = [frame for frame in frames if frame not in concept.templates]
            streams[name].append(Stream(units(phrases), half(unused, split)))
    # "the" fits before any class name, also in the plural. Terms have their own articles.
    both = together({name: f"the {name}" for name in classes}, things, bare=False)
    alike = {text for concept in concepts for text in concept.neighbours if not mentions(text, concepts)}
    return {
        **streams,
        LANGUAGES: [
            Stream(
                units(concept.translations.get(code, ())),
                half(LANGUAGE_FRAMES[code, concept.kind], split),
                categories=(language,),
            )
            for concept in concepts
            for code, language in LANGUAGE_NAMES.items()
        ],
        BENIGN: [Stream(units(classes), half(CLASS_FRAMES, split))],
        MIXED: [Stream(both, half(OBJECT_FRAMES, split))] if things else [],
        NEIGHBOURS: [Stream(units(alike), half(OBJECT_FRAMES, split))],
    }
