"""SPM, semi-permeable membrane (arXiv 2312.16145): rank-1 adapters that act on the concept alone.

    min ‖ε_m(z_t, c, t) − (ε(z_t, g, t) − η (ε(z_t, c, t) − ε(z_t, g, t)))‖²
        + λ mean_j ‖ε_m(z_t, a_j, t) − ε(z_t, a_j, t)‖²

ε_m is the network with the membrane, and only the membrane trains. g is the guide. a_j are anchors: random
text states with norms around that of c, where the membrane must do nothing. The membrane is stored as a
LoRA, and merged into the weights with strength 1. The strength that depends on the prompt, which SPM applies
at inference, is a rule of guidance (`trce_lightning.generation.transport`) that reads the LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import Count, Natural, NonNegative
from trce_lightning.erasers.protocol import Erased, Job, denoiser_name
from trce_lightning.erasers.teachers import Encode
from trce_lightning.erasers.tuning import Batch, PromptEraser, Source, Tuning
from trce_lightning.errors import InputError
from trce_lightning.generation.transport import kohya_name
from trce_lightning.losses import squared_distance
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import seeded
from trce_lightning.tokens import Text

ANCHOR = "random states "
"""The beginning of an anchor's name. The rest is its seed, and the prompt whose norm it has."""
NORMS = (0.8, 1.2)
"""The range of an anchor's norm, relative to that of the concept's states."""


class Membrane(nn.Module):
    """A rank-1 adapter of one map: y ← y + s up(down(x)). At first it does nothing, because up is zero."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
        super().__init__()
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            shape: dict[str, Any] = {
                "kernel_size": layer.kernel_size,
                "stride": layer.stride,
                "padding": layer.padding,
            }
            self.down = nn.Conv2d(layer.in_channels, 1, bias=False, **shape)
            self.up = nn.Conv2d(1, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, 1, bias=False)
            self.up = nn.Linear(1, layer.out_features, bias=False)
        bound = 1 / math.sqrt(self.down.weight[0].numel())
        with torch.no_grad():
            self.down.weight.uniform_(-bound, bound, generator=generator)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return up(down(x))."""
        return self.up(self.down(x))

    def change(self) -> Tensor:
        """Return what the membrane adds to the map's weight, in the weight's shape."""
        down, up = self.down.weight, self.up.weight
        return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


class Membranes(nn.Module):
    """The membranes of all maps inside the denoiser's transformer blocks."""

    def __init__(self, adapter: Adapter, seed: int) -> None:
        super().__init__()
        self.layers = membrane_layers(adapter)
        generator = seeded(seed_of("membranes", seed))
        self.parts = [Membrane(layer, generator) for layer in self.layers.values()]
        self.registered = nn.ModuleList(self.parts)
        self.hooks = [
            layer.register_forward_hook(lambda _, inputs, output, part=part: output + part(inputs[0]))
            for layer, part in zip(self.layers.values(), self.parts, strict=True)
        ]

    def merge_(self) -> dict[str, Tensor]:
        """Add the membranes to the weights, take them off, and return the changed tensors by name."""
        changed = {}
        for (name, layer), part, hook in zip(self.layers.items(), self.parts, self.hooks, strict=True):
            hook.remove()
            layer.weight.data += part.change().detach().to(layer.weight)
            changed[f"{name}.weight"] = layer.weight.detach()
        return changed

    def lora(self) -> dict[str, Tensor]:
        """Return the membranes under the names that other programs read, with alpha = rank = 1."""
        tensors: dict[str, Tensor] = {}
        for name, part in zip(self.layers, self.parts, strict=True):
            key = kohya_name(name)
            tensors |= {f"{key}.lora_down.weight": part.down.weight, f"{key}.lora_up.weight": part.up.weight}
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def membrane_layers(adapter: Adapter) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return by name the linear maps and convolutions inside the denoiser's transformer blocks.

    If there are none, raise ``InputError``.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, block in adapter.denoiser.named_modules():
        if isinstance(block, Transformer2DModel):
            layers |= {
                f"{name}.{inner}": layer
                for inner, layer in block.named_modules()
                if isinstance(layer, nn.Linear | nn.Conv2d)
            }
    if not layers:
        raise InputError(
            f"method=spm: expected a denoiser with blocks of {Transformer2DModel.__name__}, got none in "
            f"'{adapter.name}'"
        )
    return layers


