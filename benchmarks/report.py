"""Rows of the table, their goals, and where the table goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
GPU_RESULTS = Path(__file__).parent / "results_gpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


@dataclass(frozen=True)
class Row:
    """One measurement next to its baseline, with at most one goal.

    ``gain`` is plain / ours, or ours / plain where more is better (``rate``).
    """

    what: str
    ours: float
    unit: str
    plain: float | None = None
    rate: bool = False
    least_gain: float | None = None
    most: float | None = None
    """The most that ``ours`` may be, in ``unit``."""
    most_share: float | None = None
    """The most that ours / plain may be."""

    @property
    def gain(self) -> float | None:
        """Return how many times better ours is; None without a baseline."""
        if self.plain is None:
            return None
        return self.ours / self.plain if self.rate else self.plain / self.ours

    @property
    def goal(self) -> str:
        """The goal in words; empty where there is none."""
        if self.least_gain is not None:
            return f"≥ {self.least_gain:g}×"
        if self.most is not None:
            return f"≤ {_number(self.most)} {self.unit}".strip()
        return "" if self.most_share is None else f"ours ≤ {self.most_share:g} plain"

    @property
    def met(self) -> bool | None:
        """Return whether the goal is met; None where there is none."""
        if self.most is not None:
            return self.ours <= self.most
        if self.gain is None:
            return None
        if self.least_gain is not None:
            return self.gain >= self.least_gain
        return None if self.most_share is None else 1 / self.gain <= self.most_share

    def cells(self) -> list[str]:
        """Return the row as the table shows it."""
        plain = "" if self.plain is None else f"{_number(self.plain)} {self.unit}"
        gain = "" if self.gain is None else f"{_number(self.gain)}×"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return [self.what, plain.strip(), f"{_number(self.ours)} {self.unit}".strip(), gain, self.goal, met]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    head = [["", "plain", "ours", "gain", "goal", "met"], ["---", "---:", "---:", "---:", "---", "---"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *(row.cells() for row in rows)])


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: its rows, and a ``note`` that says why some are missing."""

    name: str
    rows: list[Row] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A GPU: what was measured on it, and with which versions."""

    versions: dict[str, str]
    sections: list[Section] = field(default_factory=list)


def load_cards(file: Path = GPU_RESULTS) -> dict[str, Card]:
    """Return what :func:`save_cards` has written, by the card's name."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: Card(
            card["versions"],
            [
                Section(part["name"], [Row(**row) for row in part["rows"]], part["note"])
                for part in card["sections"]
            ],
        )
        for name, card in found.items()
    }


def save_cards(cards: Mapping[str, Card], file: Path = GPU_RESULTS) -> None:
    """Write everything that was measured on GPUs."""
    content = {name: dataclasses.asdict(card) for name, card in cards.items()}
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def gpu_tables(cards: Mapping[str, Card]) -> str:
    """Return Markdown with a heading for each card."""
    parts = []
    for name, card in cards.items():
        rows = [row.cells()[:4] for section in card.sections for row in section.rows]
        head = [["", "plain", "measured", "gain"], ["---", "---:", "---:", "---:"]]
        lines = [f"### {name}", "", *(f"| {' | '.join(cells)} |" for cells in [*head, *rows]), ""]
        lines += [f"- {section.name}: {section.note}" for section in card.sections if section.note]
        lines += [", ".join(f"{what} {version}" for what, version in card.versions.items()) + "."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def load(file: Path = RESULTS) -> dict[str, list[Row]]:
    """Return the rows by benchmark, as :func:`save` left them."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    return {name: [Row(**row) for row in rows] for name, rows in found.items()}


def load_machine(file: Path = RESULTS) -> dict[str, Any]:
    """Return what the rows were measured on, as :func:`save` left it."""
    machine: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["machine"]
    return machine


def save(results: dict[str, list[Row]], machine: dict[str, Any], file: Path = RESULTS) -> None:
    """Write the rows by benchmark, and what they were measured on."""
    rows = {name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()}
    file.write_text(
        json.dumps({"machine": machine, "benchmarks": rows}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a column of names and columns of figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def refresh(text: str, page: Path = PAGE, name: str = "benchmarks") -> None:
    """Put ``text`` between the page's two marks of that name. ``ValueError`` where it has none."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {first} and {last}")
    page.write_text(f"{before}{first}\n{text.strip()}\n{last}{after}", encoding="utf-8")
