"""Checks of single options, whichever command has them. Torch-free."""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trce_lightning.arguments import did_you_mean
from trce_lightning.errors import InputError
from trce_lightning.schema import ConceptConfig, ModelConfig


def check_values(node: Any, prefix: str) -> None:
    """Refuse values that their fields in the schema do not take; ``prefix`` goes before the names."""
    for entry in dataclasses.fields(node):
        value, name = getattr(node, entry.name), f"{prefix}{entry.name}"
        if dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
            continue
        for item in value if isinstance(value, list) else [value]:
            check_value(name, item, entry.metadata)


def check_value(name: str, value: Any, limits: Any) -> None:
    """Refuse a value outside ``limits``, as :func:`~.schema.option` takes them; no number is infinite."""
    if value is None:
        return
    if limits.get("choices") is not None and value not in limits["choices"]:
        hint = did_you_mean(str(value), limits["choices"])
        raise InputError(f"option {name!r}: {value!r} is not one of {', '.join(limits['choices'])}.{hint}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise InputError(f"option {name!r}: expected a finite number, got {value}")
    if limits.get("at_least") is not None and value < limits["at_least"]:
        raise InputError(f"option {name!r}: expected at least {limits['at_least']}, got {value}")
    if limits.get("at_most") is not None and value > limits["at_most"]:
        raise InputError(f"option {name!r}: expected at most {limits['at_most']}, got {value}")
    if limits.get("above") is not None and value <= limits["above"]:
        raise InputError(f"option {name!r}: expected more than {limits['above']}, got {value}")
    if limits.get("below") is not None and value >= limits["below"]:
        raise InputError(f"option {name!r}: expected less than {limits['below']}, got {value}")


def check_model(model: ModelConfig, option: str) -> None:
    """Refuse a model of no source, and a path that is neither a pipeline nor a checkpoint in one file."""
    if model.timestep_spacing is not None and model.sampler is None:
        raise InputError(
            "option 'model.timestep_spacing': expected none without model.sampler, whose steps it places, "
            f"got {model.timestep_spacing!r}"
        )
    if model.path is None:
        if model.hub_id is None and model.judge != "embedded" and model.name != "emoji":
            raise InputError(f"model {model.name!r} has neither model.path nor model.hub_id")
    elif Path(model.path).is_file():
        _check_single_file(model, option)
    elif not Path(model.path).is_dir():
        raise FileNotFoundError(f"option {option!r}: no file or folder {model.path!r}")
    elif not (Path(model.path) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"option {option!r}: {model.path!r} holds no model_index.json, so it is no diffusers pipeline"
        )


def _check_single_file(model: ModelConfig, option: str) -> None:
    if Path(str(model.path)).suffix != ".safetensors":
        raise InputError(
            f"option {option!r}: expected a folder or a .safetensors file, got {model.path!r}; others "
            "(.ckpt, .pt) are pickles, which can run code when they are opened"
        )
    if model.config is None and model.hub_id is None:
        raise InputError(
            "option 'model.config': expected the folder or hub id of the pipeline that "
            f"{model.path!r} is a checkpoint of, got none"
        )


def check_judge(model: ModelConfig, concepts: Iterable[ConceptConfig], way_out: str = "") -> None:
    """Refuse a model that nothing scores, and what its judge doesn't read."""
    styles = [concept.name for concept in concepts if concept.kind == "style"]
    if model.judge is None or (model.judge == "clip" and styles):
        raise InputError(
            "option 'model.judge': expected the dotted name of a detector, or clip for what is no style, got "
            f"{model.judge or 'none'}{way_out}"
        )
    if model.judge == "clip" and model.clip is None:
        raise InputError(
            "option 'model.clip': expected CLIP's folder or hub id for model.judge=clip, got none"
        )
    own = {"embedded": ("clip", "inception", "real_images", "judge_options"), "clip": ("judge_options",)}
    for name in own.get(model.judge, ()):
        if value := getattr(model, name):
            raise InputError(
                f"option 'model.{name}': expected none with model.judge={model.judge}, got {value!r}"
            )


def check_fid(model: ModelConfig, option: str, images: int) -> None:
    """Refuse one image where FID is computed, which compares how images vary."""
    if images < 2 and (model.judge == "embedded" or model.real_images is not None):
        raise InputError(
            f"option {option!r}: expected at least 2, of which FID is computed, got {images}; "
            "or metrics.samples_per_prompt=2"
        )


def check_package(option: str, package: str, install: str) -> None:
    """Refuse an option whose package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"option {option!r}: {package} is not installed; install it with: {install}")


def check_devices(devices: Any) -> None:
    """Refuse what the Trainer takes for no devices."""
    indices = (
        isinstance(devices, list) and devices and all(type(item) is int and item >= 0 for item in devices)
    )
    if not (devices == "auto" or indices or (type(devices) is int and (devices >= 1 or devices == -1))):
        raise InputError(f"option 'trainer.devices': expected a count, [0,1,...] or auto, got {devices!r}")


def check_strategy(strategy: str) -> None:
    """Refuse processes that are copies of the first, whose results don't come back to it."""
    if any(word in strategy for word in ("fork", "spawn", "notebook")):
        raise InputError(
            "option 'trainer.strategy': expected one that starts its processes anew, such as ddp, got "
            f"{strategy!r}"
        )


def check_is_file(option: str, path: str) -> None:
    """Refuse a file that is not there."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"option {option!r}: no file {path!r}")


def check_writable(option: str, path: str | None) -> None:
    """Refuse a folder that can be neither written to nor made."""
    if path is None:
        return
    folder = Path(path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"option {option!r}: {path!r} is no folder: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"option {option!r}: cannot write to {path!r}: no permission for {str(existing)!r}")
