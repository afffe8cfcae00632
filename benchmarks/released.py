"""The released training loops of other methods, for measuring only: our own, plain implementations.

They are written from descriptions of the released code of ESD (arXiv 2303.07345) and AdvUnlearn (arXiv
2405.15234). A second network is the teacher. Each iteration samples anew, with the network in training, up to
a random step, and evaluates the teacher there. AdvUnlearn does so in each step of its attack. What is merely
wrong in the code, and costs nothing, is right here: timesteps belong to their latents, and gradients are
cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from trce_lightning.adapters import Adapter
from trce_lightning.erasers.advunlearn import with_inserted
from trce_lightning.erasers.esd import esd_target
from trce_lightning.losses import squared_distance
from trce_lightning.sampling import classifier_free_guidance, denoise_step
from trce_lightning.tokens import Text


@dataclass(frozen=True)
class Loop:
    """The numbers and networks that both loops share.

    Args:
        student: the model in training.
        teacher: the original.
        iterations: optimizer steps.
        batch: latents of each.
        num_steps: steps of a full sampling run.
        guidance_scale: scale with which they are sampled.
        lr: learning rate of Adam.
        eta: η of the target.
    """

    student: Adapter
    teacher: Adapter
    iterations: int
    batch: int
    num_steps: int
    guidance_scale: float
    lr: float
    eta: float

    @property
    def evaluations(self) -> int:
        """Return what both networks have evaluated."""
        return self.student.network_evaluations + self.teacher.network_evaluations

    def drawn(self, prompts: Sequence[str], generator: torch.Generator) -> list[str]:
        """Return the prompts of an iteration."""
        return [prompts[i] for i in torch.randint(len(prompts), (self.batch,), generator=generator).tolist()]

    @torch.no_grad()
    def sampled(self, text: Text, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents on the way to images of ``text``, and their timesteps. The step is random."""
        schedule, count = self.student.schedule(self.num_steps), self.batch
        last = int(torch.randint(self.num_steps, (), generator=generator))
        z_t = torch.randn(count, *self.student.latent_shape, generator=generator)
        both = Text.cat([self.student.empty().expand(count), text])
        for step_index in range(last):
            timestep = schedule.timesteps[step_index].expand(2 * count)
            empty, led = self.student.predict(z_t.repeat(2, 1, 1, 1), timestep, both).chunk(2)
            guided = classifier_free_guidance(empty, led, self.guidance_scale)
            z_t = denoise_step(guided, z_t, schedule, step_index)
        return z_t, schedule.timesteps[last].expand(count)

    @torch.no_grad()
    def target(self, z_t: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """Return the teacher's negative guidance."""
        both = Text.cat([self.teacher.empty().expand(len(z_t)), text])
        empty, led = self.teacher.predict(z_t.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
        return esd_target(empty, led, empty, self.eta)


def esd(loop: Loop, prompts: Sequence[str], weights: Sequence[Tensor]) -> None:
    """Train ``weights`` of the student as the script of ESD does."""
    optimizer, generator = _adam(weights, loop.lr), torch.Generator().manual_seed(0)
    for _ in tqdm(range(loop.iterations), "ESD, released loop", unit="step"):
        text = loop.teacher.encode(loop.drawn(prompts, generator))
        z_t, timestep = loop.sampled(text, generator)
        predicted = loop.student.predict(z_t, timestep, text)
        optimizer.zero_grad()
        squared_distance(predicted, loop.target(z_t, timestep, text)).mean().backward()
        optimizer.step()


@dataclass(frozen=True)
class Attack:
    """The numbers of AdvUnlearn that ESD's loop lacks."""

    warmup: int
    steps: int
    lr: float
    retain_weight: float
    retain_batch: int


def advunlearn(
    loop: Loop, attack: Attack, prompts: Sequence[str], kept: Sequence[str], weights: Sequence[Tensor]
) -> None:
    """Train ``weights`` of the student's text encoder as the script of AdvUnlearn does."""
    student, teacher = loop.student, loop.teacher
    optimizer, generator = _adam(weights, loop.lr), torch.Generator().manual_seed(0)
    for iteration in tqdm(range(loop.iterations), "AdvUnlearn, released loop", unit="step"):
        drawn = loop.drawn(prompts, generator)
        vectors = {
            name: torch.randn(len(own), iteration >= attack.warmup, own.shape[2], generator=generator)
            * own.std()
            for name, own in student.embed(student.tokenize(drawn)).items()
        }
        if iteration >= attack.warmup:
            _attack(loop, attack, drawn, vectors, generator)
        with torch.no_grad():
            plain = student.encode(drawn)
        z_t, timestep = loop.sampled(plain, generator)
        predicted = student.predict(z_t, timestep, with_inserted(student, drawn, vectors))
        erased = squared_distance(predicted, loop.target(z_t, timestep, teacher.encode(drawn))).mean()
        chosen = torch.randint(len(kept), (attack.retain_batch,), generator=generator).tolist()
        others = [kept[index] for index in chosen]
        none = {name: own[:, :0].detach() for name, own in student.embed(student.tokenize(others)).items()}
        z_r = torch.randn(len(others), *student.latent_shape, generator=generator)
        t_r = student.schedule(loop.num_steps).timesteps[0].expand(len(others))
        with torch.no_grad():
            goal = teacher.predict(z_r, t_r, teacher.encode(others))
        again = student.predict(z_r, t_r, with_inserted(student, others, none))
        optimizer.zero_grad()
        (erased + attack.retain_weight * squared_distance(again, goal).mean()).backward()
        optimizer.step()


def _attack(
    loop: Loop, attack: Attack, prompts: list[str], vectors: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Move ``vectors`` in place. Each step samples anew."""
    for vector in vectors.values():
        vector.requires_grad_(True)
    optimizer = torch.optim.Adam(vectors.values(), lr=attack.lr)
    own = loop.teacher.encode(prompts)
    for _ in range(attack.steps):
        with torch.no_grad():
            plain = loop.student.encode(prompts)
        z_t, timestep = loop.sampled(plain, generator)
        predicted = loop.student.predict(z_t, timestep, with_inserted(loop.student, prompts, vectors))
        with torch.no_grad():
            goal = loop.teacher.predict(z_t, timestep, own)
        loss = squared_distance(predicted, goal).sum()
        slopes = torch.autograd.grad(loss, list(vectors.values()))
        for vector, slope in zip(vectors.values(), slopes, strict=True):
            vector.grad = slope
        optimizer.step()
    for vector in vectors.values():
        vector.requires_grad_(False)


def _adam(weights: Sequence[Tensor], lr: float) -> torch.optim.Adam:
    for weight in weights:
        weight.requires_grad_(True)
    return torch.optim.Adam(weights, lr=lr)
