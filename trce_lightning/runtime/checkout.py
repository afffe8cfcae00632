"""The version of the code that runs: the commit of the checkout, or else the package's version.

The module imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from functools import cache
from pathlib import Path

from trce_lightning import __version__

PROJECT = Path(__file__).resolve().parents[2]
GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")


@cache
def commit() -> str:
    """Return this checkout's commit, with ``-dirty`` if files differ from it.

    If the package lies outside of a checkout, return its version. Later calls return the first call's result,
    because files may change during a run.
    """
    version = f"v{__version__}"
    try:
        if not (_is_checkout(PROJECT) and PROJECT.samefile(_git("rev-parse", "--show-toplevel"))):
            return version
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):  # no git, a git that doesn't start, or no repository
        return version


def _is_checkout(folder: Path) -> bool:
    """Return whether ``folder`` is this project, and not another one that contains the package."""
    file = folder / "pyproject.toml"
    if not file.is_file():
        return False
    project = tomllib.loads(file.read_text("utf-8")).get("project", {})
    return bool(project.get("name") == "trce-lightning")


def _git(*words: str) -> str:
    # A git hook sets these variables, and they name the hook's repository.
    environment = {name: value for name, value in os.environ.items() if name not in GIT_VARIABLES}
    run = subprocess.run(
        ["git", "--no-optional-locks", *words],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=True,
    )
    return run.stdout.strip()
