"""The exports of a run: the edit, the erased pipeline with its model card, and the changed tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.closed_form import Edit, KeepStatistics, Readers
from trce_lightning.config.schema import TextualConfig
from trce_lightning.runtime.storage import (
    read_safetensors,
    reading,
    replacing_folder,
    write_safetensors,
    write_text,
)
from trce_lightning.textual import TextualStatistics

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-erasure, trce]
---
# {base} without {concepts}

{base} after {method} with trce-lightning. Open it with
`StableDiffusionPipeline.from_pretrained(FOLDER)`; no code of trce-lightning is needed.

{table}

Changed tensors: {changed}. The pipeline comes without a safety checker, whether or not {base} has one.

Erasure lowers the rate at which prompts show a concept; it is no proof that none can. Whoever may inject
embeddings, or fine-tune, can undo it.
"""


def save_edit(
    file: Path, statistics: TextualStatistics, edit: Edit, config: TextualConfig, base: str, fingerprint: str
) -> None:
    """Write T, K, the empty prompt's states and each concept's pairs of states.

    The pairs give S and M, and few pairs take less space, see :func:`compact_pairs`. The metadata holds the
    form and its options, the counts and the base model.
    """
    tensors = {"transform": edit.transform, "k": statistics.keep.k, "empty": statistics.empty}
    optional = {"span": statistics.span, "directions": edit.directions}
    if statistics.readers is not None:
        optional |= {"edited": statistics.readers.edited, "others": statistics.readers.others}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    for name, states in statistics.states.items():
        malicious, safe = compact_pairs(*states)
        tensors |= {f"malicious.{name}": malicious, f"safe.{name}": safe}
    metadata = {
        "base_model": base,
        "fingerprint": fingerprint,
        "concepts": json.dumps({name: len(states) for name, (states, _) in statistics.states.items()}),
        "options": json.dumps(asdict(config)),
        "keep_weight": str(statistics.keep.weight),
        "keyless_distance": json.dumps(edit.keyless_distance),
    }
    write_safetensors(file, tensors, metadata)


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
        states = {
            name: (tensors[f"malicious.{name}"], tensors[f"safe.{name}"])
            for name in json.loads(facts["concepts"])
        }
        keep = KeepStatistics(tensors["k"], float(facts["keep_weight"]))
        read_by = Readers(tensors["edited"], tensors["others"]) if "edited" in tensors else None
        statistics = TextualStatistics(states, keep, tensors["empty"], tensors.get("span"), read_by)
        return statistics, TextualConfig(**json.loads(facts["options"]))


def save_pipeline(folder: Path, adapter: Adapter, card: Mapping[str, Any]) -> None:
    """Write the whole pipeline in diffusers' format. It is moved into place when it is complete."""
    with replacing_folder(folder) as aside:
        adapter.pipeline.save_pretrained(aside)
        write_text(aside / "README.md", CARD.format(**card))


def save_delta(file: Path, changed: Mapping[str, Tensor], base: str, fingerprint: str) -> None:
    """Write the changed tensors under diffusers' names.

    ``unet.load_state_dict(load_file(file), strict=False)`` reads them.
    """
    tensors = {name: tensor.cpu() for name, tensor in changed.items()}
    write_safetensors(file, tensors, {"base_model": base, "fingerprint": fingerprint})


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
