"""The prompts whose text states stage 1 must keep (the e^k of TRCE, arXiv 2503.07389)."""

import logging
from collections.abc import Iterable, Sequence

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions, shows, without_article
from trce_lightning.errors import InputError
from trce_lightning.prompts.captions import read_captions
from trce_lightning.prompts.records import shuffled

__all__ = ["KEEP_TEMPLATES", "class_names", "harmless_class_names", "keep_prompts", "scene_templates"]

# Class names come without an article. Determiners other than "a" fit all of them.
KEEP_TEMPLATES = (
    "a photograph of the {}",
    "the {} in daylight",
    "this {} up close",
    "one {} and nothing else",
    "an old print of the {}",
    "my {} at home",
    "the {} in the distance",
    "a painting with this {} in it",
    "the {} on a shelf",
    "a magazine page about the {}",
)
SCENE_TEMPLATES = (
    "{{}} beside the {}",
    "the {} next to {{}}",
    "{{}} in front of the {}",
    "the {} to the left of {{}}",
)
"""The sentences of a class name and a concept's name. No prompt set phrases two things like this."""
_NO_CLASS = ("__background__", "N/A")
_log = logging.getLogger(__name__)


def keep_prompts(
    concepts: Sequence[Concept], *, path: str | None = None, subjects: Sequence[str] | None = None, limit: int
) -> list[str]:
    """Return the prompts to keep while ``concepts`` are erased. Prompts that mention a concept are left out.

    If ``path`` is given, the prompts are its captions (:func:`.read_captions`). Otherwise they are
    :data:`KEEP_TEMPLATES` filled with ``subjects``, the names of things that the model can generate. If
    ``subjects`` is None, the names are those of the ImageNet and COCO classes that torchvision ships.

    Args:
        concepts: the concepts that are erased.
        path: a caption file.
        subjects: names for the templates.
        limit: the largest number of prompts to return. The choice spreads over all captions or subjects and
            depends on their text alone. A larger limit extends the list of a smaller one.

    Returns:
        Different prompts, from 1 to ``limit``. The empty prompt is never among them.

    Raises:
        InputError: ``limit`` is below 1, the file is unreadable or empty, there are no subjects, or no prompt
            is left to keep.
    """
    if limit < 1:
        raise InputError(f"keep_prompts.limit: expected at least 1, got {limit}")
    if path is not None:
        candidates = shuffled(read_captions(path))
    else:
        names = class_names() if subjects is None else subjects
        candidates = _fill_templates(name for name in names if not shows(name, concepts))
    kept = [prompt for prompt in candidates if not mentions(prompt, concepts)]
    names = [concept.name for concept in concepts]
    if not kept:
        raise InputError(
            f"keep_prompts: expected prompts that name none of {names}, got none among {len(candidates)}"
        )
    _log.info(
        "%d of %d prompts name none of %s; keeping %d",
        len(kept),
        len(candidates),
        names,
        min(limit, len(kept)),
    )
    return kept[:limit]


def _fill_templates(subjects: Iterable[str]) -> list[str]:
    """Return every subject in every template. Each run of ``len(subjects)`` prompts has each subject once."""
    names = shuffled(name for subject in subjects if (name := without_article(subject)))
    if not names:
        raise InputError("keep_prompts.subjects: expected one or more names, got none")
    count = len(KEEP_TEMPLATES)
    return [
        KEEP_TEMPLATES[(index + turn) % count].replace("{}", name)
        for turn in range(count)
        for index, name in enumerate(names)
    ]


def scene_templates(concepts: Sequence[Concept], *, limit: int) -> list[str]:
    """Return up to ``limit`` sentences with ``{}`` for a concept's name beside a class name.

    Class names that name a concept are left out.
    """
    names = shuffled(harmless_class_names(concepts))[:limit]
    return [
        SCENE_TEMPLATES[index % len(SCENE_TEMPLATES)].format(without_article(name))
        for index, name in enumerate(names)
    ]


def harmless_class_names(concepts: Sequence[Concept]) -> list[str]:
    """Return the class names that neither name nor show a concept."""
    return [name for name in class_names() if not (mentions(name, concepts) or shows(name, concepts))]


def class_names() -> list[str]:
    """Return the names of the ImageNet and COCO classes that torchvision ships."""
    from torchvision.models import get_weight

    weights = ("ResNet18_Weights.IMAGENET1K_V1", "FasterRCNN_ResNet50_FPN_Weights.COCO_V1")
    names = [name for weight in weights for name in get_weight(weight).meta["categories"]]
    return [name for name in names if name not in _NO_CLASS]
