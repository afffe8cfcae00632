"""The loader of pipelines: from a folder in diffusers' format, a hub id, or a checkpoint in one file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from trce_lightning.adapters.base import PipelineAdapter
from trce_lightning.adapters.flow import FlowAdapter
from trce_lightning.adapters.flux import FluxAdapter
from trce_lightning.adapters.folder import describe_network, lacks_weights, open_networks
from trce_lightning.adapters.protocol import Adapter
from trce_lightning.adapters.refusals import other_pipeline
from trce_lightning.adapters.sd3 import StableDiffusion3Adapter
from trce_lightning.adapters.sdxl import SDXLAdapter
from trce_lightning.adapters.single_file import CLIP, current_name, whole_state
from trce_lightning.adapters.stable_diffusion import StableDiffusionAdapter
from trce_lightning.adapters.stored import StoredNetwork, StoredPipeline, read_from_files
from trce_lightning.errors import InputError

INDEX = "model_index.json"
SUFFIX = ".safetensors"
FAMILIES: dict[str, type[PipelineAdapter]] = {
    family.pipeline_class.__name__: family
    for family in (StableDiffusionAdapter, SDXLAdapter, StableDiffusion3Adapter, FluxAdapter)
}
"""The adapter of each family by the name of diffusers' pipeline class."""


def load_adapter(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    resolution: int | None = None,
    config: str | Path | None = None,
    channels_last: bool = False,
    max_sequence_length: int | None = None,
    guidance_scale: float | None = None,
) -> Adapter:
    """Open a pipeline folder, a ``.safetensors`` file, or a hub id ``owner/name``.

    Args:
        source: the folder, file or hub id. A ``Path`` is never a hub id. Each network of a folder may be
            stored in float32 or half precision.
        dtype: the type of all networks, whatever the type of the stored weights.
        revision: a commit, tag or branch on the hub.
        resolution: the side of images in pixels. None means the model's own.
        config: the folder or hub id of the pipeline that a single file is a checkpoint of. It supplies the
            tokenizer, the scheduler and the networks' sizes. Its weights are not read.
        channels_last: True to lay denoiser and decoder out as NHWC. This changes only speed and last bits.
        max_sequence_length: the padded length of T5. None means that of diffusers' pipeline.
        guidance_scale: the scale that is embedded in every evaluation, for denoisers that read one. None
            means that of diffusers' pipeline.

    Raises:
        FileNotFoundError: ``source`` or ``config`` is a path without a pipeline (the hub is not asked for a
            path), or the files of ``config`` can't be found.
        InputError: the method doesn't fit the model, or parts of the model are missing from its files.
    """
    if Path(source).is_file():
        pipeline = _open_file(Path(source), config, dtype, revision)
    else:
        pipeline = _open_folder(source, dtype, revision)
    pipeline.set_progress_bar_config(disable=True)
    adapter = adapter_of(
        pipeline,
        resolution=resolution,
        name=str(source),
        max_sequence_length=max_sequence_length,
        guidance_scale=guidance_scale,
    )
    return adapter.to_channels_last() if channels_last else adapter


def stored_pipeline(source: str | Path, revision: str | None = None) -> StoredPipeline:
    """Return a folder or hub id whose denoiser stays on the disk.

    Raises:
        FileNotFoundError: see :func:`load_adapter`.
        InputError: the method doesn't fit the model, ``source`` is a single file, or the denoiser has no
            files whose tensors can be replaced.
    """
    if Path(source).is_file():
        raise InputError(
            "model.path: expected a folder or hub id for an edit of its files, got the single file "
            f"'{source}', whose tensors have other names"
        )
    _check_folder("model.path", source)
    index = _index("model.path", source, revision)
    family = _family(index, source)
    folder = Path(source) if Path(source).is_dir() else _downloaded(str(source), family, index, revision)
    unused = {part: [None, None] if value is None else value for part, value in family.unused.items()}
    kept = {part: unused.get(part, entry) for part, entry in index.items()}
    return StoredPipeline(folder, kept, StoredNetwork(folder / family.denoiser_name))


def load_stored(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    resolution: int | None = None,
    max_sequence_length: int | None = None,
) -> tuple[Adapter, StoredPipeline]:
    """Open a pipeline's text encoders, and leave its denoiser on the disk.

    The adapter encodes text, and has the streams of stage 1, whose weights are read from the files at each
    use. It draws nothing. Arguments and errors are those of :func:`load_adapter` and :func:`stored_pipeline`.
    If tensors of the denoiser are missing or have other shapes, raise ``InputError``.
    """
    place = stored_pipeline(source, revision)
    folder, index = place.folder, dict(place.index)
    family = FAMILIES[index["_class_name"]]
    described = {part: describe_network(folder / part, index[part]) for part in (family.denoiser_name, "vae")}
    place.denoiser.check(described[family.denoiser_name])
    encoders = [part for part in _present(family, index) if part not in described]
    networks = described | open_networks(folder, index, encoders, dtype)
    adapter = adapter_of(
        _assembled(family, folder, index, networks, dtype),
        resolution=resolution,
        name=str(source),
        max_sequence_length=max_sequence_length,
    )
    for stream in adapter.streams().values():
        for name, entry in stream.entries.items():
            read_from_files(entry.module, name, place.denoiser)
    return adapter, place


