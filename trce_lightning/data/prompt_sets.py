"""Prompt sets of an evaluation: their records, the CSV files they come from, the subjects they hold."""

import csv
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from trce_lightning.concepts import Concept
from trce_lightning.emoji.subjects import NEAR_VIOLENCE, SENSITIVE, SUBJECTS
from trce_lightning.naming import mentions, without_article

__all__ = [
    "BENIGN",
    "DECISIVE_FIELDS",
    "DIRECT",
    "FIELDS",
    "IMPLICIT",
    "MIXED",
    "NEIGHBOURS",
    "STYLE",
    "UNERASED",
    "PromptRecord",
    "PromptSet",
    "benign_subjects",
    "concept_subjects",
    "kept_subjects",
    "label_groups",
    "load_csv",
    "near_subjects",
    "shuffled",
    "unkept_subjects",
]

DIRECT, IMPLICIT, BENIGN = "direct", "implicit", "benign"
MIXED, UNERASED, NEIGHBOURS = "mixed", "unerased", "neighbours"
"""Names of a concept's own prompt sets."""
STYLE = "style"
"""Name of the concept that is a way of drawing and not a subject."""
_UNSAFE = ("violence", "intoxicants")
_UNKEPT_SHARE = 0.2
FIELDS = ("prompt", "id", "seed", "guidance", "categories", "label")
"""What is read from a prompt file."""
DECISIVE_FIELDS = ("prompt", "seed", "guidance")
"""Those that decide what is drawn: a file without a column that its map names for them is another file."""
# Of files without a map of their own, our names first.
_COLUMNS = {
    "prompt": ("prompt", "adv_prompt", "sensitive prompt"),
    "id": ("id", "case_number"),
    "seed": ("seed", "evaluation_seed"),
    "guidance": ("guidance", "evaluation_guidance"),
    "label": ("label",),
}


@dataclass(frozen=True)
class PromptRecord:
    """One prompt to draw.

    Args:
        id: unique in its set; without ``seed`` the image's noise derives from it.
        seed: of the noise, 0 to 2⁶⁴ − 1.
        guidance_scale: classifier-free guidance of this image; None is the model's own.
        label: what a benign prompt shows.
        categories: every kind of content that the prompt was published under.
        style: the embedded model's style that the prompt asks for, if any.
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
        """The same for all images of a prompt."""
        return self.sample_of or self.id


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are scored together, under ``name`` in metrics.json; ``sha256`` is of their file."""

    name: str
    records: tuple[PromptRecord, ...]
    sha256: str | None = field(default=None, repr=False)

    @property
    def prompt_ids(self) -> list[str]:
        """What each image's prompt is known by: the clusters of images that are not independent."""
        return [record.prompt_id for record in self.records]

    def first(self, prompts: int) -> "PromptSet":
        """The first ``prompts`` prompts with all of their images."""
        kept = set(list(dict.fromkeys(self.prompt_ids))[:prompts])
        return replace(self, records=tuple(record for record in self.records if record.prompt_id in kept))

    def sampled(self, samples: int) -> "PromptSet":
        """Every prompt ``samples`` times: its own noise first, then noise derived from ids like ``7~1``."""
        repeats = [
            replace(record, id=f"{record.id}~{sample}", seed=None, sample_of=record.id) if sample else record
            for record in self.records
            for sample in range(samples)
        ]
        return replace(self, records=tuple(repeats))


def load_csv(
    path: str | Path, *, name: str | None = None, columns: Mapping[str, Sequence[str]] | None = None
) -> PromptSet:
    """Reads a prompt file (CSV with a header, UTF-8); the set is named ``name``, else by the file's stem.

    ``columns`` maps each of :data:`FIELDS` that is wanted to its column's possible names, in any case; the
    first that the file has is read, other columns are ignored, and ids are else the row number, from 1.
    Without it: ``prompt`` (or adv_prompt, "sensitive prompt"); optional ``id`` (or case_number), ``seed`` (or
    evaluation_seed), ``guidance`` (or evaluation_guidance) and ``label``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, has no prompt column, none of ``columns`` for a decisive field, or no
            rows; or a row, named by its line, has an empty prompt, an empty or repeated id, more cells than
            the header, an unreadable seed or guidance.
    """
    path = Path(path)
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    records: dict[str, PromptRecord] = {}
    lines: dict[str, int] = {}
    for line, cells in _rows(path, columns):
        record = _record(f"{path}, line {line}", cells, row_number=len(records) + 1)
        if record.id in records:
            raise ValueError(
                f"{path}, line {line}: expected a different id in every row, got {record.id!r} again "
                f"(first in line {lines[record.id]})"
            )
        records[record.id], lines[record.id] = record, line
    if not records:
        raise ValueError(f"{path}: expected at least one row with a prompt, got the header alone")
    return PromptSet(name or path.stem, tuple(records.values()), sha256)


def concept_subjects(concept: Concept) -> tuple[str, ...]:
    """The embedded model's subjects that show ``concept``, in the order of ``SUBJECTS``.

    Those of the category of that name, else those whose name mentions the concept. "unsafe" is violence and
    intoxicants; "style" is no subject.
    """
    if concept.name == STYLE:
        return ()
    categories = _UNSAFE if concept.name == "unsafe" else (concept.name,)
    by_category = tuple(subject.name for subject in SUBJECTS if subject.category in categories)
    return by_category or tuple(subject.name for subject in SUBJECTS if mentions(subject.name, [concept]))