def anchor_text(encoded: Text, seed: int) -> Text:
    """Return random text states whose norm is that of ``encoded``, B = 1, times a number in `NORMS`."""
    generator = seeded(seed)
    low, high = NORMS
    states = {}
    for name, own in encoded.states.items():
        noise = torch.randn(own.shape, generator=generator).to(own)
        scale = low + (high - low) * torch.rand((), generator=generator).item()
        states[name] = noise * (scale * own.norm() / noise.norm())
    return Text(states, encoded.roles)


@dataclass(kw_only=True)
class SPM(PromptEraser):
    """Train rank-1 adapters.

    Args:
        eta: η, the strength of the negative guidance.
        anchors: anchors of each point.
        anchor_weight: λ.
        warmup: steps in which the learning rate rises to ``lr``.
        restarts: cosine cycles of the learning rate after that. 0 leaves it constant.
    """

    eta: NonNegative = 1.0
    anchors: Count = 4
    anchor_weight: NonNegative = 1000.0
    warmup: Natural = 500
    restarts: Natural = 3
    name: ClassVar[str] = "spm"
    title: ClassVar[str] = "SPM (arXiv 2312.16145)"

    def sources(self, job: Job) -> dict[str, Source]:
        """Return points on sampling runs for the texts to erase, with anchors of their own."""
        pairs = self.erased_prompts(job)

        def texts(prompt: str, index: int) -> tuple[str, ...]:
            seeds = [seed_of(f"anchor {number} {job.seed}", index) for number in range(self.anchors)]
            return (prompt, pairs[prompt], *(f"{ANCHOR}{seed} {prompt}" for seed in seeds))

        points = self.iterations * self.batch_size
        walks = self.draw(job, "erase", list(pairs), texts, points)
        return {"erase": Source(walks, self.batch_size)}

    def encoder(self, adapter: Adapter) -> Encode:
        """Return what encodes prompts and makes anchors."""

        def encode(text: str) -> Text:
            if not text.startswith(ANCHOR):
                return adapter.encode([text])
            seed, prompt = text.removeprefix(ANCHOR).split(" ", 1)
            return anchor_text(adapter.encode([prompt]), int(seed))

        return encode

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return no parameters of the pipeline: the membranes train."""
        return {}

    def trainable_numbers(self, adapter: Adapter) -> int:
        """Return how many numbers the membranes have."""
        layers = membrane_layers(adapter).values()
        return sum(layer.weight[0].numel() + layer.weight.shape[0] for layer in layers)

    def module(self, job: Job) -> Tuning:
        """Return the module with the membranes on the network."""
        membranes = Membranes(job.adapter, job.seed)
        return Tuning(self, job.adapter, {}, membranes, job.seed)

    @property
    def evaluations_per_step(self) -> int:
        """Return the evaluations of a step: the concept and the anchors of each point."""
        return self.batch_size * (1 + self.anchors)

    def weight_of(self, term: str) -> float:
        """Return λ for the anchors, else 1."""
        return self.anchor_weight if term == "anchor" else 1.0

    def factor_of(self, term: str) -> str:
        """Return λ's option for the anchors, else η's."""
        return "anchor_weight" if term == "anchor" else "eta"

    def lr_factor(self, step: int) -> float:
        """Return a linear rise, then cosine cycles to zero."""
        if step < self.warmup:
            return step / self.warmup
        left = max(1, self.iterations - self.warmup)
        done = (step - self.warmup) / left
        if not self.restarts or done >= 1:
            return 1.0 if not self.restarts else 0.0
        return 0.5 * (1 + math.cos(math.pi * (self.restarts * done % 1)))

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the concept and of the anchors, from one forward pass."""
        rows, adapter = batch["erase"], module.adapter
        concept, guide, *anchors = rows["predictions"].unbind(1)
        kept = [[texts[index] for texts in rows["texts"]] for index in range(2, 2 + self.anchors)]
        texts = [module.text(prompts) for prompts in (rows["taught"], *kept)]
        output = adapter.predict(
            rows["z_t"].repeat(len(texts), 1, 1, 1), rows["timestep"].repeat(len(texts)), Text.cat(texts)
        )
        predicted, *again = output.split(len(concept))
        target = guide - self.eta * (concept - guide)
        held = [squared_distance(a, b).mean() for a, b in zip(again, anchors, strict=True)]
        return {"erase": squared_distance(predicted, target).mean(), "anchor": torch.stack(held).mean()}

    def result(self, job: Job, module: Tuning) -> Erased:
        """Merge the membranes into the weights. They are also stored as a LoRA."""
        membranes = module.extra
        assert isinstance(membranes, Membranes)
        lora = membranes.lora()
        return Erased({denoiser_name(job.adapter): membranes.merge_()}, files={"lora": lora})
