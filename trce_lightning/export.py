"""The exports of a run: the edit, the erased pipeline with its model card, and the changed tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.stored import StoredNetwork, StoredPipeline
from trce_lightning.closed_form import Edit, KeepStatistics, Readers
from trce_lightning.config.schema import TextualConfig
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import (
    read_safetensors,
    reading,
    replacing_folder,
    write_safetensors,
    write_text,
)
from trce_lightning.runtime.tensor_files import write_one_by_one
from trce_lightning.textual import CONTEXT, StoredEdit, TextualStatistics, edited_tensors

ONE_STREAM = json.dumps([CONTEXT])
"""The streams of files that name none. They are of earlier versions."""
TEXTUAL_METHOD = "TRCE (arXiv 2503.07389, stage textual)"
"""The method of an edit without stage 2, for the model card."""
CHANGED = "the changed tensors of a run"
"""The content of a delta, for errors."""
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-erasure, trce]
---
# {base} without {concepts}

{base} after {method} with trce-lightning. Open it with
`{pipeline}.from_pretrained(FOLDER)`; no code of trce-lightning is needed.

{table}

Changed tensors: {changed}. The pipeline comes without a safety checker, whether or not {base} has one.

Erasure lowers the rate at which prompts show a concept; it is no proof that none can. Whoever may inject
embeddings, or fine-tune, can undo it.
"""


def save_edit(
    file: Path,
    statistics: TextualStatistics,
    edit: Edit,
    config: TextualConfig,
    base: str,
    fingerprint: str,
    edits: Mapping[str, StoredEdit],
) -> None:
    """Write T, K, the empty prompt's states and each concept's pairs of states, by stream.

    The pairs give S and M, and few pairs take less space, see :func:`compact_pairs`. The metadata holds the
    form and its options, the counts and the base model. It also holds the denoiser's tensors that ``edits``
    name by stream, each with its first edited column. The tensors of a further stream begin with its name.
    """
    streams = list(zip((statistics, *statistics.further), (edit, *edit.further), strict=True))
    facts = {
        "base_model": base,
        "fingerprint": fingerprint,
        "concepts": json.dumps({name: len(states) for name, (states, _) in statistics.states.items()}),
        "options": json.dumps(asdict(config)),
        "streams": json.dumps([own.stream for own, _ in streams]),
        "columns": json.dumps({name: dict(own.columns) for name, own in edits.items()}),
    }
    tensors: dict[str, Tensor] = {}
    for index, (own, solved) in enumerate(streams):
        prefix = _prefix(index, own.stream)
        tensors |= {prefix + name: tensor for name, tensor in _tensors_of(own, solved).items()}
        facts[f"{prefix}keep_weight"] = str(own.keep.weight)
        facts[f"{prefix}keyless_distance"] = json.dumps(solved.keyless_distance)
    write_safetensors(file, tensors, facts)


def _prefix(index: int, stream: str) -> str:
    """Return the beginning of a stream's names in a file of edits. The first stream has none."""
    return f"{stream}." if index else ""


def _tensors_of(statistics: TextualStatistics, edit: Edit) -> dict[str, Tensor]:
    """Return the tensors of one stream."""
    tensors = {"transform": edit.transform, "k": statistics.keep.k, "empty": statistics.empty}
    optional = {"span": statistics.span, "directions": edit.directions}
    if statistics.readers is not None:
        optional |= {"edited": statistics.readers.edited, "others": statistics.readers.others}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, states in statistics.states.items():
        malicious, safe = compact_pairs(*states)
        tensors |= {f"malicious.{name}": malicious, f"safe.{name}": safe}
    return tensors


def compact_pairs(malicious: Tensor, safe: Tensor) -> tuple[Tensor, Tensor]:
    """Return at most 2 d pairs of states with the same S, M and safe energy as these n, ``[n, d]`` each.

    If n is larger, they are the rows of R √(2 d / n), where QR is the decomposition of ``[malicious, safe]``.
    """
    count, width = malicious.shape
    if count <= 2 * width:
        return malicious, safe
    rows = torch.linalg.qr(torch.cat([malicious, safe], 1).double(), mode="r").R
    fewer = rows * math.sqrt(len(rows) / count)
    return fewer[:, :width], fewer[:, width:]


def load_edit(file: Path) -> tuple[TextualStatistics, TextualConfig]:
    """Return the statistics and options that an edit was solved from.

    ``statistics.solve(options)`` gives the edit again. With a concept more in ``statistics.states``, it gives
    the edit of all concepts together. If the file is damaged or of an earlier version, raise ``InputError``.
    """
    remedy = "run train.py again"
    tensors = read_safetensors(file, "an edit", remedy)
    with reading(file, "an edit", remedy), safe_open(file, "pt") as opened:
        facts = opened.metadata() or {}
        concepts, config = json.loads(facts["concepts"]), TextualConfig(**json.loads(facts["options"]))
        first, *further = [
            _statistics_of(stream, _prefix(index, stream), list(concepts), tensors, facts)
            for index, stream in enumerate(json.loads(facts.get("streams", ONE_STREAM)))
        ]
        return replace(first, further=tuple(further)), config


