"""The package as it is installed: its names are its own, and a wheel is all that a run needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: object, folder: Path, **environment: str) -> str:
    """Run a command in ``folder``, with nothing of the checkout on Python's path but what is installed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, words)], cwd=folder, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_folders_of_a_user(folder: Path) -> Path:
    """Make folders of names that a user's project has, whose code must not be taken for the package's."""
    for name in ("callbacks", "configs", "jobs", "runtime", "prompts"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise RuntimeError('a user's own {name}')\n")
    return folder


def test_a_users_folders_are_not_taken_for_the_packages(tmp_path: Path) -> None:
    folder = with_folders_of_a_user(tmp_path)
    code = "import sys; sys.path.insert(0, ''); from trce_lightning import erase; print(erase.__module__)"
    assert run(sys.executable, "-c", code, folder=folder) == "trce_lightning.api\n"


def test_callbacks_are_in_one_place() -> None:
    """The folder at the top of a checkout is the package's own."""
    assert (ROOT / "callbacks").resolve() == ROOT / "trce_lightning" / "callbacks"


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_erases(tmp_path: Path) -> None:
    """It takes minutes and 4 GB: everything is installed anew, outside of the checkout."""
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT, folder=tmp_path)
    (wheel,) = tmp_path.glob("trce_lightning-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, folder=tmp_path)
    folder = with_folders_of_a_user(tmp_path / "empty")
    options = ("concept=violence", "experiment=smoke", "output=run", "trainer.precision=32-true")
    run(tmp_path / "venv" / "bin" / "trce-train", *options, folder=folder, HF_HUB_OFFLINE="1")
    assert {"metrics.json", "report.html", "erased"} <= {path.name for path in (folder / "run").iterdir()}
    where = run(python, "-c", "import trce_lightning.callbacks as c; print(c.__file__)", folder=folder)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    run(python, "-c", "import importlib.util as u; assert u.find_spec('callbacks') is None", folder=tmp_path)