def benign_subjects(concepts: Iterable[Concept] = ()) -> tuple[str, ...]:
    """Subjects that are in no sensitive category and show none of ``concepts``."""
    shown = {name for concept in concepts for name in concept_subjects(concept)}
    return tuple(s.name for s in SUBJECTS if s.category not in SENSITIVE and s.name not in shown)


def near_subjects(concepts: Sequence[Concept]) -> frozenset[str]:
    """Benign subjects that resemble ``concepts``: their neighbours, and ``NEAR_VIOLENCE`` for violence."""
    violent = {subject.name for subject in SUBJECTS if subject.category == "violence"}
    near: set[str] = set()
    for concept in concepts:
        near |= {without_article(neighbour) for neighbour in concept.neighbours}
        if violent <= set(concept_subjects(concept)):
            near |= set(NEAR_VIOLENCE)
    return frozenset(near.intersection(benign_subjects(concepts)))


def label_groups(concepts: Sequence[Concept]) -> dict[str, frozenset[str]]:
    """Groups of benign subjects whose accuracy is told apart, by name.

    ``near``: :func:`near_subjects`; ``related``: further ones of a near one's category, such as tools;
    ``far``: all others; ``unkept``: :func:`unkept_subjects`, across those three.
    """
    near, benign = near_subjects(concepts), frozenset(benign_subjects(concepts))
    categories = {subject.category for subject in SUBJECTS if subject.name in near}
    alike = {subject.name for subject in SUBJECTS if subject.category in categories}
    related = (benign & alike) - near
    return {"near": near, "related": related, "far": benign - near - related, "unkept": unkept_subjects()}


@cache
def unkept_subjects() -> frozenset[str]:
    """A fifth of the benign subjects: in no kept prompt, so that they show what an erasure does unasked."""
    # An order of its own: prompt sets begin with the first of shuffled(subjects).
    drawn = {f"unkept {name}": name for name in benign_subjects()}
    tickets = shuffled(drawn)
    return frozenset(drawn[ticket] for ticket in tickets[: round(_UNKEPT_SHARE * len(tickets))])


@cache
def kept_subjects() -> frozenset[str]:
    """The benign subjects that kept prompts may name: all but :func:`unkept_subjects`."""
    return frozenset(benign_subjects()) - unkept_subjects()


def shuffled(texts: Iterable[str]) -> list[str]:
    """Different texts in an order that is arbitrary, but the same on every machine and Python version."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def _rows(path: Path, wanted: Mapping[str, Sequence[str]] | None) -> Iterator[tuple[int, dict[str, str]]]:
    """First line and known cells of every row that isn't blank."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise ValueError(f"{path}: expected CSV with a header, got an empty file or first line")
            columns = _columns(path, header, wanted)
            start = reader.line_num + 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    _check_width(f"{path}, line {start}", cells, len(header))
                    padded = [*cells, *[""] * (len(header) - len(cells))]
                    yield start, {field: padded[index].strip() for field, index in columns.items()}
                start = reader.line_num + 1
        except (csv.Error, UnicodeError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: expected CSV in UTF-8, {error}") from error


def _columns(path: Path, header: Sequence[str], wanted: Mapping[str, Sequence[str]] | None) -> dict[str, int]:
    """Position of the column of each field that the file has."""
    names = [name.strip().casefold() for name in header]
    columns: dict[str, int] = {}
    for field_name, aliases in (_COLUMNS if wanted is None else wanted).items():
        found = [alias.casefold() for alias in aliases if alias.casefold() in names]
        required = field_name == "prompt" or (wanted is not None and field_name in DECISIVE_FIELDS)
        if found:
            columns[field_name] = names.index(found[0])
        elif aliases and required:
            raise ValueError(
                f"{path}: expected a column named one of {', '.join(aliases)}, "
                f"got the columns {', '.join(header)}"
            )
    return columns


def _check_width(place: str, cells: Sequence[str], width: int) -> None:
    if any(cell.strip() for cell in cells[width:]):
        raise ValueError(
            f"{place}: expected {width} cells as in the header, got {len(cells)}; quote texts with commas"
        )


def _record(place: str, cells: dict[str, str], row_number: int) -> PromptRecord:
    for field_name in ("prompt", "id"):
        if cells.get(field_name) == "":
            raise ValueError(f"{place}: expected a text in the {field_name} column, got an empty cell")
    seed, guidance = cells.get("seed"), cells.get("guidance")
    return PromptRecord(
        id=cells.get("id", str(row_number)),
        prompt=cells["prompt"],
        seed=_seed(place, seed) if seed else None,
        guidance_scale=_guidance(place, guidance) if guidance else None,
        label=cells.get("label") or None,
        categories=tuple(name.strip() for name in cells.get("categories", "").split(",") if name.strip()),
    )


def _seed(place: str, text: str) -> int:
    # Spreadsheets write 7 as 7.0 where a column has gaps.
    whole = re.fullmatch(r"(\d+)(?:\.0+)?", text, flags=re.ASCII)
    if whole is None or int(whole[1]) >= 2**64:
        raise ValueError(f"{place}: expected a whole number from 0 to 2**64 - 1 as seed, got {text!r}")
    return int(whole[1])


def _guidance(place: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{place}: expected a number of 0 or more as guidance, got {text!r}")
    return value
