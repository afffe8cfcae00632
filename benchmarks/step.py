"""A training step against forward and backward of the same network, and against the authors' iteration."""

from __future__ import annotations

import copy
import dataclasses

import torch
from diffusers import UNet2DConditionModel

from benchmarks import networks, plain
from benchmarks.fitting import compose, fit_in_turns, small
from benchmarks.processes import alone
from benchmarks.report import Row
from benchmarks.timing import in_turns
from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.config.schema import TrajectoryConfig
from trce_lightning.emoji.package import weights_folder
from trce_lightning.tokens import Text

SHARE = 1.15
ROWS = 5
"""The latents of a batch: one malicious latent and four unconditional ones, as in the paper."""
SIZES = ((16, ROWS, 5), (networks.LATENT_SIDE, networks.LARGEST_BATCH, 3))
"""Latents' side, rows of a batch, and how many steps are timed; the first of them warms up."""


def stable_diffusion(latent_side: int, rows: int, steps: int) -> tuple[float, float]:
    """Plain and ours at full size."""
    adapter = StableDiffusionAdapter(networks.pipeline(), resolution=8 * latent_side)
    return fit_in_turns(adapter, small(rows, epochs=steps))


def embedded_config() -> TrajectoryConfig:
    """The embedded model's options with 16 malicious points and two unconditional ones with each."""
    return dataclasses.replace(
        compose("concept=violence").trajectory,
        num_trajectories=32,
        num_unconditional=16,
        batch_size=16,
        unconditional_per_malicious=2,
        kept_per_malicious=0,
    )


def embedded() -> tuple[float, float]:
    """Plain and ours on the embedded model."""
    return fit_in_turns(load_adapter(weights_folder(), channels_last=True), embedded_config())


def authors() -> tuple[float, float]:
    """Seconds of the authors' iteration, and of the network's work that ours takes for the same latents."""
    adapter = load_adapter(weights_folder(), channels_last=True)
    original, edited = copy.deepcopy(adapter.denoiser), copy.deepcopy(adapter.denoiser)
    text = adapter.encode(["", "a dagger", "a rose"])
    states = dict(zip(("uncond", "malicious", "safe"), text.states["clip"].split(1), strict=True))
    batch = Text.cat([text.rows([1]), text.rows([0]).expand(ROWS - 1)])
    points = [
        plain.Point(torch.randn(1, *adapter.latent_shape), torch.tensor(500 + 50 * i)) for i in range(ROWS)
    ]
    three = plain.Networks(*(evaluation(unet) for unet in (original, edited, adapter.denoiser)))
    for parameter in adapter.trainable("*.to_q").values():
        parameter.requires_grad_(True)

    def theirs() -> None:
        plain.training_loss(three, points[0], points[1:], states).backward()

    def ours() -> None:
        z_t, timestep = torch.cat([row.z_t for row in points]), torch.stack([row.timestep for row in points])
        adapter.predict(z_t, timestep, batch).square().mean().backward()

    times = in_turns({"plain": theirs, "ours": ours}, repeats=9)
    return times["plain"], times["ours"]


def evaluation(unet: UNet2DConditionModel) -> plain.Network:
    """Return the network as the plain implementation calls it."""
    return lambda z_t, timestep, states: unet(z_t, timestep, encoder_hidden_states=states).sample


def run() -> list[Row]:
    """Whole steps of Lightning's loop: data, forward, backward, optimizer, logging."""
    rows = []
    for side, size, steps in SIZES:
        forward_backward, step = alone(stable_diffusion, side, size, steps)
        what = (
            f"training step, SD 1.4 at {side}×{side} latents, {size} in a batch, against forward + backward"
        )
        rows.append(Row(what, step, "s", forward_backward, most_share=SHARE))
    forward_backward, step = alone(embedded)
    config = embedded_config()
    size = config.batch_size * (1 + config.unconditional_per_malicious)
    what = f"training step, embedded model, {size} in a batch, against forward + backward"
    rows.append(Row(what, step, "s", forward_backward, most_share=SHARE))
    theirs, ours = alone(authors)
    rows.append(Row("network's work for one iteration's latents, embedded model", ours, "s", theirs))
    return rows
