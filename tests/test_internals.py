"""Internal names of libraries change without notice: the versions of these libraries have an upper bound."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDERS = ("trce_lightning", "benchmarks")
INTERNALS = {
    "_SubprocessScriptLauncher": "lightning",
    "_signal_connector": "lightning",
    "_sigterm_notifier_fn": "lightning",
    "_is_avx512_bf16_supported": "torch",
    "_is_amx_tile_supported": "torch",
    "_version": "torch",
    "_orig_mod": "torch",
    "_compiled_call_impl": "torch",
    "_foreach_add_": "torch",
    "_foreach_copy_": "torch",
    "_foreach_mul_": "torch",
    "_foreach_sub": "torch",
    "_diffusers_hook": "diffusers",
    "_pack_latents": "diffusers",
    "_prepare_latent_image_ids": "diffusers",
    "_unpack_latents": "diffusers",
}
"""The private names that are used, and the package that owns each."""
DOCUMENTED = {"_exit", "_fields", "_asdict", "_replace", "_make", "_hf_hook"}
"""Names of os, of named tuples and of accelerate, which are told to users all the same."""


def private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def names_of(source: str) -> tuple[set[str], set[str]]:
    """Private names that a source uses of others' things, and those that it defines."""
    used: set[str] = set()
    defined: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            used |= {part for module in modules for part in module.split(".")}
        elif isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (defined if is_own else used).add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            used |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return set(filter(private, used)), set(filter(private, defined))


def test_the_check_sees_internals() -> None:
    source = "from a._b import _c\nx._d.e\nhasattr(x, '_f')\nself._g = x._h.i\ndef _j(): ...\nx.__dict__\n"
    assert names_of(source) == ({"_b", "_c", "_d", "_f", "_h"}, {"_g", "_j"})


def test_every_internal_name_in_use_is_listed_with_its_library() -> None:
    found = [names_of(file.read_text()) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    used, defined = (set().union(*names) for names in zip(*found, strict=True))
    assert used - defined - DOCUMENTED == set(INTERNALS)


@pytest.mark.parametrize("library", sorted(set(INTERNALS.values())))
def test_a_library_whose_internals_are_used_ends_before_its_next_minor_version(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [Requirement(text) for text in project["dependencies"] if Requirement(text).name == library]
    (pinned,) = re.findall(rf"^{library}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    version = Version(pinned)
    assert needed.specifier.contains(version)
    for newer in (f"{version.major}.{version.minor + 1}", f"{version.major + 1}.0"):
        assert not needed.specifier.contains(newer), f"{needed} takes {newer}, which nobody has tried"
