"""Measure images per second of the embedded model: our batched loop, and diffusers' pipeline one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.fitting import compose
from benchmarks.report import Row
from benchmarks.timing import in_turns
from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.emoji.groups import benign_subjects
from trce_lightning.emoji.package import weights_folder
from trce_lightning.evaluation.scorer import Sampling
from trce_lightning.generation.loop import generate
from trce_lightning.generation.variation import Variation
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.prompts.records import PromptRecord, image_seed
from trce_lightning.sampling import noise

IMAGES, ALONE, REPEATS = 64, 16, 5
DDIM_STEPS = 20
TOLERANCE = 0.5
"""The largest mean absolute difference of the images, in levels of 0 to 255."""
MATRIX_SIDE = 2048


class Generation:
    """Our loop and diffusers' on equal prompts, noise and schedule."""

    def __init__(self) -> None:
        config = compose("concept=violence", "trainer.precision=32-true")
        self.configured = Session(config, concepts_of(config)).sampling()
        self.ddim = replace(self.configured, num_steps=DDIM_STEPS, variation=Variation())
        self.adapter = cast(StableDiffusionAdapter, load_adapter(weights_folder(), channels_last=True))
        self.other_layout = cast(StableDiffusionAdapter, load_adapter(weights_folder()))
        self.pipeline = self.other_layout.pipeline
        self.pipeline.scheduler = self.adapter.ddim
        subjects = benign_subjects([])[:IMAGES]
        self.records = [PromptRecord(id=name, prompt=f"a picture of {name}") for name in subjects]

    def ours(self) -> Tensor:
        """Generate the images of all records in batches by DDIM, uint8 ``[N, 3, H, W]``."""
        return self._batched(self.ddim)

    def as_configured(self) -> Tensor:
        """Generate the same in the steps that the embedded model takes by default."""
        return self._batched(self.configured)

    def one_batch(self) -> Tensor:
        """Generate the same in one batch."""
        return self._batched(replace(self.configured, batch_size=IMAGES))

    def channels_first(self) -> Tensor:
        """Generate the images of all records by DDIM, in the other memory layout."""
        return self._batched(self.ddim, self.other_layout)

    def _batched(self, sampling: Sampling, adapter: StableDiffusionAdapter | None = None) -> Tensor:
        return generate(adapter or self.adapter, self.records, **sampling.options())

    def plain(self) -> Tensor:
        """Generate the images of the first records by diffusers, one by one."""
        images = [
            self.pipeline(
                record.prompt,
                latents=noise((1, *self.adapter.latent_shape), image_seed(record)),
                guidance_scale=self.ddim.guidance_scale,
                num_inference_steps=DDIM_STEPS,
                output_type="pt",
            ).images
            for record in self.records[:ALONE]
        ]
        return (torch.cat(images) * 255).round().to(torch.uint8)


def run() -> list[Row]:
    """Measure rates, after a check that both loops generate the same images."""
    loops = Generation()
    difference = (loops.ours()[:ALONE].float() - loops.plain().float()).abs().mean()
    assert difference < TOLERANCE, f"expected the same images, got a mean difference of {difference}"
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE)
    loops_in_turns = {
        "plain": loops.plain,
        "ours": loops.ours,
        "configured": loops.as_configured,
        "one batch": loops.one_batch,
        "channels first": loops.channels_first,
    }
    times = in_turns({**loops_in_turns, "product": lambda: matrix @ matrix}, REPEATS)
    rates = len(loops.records) / times["ours"], ALONE / times["plain"]
    with FlopCounterMode(display=False) as counter:
        loops.ours()
    work = counter.get_total_flops() / 1e9 / times["ours"], 2 * MATRIX_SIDE**3 / 1e9 / times["product"]
    drawn = f"images drawn, embedded model, {DDIM_STEPS} DDIM steps"
    few, batch = loops.configured.num_steps, loops.configured.batch_size
    return [
        Row(drawn, rates[0], "/s", rates[1], rate=True, least_gain=2),
        Row(f"… in all, {IMAGES} images", times["ours"], "s", most=8.0),
        Row(f"… in {few} steps of DPM-Solver++, the default", times["configured"], "s", most=8.0),
        Row(f"… {batch} of these a batch, against {IMAGES}", times["configured"], "s", times["one batch"]),
        Row("… by DDIM with channels_last, against without", times["ours"], "s", times["channels first"]),
        Row("… operations, against a large matrix product's", work[0], "GFLOP/s", work[1], rate=True),
    ]
