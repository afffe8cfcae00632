"""Count the operations of each stage at Stable Diffusion 1.4's size, without weights.

A multiplication and an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks, plan
from benchmarks.plain import trained_parameters
from benchmarks.report import Row
from trce_lightning.cli import config_folder
from trce_lightning.concepts import load_concept
from trce_lightning.jobs.session import KEEP_LIMIT
from trce_lightning.textual import batches_by_length


def denoiser(trains: str | None) -> float:
    """Return the TFLOP of one evaluation at 512 px.

    If ``trains`` is None, it counts the forward pass. Otherwise it adds a backward pass, in which either "Q"
    trains or what the "authors" train.
    """
    with torch.device("meta"):
        unet = networks.unet().requires_grad_(False)
        side = networks.LATENT_SIDE
        inputs = torch.randn(1, 4, side, side), torch.zeros(1), torch.randn(1, networks.TOKENS, 768)
    queries = [value for name, value in unet.named_parameters() if name.endswith("to_q.weight")]
    for parameter in {None: [], "Q": queries, "authors": trained_parameters(unet)}[trains]:
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        output = unet(*inputs).sample
        if trains:
            output.sum().backward()
    return counter.get_total_flops() / 1e12


def text(lengths: Sequence[int], tokens: int | None = None) -> float:
    """Return the TFLOP of encoding prompts of such lengths in tokens, in stage 1's batches.

    With ``tokens``, every prompt is padded to that many.
    """
    with torch.device("meta"):
        encoder = networks.text_encoder()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for rows in batches_by_length(lengths):
            longest = tokens or max(lengths[row] for row in rows)
            encoder(torch.zeros(len(rows), longest, dtype=torch.int64, device="meta"))
    return counter.get_total_flops() / 1e12


def pair_lengths() -> list[int]:
    """Return the number of tokens of every malicious and safe prompt of 300 pairs."""
    pairs = load_concept(config_folder() / "concept" / "sexual.yaml").pairs()
    prompts = [prompt for pair in pairs for prompt in (pair.malicious, pair.safe)]
    return [len(input_ids) for input_ids in networks.clip_tokenizer()(prompts).input_ids]


def run() -> list[Row]:
    """Count the operations of each stage."""
    config, drawn = plan.paper()
    forward, step, their_step = denoiser(None), denoiser("Q"), denoiser("authors")
    passes = drawn.training_evaluations(config.trajectory, config.seed)
    lengths = pair_lengths()
    pairs = text(lengths), text(lengths, networks.TOKENS)
    kept = text([networks.TOKENS] * KEEP_LIMIT)
    sampling = drawn.network_evaluations * forward / 1e3, plan.plain_sampling() * forward / 1e3
    theirs = plan.ITERATIONS * (7 * forward + 6 * their_step) / 1e3
    training = passes * step / 1e3, theirs
    return [
        Row("one evaluation at 512 px, forward", forward, "TFLOP"),
        Row("… forward and backward", step, "TFLOP", their_step),
        Row("stage 1: encoding the pairs", pairs[0], "TFLOP", pairs[1]),
        Row("stage 1: encoding the kept prompts, once per text encoder", kept, "TFLOP"),
        Row("stage 2: trajectories", sampling[0], "PFLOP", sampling[1]),
        Row("stage 2: training", training[0], "PFLOP", training[1]),
    ]
