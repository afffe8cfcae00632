"""The one loop that generates images: deterministic DDIM, or a `Variation`, with classifier-free guidance.

Each image has its own CPU generator of noise. So its noise doesn't depend on the model, the batch size or the
number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.finite import Finite
from trce_lightning.errors import InputError
from trce_lightning.generation.guidance import (
    ChangesNetwork,
    ClassifierFreeGuidance,
    Guidance,
    check_scales,
)
from trce_lightning.generation.image_folder import claim, guidance_scales, load_images, manifest, write_png
from trce_lightning.generation.lora import lora_applied
from trce_lightning.generation.samplers import Deterministic, Noisy, Sampler, make_sampler
from trce_lightning.generation.variation import NoisyDdim, Start, Variation
from trce_lightning.prompts.records import PromptRecord, image_seed
from trce_lightning.sampling import noise, seeded

__all__ = [
    "generate",
    "generate_to",
    "latents_after",
    "load_images",
    "network_steps",
    "planned_evaluations",
    "shard",
]

Batch = Sequence[PromptRecord]
USUAL = Variation()
CLASSIFIER_FREE = ClassifierFreeGuidance()


def generate(
    adapter: Adapter,
    records: Sequence[PromptRecord],
    *,
    guidance_scale: float,
    num_steps: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    description: str | None = None,
    variation: Variation = USUAL,
) -> Tensor:
    """Return images of prompts, uint8 ``[N, 3, H, W]`` on the CPU.

    The prediction is ε = ε_∅ + w (ε_c − ε_∅), with ∅ and c in one forward pass. For w ≤ 1 it is ε_c alone.

    Args:
        adapter: the model.
        records: the prompts. If a record has no seed, its seed derives from its id.
        guidance_scale: w of records without one of their own.
        num_steps: the number of sampling steps.
        batch_size: the number of images that are generated together.
        autocast_dtype: the autocast type of denoiser and decoder. None leaves their own type.
        description: the text of a progress bar over network evaluations. None shows no bar.
        variation: another sampler, negative prompt, first latent, or a LoRA.

    Raises:
        InputError: ``batch_size`` is below 1, or the model gives NaN or infinity.
    """
    with lora_applied(adapter, variation.lora):
        drawing = _Drawing(adapter, guidance_scale, num_steps, autocast_dtype, variation)
        images = [images for _, images in drawing.run(_batches(records, batch_size), description)]
    return torch.cat(images) if images else torch.empty((0, 3, 0, 0), dtype=torch.uint8)


def latents_after(
    adapter: Adapter,
    records: Sequence[PromptRecord],
    steps: Collection[int],
    *,
    guidance_scale: float,
    num_steps: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    variation: Variation = USUAL,
) -> dict[int, Tensor]:
    """Return the latents after these numbers of steps, ``[N, C, H, W]`` on the CPU each.

    0 is what sampling begins with. Of the ``num_steps`` that `generate` would take, no step after the largest
    of ``steps`` is taken. The other arguments are those of `generate`.
    """
    found: dict[int, list[Tensor]] = {step: [] for step in steps}
    with lora_applied(adapter, variation.lora):
        drawing = _Drawing(adapter, guidance_scale, num_steps, autocast_dtype, variation)
        for rows in _batches(records, batch_size):
            for step, latents in drawing.latents(rows, steps).items():
                found[step].append(latents.cpu())
    return {step: torch.cat(parts) for step, parts in found.items()}


def network_steps(adapter: Adapter, num_steps: int, variation: Variation = USUAL) -> int:
    """Return how often the denoiser evaluates an image's latents.

    This is ``num_steps``, except with some samplers and in image-to-image.
    """
    return len(_sampler(adapter, num_steps, variation).timesteps)


def _sampler(adapter: Adapter, num_steps: int, variation: Variation) -> Sampler:
    given, scheduler = variation.latent_start, variation.scheduler
    sampler = make_sampler(
        adapter,
        num_steps,
        scheduler=None if isinstance(scheduler, NoisyDdim) else scheduler,
        timestep_spacing=variation.timestep_spacing,
        strength=variation.strength,
        first_step=0 if given is None else given.first_step,
    )
    if given is not None and not isinstance(sampler, Deterministic):
        raise InputError(f"variation.scheduler: expected none beside given latents, got {scheduler}")
    return sampler


def planned_evaluations(
    records: Sequence[PromptRecord],
    num_steps: int,
    guidance_scale: float,
    guidance: Guidance = CLASSIFIER_FREE,
) -> int:
    """Return the number of network evaluations that `generate` takes.

    With classifier-free guidance, each image takes two per step if it is guided, else one. `network_steps`
    gives ``num_steps``.
    """
    return sum(num_steps * guidance.evaluations(w) for w in guidance_scales(records, guidance_scale))


def shard(records: Sequence[PromptRecord], rank: int, world_size: int) -> tuple[PromptRecord, ...]:
    """Return every ``world_size``-th record from ``rank`` on. The ranks' shares are disjoint and complete."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected one in [0, {world_size}), got {rank}")
    return tuple(records[rank::world_size])


