"""Prompt files: CSV with a header, whose columns may have different names."""

import codecs
import csv
import hashlib
import io
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord, PromptSet

log = logging.getLogger(__name__)
FIELDS = ("prompt", "id", "seed", "guidance", "categories", "label")
"""The fields that are read from a prompt file."""
DECISIVE_FIELDS = ("prompt", "seed", "guidance")
"""The fields that decide which image the model generates.

If a map names a column for one of these and the file lacks it, it is the wrong file.
"""
# The column names of files without a map of their own. This project's names come first.
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
    """Return the prompts of a file (CSV with a header, UTF-8).

    The set is named ``name``. If ``name`` is None, it is named by the file's stem.

    ``columns`` maps each wanted field of :data:`FIELDS` to the possible names of its column, in any case. The
    first name that the file has is read, and other columns are ignored. If no id column is found, ids are the
    row numbers, from 1. If ``columns`` is None, the columns are ``prompt`` (or adv_prompt, "sensitive
    prompt") and, optionally, ``id`` (or case_number), ``seed`` (or evaluation_seed), ``guidance`` (or
    evaluation_guidance) and ``label``.

    If a row has no prompt, it is left out and logged. Spreadsheets and pandas read some words, such as
    "null", as empty, and most copies of the published I2P have such a row. It still counts as a row, so that
    the other rows keep their numbers.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file is empty or not UTF-8, has no prompt column or two, has none of ``columns`` for a
            decisive field, has no rows, or lacks the prompt in most of them. Also raised if a row, named by
            its line, has an empty or repeated id, more cells than the header, or an unreadable seed or
            guidance.
    """
    path = Path(path)
    content = path.read_bytes()
    records: dict[str, PromptRecord] = {}
    lines: dict[str, int] = {}
    empty: list[str] = []
    for row_number, (line, cells) in enumerate(_rows(path, decoded(path, content), columns), start=1):
        if not cells["prompt"]:
            empty.append(f"line {line}" + (f" (id {cells['id']})" if cells.get("id") else ""))
            continue
        record = _record(f"{path}, line {line}", cells, row_number)
        if record.id in records:
            raise InputError(
                f"{path}, line {line}: expected a different id in every row, got {record.id!r} again "
                f"(first in line {lines[record.id]})"
            )
        records[record.id], lines[record.id] = record, line
    _check_few_empty(path, empty, len(records))
    return PromptSet(name or path.stem, tuple(records.values()), hashlib.sha256(content).hexdigest())


def _check_few_empty(path: Path, empty: Sequence[str], full: int) -> None:
    """Log the rows without a prompt. Refuse a file in which they outnumber the other rows."""
    if not empty and not full:
        raise InputError(f"{path}: expected at least one row with a prompt, got the header alone")
    if len(empty) > full:
        raise InputError(
            f"{path}: expected a prompt in every row, got none in {len(empty)} of {len(empty) + full}, "
            f"the first in {empty[0]}"
        )
    if empty:
        log.info(
            "%s: %d of %d rows have no prompt and are left out: %s",
            path,
            len(empty),
            len(empty) + full,
            ", ".join(empty),
        )


def _rows(
    path: Path, text: str, wanted: Mapping[str, Sequence[str]] | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the first line and the known cells of every row that isn't blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    start = 1
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
    except csv.Error as error:
        raise InputError(
            f"{path}, line {start}: expected a row of CSV, quotes within quotes doubled, got: {error}"
        ) from error


def _columns(path: Path, header: Sequence[str], wanted: Mapping[str, Sequence[str]] | None) -> dict[str, int]:
    """Return the position of the column of each field that the file has."""
    names = [name.strip().casefold() for name in header]
    columns: dict[str, int] = {}
    for field_name, aliases in (_COLUMNS if wanted is None else wanted).items():
        found = [alias.casefold() for alias in aliases if alias.casefold() in names]
        required = field_name == "prompt" or (wanted is not None and field_name in DECISIVE_FIELDS)
        if found:
            columns[field_name] = _only(path, header, names, found[0])
        elif aliases and required:
            raise InputError(
                f"{path}: expected a column named one of {', '.join(aliases)}, "
                f"got the columns {', '.join(header)}{_other_separator(header)}"
            )
    return columns


def _only(path: Path, header: Sequence[str], names: Sequence[str], name: str) -> int:
    """Return the position of the column of this name. Refuse a file with two such columns."""
    positions = [index for index, other in enumerate(names) if other == name]
    if len(positions) > 1:
        found = " and ".join(f"column {index + 1} ({header[index]})" for index in positions)
        raise InputError(f"{path}: expected one column named {name}, got {found}; rename all but one")
    return positions[0]


def _other_separator(header: Sequence[str]) -> str:
    names = {";": "semicolons", "\t": "tabs"}
    found = [name for mark, name in names.items() if len(header) == 1 and mark in header[0]]
    return f", separated by {found[0]} and not by commas" if found else ""


def _check_width(place: str, cells: Sequence[str], width: int) -> None:
    if any(cell.strip() for cell in cells[width:]):
        raise InputError(
            f"{place}: expected {width} cells as in the header, got {len(cells)}; quote texts with commas"
        )


def _record(place: str, cells: dict[str, str], row_number: int) -> PromptRecord:
    if cells.get("id") == "":
        raise InputError(f"{place}: expected a text in the id column, got an empty cell")
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
    # If a column has gaps, spreadsheets write 7 as 7.0.
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


@dataclass
class PromptFileConfig:
    """A prompt file. If `path` is set, it is used and not `filename` of the Hub's data set `hub_id`."""

    path: str | None = None
    hub_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    sha256: str | None = None  # the hash that the file must have
    columns: dict[str, list[str]] = field(default_factory=dict)  # field → names of its column


_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def decoded(path: Path, content: bytes) -> str:
    """Return the text of a file, without the byte order mark that some programs write.

    Raises:
        InputError: the bytes are not UTF-8, or contain NUL. The message names the line.
    """
    found = next((f"{name} by its first bytes" for mark, name in _MARKS.items() if content[:2] == mark), None)
    try:
        text = content.decode("utf-8-sig")
        position = content.find(b"\0")
    except UnicodeDecodeError as error:
        text, position = "", error.start
    if found is None and position < 0:
        return text
    line = len(content[: max(position, 0) + 1].splitlines())
    raise InputError(
        f"{path}, line {line}: expected text in UTF-8, got "
        f"{found or f'the byte 0x{content[position]:02x} in it'}; save it as UTF-8"
    )
