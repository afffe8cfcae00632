"""An adapter whose prompts mean something else: how found text states reach the common generation loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.runtime.fingerprints import tensors_fingerprint
from trce_lightning.tokens import Text


class _WithText:
    """An adapter that reads prompts through ``changed`` and is another one in everything else."""

    def __init__(self, adapter: Adapter, changed: _Changed, identity: str, *, also_empty: bool) -> None:
        self._adapter, self._changed, self._identity, self._also_empty = (
            adapter,
            changed,
            identity,
            also_empty,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def to(self, device: torch.device | str) -> _WithText:
        self._adapter.to(device)
        return self

    def to_channels_last(self) -> _WithText:
        self._adapter.to_channels_last()
        return self

    def encode(self, prompts: Sequence[str], *, trimmed: bool = False) -> Text:
        return self._changed(prompts, self._adapter.encode(prompts, trimmed=trimmed))

    def empty(self) -> Text:
        empty = self._adapter.empty()
        return self._changed([""], empty) if self._also_empty else empty

    def text_fingerprint(self) -> str:
        return self._marked(self._adapter.text_fingerprint())

    def fingerprint(self) -> str:
        return self._marked(self._adapter.fingerprint())

    def _marked(self, fingerprint: str) -> str:
        return hashlib.blake2b(f"{fingerprint} {self._identity}".encode(), digest_size=8).hexdigest()


_Changed = Callable[[Sequence[str], Text], Text]


def with_states(adapter: Adapter, states: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    """Return the adapter with these text states in place of some prompts' own.

    Args:
        states: by prompt, then by segment, ``[L, d]`` each. ∅ and other prompts stay as they are.
    """

    def changed(prompts: Sequence[str], text: Text) -> Text:
        return Text({name: _replaced(own, name, prompts) for name, own in text.states.items()}, text.roles)

    def _replaced(own: Tensor, segment: str, prompts: Sequence[str]) -> Tensor:
        rows = [
            states[prompt][segment].to(own) if prompt in states else row
            for prompt, row in zip(prompts, own, strict=True)
        ]
        return torch.stack(rows)

    tensors = {f"{prompt}\0{name}": value for prompt, by in states.items() for name, value in by.items()}
    return cast(Adapter, _WithText(adapter, changed, tensors_fingerprint(tensors), also_empty=False))


def with_mapped_states(adapter: Adapter, keys: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter with E → E K for the states of every prompt, ∅ among them.

    Args:
        keys: K ``[d, d]`` by segment, float64; segments without one stay as they are.
    """

    def changed(prompts: Sequence[str], text: Text) -> Text:
        mapped = {
            name: (own.double().cpu() @ keys[name]).to(own) if name in keys else own
            for name, own in text.states.items()
        }
        return Text(mapped, text.roles)

    return cast(Adapter, _WithText(adapter, changed, tensors_fingerprint(keys), also_empty=True))