def generate_to(
    folder: Path,
    adapter: Adapter,
    records: Sequence[PromptRecord],
    *,
    guidance_scale: float,
    num_steps: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    description: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    variation: Variation = USUAL,
) -> int:
    """Fill ``folder`` with PNG images of ``records``. Return how many were written by this call.

    ``manifest.jsonl`` lists all records, and this rank generates its `shard` of them. Batches are cut from
    the whole shard. If an image of a batch is missing, the whole batch is sampled. So a resumed folder equals
    an uninterrupted one. The arguments are those of :func:`generate`.

    Raises:
        InputError: two records have one id, or the folder belongs to another generator, setting or prompt
            list. Also raised if the model gives NaN or infinity; no file is written then.
    """
    entries = manifest(records, guidance_scale)
    precision = str(autocast_dtype or adapter.denoiser.dtype).removeprefix("torch.")
    files = {entry["id"]: folder / entry["file"] for entry in entries}
    written = 0
    with lora_applied(adapter, variation.lora):
        meta = {"generator": adapter.fingerprint(), "num_steps": num_steps, "precision": precision}
        claim(folder, entries, meta | guidance_meta(records, guidance_scale) | variation.meta())
        missing = [
            rows
            for rows in _batches(shard(records, rank, world_size), batch_size)
            if not all(files[record.id].exists() for record in rows)
        ]
        drawing = _Drawing(adapter, guidance_scale, num_steps, autocast_dtype, variation)
        for rows, images in drawing.run(missing, description):
            for record, image in zip(rows, images, strict=True):
                if not files[record.id].exists():
                    write_png(files[record.id], image)
                    written += 1
    return written


def guidance_meta(records: Sequence[PromptRecord], guidance_scale: float) -> dict[str, str]:
    """Return a mark for an image folder's record if a guidance scale is below 1, else an empty dictionary.

    Earlier versions generated such images in another way, and the two must not be mixed.
    """
    below = any(scale < 1 for scale in guidance_scales(records, guidance_scale))
    return {"guidance below 1": "prompt alone"} if below else {}


