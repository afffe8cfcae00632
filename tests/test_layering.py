"""Imports point one way, between folders too: what a room may use stands above it, and nothing comes back."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "trce_lightning"
MATHS = ("closed_form", "losses", "tokens", "sampling")
ROOMS = (
    ("errors", "__init__"),
    MATHS,
    ("runtime",),
    ("concepts",),
    ("prompts",),
    ("config",),
    ("adapters",),
    ("generation",),
    ("data", "metrics"),
    ("evaluation",),
    ("report",),
    ("textual", "module", "export"),
    ("callbacks", "emoji"),
    ("attacks", "erasers"),
    ("jobs",),
    ("cli", "api", "apply", "compare", "expand"),
    ("commands",),
    ("emoji.training", "leaderboard", "tune"),
)
"""Folders and modules of the package. Each may import what stands above it, and its neighbours."""
SCRIPTS = ("train", "eval", "demo")


def files() -> dict[str, Path]:
    """Every module of the project by its name; a package goes by its own."""
    paths = [*sorted((ROOT / PACKAGE).rglob("*.py")), *(ROOT / f"{script}.py" for script in SCRIPTS)]
    names = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(names, paths, strict=True)}


def imports(source: str) -> Iterator[str]:
    """Modules and names that a source imports, anywhere in it, also for types alone; all are absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def room(name: str) -> str | None:
    """The room of a module or of a name in it, None for what is not the package's."""
    if name == PACKAGE:
        return "__init__"
    if not name.startswith(f"{PACKAGE}."):
        return None
    inside = name.removeprefix(f"{PACKAGE}.")
    found = [room for rooms in ROOMS for room in rooms if within(inside, room)]
    # What the package itself hands out, such as its version.
    return max(found, key=len) if found else ("__init__" if "." not in inside else inside)


def level(name: str) -> int:
    levels = [i for i, rooms in enumerate(ROOMS) if name in rooms]
    assert levels, f"no rule names {name}"
    return levels[0]


def upward(name: str, source: str) -> list[str]:
    """Imports of a module from rooms below its own, which may use it."""
    if name in SCRIPTS:
        return [found for found in imports(source) if found.startswith(PACKAGE) and room(found) != "commands"]
    own = room(name)
    assert own is not None
    return sorted(
        found for found in imports(source) if (other := room(found)) is not None and level(other) > level(own)
    )


def test_the_check_sees_wrong_imports() -> None:
    lines = ["import trce_lightning.callbacks", "def f():", "    from trce_lightning.module import TRCE"]
    source = "\n".join([*lines, "from trce_lightning.jobs import runs", "from trce_lightning import cli", ""])
    every = [
        "trce_lightning.callbacks",
        "trce_lightning.cli",
        "trce_lightning.jobs.runs",
        "trce_lightning.module.TRCE",
    ]
    assert upward("trce_lightning.adapters.x", source) == every
    assert upward("trce_lightning.callbacks.grid", source) == [
        "trce_lightning.cli",
        "trce_lightning.jobs.runs",
    ]
    assert upward("trce_lightning.commands", source) == []
    assert upward("train", "from trce_lightning.jobs.train import train") != []
    assert room("trce_lightning.emoji.training.vae") == "emoji.training"
    assert room("trce_lightning.emoji.judge.Judge") == "emoji"
    assert upward("trce_lightning.emoji.judge", "from trce_lightning.emoji.training import vae") != []
    # A name that merely begins like a room is another one, and no room at all is refused.
    with pytest.raises(AssertionError, match="no rule names jobs_of_mine"):
        upward("trce_lightning.jobs_of_mine.x", "import trce_lightning.errors")


@pytest.mark.parametrize("name", sorted(files()))
def test_every_module_has_a_room_and_imports_from_those_above(name: str) -> None:
    if name == PACKAGE:  # hands out the names of its API, when they are asked for
        return
    assert upward(name, files()[name].read_text()) == []


@pytest.mark.parametrize("name", MATHS)
def test_maths_imports_torch_and_the_standard_library_alone(name: str) -> None:
    found = set(imports((ROOT / PACKAGE / f"{name}.py").read_text()))
    own = tuple(f"{PACKAGE}.{module}." for module in MATHS)
    outside = {module for module in found if not module.startswith(own)}
    assert {module.partition(".")[0] for module in outside} <= {"torch", *sys.stdlib_module_names}
    assert any(within(module, "torch") for module in outside)


def test_only_adapters_name_the_denoisers_modules() -> None:
    """``emoji/training`` builds its own network, and the trainable pattern is the user's."""
    exempt = tuple(f"{PACKAGE}.{name}" for name in ("adapters", "emoji.training", "config.schema"))
    names = ("to_q", "to_k", "to_v", "attn1", "attn2", "encoder_hid_proj", "unet")
    for module, path in files().items():
        if not any(within(module, other) for other in exempt):
            words = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert words.isdisjoint(names), module


def graph_of(names: dict[str, str]) -> dict[str, set[str]]:
    """Return what imports what. ``names`` gives the node of each module, such as itself or its room."""
    modules = files()
    graph: dict[str, set[str]] = {}
    for name, node in names.items():
        found = {
            names[other]
            for full in imports(modules[name].read_text())
            for other in (full, full.rpartition(".")[0])
            if other in names
        }
        graph[node] = graph.get(node, set()) | found - {node}
    return graph


def cycle_in(graph: dict[str, set[str]]) -> str | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " → ".join(error.args[1])
    return None


def test_no_room_imports_itself_through_others() -> None:
    names = {name: found for name in files() if (found := room(name)) is not None and found != "__init__"}
    graph = graph_of(names)
    assert cycle_in(graph) is None
    assert cycle_in(graph | {"errors": {"jobs"}}) is not None


def test_no_module_imports_itself_through_others() -> None:
    # Importing from a package's file runs the package's own first, and no more; leave these out.
    names = {name: name for name, path in files().items() if path.name != "__init__.py"}
    graph = graph_of(names)
    # Where a job is split in two, one half names the other for its types.
    typed = {("trce_lightning.jobs.announce", "trce_lightning.jobs.train")}
    typed |= {("trce_lightning.jobs.results", "trce_lightning.jobs.train")}
    for name, other in typed:
        graph[name].discard(other)
    assert cycle_in(graph) is None
