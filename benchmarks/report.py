"""Rows of the table, their goals, and where the table goes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
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
    """Of ``ours``, in ``unit``."""
    most_share: float | None = None
    """Of ours / plain."""

    @property
    def gain(self) -> float | None:
        """How many times better ours is; None without a baseline."""
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
        """Whether the goal is met; None where there is none."""
        if self.most is not None:
            return self.ours <= self.most
        if self.gain is None:
            return None
        if self.least_gain is not None:
            return self.gain >= self.least_gain
        return None if self.most_share is None else 1 / self.gain <= self.most_share

    def cells(self) -> list[str]:
        """As the table shows it."""
        plain = "" if self.plain is None else f"{_number(self.plain)} {self.unit}"
        gain = "" if self.gain is None else f"{_number(self.gain)}×"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return [self.what, plain.strip(), f"{_number(self.ours)} {self.unit}".strip(), gain, self.goal, met]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = [["", "plain", "ours", "gain", "goal", "met"], ["---", "---:", "---:", "---:", "---", "---"]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *(row.cells() for row in rows)])


def load(file: Path = RESULTS) -> dict[str, list[Row]]:
    """Rows by benchmark, as :func:`save` left them."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    return {name: [Row(**row) for row in rows] for name, rows in found.items()}


def save(results: dict[str, list[Row]], machine: dict[str, Any], file: Path = RESULTS) -> None:
    """Rows by benchmark, and what they were measured on."""
    rows = {name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()}
    file.write_text(
        json.dumps({"machine": machine, "benchmarks": rows}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )


def refresh(text: str, page: Path = PAGE, name: str = "benchmarks") -> None:
    """Put ``text`` between the page's two marks of that name. ``ValueError`` where it has none."""
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {first} and {last}")
    page.write_text(f"{before}{first}\n{text.strip()}\n{last}{after}", encoding="utf-8")
