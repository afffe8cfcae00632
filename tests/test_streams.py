"""No terminal, locale or reader ends a run: what can't be said is replaced or dropped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCALES = {
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    "latin1": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "unbuffered": {"PYTHONUNBUFFERED": "1"},
    "dumb": {"PYTHONUNBUFFERED": "", "TERM": "dumb", "COLUMNS": "", "LINES": ""},
}
SPEAK = """
import logging, sys
from pathlib import Path
from trce_lightning.runtime.streams import keep_speaking
keep_speaking()
from rich.console import Console
from tqdm import tqdm
logging.basicConfig(level=logging.INFO, force=True)
for number in tqdm(range(2000), "– 枪", mininterval=0, miniters=1):
    logging.info("%d × 2 – 枪", number)
    sys.stdout.write("┏━ × –\\n")
Console().print("┏━ × –")
sys.stdout.flush()
Path(sys.argv[1]).write_text("whole")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "speak.py"
    file.write_text(SPEAK, encoding="utf-8")
    return file


def environment(name: str) -> dict[str, str]:
    rest = {
        key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))
    }
    return rest | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | LOCALES[name]


@pytest.mark.parametrize("name", LOCALES)
def test_no_locale_ends_what_is_done(name: str, script: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(script), str(tmp_path / "end")]
    done = subprocess.run(words, env=environment(name), capture_output=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "whole", done.stderr[-500:]
    assert b"Traceback" not in done.stderr and b"Logging error" not in done.stderr
    if name == "ascii":
        assert b"1999 \\xd7 2 \\u2013 \\u67aa" in done.stderr


@pytest.mark.parametrize(
    "gone", ["2>&1 | head -1", "| head -1", "2>&-", ">&-", ">&- 2>&- <&-", ">/dev/full 2>&1"]
)
@pytest.mark.parametrize("name", ["dumb", "unbuffered"])
def test_no_reader_that_is_gone_ends_what_is_done(name: str, gone: str, script: Path, tmp_path: Path) -> None:
    words = ["sh", "-c", f'"$0" "$1" "$2" {gone}', sys.executable, str(script), str(tmp_path / "end")]
    done = subprocess.run(words, env=environment(name), capture_output=True, timeout=60)
    assert (tmp_path / "end").read_text() == "whole", done.stderr[-500:]
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


def test_help_may_be_cut_off() -> None:
    words = ["sh", "-c", '"$0" train.py --help | head -1', sys.executable]
    done = subprocess.run(words, cwd=ROOT, env=environment("dumb"), capture_output=True, timeout=60)
    assert done.stdout.count(b"\n") == 1 and done.stderr == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gone"), [("ascii", "2>&1"), ("latin1", "2>&1 | head -1"), ("C", ">&- 2>&-")]
)
def test_a_run_comes_to_its_end(name: str, gone: str, tmp_path: Path) -> None:
    options = f"concept=violence experiment=smoke logger=csv runs={tmp_path}/runs"
    words = ["sh", "-c", f"umask 027; '{sys.executable}' {ROOT}/train.py {options} {gone}"]
    done = subprocess.run(words, env=environment(name), capture_output=True, timeout=600)
    (metrics,) = tmp_path.glob("runs/violence/emoji/*/metrics.json")
    assert "×" in (metrics.parent / "erased" / "README.md").read_text("utf-8"), done.stdout[-500:]
    assert "×" in (metrics.parent / "run.log").read_text("utf-8")
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
