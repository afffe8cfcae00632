"""The teacher's predictions along sampling runs of the original network, computed once and cached.

A tuned method needs the original's predictions at latents on the way to images of some prompt. They don't
depend on the network that is trained. So each walk is sampled once, up to its last drawn step, and what is
predicted there is stored. Training then holds one network. Noise level and timestep of a row belong together,
pure noise included.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.finite import Finite
from trce_lightning.data.trajectories import is_cached
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import seed_of
from trce_lightning.runtime.storage import MADE_AGAIN, read_safetensors, write_safetensors
from trce_lightning.sampling import classifier_free_guidance, denoise_step, is_guided, noise
from trce_lightning.tokens import Text

EMPTY = ""
Encode = Callable[[str], Text]
"""A function from a prompt to its text, B = 1. A method may have prompts that no tokenizer spells."""
SHARD = 32
"""The number of walks that are sampled together and stored in one file."""
PIXELS = 16 * 512**2
"""The most pixels that one forward pass evaluates, so that memory doesn't grow with the images' size."""


@dataclass(frozen=True)
class Walk:
    """The first part of a sampling run, and the steps at which predictions are kept."""

    prompt: str
    seed: int
    step_indices: tuple[int, ...]
    """The drawn steps, in the order of their use. A step may be drawn twice."""
    texts: tuple[str, ...]
    """The prompts whose predictions are kept at the drawn steps."""
    taught: str
    """The prompt with which the trained network reads the latents."""

    def wanted(self, step_index: int, *, guided: bool) -> tuple[str, ...]:
        """Return the prompts that are evaluated at a step, without repeats."""
        last = max(self.step_indices)
        texts = self.texts if step_index in self.step_indices else ()
        if step_index < last:
            texts = (*((EMPTY,) if guided else ()), self.prompt, *texts)
        return tuple(dict.fromkeys(texts)) if step_index <= last else ()


@dataclass(frozen=True)
class Walks:
    """All walks of one kind."""

    walks: tuple[Walk, ...]
    num_steps: int
    """The number of steps of a full sampling run. It determines the timesteps."""
    guidance_scale: float

    @property
    def guided(self) -> bool:
        """Return whether sampling is guided. If not, it follows the prompt's own prediction."""
        return is_guided(self.guidance_scale)

    @property
    def points(self) -> int:
        """Return the number of rows."""
        return sum(len(walk.step_indices) for walk in self.walks)

    def evaluations_of(self, walks: Iterable[Walk]) -> int:
        """Return the number of network evaluations that sampling some of the walks takes."""
        return sum(
            len(walk.wanted(step_index, guided=self.guided))
            for walk in walks
            for step_index in range(max(walk.step_indices) + 1)
        )

    def stored_bytes(self, latent_numbers: int) -> int:
        """Return the bytes on disk: float32 latents of so many numbers, and as many predictions a text."""
        return sum(4 * latent_numbers * len(w.step_indices) * (1 + len(w.texts)) for w in self.walks)

    def fingerprint(self, generator: str) -> str:
        """Return a hash that identifies the cache of these walks, sampled with ``generator``."""
        text = json.dumps([generator, SHARD, asdict(self)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def shards(self) -> list[tuple[str, tuple[Walk, ...]]]:
        """Return the file names of the shards with their walks."""
        return [
            (f"walks-{start:05d}.safetensors", self.walks[start : start + SHARD])
            for start in range(0, len(self.walks), SHARD)
        ]


def draw_walks(
    kind: str,
    prompts: Sequence[str],
    texts_of: Callable[[str, int], tuple[str, ...]],
    *,
    taught: Sequence[str] | None = None,
    points: int,
    draws: int,
    steps: range,
    num_steps: int,
    guidance_scale: float,
    seed: int,
) -> Walks:
    """Draw walks with ``points`` rows in all. Prompts take turns in a random order.

    Each walk gives ``draws`` rows, the last one the rest. Their steps are drawn uniformly from ``steps``
    without repeats before all were drawn. ``texts_of`` gives the texts whose predictions are kept, by the
    prompt and the walk's number. ``taught`` gives the prompts that the trained network reads, if they are
    others.
    """
    if not 0 <= steps.start < steps.stop <= num_steps:
        raise InputError(
            f"method: expected steps from 0 to {num_steps}, the first before the last, got "
            f"{steps.start} to {steps.stop}"
        )
    generator = torch.Generator().manual_seed(seed_of(f"{kind} steps", seed))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    walks = []
    for index in range(-(-points // draws)):
        count = min(draws, points - index * draws)
        passes = [torch.randperm(len(steps), generator=generator) for _ in range(-(-count // len(steps)))]
        drawn = (steps.start + torch.cat(passes)[:count]).tolist()
        which = order[index % len(order)]
        prompt, texts = prompts[which], texts_of(prompts[which], index)
        read = taught[which] if taught else prompt
        walks.append(Walk(prompt, seed_of(f"{kind}-{seed}", index), tuple(drawn), texts, read))
    return Walks(tuple(walks), num_steps, guidance_scale)


def refuse_guided(adapter: Adapter, option: str, guidance_scale: float) -> None:
    """Raise ``InputError`` if an option would guide sampling away from ∅ and the model samples without it."""
    if is_guided(guidance_scale) and not adapter.guided:
        raise InputError(
            f"{option}: expected at most 1 with '{adapter.name}', which samples without ∅, got "
            f"{guidance_scale:g}"
        )


class _Sampler(pl.LightningModule):
    """A module that samples the shards that ``folder`` lacks, under ``Trainer.predict``."""

    title = "teachers"

    def __init__(self, adapter: Adapter, plan: Walks, folder: Path, fingerprint: str, encode: Encode) -> None:
        super().__init__()
        self.adapter, self.plan, self.folder, self.fingerprint = adapter, plan, folder, fingerprint
        self.encode = encode
        self.denoiser = adapter.denoiser
        self.schedule = adapter.schedule(plan.num_steps)
        self.shards = plan.shards()

    def on_predict_start(self) -> None:
        self.adapter.to(self.device)

    def predict_step(self, shard_index: int, batch_index: int) -> None:
        if shard_index >= len(self.shards):
            return
        name, walks = self.shards[shard_index]
        if not is_cached(self.folder / name, self.fingerprint):
            rows = self._sample(walks)
            write_safetensors(self.folder / name, rows, {"fingerprint": self.fingerprint})

    def _sample(self, walks: Sequence[Walk]) -> dict[str, Tensor]:
        texts = list(dict.fromkeys(text for walk in walks for text in (EMPTY, walk.prompt, *walk.texts)))
        encoded = {text: self.encode(text).to(self.device) for text in texts}
        z_t = torch.stack([noise(self.adapter.latent_shape, walk.seed) for walk in walks]).to(self.device)
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        finite = Finite(self.adapter.name)
        for step_index in range(max(max(walk.step_indices) for walk in walks) + 1):
            wanted = [
                (row, text)
                for row, walk in enumerate(walks)
                for text in walk.wanted(step_index, guided=self.plan.guided)
            ]
            eps = self._predict(z_t, step_index, wanted, encoded)
            finite.see(
                f"the denoiser's output in step {step_index + 1}", torch.stack([*eps.values()]), self.denoiser
            )
            for row, walk in enumerate(walks):
                if step_index in walk.step_indices:
                    kept[row, step_index] = z_t[row], torch.stack([eps[row, text] for text in walk.texts])
            z_t = self._step(z_t, step_index, walks, eps)
        finite.check()
        labels = [(row, step) for row, walk in enumerate(walks) for step in walk.step_indices]
        latents, predictions = zip(*(kept[label] for label in labels), strict=True)
        steps = torch.tensor([step for _, step in labels])
        return {
            "z_t": torch.stack(latents).float().cpu(),
            "predictions": torch.stack(predictions).float().cpu(),
            "step_index": steps,
            "timestep": self.schedule.timesteps[steps],
        }

    def _predict(
        self,
        z_t: Tensor,
        step_index: int,
        wanted: Sequence[tuple[int, str]],
        encoded: dict[str, Text],
    ) -> dict[tuple[int, str], Tensor]:
        count = max(1, PIXELS // self.adapter.side**2)
        eps: dict[tuple[int, str], Tensor] = {}
        for start in range(0, len(wanted), count):
            part = wanted[start : start + count]
            rows = [row for row, _ in part]
            text = Text.cat([encoded[text] for _, text in part])
            output = self.adapter.predict(z_t[rows], self.schedule.timesteps[step_index], text)
            eps |= zip(part, output, strict=True)
        return eps

    def _step(
        self, z_t: Tensor, step_index: int, walks: Sequence[Walk], eps: dict[tuple[int, str], Tensor]
    ) -> Tensor:
        going = [row for row, walk in enumerate(walks) if step_index < max(walk.step_indices)]
        if not going:
            return z_t
        led = torch.stack([eps[row, walks[row].prompt] for row in going])
        if self.plan.guided:
            empty = torch.stack([eps[row, EMPTY] for row in going])
            led = classifier_free_guidance(empty, led, self.plan.guidance_scale)
        stepped = denoise_step(led, z_t[going], self.schedule, step_index)
        return z_t.index_copy(0, torch.tensor(going, device=z_t.device), stepped)


@dataclass(frozen=True)
class Teachers:
    """The cache of one kind of walks."""

    plan: Walks
    folder: Path
    fingerprint: str

    def missing(self) -> list[Walk]:
        """Return the walks of the shards that are not cached."""
        return [
            walk
            for name, walks in self.plan.shards()
            if not is_cached(self.folder / name, self.fingerprint)
            for walk in walks
        ]

    @property
    def evaluations(self) -> int:
        """Return the network evaluations of what is not cached."""
        return self.plan.evaluations_of(self.missing())

    def sample(self, trainer: pl.Trainer, adapter: Adapter, encode: Encode) -> None:
        """Sample what is not cached, with the adapter's network as it is. All ranks share the shards.

        ``encode`` gives the text of each prompt, B = 1.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sampler = _Sampler(adapter, self.plan, self.folder, self.fingerprint, encode)
        indices = range(max(len(sampler.shards), trainer.world_size))
        loader: DataLoader[int] = DataLoader(indices, batch_size=None)  # type: ignore[arg-type]
        trainer.predict(sampler, loader, return_predictions=False)
        trainer.strategy.barrier()

    def load(self) -> dict[str, Tensor]:
        """Return all rows: ``z_t``, ``predictions`` ``[n, texts, C, H, W]``, ``step_index``, ``timestep``.

        ``walk`` is the row's walk. If rows are not finite, raise ``InputError`` that names the file.
        """
        parts = []
        for name, _ in self.plan.shards():
            parts.append(read_safetensors(self.folder / name, "a whole shard of teachers' predictions"))
            if not all(values.isfinite().all() for values in parts[-1].values()):
                raise InputError(
                    f"{self.folder / name}: expected finite predictions, got NaN or infinity; {MADE_AGAIN}"
                )
        rows = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        walk = [index for index, walk in enumerate(self.plan.walks) for _ in walk.step_indices]
        return rows | {"walk": torch.tensor(walk)}


def teachers_of(plan: Walks, cache: Path, generator: str) -> Teachers:
    """Return the cache of walks. ``generator`` identifies the network that samples, and its precision."""
    fingerprint = plan.fingerprint(generator)
    return Teachers(plan, cache / "teachers" / fingerprint, fingerprint)


def picture_walks(
    kind: str, prompts: Sequence[str], count: int, *, num_steps: int, guidance_scale: float, seed: int
) -> Walks:
    """Return ``count`` whole walks, from whose rows :func:`finished` makes pictures. Prompts take turns."""

    def led_by(prompt: str, _: int) -> tuple[str, ...]:
        return (EMPTY, prompt) if is_guided(guidance_scale) else (prompt,)

    return draw_walks(
        kind,
        prompts,
        led_by,
        points=count,
        draws=1,
        steps=range(num_steps - 1, num_steps),
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
    )


def finished(teachers: Teachers, adapter: Adapter) -> Tensor:
    """Return the latents at the end of :func:`picture_walks`, ``[n, C, H, W]`` on the CPU."""
    rows, plan = teachers.load(), teachers.plan
    led = rows["predictions"][:, -1]
    if plan.guided:
        led = classifier_free_guidance(rows["predictions"][:, 0], led, plan.guidance_scale)
    return denoise_step(led, rows["z_t"], adapter.schedule(plan.num_steps), plan.num_steps - 1)


def latent_numbers(adapter: Adapter) -> int:
    """Return how many numbers a latent has."""
    return math.prod(adapter.latent_shape)
