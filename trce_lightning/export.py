"""The exports of a run: the edit, the erased pipeline with its model card, and the changed tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.closed_form import Edit
from trce_lightning.config.schema import TextualConfig
from trce_lightning.runtime.storage import replacing_folder, write_safetensors, write_text
from trce_lightning.textual import TextualStatistics

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [concept-erasure, trce]
---
# {base} without {concepts}

{base} after TRCE (arXiv 2503.07389, stages {stages}) with trce-lightning. Open it with
`StableDiffusionPipeline.from_pretrained(FOLDER)`; no code of trce-lightning is needed.

{table}

Changed tensors: {changed}. The pipeline comes without a safety checker, whether or not {base} has one.

Erasure lowers the rate at which prompts show a concept; it is no proof that none can. Whoever may inject
embeddings, or fine-tune, can undo it.
"""


def save_edit(
    file: Path, statistics: TextualStatistics, edit: Edit, config: TextualConfig, base: str, fingerprint: str
) -> None:
    """Write T, K and each concept's S and M in float64.

    The metadata holds counts, energies, η, λ and the base model.
    """
    tensors: dict[str, Tensor] = {"transform": edit.transform, "k": statistics.keep.k}
    for name, pairs in statistics.pairs.items():
        tensors |= {f"s.{name}": pairs.s, f"m.{name}": pairs.m}
    facts = {
        name: {"count": pairs.count, "safe_energy": pairs.safe_energy}
        for name, pairs in statistics.pairs.items()
    }
    metadata = {
        "base_model": base,
        "fingerprint": fingerprint,
        "concepts": json.dumps(facts),
        "eta": str(config.eta),
        "ridge": str(config.ridge),
        "keep_weight": str(statistics.keep.weight),
    }
    write_safetensors(file, tensors, metadata)


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


def card_facts(
    base: str, concepts: Sequence[str], stages: Sequence[str], table: str, changed: int
) -> dict[str, Any]:
    """Return the values that fill the model card."""
    return {
        "base": base,
        "concepts": ", ".join(concepts),
        "stages": " + ".join(stages),
        "table": table,
        "changed": changed,
    }
