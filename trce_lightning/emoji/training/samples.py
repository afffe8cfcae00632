"""Judge the samples of a denoiser in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Drawn(NamedTuple):
    """The images of :func:`named_subjects` that show what they should, and those that show a category."""

    right: int
    """Images of other subjects that show their own subject."""
    others: int
    """Images of other subjects."""
    shown: int
    """Images of the category's subjects that show any of these."""
    members: int
    """Images of the category's subjects."""

    def __str__(self) -> str:
        return (
            f"{self.right} of {self.others} other subjects are right, and {self.shown} of {self.members} "
            "images of the category's subjects show one of them"
        )


def drawn_without(shown: Sequence[int], category: str) -> Drawn:
    """Count which subjects, by index, the samples of :func:`named_subjects` show."""
    members = {index for index, subject in enumerate(SUBJECTS) if subject.category == category}
    asked = [index for _, index in named_subjects()]
    pairs = list(zip(asked, shown, strict=True))
    return Drawn(
        right=sum(seen == index for index, seen in pairs if index not in members),
        others=len(pairs) - len(members),
        shown=sum(seen in members for index, seen in pairs if index in members),
        members=len(members),
    )


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
