"""Judge the samples of a denoiser in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.subjects import BACKGROUNDS, SUBJECTS
from trce_lightning.generation.loop import generate
from trce_lightning.jobs.trainers import native_dtype
from trce_lightning.prompts.records import PromptRecord


def named_subjects() -> list[tuple[str, int]]:
    """Return for every subject a prompt that names it and a background, with the subject's index."""
    colours = tuple(BACKGROUNDS)
    return [
        (f"a picture of a {subject.name} on a {colours[index % len(colours)]} background", index)
        for index, subject in enumerate(SUBJECTS)
    ]


class JudgedSamples:
    """Generate samples with a denoiser's state in ``pipeline``, in 20 steps at guidance scale 3."""

    def __init__(self, pipeline: StableDiffusionPipeline, judge: Judge) -> None:
        self.adapter, self.judge = StableDiffusionAdapter(pipeline), judge

    @torch.no_grad()
    def __call__(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """Return the subject index that each prompt's sample shows, ``[N]``.

        The noise derives from the prompt.
        """
        self.adapter.denoiser.load_state_dict(state)
        records = [PromptRecord(id=prompt, prompt=prompt) for prompt in prompts]
        images = generate(
            self.adapter,
            records,
            guidance_scale=3.0,
            num_steps=20,
            batch_size=64,
            autocast_dtype=native_dtype(self.adapter.device.type),
        )
        return self.judge(images)["subject"].argmax(-1)
