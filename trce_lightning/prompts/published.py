"""Published prompt files: the ones that an evaluation names, their places, and the texts that they share."""

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
    """The size of a prompt set and its overlaps. Texts are the same if :func:`_normalized` gives one text."""

    records: int
    distinct: int
    """The number of different texts."""
    sha256: str | None
    """The hash of the file, or None if the set was not read from a file."""
    overlaps: dict[str, int]
    """The number of different texts that this set shares with each other set, if it shares any."""


def prompt_files(
    prompts: Sequence[str], published: Mapping[str, PromptFileConfig]
) -> list[tuple[str, PromptFileConfig]]:
    """Return name and file of each of ``prompts``: ``NAME`` or ``NAME:FILE`` of a published set, or ``FILE``.

    In ``NAME:FILE``, the file replaces the set's own ``path``. If an item begins with no set's name, it is a
    file. Its set is named by its stem, and :func:`load_csv` finds its columns by their usual names.

    Raises:
        InputError: two sets have one name.
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
    """Refuse a prompt file that can't be used, before it is read.

    Raises:
        FileNotFoundError: there is no file ``config.path``.
        InputError: ``config`` names neither a path nor a place on the Hub, or columns that :func:`load_csv`
            can't use.
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
    """Return the prompts of a file, and log its sha256. If there is no ``path``, the Hub provides the file.

    Raises:
        FileNotFoundError: there is no such file, or the Hub doesn't provide it.
        InputError: the file's sha256 is not ``config.sha256``, or :func:`load_csv` refuses the file.
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
    """Return the size of each set, its different texts, and the texts that it shares, by the sets' names."""
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
    """Log one line per set, and return :func:`summarize_sets`."""
    summaries = summarize_sets(sets)
    for name, summary in summaries.items():
        parts = [f"{summary['records']} prompts, {summary['distinct']} distinct"]
        parts += [f"{count} also in {other}" for other, count in summary["overlaps"].items()]
        log.info("prompts %s: %s", name, ", ".join(parts))
    return summaries


def _normalized(text: str) -> str:
    """Return a text in one case, spacing and compatibility form. These don't change its words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _download(name: str, config: PromptFileConfig) -> Path:
    assert config.hub_id is not None and config.filename is not None
    try:
        return dataset_file(config.hub_id, config.filename, config.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"option 'prompts': expected the file of {name!r} as {name}:FILE.csv, got none, and {error}"
        ) from error