class Solved(NamedTuple):
    """A file's solved edits, one a stream, with the concepts that they erase and the model's fingerprint."""

    edits: list[StoredEdit]
    concepts: list[str]
    fingerprint: str


def load_solved(file: Path) -> Solved:
    """Return the solved T of each stream of a file of edits, with the tensors that it edits.

    If the file is damaged or of an earlier version, raise ``InputError``.
    """
    remedy = "run train.py again"
    with reading(file, "an edit that names the tensors it edits", remedy), safe_open(file, "pt") as opened:
        facts = opened.metadata() or {}
        columns, streams = json.loads(facts["columns"]), json.loads(facts["streams"])
        edits = [
            StoredEdit(opened.get_tensor(f"{_prefix(index, stream)}transform"), columns[stream])
            for index, stream in enumerate(streams)
        ]
        return Solved(edits, list(json.loads(facts["concepts"])), facts["fingerprint"])


def _statistics_of(
    stream: str,
    prefix: str,
    concepts: Sequence[str],
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, str],
) -> TextualStatistics:
    """Return the statistics of one stream in a file of edits."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return TextualStatistics(
        states={name: (own[f"malicious.{name}"], own[f"safe.{name}"]) for name in concepts},
        keep=KeepStatistics(own["k"], float(facts[f"{prefix}keep_weight"])),
        empty=own["empty"],
        span=own.get("span"),
        readers=Readers(own["edited"], own["others"]) if "edited" in own else None,
        stream=stream,
    )


def save_stored_pipeline(
    folder: Path, pipeline: StoredPipeline, edits: Sequence[StoredEdit], card: Mapping[str, Any]
) -> None:
    """Copy a pipeline's files, and replace the edited tensors in the copy, rounded to their stored types."""
    with replacing_folder(folder) as aside:
        copy = pipeline.copied(aside)
        for name, weight in edited_tensors(pipeline.denoiser, edits):
            copy.replace(name, weight)
        write_text(aside / "README.md", CARD.format(pipeline=pipeline.index["_class_name"], **card))


def save_stored_delta(
    file: Path,
    denoiser: StoredNetwork,
    edits: Sequence[StoredEdit],
    facts: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the edited tensors as :func:`save_delta` does, one at a time. None means their stored type."""
    shapes = {name: denoiser.shape(name) for edit in edits for name in edit.columns}
    dtype = dtype or denoiser.dtype(next(iter(shapes)))
    write_one_by_one(file, shapes, dtype, edited_tensors(denoiser, edits), facts)


def save_pipeline(folder: Path, adapter: Adapter, card: Mapping[str, Any]) -> None:
    """Write the whole pipeline in diffusers' format. It is moved into place when it is complete."""
    with replacing_folder(folder) as aside:
        adapter.pipeline.save_pretrained(aside)
        write_text(aside / "README.md", CARD.format(pipeline=type(adapter.pipeline).__name__, **card))


def save_delta(file: Path, changed: Mapping[str, Tensor], base: str, fingerprint: str) -> None:
    """Write the changed tensors under diffusers' names.

    ``unet.load_state_dict(load_file(file), strict=False)`` reads them.
    """
    tensors = {name: tensor.cpu() for name, tensor in changed.items()}
    write_safetensors(file, tensors, {"base_model": base, "fingerprint": fingerprint})


def delta_name(adapter: Adapter, component: str) -> str:
    """Return the file name of a component's changed tensors."""
    own = adapter.networks()[component] is adapter.denoiser
    return "delta.safetensors" if own else f"delta.{component}.safetensors"


def load_deltas(folder: Path, adapter: Adapter) -> None:
    """Load the changed tensors that a run has written into the model that it has erased from.

    ``InputError`` if a file is damaged or was made from other weights, or there is none.
    """
    own = adapter.fingerprint()
    files = {name: folder / delta_name(adapter, name) for name in adapter.networks()}
    found = {name: file for name, file in files.items() if file.exists()}
    if not found:
        raise InputError(f"{folder}: expected changed tensors, such as delta.safetensors, got none")
    for file in found.values():
        with reading(file, CHANGED), safe_open(file, "pt") as stored:
            erased_from = stored.metadata()["fingerprint"]
        if erased_from != own:
            raise InputError(
                f"{file}: expected a change of the weights of '{adapter.name}', got one of other weights"
            )
    for component, file in found.items():
        adapter.networks()[component].load_state_dict(read_safetensors(file, CHANGED), strict=False)
    adapter.weights_changed()


def save_single_file(file: Path, adapter: Adapter, base: str, fingerprint: str) -> None:
    """Write the whole pipeline into one file under the original code's names, for other programs.

    If the original code has no names for parts of the model, raise ``InputError``.
    """
    facts = {"format": "pt", "base_model": base, "fingerprint": fingerprint}
    write_safetensors(file, adapter.original_state(), facts)


def card_facts(base: str, concepts: Sequence[str], method: str, table: str, changed: int) -> dict[str, Any]:
    """Return the values that fill the model card."""
    return {
        "base": base,
        "concepts": ", ".join(concepts),
        "method": method,
        "table": table,
        "changed": changed,
    }
