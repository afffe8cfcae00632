"""Find configs/ and compose a command's configuration from it. The module imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from trce_lightning.errors import InputError

PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """Return the folder configs/ of the checkout, or else of the installed package."""
    checkout = PACKAGE.parent
    return checkout / "configs" if (checkout / "pyproject.toml").is_file() else PACKAGE / "configs"


def config_groups(folder: Path, name: str) -> list[str]:
    """Return the groups that the defaults list of `name`.yaml chooses from."""
    defaults = OmegaConf.select(OmegaConf.load(folder / f"{name}.yaml"), "defaults")
    chosen = [str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry]
    return [key.removeprefix("optional ") for key in chosen if not key.startswith("override ")]


def compose(
    name: str, schema: type, overrides: Sequence[str], changes: Mapping[str, Any] | None = None
) -> Any:
    """Return the configuration of another command with these overrides, an object of ``schema``.

    A command that is running keeps its own. The overrides are Hydra's, so no text of them is rewritten.
    ``changes`` are nested values that replace composed ones. ``InputError`` if an option has another type, or
    if there is none of its name.
    """
    from trce_lightning.runtime.host import hydra_kept  # imported here, because it imports torch

    with hydra_kept():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = hydra.compose(name, list(overrides))
    for node in composed.values():
        if isinstance(node, DictConfig) and not dataclasses.is_dataclass(OmegaConf.get_type(node)):
            OmegaConf.set_struct(node, False)  # a map, such as `method`, takes further keys
    try:
        return OmegaConf.to_object(OmegaConf.merge(composed, changes or {}))
    except (ConfigKeyError, ValidationError) as error:
        said = str(error).splitlines()[0]
        raise InputError(
            f"option '{error.full_key}': expected an option of {name} and its value: {said}"
        ) from error
