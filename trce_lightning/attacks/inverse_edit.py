"""The exact key of an edit W' = W T on every projection that reads text states.

    T = argmin Σ_l ‖W_l T − W'_l‖²,   then feed E T⁻ᵀ:   W'(T⁻¹ e) = W e for every state e

The attacker has the weights of the model before and after, and may inject text states. It shows the ceiling
of any attack on embeddings against closed-form edits of keys and values (UCE, arXiv 2308.14761; RECE, arXiv
2407.12383; TRCE's stage 1, arXiv 2503.07389), at no network evaluation. It shows nothing about edits of
another form: tuned attention, edits of values alone, or edits on the side of the output. The finding says how
much of the change T leaves unexplained, and the rank of T: where T has no inverse, the key is its
pseudo-inverse. Where a segment's states are narrower than the stream, the key is the best that fits them
(:func:`trce_lightning.textual.keys_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.protocol import (
    UNIVERSAL,
    Cost,
    Door,
    Finding,
    Progress,
    Reads,
    Target,
    Way,
    untold,
)
from trce_lightning.attacks.proxies import with_mapped_states
from trce_lightning.attacks.tries import fresh_record
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.runtime.fingerprints import digest_of
from trce_lightning.runtime.storage import read_safetensors
from trce_lightning.textual import CONTEXT, keys_of

RELATIVE_ROUNDING = 1e-9
"""Singular values of T below this share of the largest count as zero."""


class InverseEdit:
    """Undo an edit W T by what the model reads.

    Args:
        edit: a run's ``edit.safetensors``; None recovers T from the weights of both models.
    """

    name = "inverse_edit"
    door = Door.EMBEDDINGS
    reads = Reads.MODEL
    universal = True

    def __init__(self, *, edit: str | None = None) -> None:
        self.edit = edit

    def file_digest(self) -> str:
        """Return a hash of the edit's tensors, and how findings are stored.

        ``InputError`` if its file can't be read.
        """
        # Findings of earlier versions have a key for each stream.
        return f"keys by segment, {digest_of(sorted(self._stored().items()))}"

    def cost(self, target: Target) -> Cost:
        """Return nothing: the search is a solution of linear equations."""
        return Cost()

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless both models have the same matrices, which the edit's file fits."""
        for name in target.adapter.streams():
            before, after = _shapes(target.original, name), _shapes(target.adapter, name)
            if before != after:
                different = sorted(set(before.items()) ^ set(after.items()))
                raise InputError(
                    "attack.inverse_edit: expected the model that the attacked one was made of, got one "
                    f"whose text projections differ, such as {different[0][0]}"
                )
            self._given(name, target.adapter.streams()[name].width)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Return the key of each segment, ``[w, w]`` float64, with residual, rank and condition of each T."""
        self.check(target)
        transforms: dict[str, Tensor] = {}
        facts: dict[str, dict[str, float | int | bool]] = {}
        for name in target.adapter.streams():
            before, after = _weights(target.original, name), _weights(target.adapter, name)
            given = self._given(name, next(iter(before.values())).shape[1])
            w, edited = (torch.cat(list(weights.values())) for weights in (before, after))
            if given is None or torch.equal(w, edited):  # the file is of the edit, and here is none
                transform = torch.linalg.lstsq(w, edited, driver="gelsd").solution
            else:
                transform = given
            singular = torch.linalg.svdvals(transform)
            rank = int((singular > RELATIVE_ROUNDING * singular[0]).sum())
            transforms[name] = transform
            facts[name] = {
                "residual": _unexplained(w, edited, transform),
                "changed": not torch.equal(w, edited),
                "rank": rank,
                "width": len(transform),
                "condition": float(singular[0] / singular[rank - 1]),
            }
        tensors = keys_of(target.adapter, transforms, rtol=RELATIVE_ROUNDING)
        return [Finding(UNIVERSAL, tensors, {"streams": facts, "read from": self.edit or "weights"})]

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors of the edit's file, none if no file is given."""
        if self.edit is None:
            return {}
        return read_safetensors(Path(self.edit), "T of an edit", "name another in attack.inverse_edit.edit")

    def _given(self, stream: str, width: int) -> Tensor | None:
        if self.edit is None or stream != CONTEXT:
            return None
        found = self._stored().get("transform")
        if found is None or found.shape != (width, width):
            got = "none" if found is None else list(found.shape)
            raise InputError(
                f"attack.inverse_edit.edit: expected 'transform' of shape [{width}, {width}] in {self.edit}, "
                f"got {got}"
            )
        return found.double()

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Return keys that move states as much as the true ones, in random directions."""
        true = self.search(target, records, generator, progress)[0].tensors
        return [Finding(UNIVERSAL, {name: _turned(key, generator) for name, key in true.items()})]

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the prompts themselves, read through the key."""
        keys = findings[UNIVERSAL].tensors
        records = tuple(fresh_record(record, self.name) for record in target.records)
        yield Way("", records, with_mapped_states(target.adapter, keys), target.variation)


def _shapes(adapter: Adapter, name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a stream's matrices, by name."""
    return {key: tuple(entry.module.weight.shape) for key, entry in adapter.streams()[name].entries.items()}


def _weights(adapter: Adapter, name: str) -> dict[str, Tensor]:
    """Return the matrices of a stream that read text states, ``[d_out, d]`` float64 on the CPU."""
    stream = adapter.streams()[name]
    return {
        entry_name: entry.module.weight.detach()[:, entry.first : entry.first + stream.width].cpu().double()
        for entry_name, entry in stream.entries.items()
    }


def _unexplained(before: Tensor, after: Tensor, transform: Tensor) -> float:
    """Return ‖W T − W'‖ / ‖W' − W‖: 0 where T explains the whole change, 0 too where nothing changed."""
    change = torch.linalg.matrix_norm(after - before)
    return float(torch.linalg.matrix_norm(before @ transform - after) / change) if change > 0 else 0.0


def _turned(key: Tensor, generator: torch.Generator) -> Tensor:
    """Return I + a random matrix as large as K − I."""
    unchanged = torch.eye(len(key), dtype=key.dtype)
    change = torch.randn(key.shape, generator=generator, dtype=key.dtype)
    size = torch.linalg.matrix_norm(key - unchanged) / torch.linalg.matrix_norm(change)
    return unchanged + size * change
