"""Imports point one way: maths ← adapters, data, metrics ← module ← callbacks ← scripts; no cycles."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MATHS = ("closed_form", "losses", "tokens", "sampling")
LAYERS = (
    (
        "trce_lightning.closed_form",
        "trce_lightning.losses",
        "trce_lightning.tokens",
        "trce_lightning.sampling",
    ),
    ("trce_lightning.adapters", "trce_lightning.data", "trce_lightning.metrics"),
    ("trce_lightning.module",),
    ("callbacks",),
    (
        "trce_lightning.jobs.train",
        "trce_lightning.jobs.evaluate",
        "trce_lightning.jobs.train",
        "trce_lightning.jobs.results",
        "trce_lightning.cli",
        "trce_lightning.api",
        "trce_lightning.jobs.demo",
        "train",
        "eval",
        "demo",
    ),
)


def files() -> dict[str, Path]:
    """Every module of the project by its name; a package goes by its own."""
    paths = [
        *sorted((ROOT / "trce_lightning").rglob("*.py")),
        *sorted((ROOT / "callbacks").rglob("*.py")),
        ROOT / "train.py",
        ROOT / "eval.py",
        ROOT / "demo.py",
    ]
    names = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(names, paths, strict=True)}


def imports(source: str) -> Iterator[str]:
    """Modules and names that a source imports, anywhere in it but under TYPE_CHECKING; all are absolute."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def layer(name: str) -> int | None:
    """The layer of a module, None where any may import it that doesn't make a cycle."""
    return next(
        (i for i, modules in enumerate(LAYERS) if any(within(name, module) for module in modules)), None
    )


def upward(name: str, source: str) -> list[str]:
    """Imports of a module from layers above its own."""
    own = layer(name)
    above = (
        found
        for found in imports(source)
        if (other := layer(found)) is not None and own is not None and other > own
    )
    return sorted(above)


def test_the_check_sees_wrong_imports() -> None:
    lines = ["import callbacks", "def f():", "    from trce_lightning.module import TRCE"]
    source = "\n".join([*lines, "from trce_lightning import run", ""])
    assert upward("trce_lightning.adapters.x", source) == [
        "callbacks",
        "trce_lightning.module.TRCE",
        "trce_lightning.jobs.train",
    ]
    assert upward("callbacks.grid", source) == ["trce_lightning.jobs.train"]
    assert upward("trce_lightning.cli", source) == []
    assert upward("callbacks.grid", "if TYPE_CHECKING:\n    import trce_lightning.run") == []
    # A name that merely begins like a module is another one.
    assert layer("trce_lightning.jobs.runs") is None and layer("trce_lightning.jobs.train") == 4


@pytest.mark.parametrize("name", sorted(files()))
def test_imports_point_one_way(name: str) -> None:
    assert upward(name, files()[name].read_text()) == []


@pytest.mark.parametrize("name", MATHS)
def test_maths_imports_torch_and_the_standard_library_alone(name: str) -> None:
    found = set(imports((ROOT / "trce_lightning" / f"{name}.py").read_text()))
    own = tuple(f"trce_lightning.{module}." for module in MATHS)
    outside = {module for module in found if not module.startswith(own)}
    assert {module.partition(".")[0] for module in outside} <= {"torch", *sys.stdlib_module_names}
    assert any(within(module, "torch") for module in outside)


def test_only_adapters_name_the_denoisers_modules() -> None:
    """``emoji`` builds its own network, and the trainable pattern is the user's."""
    exempt = ("trce_lightning.adapters", "trce_lightning.emoji", "trce_lightning.config.schema")
    names = ("to_q", "to_k", "to_v", "attn1", "attn2", "encoder_hid_proj")
    for module, path in files().items():
        if not any(within(module, other) for other in exempt):
            words = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert words.isdisjoint(names), module


def test_no_module_imports_itself_through_others() -> None:
    modules = files()
    graph = {
        name: {
            other
            for found in imports(path.read_text())
            for other in (found, found.rpartition(".")[0])
            if other in modules
        }
        - {name}
        for name, path in modules.items()
    }
    # Importing from a package's file runs the package's own first, and no more; leave these edges out.
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    assert packages & set(graph)
    try:
        TopologicalSorter({name: others - packages for name, others in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {' → '.join(error.args[1])}")
