"""Docstrings begin with a verb or a noun and its article, not in the middle of a sentence."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "trce_lightning").rglob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]
FRAGMENTS = frozenset(
    "As At Beside By Else From If In Of On One's Over Than That Those To Under What When Where Whether Which "
    "Who Whose With Without".split()
)
"""Words that begin a fragment: a reader must guess what is spoken of."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Every text that stands alone, with its line: docstrings, also those below a field or a constant."""
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield node.lineno, value.value.strip()


def fragments(source: str) -> list[tuple[int, str]]:
    return [(line, text.split("\n")[0]) for line, text in docstrings(source) if text.split()[0] in FRAGMENTS]


def test_the_check_sees_fragments() -> None:
    source = 'x = 1\n"""Of all calls."""\ndef f():\n    """Return x."""\nclass C:\n    """Whether so."""\n'
    assert fragments(source) == [(2, "Of all calls."), (6, "Whether so.")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(path: Path) -> None:
    assert fragments(path.read_text("utf-8")) == []