class _Drawing:
    """The sampler, guidance and precision that the images of a run share."""

    def __init__(
        self,
        adapter: Adapter,
        guidance_scale: float,
        num_steps: int,
        autocast_dtype: torch.dtype | None,
        variation: Variation,
    ) -> None:
        self.adapter, self.guidance_scale, self.autocast_dtype = adapter, guidance_scale, autocast_dtype
        self.variation = variation
        self.sampler = _sampler(adapter, num_steps, variation)
        self.guidance = variation.rule

    def run(self, batches: Sequence[Batch], description: str | None) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its images, uint8 ``[B, 3, H, W]`` on the CPU."""
        records = list(chain.from_iterable(batches))
        total = planned_evaluations(records, len(self.sampler.timesteps), self.guidance_scale, self.guidance)
        with tqdm(
            total=total, desc=description, unit="eval", disable=description is None or not total
        ) as progress:
            for rows in batches:
                yield rows, self._sample(rows, progress)

    @torch.no_grad()
    def _sample(self, rows: Batch, progress: tqdm) -> Tensor:
        last = len(self.sampler.timesteps)
        with self._precision():
            return self.adapter.decode(self._denoise(rows, [last], progress)[last]).cpu()

    @torch.no_grad()
    def latents(self, rows: Batch, steps: Collection[int]) -> dict[int, Tensor]:
        """Return a batch's latents after these numbers of steps."""
        with self._precision(), tqdm(disable=True) as progress:
            return self._denoise(rows, steps, progress)

    def _precision(self) -> torch.autocast:
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.adapter.device.type, self.autocast_dtype, enabled=enabled)

    def _denoise(self, rows: Batch, steps: Collection[int], progress: tqdm) -> dict[int, Tensor]:
        """Return the latents after these numbers of steps. No step is taken after the largest."""
        adapter, scales = self.adapter, guidance_scales(rows, self.guidance_scale)
        check_scales(adapter, scales)
        generators = [seeded(image_seed(record)) for record in rows]
        pure = torch.stack([noise(adapter.latent_shape, generator) for generator in generators])
        pure = pure.to(adapter.device)
        finite, sampler = Finite(adapter.name), self._sampler_of(rows)
        num_steps = len(sampler.timesteps)
        guide = self.guidance.guide(adapter, [record.prompt for record in rows], scales, num_steps)
        z_t = self._first_latents(rows, pure, sampler)
        keep_region = self._region(rows, pure, sampler)
        reached = {0: z_t}
        for step_index, timestep in enumerate(sampler.timesteps[: max(steps)]):
            latents, text = guide.inputs(step_index)
            seen = sampler.network_input(z_t, step_index)[latents.to(z_t.device)]
            with guide.network_changed() if isinstance(guide, ChangesNetwork) else nullcontext():
                output = adapter.predict(seen, timestep, text)
            step = f"step {step_index + 1} of {num_steps}"
            finite.see(f"the denoiser's output in {step}", output, adapter.denoiser)
            z_t = sampler.step(guide.combine(output, step_index), z_t, step_index, generators)
            finite.see(f"the sampler's latents after {step}", z_t)
            z_t = keep_region(z_t, step_index)
            if step_index + 1 in steps:
                reached[step_index + 1] = z_t
            progress.update(len(text))
        finite.check()
        return {step: reached[step] for step in steps}

    def _sampler_of(self, rows: Batch) -> Sampler:
        """Return the run's sampler, or one that adds these images' noise."""
        noisy = self.variation.scheduler
        if isinstance(noisy, NoisyDdim) and isinstance(self.sampler, Deterministic):
            return Noisy(self.sampler.schedule, self.sampler.skipped, *noisy.of(rows))
        return self.sampler

    def _first_latents(self, rows: Batch, pure: Tensor, sampler: Sampler) -> Tensor:
        """Return noise, given latents, or pictures' latents with noise in them."""
        adapter, start = self.adapter, self.variation.start
        if isinstance(start, Start):
            return sampler.start(pure, adapter.encode_images(start.images(rows, adapter.side)))
        given = None if start is None else start.of("latents", rows, adapter.latent_shape, adapter.device)
        return sampler.start(pure, None) if given is None else given

    def _region(self, rows: Batch, pure: Tensor, sampler: Sampler) -> Callable[[Tensor, int], Tensor]:
        """Return what puts the known latents in after a step: nothing, unless a region is kept."""
        adapter, start = self.adapter, self.variation.latent_start
        if start is None or start.known is None:
            return lambda z_t, step_index: z_t
        known = start.of("known", rows, adapter.latent_shape, adapter.device)
        mask = start.of("mask", rows, (1, *adapter.latent_shape[1:]), adapter.device)
        assert known is not None and mask is not None
        assert isinstance(sampler, Deterministic)
        return lambda z_t, step_index: torch.lerp(sampler.reached(known, pure, step_index), z_t, mask)


def _batches(records: Sequence[PromptRecord], batch_size: int) -> list[Batch]:
    if batch_size < 1:
        raise InputError(f"metrics.batch_size: expected at least 1, got {batch_size}")
    return [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
