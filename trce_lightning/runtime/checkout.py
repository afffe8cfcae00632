"""Which code it is that runs: the commit of this project's checkout, or its version. Torch-free."""

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
    """This checkout's commit, with ``-dirty`` if files differ from it; the version outside of a checkout.

    Of the first call: files may change while a run goes on.
    """
    version = f"v{__version__}"
    try:
        if not (_is_checkout(PROJECT) and PROJECT.samefile(_git("rev-parse", "--show-toplevel"))):
            return version
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):  # no git, one that doesn't start, or no repository
        return version


def _is_checkout(folder: Path) -> bool:
    """Whether this project lies there, and not its package alone in another project."""
    file = folder / "pyproject.toml"
    if not file.is_file():
        return False
    project = tomllib.loads(file.read_text("utf-8")).get("project", {})
    return bool(project.get("name") == "trce-lightning")


def _git(*words: str) -> str:
    # A hook's variables would name the repository that it runs in.
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
