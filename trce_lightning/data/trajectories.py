"""The cache of trajectories: sampling them with the original network into shards, and reading them back.

A shard is a safetensors file with several trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.finite import Finite
from trce_lightning.data.plan import Trajectory, TrajectoryPlan
from trce_lightning.errors import InputError
from trce_lightning.runtime.storage import MADE_AGAIN, read_safetensors, reading, write_safetensors
from trce_lightning.sampling import classifier_free_guidance, denoise_step, noise
from trce_lightning.tokens import Text

Shard = tuple[str, tuple[Trajectory, ...]]
"""The file name of a shard and its trajectories."""
SHARD = "a whole trajectory shard"


def shards(plan: TrajectoryPlan, shard_size: int) -> list[Shard]:
    """Return the plan in shards, named by size and first trajectory. One shard is sampled as one batch."""
    return [
        (f"{kind}-{shard_size}x{start:05d}.safetensors", rows[start : start + shard_size])
        for kind, rows in (
            ("malicious", plan.malicious),
            ("unconditional", plan.unconditional),
            ("kept", plan.kept),
        )
        for start in range(0, len(rows), shard_size)
    ]


def is_cached(file: Path, fingerprint: str) -> bool:
    """Return whether a shard exists and is whole. If its fingerprint is another, raise ``InputError``."""
    if not file.exists():
        return False
    with reading(file, SHARD), safe_open(file, "pt") as shard:
        found = (shard.metadata() or {}).get("fingerprint")
    if found != fingerprint:
        raise InputError(
            f"{file}: expected trajectories of fingerprint {fingerprint}, got {found}; {MADE_AGAIN}"
        )
    return True


class TrajectorySampler(pl.LightningModule):
    """A module that samples those of ``shards`` that ``folder`` lacks, under ``Trainer.predict``.

    The Trainer splits the shards over the ranks. Stage 1 is never applied. If the model gives NaN or
    infinity, ``InputError`` is raised and the shard is not written.
    """

    title = "trajectories"

    def __init__(
        self,
        adapter: Adapter,
        plan: TrajectoryPlan,
        shards: Sequence[Shard],
        folder: Path,
        fingerprint: str,
    ) -> None:
        super().__init__()
        self.adapter, self.plan, self.shards = adapter, plan, shards
        self.folder, self.fingerprint = folder, fingerprint
        self.denoiser = adapter.denoiser
        self.schedule = adapter.schedule(plan.num_steps)

    def on_predict_start(self) -> None:
        """Move the networks to the rank's device."""
        self.adapter.to(self.device)

    def predict_step(self, shard_index: int, batch_index: int) -> None:
        """Sample one shard and write it whole. Do nothing if it exists, or past the last shard."""
        if shard_index >= len(self.shards):
            return
        name, trajectories = self.shards[shard_index]
        if is_cached(self.folder / name, self.fingerprint):
            return
        rows = self._sample(trajectories, self._texts(trajectories))
        write_safetensors(self.folder / name, rows, {"fingerprint": self.fingerprint})

    def _texts(self, trajectories: Sequence[Trajectory]) -> dict[str, Text]:
        """Return each kind of text: ∅ and c_k, or ∅, and for malicious trajectories also c_m and c_s."""
        if prompts := [row.prompt for row in trajectories if row.prompt is not None]:
            text = {"kept": self.adapter.encode(prompts)}
            return {**self._uncond(prompts), **text} if self.plan.guided else text
        texts = self._uncond(trajectories)
        if trajectories[0].pair is not None:
            pairs = [row.pair for row in trajectories if row.pair]
            texts["malicious"] = self.adapter.encode([pair.malicious for pair in pairs])
            texts["safe"] = self.adapter.encode([pair.safe for pair in pairs])
        return texts

    def _uncond(self, rows: Sequence[Any]) -> dict[str, Text]:
        return {"uncond": self.adapter.empty().expand(len(rows))}

    def _sample(self, trajectories: Sequence[Trajectory], texts: dict[str, Text]) -> dict[str, Tensor]:
        z_t = torch.stack([noise(self.adapter.latent_shape, row.seed) for row in trajectories]).to(
            self.device
        )
        kept: dict[tuple[int, int], dict[str, Tensor]] = {}
        finite = Finite(self.adapter.name)
        for step_index in range(max(row.num_steps for row in trajectories)):
            active = [i for i, row in enumerate(trajectories) if step_index < row.num_steps]
            drawn = [i for i in active if step_index in trajectories[i].step_indices]
            eps = self._predictions(z_t, step_index, texts, active, drawn)
            step = f"step {step_index + 1} of {self.plan.num_steps}"
            finite.see(f"the denoiser's output in {step}", torch.stack([*eps.values()]), self.denoiser)
            for i in drawn:
                stored = {"kept": eps["kept"]} if "kept" in eps else eps
                kept[i, step_index] = {"z_t": z_t[i], **{kind: rows[i] for kind, rows in stored.items()}}
            z_t = denoise_step(self._guided(eps), z_t, self.schedule, step_index)
            finite.see(f"the sampler's latents after {step}", z_t)
        finite.check()
        rows = [kept[i, step_index] for i, row in enumerate(trajectories) for step_index in row.step_indices]
        return _stack(rows) | self._labels(trajectories)

    def _guided(self, eps: dict[str, Tensor]) -> Tensor:
        """Return the prediction that a step follows."""
        prompted = next((eps[kind] for kind in ("malicious", "kept") if kind in eps), None)
        if prompted is None:
            return eps["uncond"]
        if not self.plan.guided:
            return prompted
        return classifier_free_guidance(eps["uncond"], prompted, self.plan.guidance_scale)

    def _predictions(
        self, z_t: Tensor, step_index: int, texts: dict[str, Text], active: list[int], drawn: list[int]
    ) -> dict[str, Tensor]:
        """Return ε(z_t, ·, t) for every kind of text, from one forward pass.

        ∅ and c_m are evaluated for trajectories whose sampling goes on, and c_s only for those in which the
        step is drawn. Without guidance, ∅ is evaluated only for the latter too.
        """
        where_drawn = {"safe"} if self.plan.guided or "malicious" not in texts else {"safe", "uncond"}
        chosen = {kind: drawn if kind in where_drawn else active for kind in texts}
        rows = [i for kind in texts for i in chosen[kind]]
        text = Text.cat([texts[kind].rows(chosen[kind]) for kind in texts])
        output = self.adapter.predict(z_t[rows], self.schedule.timesteps[step_index], text)
        parts = output.split([len(chosen[kind]) for kind in texts])
        full = {kind: torch.zeros_like(z_t) for kind in texts}
        for kind, part in zip(texts, parts, strict=True):
            full[kind][chosen[kind]] = part
        return full

    def _labels(self, trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
        pairs = [(row.index, step_index) for row in trajectories for step_index in row.step_indices]
        trajectory, step_index = torch.tensor(pairs).T
        return {
            "trajectory": trajectory.clone(),
            "step_index": step_index.clone(),
            "timestep": self.schedule.timesteps[step_index],
        }


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]).float().cpu().contiguous() for name in rows[0]}


