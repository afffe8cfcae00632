"""Network evaluations of the paper's sexual setting: 100 malicious trajectories, 3 epochs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import networks, plain
from benchmarks.fitting import compose
from benchmarks.report import Row
from trce_lightning import cli
from trce_lightning.concepts import load_concept
from trce_lightning.config.schema import TrainConfig
from trce_lightning.data.plan import TrajectoryPlan, draw_plan
from trce_lightning.emoji.training.unet import build_scheduler

UNCONDITIONAL_SAMPLED = 2000
MALICIOUS = 100
STEPS = 50
ITERATIONS = 300
KEPT_PER_ITERATION = 4
STORED_BYTES = 6_684_865
"""The size of one of their trajectory files: pickled noise, and 50 latents with their predictions."""


@dataclass
class Counter:
    """A network that only counts: latents in, the same latents out."""

    evaluations: int = 0

    def __call__(self, z_t: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        self.evaluations += len(z_t)
        return z_t


def plain_sampling() -> int:
    """Evaluations of the authors' preparation: all trajectories cost what this one is counted to take."""
    network, scheduler = Counter(), build_scheduler()
    scheduler.set_timesteps(STEPS)
    plain.sample_trajectory(network, scheduler, torch.zeros(2, 1, 1), torch.zeros(1, 1, 1, 1), 3.0)
    return (MALICIOUS + UNCONDITIONAL_SAMPLED) * network.evaluations


def plain_training() -> int:
    """Evaluations of the authors' fine-tuning, likewise."""
    network, states = Counter(), dict.fromkeys(("uncond", "malicious", "safe"), torch.zeros(1, 1, 1))
    point = plain.Point(torch.zeros(1, 1, 1, 1), torch.tensor(0))
    three = plain.Networks(network, network, network)
    plain.training_loss(three, point, [point] * KEPT_PER_ITERATION, states)
    return ITERATIONS * network.evaluations


def paper() -> tuple[TrainConfig, TrajectoryPlan]:
    """`train.py experiment=sd14_sexual`, composed and drawn."""
    config = compose("experiment=sd14_sexual")
    concept = load_concept(cli.config_folder() / "concept" / "sexual.yaml")
    return config, draw_plan(concept.pairs(), config.trajectory, config.seed)


def run() -> list[Row]:
    """Exact counts; tests/test_plan.py holds the plan to what sampling takes."""
    config, plan = paper()
    sampling, training = plan.network_evaluations, plan.training_evaluations(config.trajectory, config.seed)
    plain_bytes = (MALICIOUS + UNCONDITIONAL_SAMPLED) * STORED_BYTES
    latent = 4 * networks.LATENT_SIDE**2
    assert len(plan.malicious) == MALICIOUS and 3 * MALICIOUS == ITERATIONS
    return [
        Row("trajectories, network evaluations", sampling, "", plain_sampling(), most=15_000),
        Row("training, network evaluations forward", training, "", plain_training()),
        Row(
            "trajectories on disk, 64×64 latents",
            plan.stored_bytes(latent) / 1e6,
            "MB",
            plain_bytes / 1e6,
            most=1000,
        ),
    ]