def adapter_of(
    pipeline: Any,
    *,
    resolution: int | None = None,
    name: str | None = None,
    max_sequence_length: int | None = None,
    guidance_scale: float | None = None,
) -> Adapter:
    """Return the adapter of a pipeline in memory. If its class has none, raise ``InputError``.

    Args:
        pipeline: diffusers' pipeline.
        resolution: the side of images in pixels. None means the model's own.
        name: the model's name in messages. None means the place it was opened from.
        max_sequence_length: see :func:`load_adapter`.
        guidance_scale: see :func:`load_adapter`.
    """
    names = [kind.__name__ for kind in type(pipeline).mro() if kind.__name__ in FAMILIES]
    if not names:
        index = {**pipeline.config, "_class_name": type(pipeline).__name__}
        raise other_pipeline(index, name or "memory", list(FAMILIES))
    family = FAMILIES[names[0]]
    options: dict[str, Any] = {"resolution": resolution}
    if issubclass(family, FlowAdapter):
        options["max_sequence_length"] = max_sequence_length
    elif max_sequence_length is not None:
        raise InputError(
            f"model.max_sequence_length: expected none for a {names[0]}, which has no T5, got "
            f"{max_sequence_length}"
        )
    if issubclass(family, FluxAdapter):
        options["guidance_scale"] = guidance_scale
    adapter: Any = family(pipeline, name, **options)
    return adapter


def _family(index: dict[str, Any], source: str | Path) -> type[PipelineAdapter]:
    """Return the family of a ``model_index.json``. If it has no adapter, raise ``InputError``."""
    family = FAMILIES.get(index.get("_class_name", ""))
    if family is None:
        raise other_pipeline(index, str(source), list(FAMILIES))
    family.refuse_index(index, str(source))
    return family


def _open_folder(source: str | Path, dtype: torch.dtype, revision: str | None) -> DiffusionPipeline:
    _check_folder("model.path", source)
    index = _index("model.path", source, revision)
    family = _family(index, source)
    folder = Path(source) if Path(source).is_dir() else _downloaded(str(source), family, index, revision)
    networks = open_networks(folder, index, _present(family, index), dtype)
    return _assembled(family, folder, index, networks, dtype)


def _assembled(
    family: type[PipelineAdapter],
    folder: Path,
    index: dict[str, Any],
    networks: dict[str, Any],
    dtype: torch.dtype,
) -> DiffusionPipeline:
    """Return the pipeline of a folder with these networks."""
    try:
        parts = {**_absent(family, index), **networks, **family.unused}
        return family.pipeline_class.from_pretrained(str(folder), dtype=dtype, **parts)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.path: expected a tokenizer and a scheduler that can be read in '{folder}', got "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _present(family: type[PipelineAdapter], index: dict[str, Any]) -> list[str]:
    """Return the names of the networks that a pipeline has. SD3 may lack its T5."""
    return [name for name in family.network_names() if (index.get(name) or [None])[-1] is not None]


def _absent(family: type[PipelineAdapter], index: dict[str, Any]) -> dict[str, None]:
    """Return None for each encoder and tokenizer that a pipeline lacks. diffusers wants it said."""
    parts = (*family.encoder_names, *family.tokenizer_names)
    return {name: None for name in parts if (index.get(name) or [None])[-1] is None}


def _downloaded(
    hub_id: str, family: type[PipelineAdapter], index: dict[str, Any], revision: str | None
) -> Path:
    """Return the folder of a hub id in the local cache.

    If the hub has only half precision, it is the folder with that.
    """
    download = partial(family.pipeline_class.download, hub_id, revision=revision, **family.unused)
    folder = Path(download())
    if not lacks_weights(folder, index, _present(family, index)):
        return folder
    try:
        half = download(variant="fp16")
    except ValueError:  # no such variant
        return folder
    return Path(half)


def _open_file(
    file: Path, config: str | Path | None, dtype: torch.dtype, revision: str | None
) -> DiffusionPipeline:
    stored = _stored_shapes(file)
    if config is None:
        raise InputError(
            f"model.config: expected the folder or hub id of the pipeline that '{file}' is a checkpoint of, "
            "for its tokenizer, scheduler and sizes, got none"
        )
    _check_folder("model.config", config)
    index = _index("model.config", config, revision)
    family = _family(index, config)
    _refuse_other_files(file, stored, family)
    if index["vae"][1] != AutoencoderKL.__name__:
        raise InputError(
            f"model.config: expected a pipeline with an {AutoencoderKL.__name__}, as single files have, got "
            f"{index['vae'][1]} in '{config}'"
        )
    try:
        _refuse_other_tensors(file, stored, index, family, config, revision)
        parts = {"text_encoder": _old_text_encoder(file, config, dtype, revision)}
        return family.pipeline_class.from_single_file(
            str(file),
            config=str(config),
            dtype=dtype,
            revision=revision,
            **{name: part for name, part in parts.items() if part is not None},
            **{"image_encoder": None, **family.unused},
        )
    except InputError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"model.config: expected all configuration files of '{config}' in a folder or from the hub, got: "
            f"{_first_line(error)}"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"model.config: expected the pipeline that '{file}' is a checkpoint of, got '{config}': "
            f"{_first_line(error)}"
        ) from error


