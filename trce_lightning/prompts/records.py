"""Prompt sets of an evaluation, and their records."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

__all__ = [
    "BENIGN",
    "DIRECT",
    "IMPLICIT",
    "MIXED",
    "NEIGHBOURS",
    "UNERASED",
    "PromptRecord",
    "PromptSet",
    "shuffled",
]

DIRECT, IMPLICIT, BENIGN = "direct", "implicit", "benign"
MIXED, UNERASED, NEIGHBOURS = "mixed", "unerased", "neighbours"
"""Names of a concept's own prompt sets."""


@dataclass(frozen=True)
class PromptRecord:
    """One prompt to draw.

    Args:
        id: unique in its set; without ``seed`` the image's noise derives from it.
        seed: of the noise, 0 to 2⁶⁴ − 1.
        guidance_scale: classifier-free guidance of this image; None is the model's own.
        label: what a benign prompt shows.
        categories: every kind of content that the prompt was published under.
        style: the style of picture that the prompt asks for, if any.
        background: the colour of background that it asks for, if any.
        sample_of: id of the record that this one repeats with other noise.
    """

    id: str
    prompt: str
    seed: int | None = None
    guidance_scale: float | None = None
    label: str | None = None
    # Not in repr, which identifies images: these decide nothing that is drawn.
    categories: tuple[str, ...] = field(default=(), repr=False)
    style: str | None = field(default=None, repr=False)
    background: str | None = field(default=None, repr=False)
    sample_of: str | None = field(default=None, repr=False)

    @property
    def prompt_id(self) -> str:
        """An id that all images of the prompt share."""
        return self.sample_of or self.id


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are scored together, under ``name`` in metrics.json; ``sha256`` is of their file."""

    name: str
    records: tuple[PromptRecord, ...]
    sha256: str | None = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """The prompt of each image: images of one text are not independent, whatever their ids."""
        return [record.prompt for record in self.records]

    def first(self, prompts: int) -> "PromptSet":
        """Return the first ``prompts`` prompts with all of their images."""
        kept = set(list(dict.fromkeys(record.prompt_id for record in self.records))[:prompts])
        return replace(self, records=tuple(record for record in self.records if record.prompt_id in kept))

    def sampled(self, samples: int) -> "PromptSet":
        """Repeat every prompt ``samples`` times: on its own noise, then on noise of ids like ``7~1``."""
        repeats = [
            replace(record, id=f"{record.id}~{sample}", seed=None, sample_of=record.id) if sample else record
            for record in self.records
            for sample in range(samples)
        ]
        return replace(self, records=tuple(repeats))


def shuffled(texts: Iterable[str]) -> list[str]:
    """Return the different texts in an arbitrary order, the same on every machine and Python version."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def seed_of(prompt_id: str, sample: int) -> int:
    """Return a seed in [0, 2⁶³) from (prompt id, sample), the same on every machine and in every run."""
    digest = hashlib.sha256(f"{prompt_id}\0{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def image_seed(record: PromptRecord) -> int:
    """Return the seed of the image's noise: the record's, or else one derived from its id."""
    return seed_of(record.id, 0) if record.seed is None else record.seed
