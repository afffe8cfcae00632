"""Find configs/ and compose a command's configuration from it. The module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

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
    ``changes`` are nested values that replace composed ones.
    """
    from trce_lightning.runtime.host import hydra_kept  # imported here, because it imports torch

    with hydra_kept():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = hydra.compose(name, list(overrides))
    OmegaConf.set_struct(composed, False)  # a map, such as `method`, takes further keys
    return OmegaConf.to_object(OmegaConf.merge(composed, changes or {}))