def _stored_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of a file's tensors by name. Only the file's header is read.

    If the file can't be read, raise ``InputError``.
    """
    if file.suffix != SUFFIX:
        raise InputError(
            f"model.path: expected a folder or a {SUFFIX} file, got '{file}'; others (.ckpt, .pt) are "
            f"pickles, which can run code when they are opened: take the same model as {SUFFIX}"
        )
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"model.path: expected a readable {SUFFIX} file, got '{file}': {error}") from error
    return {current_name(name): shape for name, shape in shapes.items()}


def _refuse_other_files(file: Path, stored: dict[str, list[int]], family: type[PipelineAdapter]) -> None:
    """Refuse a file without the family's networks, and a family that has no such files."""
    kind = family.pipeline_class.__name__
    if not family.file_prefixes:
        raise InputError(
            f"model.path: expected a folder for a {kind}, got '{file}'; it can't be opened from one file"
        )
    absent = [
        prefix for prefix in family.file_prefixes if not any(name.startswith(prefix) for name in stored)
    ]
    if absent:
        raise InputError(
            f"model.path: expected a checkpoint of a {kind}, as model.config says, got '{file}' without any "
            f"tensor named {' or '.join(f'{prefix}*' for prefix in absent)}"
        )


def _refuse_other_tensors(
    file: Path,
    stored: dict[str, list[int]],
    index: dict[str, Any],
    family: type[PipelineAdapter],
    config: str | Path,
    revision: str | None,
) -> None:
    """Refuse a file whose tensors are not those of ``config``. A missing one would stay as initialised."""
    expected = _expected_state(index, family, config, revision)
    if missing := sorted(expected.keys() - stored.keys()):
        raise InputError(
            f"model.path: expected all tensors of '{config}', got '{file}' without {len(missing)} of them, "
            f"such as {missing[0]}"
        )
    other = [name for name, part in expected.items() if _plain(stored[name]) != _plain(part.shape)]
    if other:
        raise InputError(
            f"model.config: expected the pipeline that '{file}' is a checkpoint of, got '{config}': "
            f"{len(other)} tensors have other shapes, such as {other[0]}: {stored[other[0]]} for "
            f"{[*expected[other[0]].shape]}"
        )


def _expected_state(
    index: dict[str, Any], family: type[PipelineAdapter], config: str | Path, revision: str | None
) -> dict[str, Tensor]:
    """Return all tensors that ``config`` describes, by their original names. They take no memory."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(config), "revision": revision}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(**place, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(**place, subfolder="vae"))
        encoders = [
            getattr(transformers, index[name][1])(CLIPTextConfig.from_pretrained(**place, subfolder=name))
            for name in family.encoder_names
        ]
    return whole_state(unet, vae, encoders)


def _plain(shape: list[int] | torch.Size) -> list[int]:
    """Return a shape. The shape of a 1×1 convolution becomes that of a matrix."""
    return list(shape[:2]) if len(shape) == 4 and list(shape[2:]) == [1, 1] else list(shape)


def _old_text_encoder(
    file: Path, config: str | Path, dtype: torch.dtype, revision: str | None
) -> CLIPTextModel | None:
    """Return the text encoder of a file with old names, which lack ``text_model``.

    If the file has current names, return None.
    """
    with safe_open(file, "pt") as opened:
        old = {name: current_name(name) for name in opened.keys() if current_name(name) != name}  # noqa: SIM118
        state = {new.removeprefix(CLIP): opened.get_tensor(name) for name, new in old.items()}
    if not state:
        return None
    sizes = CLIPTextConfig.from_pretrained(str(config), subfolder="text_encoder", revision=revision)
    return CLIPTextModel.from_pretrained(None, config=sizes, state_dict=state, dtype=dtype)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _check_folder(option: str, source: str | Path) -> None:
    is_hub_id = isinstance(source, str) and source.count("/") == 1 and source[0] not in "./~"
    if (Path(source).exists() or not is_hub_id) and not (Path(source) / INDEX).is_file():
        raise FileNotFoundError(f"{option}: expected a diffusers pipeline folder, got '{source}'")


def _index(option: str, source: str | Path, revision: str | None) -> dict[str, Any]:
    try:
        return DiffusionPipeline.load_config(str(source), revision=revision)
    except OSError as error:
        reason = type(error.__cause__ or error.__context__ or error).__name__
        raise FileNotFoundError(
            f"{option}: expected a pipeline in a folder, in the local cache or on the hub, got '{source}', "
            f"whose {INDEX} can't be read ({reason})"
        ) from error
