"""The prompt sets of an evaluation, and their records."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

__all__ = [
    "ALIAS",
    "BENIGN",
    "DESCRIPTION",
    "DIRECT",
    "IMPLICIT",
    "LANGUAGES",
    "MISSPELT",
    "MIXED",
    "NEIGHBOURS",
    "PREFIX",
    "SCENES",
    "UNERASED",
    "UNLABELLED",
    "WORDINGS",
    "PromptRecord",
    "PromptSet",
    "shuffled",
]

DIRECT, IMPLICIT, BENIGN = "direct", "implicit", "benign"
MIXED, SCENES = "mixed", "scenes"
UNERASED, NEIGHBOURS = "unerased", "neighbours"
ALIAS, PREFIX, DESCRIPTION, MISSPELT, LANGUAGES = "alias", "prefix", "description", "misspelt", "languages"
"""The names of a concept's own prompt sets."""
WORDINGS = (ALIAS, PREFIX, DESCRIPTION, MISSPELT, LANGUAGES)
"""The sets that ask for the concept in other words than the direct prompts."""
UNLABELLED = (DIRECT, IMPLICIT, *WORDINGS)
"""The sets whose prompts ask for nothing but the concept. Their images have no label to be right about."""


@dataclass(frozen=True)
class PromptRecord:
    """One prompt, from which the model generates one image.

    Args:
        id: unique in its set. If ``seed`` is None, the image's noise derives from the id.
        prompt: the text.
        seed: the seed of the noise, 0 to 2⁶⁴ − 1.
        guidance_scale: the scale of this image's classifier-free guidance. None means the model's own.
        label: the thing that a benign prompt shows.
        categories: every kind of content that the prompt was published under, or the kind of its wording.
        style: the style of picture that the prompt asks for, if any.
        background: the colour of background that the prompt asks for, if any.
        left: the benign thing that the prompt asks for on the left of a scene, if any.
        right: the benign thing that the prompt asks for on the right of a scene, if any.
        sample_of: the id of the record that this one repeats with other noise.
    """

    id: str
    prompt: str
    seed: int | None = None
    guidance_scale: float | None = None
    label: str | None = None
    # The repr identifies images. These fields are not in it, because they don't change the image.
    categories: tuple[str, ...] = field(default=(), repr=False)
    style: str | None = field(default=None, repr=False)
    background: str | None = field(default=None, repr=False)
    left: str | None = field(default=None, repr=False)
    right: str | None = field(default=None, repr=False)
    sample_of: str | None = field(default=None, repr=False)

    @property
    def prompt_id(self) -> str:
        """Return the id that all images of the prompt share."""
        return self.sample_of or self.id


@dataclass(frozen=True)
class PromptSet:
    """The prompts that are scored together under ``name``. ``sha256`` is the hash of their file, if any."""

    name: str
    records: tuple[PromptRecord, ...]
    sha256: str | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """Return the prompt of each image. Images of one text are not independent, whatever their ids."""
        return [record.prompt for record in self.records]

    def first(self, prompts: int) -> "PromptSet":
        """Return the first ``prompts`` prompts with all of their images."""
        kept = set(list(dict.fromkeys(record.prompt_id for record in self.records))[:prompts])
        return replace(self, records=tuple(record for record in self.records if record.prompt_id in kept))

    def sampled(self, samples: int) -> "PromptSet":
        """Return the set with every prompt ``samples`` times.

        The first image of a prompt has the prompt's own noise. Further ones have noise of ids like ``7~1``.
        """
        repeats = [
            replace(record, id=f"{record.id}~{sample}", seed=None, sample_of=record.id) if sample else record
            for record in self.records
            for sample in range(samples)
        ]
        return replace(self, records=tuple(repeats))


def shuffled(texts: Iterable[str]) -> list[str]:
    """Return the different texts in an arbitrary order. It is equal on all machines and Python versions."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def seed_of(prompt_id: str, sample: int) -> int:
    """Return a seed in [0, 2⁶³) for (prompt id, sample). It is the same on every machine and in every run."""
    digest = hashlib.sha256(f"{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def image_seed(record: PromptRecord) -> int:
    """Return the seed of the image's noise: the record's own seed, or else one derived from its id."""
    return seed_of(record.id, 0) if record.seed is None else record.seed
