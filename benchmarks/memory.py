"""Peak resident memory of a training step at Stable Diffusion 1.4's size, in processes of its own (Linux)."""

from __future__ import annotations

import copy
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import networks, plain
from benchmarks.fitting import Fit, small
from benchmarks.processes import alone, available_gb, forget_peak, peak_gb
from benchmarks.report import Row
from benchmarks.step import evaluation
from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.attacks.objectives import noised
from trce_lightning.attacks.white_box import embedding_gradient
from trce_lightning.attacks.words import Layout, Vocabulary, prefixed
from trce_lightning.sampling import seeded

LIMIT_GB = 14.0
SIDE, ROWS = 16, 5
FREE_TOKENS, LEVELS = 16, 999
"""Tokens that a search for words changes, and its noise levels, as published for P4D."""


@dataclass(frozen=True)
class Peak:
    """The peak memory of one training step, and the size of what it trains on."""

    gb: float
    shard_bytes: int
    """The size on disk of all trajectories."""
    planned_bytes: int


def limit() -> None:
    """Fail with an error rather than take the machine's memory."""
    most = min(LIMIT_GB, available_gb() - 2)
    resource.setrlimit(resource.RLIMIT_DATA, (int(most * 1e9),) * 2)


def ours(side: int, rows: int, checkpointing: bool, epochs: int = 1) -> Peak:
    """Our module in its Trainer, the text encoder beside it."""
    limit()
    adapter = StableDiffusionAdapter(networks.pipeline(), resolution=8 * side)
    with tempfile.TemporaryDirectory() as folder:
        fit = Fit(adapter, small(rows, epochs, gradient_checkpointing=checkpointing), Path(folder))
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        forget_peak()
        fit.run()
    return Peak(peak_gb(), stored, fit.plan.stored_bytes(4 * side**2))


def authors(side: int) -> float:
    """An iteration of the authors': three networks, self-attention and cross-attention's Q train."""
    limit()
    trained = networks.unet().requires_grad_(False)
    original, edited = copy.deepcopy(trained), copy.deepcopy(trained)
    parameters = plain.trained_parameters(trained)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    three = plain.Networks(*(evaluation(unet) for unet in (original, edited, trained)))
    states = {kind: torch.randn(1, networks.TOKENS, 768) for kind in ("uncond", "malicious", "safe")}
    points = [plain.Point(torch.randn(1, 4, side, side), torch.tensor(500)) for _ in range(ROWS)]
    forget_peak()
    plain.training_loss(three, points[0], points[1:], states).backward()
    optimizer.step()
    return peak_gb()


def white_box(side: int, prompts: int, kind: str = "") -> float:
    """A gradient step of a search for words through text encoder and denoiser, ``prompts`` together.

    "tracked" weights want gradients, so that the forward pass keeps what these need. "recomputed" activations
    are those of gradient checkpointing.
    """
    limit()
    adapter = StableDiffusionAdapter(networks.pipeline(), resolution=8 * side)
    for network in (adapter.denoiser, adapter.text_encoder):
        network.requires_grad_(kind == "tracked")
    if kind == "recomputed":
        adapter.denoiser.enable_gradient_checkpointing()
    forget_peak()
    slope = search_step(adapter, prompts)
    assert slope.isfinite().all() and slope.abs().sum() > 0
    return peak_gb()


def search_step(adapter: StableDiffusionAdapter, prompts: int) -> Tensor:
    """Return a gradient at token embeddings, ``[prompts, FREE_TOKENS, e]``."""
    ids = adapter.tokenize(["a"])["clip"][0, 1:2]
    embeddings = adapter.embed({"clip": ids[None]})["clip"][0]
    layout = Layout.of(
        adapter,
        Vocabulary("clip", ids, ["a"], embeddings, frozenset()),
        [prefixed([], FREE_TOKENS)] * prompts,
    )
    z_0, levels = torch.zeros(prompts, *adapter.latent_shape), torch.full((prompts,), LEVELS // 2)
    rows = noised(adapter, z_0, levels, LEVELS, [seeded(i) for i in range(prompts)])
    found = embeddings.expand(prompts, FREE_TOKENS, -1)
    return embedding_gradient(layout, layout.fixed(), found, rows)[1]


def run() -> list[Row]:
    """Measure at small latents, next to the authors' iteration."""
    plain_gb = alone(authors, SIDE)
    kept, recomputed = (alone(ours, SIDE, ROWS, flag, 4) for flag in (False, True))
    what = f"peak memory of training, SD 1.4 at {SIDE}×{SIDE} latents, {ROWS} in a batch"
    return [
        Row(what, kept.gb, "GB", plain_gb),
        Row("… with gradient checkpointing", recomputed.gb, "GB", plain_gb),
    ]
