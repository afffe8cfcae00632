"""Runs on Weights & Biases, by its own package: nothing but its variables says that it is offline."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from trce_lightning.cli import explain
from trce_lightning.config.schema import LoggerConfig
from trce_lightning.errors import InputError
from trce_lightning.jobs.trainers import make_loggers

wandb = pytest.importorskip("wandb")
KEY = "0" * 40
NO_SERVER = "http://127.0.0.1:9"
SECONDS = 60.0


@pytest.fixture(autouse=True)
def fresh_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A home without settings, no variable of W&B's, and a W&B that has read neither yet."""
    for name in [*os.environ]:
        if name.startswith("WANDB_") or name in ("NETRC", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    wandb.teardown()
    yield
    if wandb.run is not None:
        wandb.finish()
    wandb.teardown()


def begin(folder: Path, **options: str | float) -> WandbLogger:
    logger = make_loggers(LoggerConfig(wandb=True, **options), folder, "mine")[-1]
    assert isinstance(logger, WandbLogger)
    return logger


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("trce_lightning")]


def assert_offline(logger: WandbLogger, folder: Path) -> None:
    """A number that is logged is in an offline run's file."""
    logger.log_metrics({"answer": 42.0}, step=0)
    logger.log_table("prompts", columns=["prompt"], data=[["a rose"]])
    logger.experiment.finish()
    wandb.teardown()  # waits for what writes
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"answer" in file.read_bytes()


def test_without_a_key_a_run_is_offline_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        logger = begin(tmp_path / "run")
    assert_offline(logger, tmp_path / "run")
    (line,) = ours(caplog)
    assert "no key for W&B" in line and "WANDB_API_KEY" in line and "offline" in line
    assert "WANDB_MODE" not in os.environ


def test_without_a_server_a_run_goes_offline_soon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", NO_SERVER)
    start = time.monotonic()
    logger = begin(tmp_path / "run", init_timeout=0.5)
    assert_offline(logger, tmp_path / "run")
    assert time.monotonic() - start < SECONDS
    (line,) = ours(caplog)
    assert "can't be reached" in line and NO_SERVER in line and "offline" in line


@pytest.mark.parametrize("mode", ["dryrun", "disabled"])
def test_the_mode_that_is_set_is_taken(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with caplog.at_level("INFO"):
        logger = begin(tmp_path / "run")
    assert logger.experiment.settings.mode == mode and ours(caplog) == []
    logger.log_table("prompts", columns=["prompt"], data=[["a rose"]])
    assert len([*(tmp_path / "run").glob("wandb/offline-run-*")]) == (mode == "dryrun")


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({"WANDB_API_KEY": "short"}, {}, ["WANDB_API_KEY", "40+ characters, has 5", "WANDB_MODE=offline"]),
        ({"WANDB_API_KEY": f" {KEY}"}, {}, ["WANDB_", "whitespace"]),
        ({"WANDB_API_KEY": KEY, "WANDB_IDENTITY_TOKEN_FILE": __file__}, {}, ["WANDB_IDENTITY_TOKEN_FILE"]),
        ({"WANDB_IDENTITY_TOKEN_FILE": "/gone"}, {}, ["WANDB_IDENTITY_TOKEN_FILE", "'/gone'"]),
        ({"WANDB_MODE": "bogus"}, {}, ["WANDB_MODE", "'bogus'", "'offline'"]),
        ({"WANDB_MODE": ""}, {}, ["WANDB_MODE", "''", "'offline'"]),
        ({"WANDB_BASE_URL": "bogus"}, {}, ["WANDB_BASE_URL", "'bogus'", "URL"]),
        ({"WANDB_HTTP_TIMEOUT": "soon"}, {}, ["WANDB_HTTP_TIMEOUT", "'soon'"]),
        ({"WANDB_MODE": "offline"}, {"project": "a/b"}, ["logger.project", "'a/b'"]),
        ({"WANDB_DATA_DIR": "/proc/gone", "WANDB_MODE": "offline"}, {}, ["WANDB_DATA_DIR", "/proc/gone"]),
    ],
)
def test_what_wandb_refuses_is_a_sentence_at_the_start(
    variables: dict[str, str],
    options: dict[str, str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((InputError, OSError)) as refused:
        begin(tmp_path / "run", **options)
    lines = explain(refused.value)
    assert lines is not None and all(part in " ".join(lines) for part in expected), lines


def test_a_key_in_netrc_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine 127.0.0.1:9\n  login user\n  password short\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", NO_SERVER)
    with pytest.raises(InputError, match=r"~/\.netrc.*40\+ characters, has 5"):
        begin(tmp_path / "run")


def test_files_of_wandb_that_cannot_be_read_count_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "home" / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("nonsense")
    (tmp_path / "home" / ".netrc").write_text("machine\nfoo bar\n")
    assert begin(tmp_path / "run").experiment.settings.mode == "offline"


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("")
    with pytest.raises(OSError, match="wandb") as refused:
        begin(tmp_path)
    assert explain(refused.value) is not None


def test_one_process_of_several_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    (logger,) = make_loggers(LoggerConfig(wandb=True), tmp_path, "mine")
    assert isinstance(logger, CSVLogger) and not (tmp_path / "wandb").exists()
