"""Published prompt files: which of them an evaluation names, where they lie, what they repeat."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from trce_lightning.errors import InputError
from trce_lightning.prompts.files import FIELDS, PromptFileConfig, load_csv
from trce_lightning.prompts.hub import dataset_file
from trce_lightning.prompts.records import PromptSet

__all__ = ["SetSummary", "check_file", "load_file", "log_sets", "prompt_files", "summarize_sets"]

log = logging.getLogger(__name__)


class SetSummary(TypedDict):
    """How much of a prompt set is its own; texts count as the same by :func:`_normalized`."""

    records: int
    distinct: int
    """Different texts."""
    sha256: str | None
    """Of the file; None for a set that was not read from one."""
    overlaps: dict[str, int]
    """Other set → different texts that both have; sets that share none are left out."""


def prompt_files(
    prompts: Sequence[str], published: Mapping[str, PromptFileConfig]
) -> list[tuple[str, PromptFileConfig]]:
    """Name and file of each of ``prompts``: ``NAME`` or ``NAME:FILE`` of a published set, or ``FILE``.

    ``NAME:FILE`` goes before the set's own ``path``; what begins with no set's name is a file throughout,
    named by its stem and read by the names of columns that :func:`load_csv` knows.

    Raises:
        InputError: two of them have one name.
    """
    files: dict[str, PromptFileConfig] = {}
    for item in prompts:
        name, colon, path = item.partition(":")
        if name not in published:
            name, config = Path(item).stem, PromptFileConfig(path=item)
        else:
            config = replace(published[name], path=path) if colon else published[name]
        if name in files:
            raise InputError(f"option 'prompts': expected sets of different names, got {name!r} twice")
        files[name] = config
    return list(files.items())


def check_file(name: str, config: PromptFileConfig, published: Sequence[str]) -> None:
    """What can be refused before a file is read.

    Raises:
        FileNotFoundError: no file ``config.path``.
        InputError: neither a path nor a place on the Hub, or columns that :func:`load_csv` can't use.
    """
    if config.path is not None and not Path(config.path).is_file():
        sets = "" if name in published else f"\npublished sets: {', '.join(published)}"
        raise FileNotFoundError(f"option 'prompts': no file {config.path!r}{sets}")
    if config.path is None and (config.hub_id is None or config.filename is None):
        raise InputError(
            f"option 'prompts': expected the file of {name!r}, which isn't shipped, as {name}:FILE.csv, "
            "got none"
        )
    if unknown := [field for field in config.columns if field not in FIELDS]:
        raise InputError(
            f"option 'published.{name}.columns': expected any of {', '.join(FIELDS)}, got {unknown[0]!r}"
        )
    if config.columns and not config.columns.get("prompt"):
        raise InputError(f"option 'published.{name}.columns.prompt': expected a column's name, got none")


def load_file(name: str, config: PromptFileConfig) -> PromptSet:
    """Reads a prompt file, from the Hub where there is no ``path``, and logs its sha256.

    Raises:
        FileNotFoundError: no such file, or the Hub doesn't hand it out.
        InputError: the file has another sha256 than ``config.sha256``, or isn't as :func:`load_csv` needs it.
    """
    path = Path(config.path) if config.path is not None else _download(name, config)
    prompts = load_csv(path, name=name, columns=config.columns or None)
    if config.sha256 is not None and config.sha256.lower() != prompts.sha256:
        raise InputError(
            f"option 'published.{name}.sha256': expected {config.sha256}, got {prompts.sha256} of {path}"
        )
    log.info("prompts %s: %s, sha256 %s", name, path, prompts.sha256)
    return prompts


def summarize_sets(sets: Sequence[PromptSet]) -> dict[str, SetSummary]:
    """Size of each set, its different texts, and how many of these others have too; by the sets' names."""
    texts = {prompts.name: {_normalized(record.prompt) for record in prompts.records} for prompts in sets}
    return {
        prompts.name: SetSummary(
            records=len(prompts.records),
            distinct=len(own := texts[prompts.name]),
            sha256=prompts.sha256,
            overlaps={
                other: len(own & theirs)
                for other, theirs in texts.items()
                if other != prompts.name and own & theirs
            },
        )
        for prompts in sets
    }


def log_sets(sets: Sequence[PromptSet]) -> dict[str, SetSummary]:
    """Logs and returns :func:`summarize_sets`: one line a set."""
    summaries = summarize_sets(sets)
    for name, summary in summaries.items():
        parts = [f"{summary['records']} prompts, {summary['distinct']} distinct"]
        parts += [f"{count} also in {other}" for other, count in summary["overlaps"].items()]
        log.info("prompts %s: %s", name, ", ".join(parts))
    return summaries


def _normalized(text: str) -> str:
    """A text without what doesn't change its words: case, spacing and compatibility forms of characters."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _download(name: str, config: PromptFileConfig) -> Path:
    assert config.hub_id is not None and config.filename is not None
    try:
        return dataset_file(config.hub_id, config.filename, config.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"option 'prompts': expected the file of {name!r} as {name}:FILE.csv, got none, and {error}"
        ) from error