def generator_of(model: str, trainer: pl.Trainer) -> str:
    """Return a text that identifies what makes trajectories: the model's fingerprint and the precision."""
    return f"{model} {trainer.precision}, text states in full"


def missing_shards(plan: TrajectoryPlan, folder: Path, shard_size: int, generator: str) -> list[Shard]:
    """Return the shards that ``folder`` lacks. ``generator`` is the text of :func:`generator_of`."""
    fingerprint = plan.fingerprint(generator)
    return [item for item in shards(plan, shard_size) if not is_cached(folder / item[0], fingerprint)]


def sample_missing(
    trainer: pl.Trainer, adapter: Adapter, plan: TrajectoryPlan, folder: Path, shard_size: int
) -> int:
    """Sample the shards that ``folder`` lacks. Return the number of network evaluations that it took."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = generator_of(adapter.fingerprint(), trainer)
    missing = missing_shards(plan, folder, shard_size, generator)
    every = shards(plan, shard_size)
    sampler = TrajectorySampler(adapter, plan, every, folder, plan.fingerprint(generator))
    # All ranks list all shards, because another run may write a missing one between two ranks' checks.
    # The loader gives indices: Lightning moves batches to the device field by field and refuses frozen
    # dataclasses. It also wants at least one item for each rank.
    indices = range(max(len(every), trainer.world_size))
    loader: DataLoader[int] = DataLoader(indices, batch_size=None)  # type: ignore[arg-type]
    trainer.predict(sampler, loader, return_predictions=False)
    trainer.strategy.barrier()
    return sum(plan.evaluations_of(rows) for _, rows in missing)


def load_rows(plan: TrajectoryPlan, folder: Path, shard_size: int, kind: str) -> dict[str, Tensor]:
    """Return all cached rows of one ``kind``, by trajectory, then draw: malicious, unconditional or kept.

    If rows of a file are not finite, raise ``InputError`` that names it.
    """
    parts: list[dict[str, Tensor]] = []
    for name, _ in shards(plan, shard_size):
        if name.startswith(kind):
            parts.append(read_safetensors(folder / name, SHARD))
            _check_rows(folder / name, parts[-1])
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} if parts else {}


def _check_rows(file: Path, rows: dict[str, Tensor]) -> None:
    for name, values in rows.items():
        if not values.isfinite().all():
            raise InputError(
                f"{file}: expected finite trajectories, got NaN or infinity in '{name}'; {MADE_AGAIN}"
            )
