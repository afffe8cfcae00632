"""Facilitated transport of SPM (arXiv 2312.16145): a LoRA acts by how much the prompt resembles the concept.

    W → W + γ(p) B A,   γ(p) = max_c max(cos(E(p), E(c)), |tokens(p) ∩ tokens(c)| / |tokens(c)|)

c are phrases that name the concept. E are the text states of all positions in one vector. γ multiplies B A
once. Both rows of an image, ∅ and the
prompt, are evaluated with the γ of its prompt, and combined by classifier-free guidance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trce_lightning.adapters import Adapter
from trce_lightning.errors import InputError
from trce_lightning.generation.guidance import ClassifierFreeGuidance, Guide, Inputs, phrases_of
from trce_lightning.runtime.storage import read_safetensors
from trce_lightning.tokens import Role, Text

KOHYA = "lora_unet_"
"""The beginning of a denoiser's names in LoRA files of other programs."""
REMEDY = "set guidance.lora=RUN/lora.safetensors of a run with method=spm"


def kohya_name(module: str) -> str:
    """Return a module's name in LoRA files of other programs."""
    return KOHYA + module.replace(".", "_")


class Factors(NamedTuple):
    """The LoRA B A of one map, with alpha / rank in B."""

    down: Tensor
    """A, in the shape of the map's weight but for the rank in the place of d_out."""
    up: Tensor
    """B, ``[d_out, rank]``, or ``[d_out, rank, 1, 1]`` of a convolution."""

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return B A x, in the shape of the layer's output."""
        down, up = self.down.to(x), self.up.to(x)
        if isinstance(layer, nn.Conv2d):
            inner = functional.conv2d(x, down, stride=layer.stride, padding=layer.padding)
            return functional.conv2d(inner, up)
        return functional.linear(functional.linear(x, down), up)


def transport_strength(
    prompt: Text, phrases: Text, prompt_ids: list[set[int]], phrase_ids: list[set[int]]
) -> Tensor:
    """Return γ of each prompt, ``[B]`` in [0, 1].

    Args:
        prompt: B prompts.
        phrases: the phrases that name the concept.
        prompt_ids: each prompt's tokens without start, end and padding.
        phrase_ids: those of each phrase.
    """
    flat, other = (
        torch.cat([own.float().flatten(1) for own in text.states.values()], 1) for text in (prompt, phrases)
    )
    cosine = functional.normalize(flat) @ functional.normalize(other).mT
    found = torch.tensor([[len(own & ids) / max(1, len(ids)) for ids in phrase_ids] for own in prompt_ids])
    return torch.maximum(cosine, found.to(cosine)).amax(1).clamp(0, 1)


def token_sets(adapter: Adapter, prompts: Sequence[str], text: Text) -> list[set[int]]:
    """Return the tokens of each prompt without start, end and padding. ``text`` has their roles."""
    name, ids = next(iter(adapter.tokenize(prompts).items()))
    words = text.roles[name].cpu() == Role.WORD
    return [set(row[mask].tolist()) for row, mask in zip(ids, words, strict=True)]


def read_factors(adapter: Adapter, file: Path) -> dict[str, Factors]:
    """Return the LoRA of each of the denoiser's maps by name. If a tensor fits none, raise ``InputError``."""
    tensors = read_safetensors(file, "a LoRA", REMEDY)
    factors = {}
    for name, layer in adapter.denoiser.named_modules():
        parts = [f"{kohya_name(name)}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")]
        if not all(part in tensors for part in parts):
            continue
        down, up, alpha = (tensors.pop(part) for part in parts)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or down.shape[1:] != layer.weight.shape[1:]:
            raise InputError(
                f"guidance.lora: expected weights that fit {name}, got {list(down.shape)} in {file}"
            )
        factors[name] = Factors(down, up * (alpha / len(down)))
    if tensors or not factors:
        raise InputError(
            f"guidance.lora: expected the maps of '{adapter.name}' under kohya's names, with alpha, got "
            f"{len(tensors)} other tensors in {file}; {REMEDY}"
        )
    return factors


@dataclass(frozen=True, kw_only=True, repr=False)
class FacilitatedTransport:
    """The rule. The model is the original, since the merged one has the LoRA with γ = 1 already.

    Args:
        lora: the file of the LoRA, with kohya's names.
        concept: phrases that name the concept, with commas between them. Runs give the terms of the erased
            concepts if it is empty.
    """

    lora: str = ""
    concept: str = ""

    def __post_init__(self) -> None:
        if not Path(self.lora).is_file():
            raise InputError(f"guidance.lora: expected a file, got '{self.lora}'; {REMEDY}")

    def __repr__(self) -> str:
        """Return the rule with a hash of the file in place of its name. It identifies stored scores."""
        digest = hashlib.blake2b(Path(self.lora).read_bytes(), digest_size=8).hexdigest()
        return f"{type(self).__name__}(lora={digest}, concept={self.concept!r})"

    def evaluations(self, guidance_scale: float) -> int:
        """Return 2 if guidance has an effect, else 1."""
        return ClassifierFreeGuidance().evaluations(guidance_scale)

    def guide(
        self, adapter: Adapter, prompts: Sequence[str], guidance_scales: Sequence[float], num_steps: int
    ) -> Guide:
        """Return the guide of a batch."""
        phrases = phrases_of(self.concept)
        if not phrases:
            raise InputError("guidance.concept: expected phrases that name the concept, got none")
        text, named = adapter.encode(prompts), adapter.encode(phrases)
        strength = transport_strength(
            text, named, token_sets(adapter, prompts, text), token_sets(adapter, phrases, named)
        )
        plain = ClassifierFreeGuidance().guide(adapter, prompts, guidance_scales, num_steps)
        return _Guide(adapter, plain, read_factors(adapter, Path(self.lora)), strength)


class _Guide:
    def __init__(self, adapter: Adapter, plain: Guide, factors: dict[str, Factors], strength: Tensor) -> None:
        self.plain, self.strength, self.rows = plain, strength, strength
        self.layers = {name: adapter.denoiser.get_submodule(name) for name in factors}
        self.factors = {
            name: Factors(*(part.to(strength.device) for part in own)) for name, own in factors.items()
        }

    def inputs(self, step_index: int) -> Inputs:
        found = self.plain.inputs(step_index)
        self.rows = self.strength[found.latents.to(self.strength.device)]
        return found

    def combine(self, outputs: Tensor, step_index: int) -> Tensor:
        return self.plain.combine(outputs, step_index)

    @contextmanager
    def network_changed(self) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._adding(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = self.rows.view(-1, *[1] * (output.ndim - 1)).to(output)
            return output + rows * self.factors[name].of(layer, inputs[0]).to(output)

        return add
