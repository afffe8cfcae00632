"""Store what an attack has found, so that it goes on after a stop and can be tried on other models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from trce_lightning.attacks.protocol import Cost, Finding
from trce_lightning.runtime.storage import read_safetensors, reading, write_json, write_safetensors


def save_findings(stem: Path, findings: Sequence[Finding]) -> None:
    """Write findings as ``STEM.safetensors`` and ``STEM.json``, the latter last."""
    tensors = {f"{i}/{name}": tensor for i, f in enumerate(findings) for name, tensor in f.tensors.items()}
    write_safetensors(stem.with_suffix(".safetensors"), tensors or {"none": torch.empty(0)})
    rows = [{"prompt_id": f.prompt_id, "facts": f.facts, "spent": asdict(f.spent)} for f in findings]
    write_json(stem.with_suffix(".json"), {"findings": rows})


def load_findings(stem: Path) -> Iterator[Finding]:
    """Yield what :func:`save_findings` wrote."""
    with reading(stem.with_suffix(".json"), "what an attack has found"):
        rows = json.loads(stem.with_suffix(".json").read_text("utf-8"))["findings"]
    tensors = read_safetensors(stem.with_suffix(".safetensors"), "what an attack has found")
    for i, row in enumerate(rows):
        own = {
            name.partition("/")[2]: tensor
            for name, tensor in tensors.items()
            if name.partition("/")[0] == str(i)
        }
        yield Finding(row["prompt_id"], own, row["facts"], Cost(**row["spent"]))
