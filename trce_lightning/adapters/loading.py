"""Opening a pipeline: a folder in diffusers' format, a hub id, or a checkpoint in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open

from trce_lightning.adapters.refusals import refuse_other_pipelines
from trce_lightning.adapters.single_file import NETWORKS, original_state
from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter
from trce_lightning.errors import InputError

INDEX = "model_index.json"
SUFFIX = ".safetensors"
# Its verdict would blacken what is to be scored.
WITHOUT_CHECKER: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


def load_adapter(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    resolution: int | None = None,
    config: str | Path | None = None,
    channels_last: bool = False,
) -> StableDiffusionAdapter:
    """Open a pipeline folder, a ``.safetensors`` file, or a hub id ``owner/name``; a ``Path`` is no hub id.

    Args:
        source: folder, file or hub id. A folder of fp16 weights alone opens as well as one of float32.
        dtype: of all networks, whatever that of the stored weights.
        revision: commit, tag or branch on the hub.
        resolution: pixels; None is the model's own.
        config: of a single file, the folder or hub id of the pipeline that it is a checkpoint of, for
            tokenizer, scheduler and the networks' sizes; no weights of that pipeline are read.
        channels_last: lay denoiser and decoder out as NHWC, which changes speed and last bits alone.

    Raises:
        FileNotFoundError: ``source`` or ``config`` is a path and holds no pipeline; no hub is asked for it.
            Or the files of ``config`` can't be had.
        InputError: the method doesn't fit the model, or a file is no checkpoint of one.
    """
    if Path(source).is_file():
        pipeline = _open_file(Path(source), config, dtype, revision)
    else:
        _check_folder("model.path", source)
        refuse_other_pipelines(_index("model.path", source, revision), str(source))
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(source), dtype=dtype, revision=revision, variant=_variant(Path(source)), **WITHOUT_CHECKER
        )
    pipeline.set_progress_bar_config(disable=True)
    adapter = StableDiffusionAdapter(pipeline, resolution=resolution, name=str(source))
    return adapter.to_channels_last() if channels_last else adapter


def _open_file(
    file: Path, config: str | Path | None, dtype: torch.dtype, revision: str | None
) -> StableDiffusionPipeline:
    names = _names(file)
    if config is None:
        raise InputError(
            f"model.config: expected the folder or hub id of the pipeline that '{file}' is a checkpoint of, "
            "for its tokenizer, scheduler and sizes, got none"
        )
    _check_folder("model.config", config)
    refuse_other_pipelines(_index("model.config", config, revision), str(config))
    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file), config=str(config), dtype=dtype, revision=revision, **WITHOUT_CHECKER
        )
    except OSError as error:
        raise FileNotFoundError(
            f"model.config: expected all configuration files of '{config}' in a folder or from the hub, got: "
            f"{_first_line(error)}"
        ) from error
    except (RuntimeError, ValueError) as error:  # tensors of other sizes, or none of a network
        raise InputError(
            f"model.config: expected the pipeline that '{file}' is a checkpoint of, got '{config}': "
            f"{_first_line(error)}"
        ) from error
    # What a file lacks would stay as initialised.
    if missing := original_state(pipeline).keys() - names:
        raise InputError(
            f"model.path: expected all tensors of '{config}', got '{file}' without {len(missing)} of them, "
            f"such as {min(missing)}"
        )
    return pipeline


def _names(file: Path) -> set[str]:
    """Tensors of a file; refuses by its header alone what is no Stable Diffusion 1.x or 2.x."""
    if file.suffix != SUFFIX:
        raise InputError(f"model.path: expected a folder or a {SUFFIX} file, got '{file}'")
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
    except SafetensorError as error:
        raise InputError(f"model.path: expected a readable {SUFFIX} file, got '{file}': {error}") from error
    if any(name.startswith("conditioner.embedders.") for name in names):
        raise InputError(
            f"model: expected one text encoder, got two (Stable Diffusion XL) in '{file}', which have no "
            "adapter yet"
        )
    absent = [prefix for prefix in NETWORKS if not any(name.startswith(prefix) for name in names)]
    if absent:
        raise InputError(
            f"model.path: expected a checkpoint of Stable Diffusion 1.x or 2.x, got '{file}' without any "
            f"tensor named {' or '.join(f'{prefix}*' for prefix in absent)}"
        )
    return names


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _check_folder(option: str, source: str | Path) -> None:
    is_hub_id = isinstance(source, str) and source.count("/") == 1 and source[0] not in "./~"
    if (Path(source).exists() or not is_hub_id) and not (Path(source) / INDEX).is_file():
        raise FileNotFoundError(f"{option}: expected a diffusers pipeline folder, got '{source}'")


def _index(option: str, source: str | Path, revision: str | None) -> dict[str, Any]:
    try:
        return StableDiffusionPipeline.load_config(str(source), revision=revision)
    except OSError as error:
        reason = type(error.__cause__ or error.__context__ or error).__name__
        raise FileNotFoundError(
            f"{option}: expected a pipeline in a folder, in the local cache or on the hub, got '{source}', "
            f"whose {INDEX} can't be read ({reason})"
        ) from error


def _variant(folder: Path) -> str | None:
    """``fp16`` where that is all that a folder has of the denoiser."""
    names = [file.name for file in folder.glob(f"unet/*{SUFFIX}")]
    return "fp16" if names and all(".fp16." in name for name in names) else None
