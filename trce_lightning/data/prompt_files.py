"""Prompt files: CSV with a header, by whatever names others give the columns."""

import csv
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trce_lightning.data.prompt_sets import PromptRecord, PromptSet
from trce_lightning.errors import InputError

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
        InputError: the file is empty, has no prompt column, none of ``columns`` for a decisive field, or no
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
            raise InputError(
                f"{path}, line {line}: expected a different id in every row, got {record.id!r} again "
                f"(first in line {lines[record.id]})"
            )
        records[record.id], lines[record.id] = record, line
    if not records:
        raise InputError(f"{path}: expected at least one row with a prompt, got the header alone")
    return PromptSet(name or path.stem, tuple(records.values()), sha256)


def _rows(path: Path, wanted: Mapping[str, Sequence[str]] | None) -> Iterator[tuple[int, dict[str, str]]]:
    """First line and known cells of every row that isn't blank."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise InputError(f"{path}: expected CSV with a header, got an empty file or first line")
            columns = _columns(path, header, wanted)
            start = reader.line_num + 1
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    _check_width(f"{path}, line {start}", cells, len(header))
                    padded = [*cells, *[""] * (len(header) - len(cells))]
                    yield start, {field: padded[index].strip() for field, index in columns.items()}
                start = reader.line_num + 1
        except (csv.Error, UnicodeError) as error:
            raise InputError(f"{path}, line {reader.line_num}: expected CSV in UTF-8, {error}") from error


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
            raise InputError(
                f"{path}: expected a column named one of {', '.join(aliases)}, "
                f"got the columns {', '.join(header)}"
            )
    return columns


def _check_width(place: str, cells: Sequence[str], width: int) -> None:
    if any(cell.strip() for cell in cells[width:]):
        raise InputError(
            f"{place}: expected {width} cells as in the header, got {len(cells)}; quote texts with commas"
        )


def _record(place: str, cells: dict[str, str], row_number: int) -> PromptRecord:
    for field_name in ("prompt", "id"):
        if cells.get(field_name) == "":
            raise InputError(f"{place}: expected a text in the {field_name} column, got an empty cell")
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
        raise InputError(f"{place}: expected a whole number from 0 to 2**64 - 1 as seed, got {text!r}")
    return int(whole[1])


def _guidance(place: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"{place}: expected a number of 0 or more as guidance, got {text!r}")
    return value
