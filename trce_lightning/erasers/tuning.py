"""The one loop of all methods that train weights with a frozen teacher.

A method says which points the teacher predicts at, which weights change, and the loss of a batch. All else is
here: the teacher's predictions are sampled and cached before any weight changes, each step takes the next
points, checkpoints hold the changed tensors alone, and an interrupted fit continues to the same weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.finite import loss_not_finite
from trce_lightning.config.schema import Count, Natural, NonNegative, OneOf, Positive, Steps
from trce_lightning.data.datamodule import ContinuedLoader
from trce_lightning.erasers.protocol import Ahead, Cost, Erased, Job
from trce_lightning.erasers.teachers import (
    Encode,
    Teachers,
    Walks,
    draw_walks,
    latent_numbers,
    refuse_guided,
    teachers_of,
)
from trce_lightning.erasers.texts import GUIDES, PROMPTS, erased_pairs
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import seeded
from trce_lightning.tokens import Text

TEACHERS, TRAINING = "teachers", "training"
ADAM_BYTES = 12
"""The bytes of a number's gradient and of Adam's two moments, in float32."""
TEXTS = 1024
"""The most texts that a fit keeps encoded."""
Batch = dict[str, Any]
"""One step's rows of each kind of points, ``[B, …]``, and its number ``step``.

The rows of a kind are those of :meth:`Teachers.load`, and two lists: ``taught``, the prompt that the
network reads in each row, and ``texts``, of which the i-th belongs to ``predictions[:, i]``.
"""


@dataclass(frozen=True)
class Source:
    """Points of one kind, and how many of them each step takes."""

    plan: Walks
    per_step: int


class _Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class StepNumbers(DistributedSampler[int]):
    """A sampler of the numbers of all steps, the same on each rank. It continues after those served.

    Lightning replaces a sampler that isn't a ``DistributedSampler``.
    """

    def __init__(self, count: int) -> None:
        super().__init__(_Numbers(count), num_replicas=1, rank=0)
        self.count, self.served = count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        for step in range(self.served, self.count):
            self.served = (step + 1) % self.count
            yield step


class StepLoader(ContinuedLoader[int]):
    """A loader of all steps of a fit."""

    sampler: StepNumbers


class Points(pl.LightningDataModule):
    """A data module that gives each step its share of cached points.

    Points are taken in one random order, each of them once as long as there are some, and then again.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[Teachers, int]],
        steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.sources, self.steps, self.seed = dict(sources), steps, seed
        self.rows: dict[str, dict[str, Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Load all rows."""
        for kind, (teachers, _) in self.sources.items():
            if kind not in self.rows:
                rows = teachers.load()
                generator = seeded(seed_of(f"{kind} order", self.seed))
                order = torch.randperm(len(rows["walk"]), generator=generator)
                self.rows[kind] = {key: values[order] for key, values in rows.items()}

    def collate(self, step: int) -> Batch:
        """Return the rows of one step, of which this rank takes its share."""
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        batch: Batch = {"step": step}
        for kind, (teachers, count) in self.sources.items():
            every, walks = self.rows[kind], teachers.plan.walks
            chosen = (step * count + torch.arange(rank, count, world_size)) % len(every["walk"])
            rows: dict[str, Any] = {key: values[chosen] for key, values in every.items()}
            chosen_walks = [walks[walk] for walk in rows["walk"].tolist()]
            rows["texts"] = [list(walk.texts) for walk in chosen_walks]
            rows["taught"] = [walk.taught for walk in chosen_walks]
            batch[kind] = rows
        return batch

    def train_dataloader(self) -> StepLoader:
        """Return a loader of all steps."""
        sampler = StepNumbers(self.steps)
        collate: Any = self.collate  # of one number, since the loader makes no batches
        return StepLoader(
            sampler.dataset, batch_size=None, sampler=sampler, collate_fn=collate, num_workers=0
        )


class Tuning(pl.LightningModule):
    """The network in training. The method computes the loss of a batch.

    Args:
        eraser: the method.
        adapter: the model.
        trained: the parameters that change, by component of the pipeline and by name.
        extra: parameters that are no part of the pipeline, such as a LoRA's. All of them are trained.
    """

    def __init__(
        self,
        eraser: TunedEraser,
        adapter: Adapter,
        trained: Mapping[str, Mapping[str, nn.Parameter]],
        extra: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.eraser, self.adapter, self.seed = eraser, adapter, seed
        self.trained = {component: dict(parameters) for component, parameters in trained.items()}
        every = adapter.networks()
        self.networks = nn.ModuleDict(
            {name: every[name] for name in every if name in trained or every[name] is adapter.denoiser}
        )
        self.extra = extra
        self._encode = lru_cache(TEXTS)(eraser.encoder(adapter))
        self._stored_dtypes = {id(parameter): parameter.dtype for parameter in self.parameters_in_training()}
        self.strict_loading = False  # checkpoints hold only the changed tensors

    def parameters_in_training(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer changes."""
        own = [p for parameters in self.trained.values() for p in parameters.values()]
        return own + (list(self.extra.parameters()) if self.extra is not None else [])

    def changed_tensors(self) -> dict[str, Tensor]:
        """Return the changed tensors by their name in this module."""
        chosen = {id(parameter) for parameter in self.parameters_in_training()}
        named = self.named_parameters()
        return {name: parameter.detach() for name, parameter in named if id(parameter) in chosen}

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """Return a CPU generator of this step alone, so that a continued fit draws the same numbers.

        The ranks have different generators.
        """
        return seeded(seed_of(f"{purpose} {self.seed} rank {self.global_rank}", step))

    def text(self, prompts: Sequence[str]) -> Text:
        """Return prompts as the original text encoder gives them.

        A method that trains the text encoder must not ask for it.
        """
        return Text.cat([self._encode(prompt) for prompt in prompts])

    def setup(self, stage: str) -> None:
        """Make the parameters trainable. They are float32 while they train."""
        self.adapter.denoiser.requires_grad_(False)
        for parameter in self.parameters_in_training():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        if self.eraser.gradient_checkpointing:
            self.adapter.denoiser.enable_gradient_checkpointing()

    def on_fit_start(self) -> None:
        """Move all networks to this rank's device."""
        self.adapter.to(self.device)

    def teardown(self, stage: str) -> None:
        """Round the trained parameters to their precision."""
        for parameter in self.parameters_in_training():
            parameter.data = parameter.data.to(self._stored_dtypes[id(parameter)])
            parameter.requires_grad_(False)
            parameter.grad = None
        self.adapter.weights_changed()
        if self.eraser.gradient_checkpointing:
            self.adapter.denoiser.disable_gradient_checkpointing()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the trainable parameters, with the method's schedule of the learning rate."""
        eraser = self.eraser
        optimizer = torch.optim.AdamW(
            self.parameters_in_training(), lr=eraser.lr, weight_decay=eraser.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, eraser.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of a batch. If it isn't finite, raise ``InputError``."""
        terms = self.eraser.losses(self, batch)
        weighted = {name: self.eraser.weight_of(name) * term for name, term in terms.items()}
        loss = torch.stack([*weighted.values()]).sum()
        if not torch.isfinite(loss):
            raise self._not_finite(weighted, batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        logged = {name: term.detach() for name, term in {"total": loss, **terms}.items()}
        values = {f"loss/{self.eraser.panel}{name}": value for name, value in logged.items()}
        self.log_dict(values, on_step=True, on_epoch=True, batch_size=1, sync_dist=True)
        return loss

    @torch.no_grad()
    def _not_finite(self, weighted: Mapping[str, Tensor], batch: Batch) -> InputError:
        """Return the error that says what to change, for the weighted terms of a batch's loss."""
        broken = next((name for name, term in weighted.items() if not term.isfinite()), "")
        option = self.eraser.factor_of(broken)
        points = (rows for kind, rows in batch.items() if kind != "step")
        return loss_not_finite(
            self.adapter.name,
            float(torch.stack([*weighted.values()]).sum()),
            self.global_step,
            (
                self.adapter.predict(rows["z_t"], rows["timestep"], self.text(rows["taught"]))
                for rows in points
            ),
            self.adapter.denoiser,
            lr=(self.eraser.option("lr"), self.eraser.lr),
            other=(self.eraser.option(option), getattr(self.eraser, option)),
        )

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Tell the adapter that weights have changed. After the last step, check that they are finite."""
        self.adapter.weights_changed()
        if self.trainer.is_last_batch:
            broken = [name for name, value in self.changed_tensors().items() if not value.isfinite().all()]
            if broken:
                raise InputError(
                    f"{self.eraser.option('lr')}: expected finite weights, got NaN or infinity in "
                    f"{len(broken)} tensors, such as {broken[0]}, with {self.eraser.lr}; lower it, or set "
                    "trainer.precision=32-true"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the changed tensors in the checkpoint."""
        checkpoint["state_dict"] = self.changed_tensors()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ``InputError`` unless the checkpoint holds exactly the tensors that this run changes."""
        if set(checkpoint["state_dict"]) != set(self.changed_tensors()):
            raise InputError(
                f"checkpoint: expected {len(self.changed_tensors())} changed tensors, got "
                f"{len(checkpoint['state_dict'])}, or others; use fresh=true"
            )


@dataclass(kw_only=True)
class TunedEraser(ABC):
    """A method that trains weights with a frozen teacher.

    Args:
        iterations: optimizer steps.
        lr: learning rate of AdamW.
        weight_decay: that of AdamW. 0 is Adam.
        num_steps: steps of a full sampling run.
        guidance_scale: scale with which the points are sampled.
        gradient_checkpointing: the backward pass computes activations again.
    """

    iterations: Count
    lr: Positive
    weight_decay: NonNegative = 0.0
    num_steps: Steps = 50
    guidance_scale: NonNegative = 3.0
    gradient_checkpointing: bool = False
    name: ClassVar[str]
    title: ClassVar[str]
    bytes_per_number: ClassVar[int] = ADAM_BYTES
    """The bytes of training for each number that trains."""

    @property
    def reads_seed(self) -> bool:
        """Return True: points, their noise and their order are drawn."""
        return True

    @abstractmethod
    def sources(self, job: Job) -> dict[str, Source]:
        """Return the points of each kind, whose predictions the teacher makes."""

    @abstractmethod
    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters that change, by component of the pipeline and by name."""

    @abstractmethod
    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of a batch's loss by name."""

    @property
    @abstractmethod
    def evaluations_per_step(self) -> int:
        """Return the network evaluations of a step, over all ranks. Each of them has a backward pass."""

    def weight_of(self, term: str) -> float:
        """Return the weight of a term of the loss."""
        return 1.0

    @property
    def panel(self) -> str:
        """Return the beginning of the loss curves' names. It tells the fits of one run apart."""
        return ""

    @property
    def scales(self) -> tuple[str, ...]:
        """Return the options that are guidance scales of sampling."""
        return ("guidance_scale",)

    def option(self, name: str) -> str:
        """Return how a user sets the number ``name`` of this object."""
        return f"method.{name}"

    def factor_of(self, term: str) -> str:
        """Return the option that can make a term of the loss infinite where all predictions are finite."""
        return "eta"

    def lr_factor(self, step: int) -> float:
        """Return the learning rate at a step as a multiple of ``lr``."""
        return 1.0

    def encoder(self, adapter: Adapter) -> Encode:
        """Return what encodes the texts of points."""
        return lambda text: adapter.encode([text])

    def teachers(self, job: Job, sources: Mapping[str, Source]) -> dict[str, Teachers]:
        """Return the caches of all kinds of points."""
        return {kind: teachers_of(source.plan, job.cache, job.generator) for kind, source in sources.items()}

    def ahead(self, job: Job) -> Ahead:
        """Return the evaluations of teachers that are not cached, and those of training."""
        for option in self.scales:
            refuse_guided(job.adapter, f"method.{option}", getattr(self, option))
        if (batches := job.trainer.accumulate_grad_batches) > 1:
            raise InputError(
                f"trainer.accumulate_grad_batches: expected 1 with method={self.name}, whose own options say "
                f"how many points a step has, got {batches}"
            )
        sources = self.sources(job)
        for source in sources.values():
            if source.per_step % job.trainer.world_size:
                raise InputError(
                    f"method.batch_size: expected a multiple of the {job.trainer.world_size} processes, got "
                    f"{source.per_step} points a step; trainer.devices sets their number"
                )
        teachers = self.teachers(job, sources)
        numbers = latent_numbers(job.adapter)
        trainable = self.trainable_numbers(job.adapter)
        return Ahead(
            {
                TEACHERS: Cost(forward=sum(each.evaluations for each in teachers.values())),
                TRAINING: Cost(backward=self.iterations * self.evaluations_per_step),
            },
            trainable=trainable,
            stored_bytes=sum(source.plan.stored_bytes(numbers) for source in sources.values()),
            training_bytes=self.bytes_per_number * trainable,
        )

    def trainable_numbers(self, adapter: Adapter) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for named in self.trained(adapter).values() for p in named.values())

    def module(self, job: Job) -> Tuning:
        """Return the module that is fitted."""
        return Tuning(self, job.adapter, self.trained(job.adapter), seed=job.seed)

    def erase(self, job: Job) -> Erased:
        """Sample the teacher's predictions, then train."""
        sources = self.sources(job)
        with job.part(TEACHERS):
            self.sample(job, sources)
        module = self.module(job)
        self.fit(job, module, sources, TRAINING)
        return self.result(job, module)

    def sample(self, job: Job, sources: Mapping[str, Source]) -> None:
        """Sample the teacher's predictions that are not cached, with the network as it is."""
        for each in self.teachers(job, sources).values():
            each.sample(job.trainer, job.adapter, self.encoder(job.adapter))

    def fit(self, job: Job, module: Tuning, sources: Mapping[str, Source], part: str) -> None:
        """Train on the points of ``sources``, under the name of a part."""
        teachers = self.teachers(job, sources)
        counted = {kind: (teachers[kind], source.per_step) for kind, source in sources.items()}
        job.fit(module, Points(counted, self.iterations, job.seed), part)

    def result(self, job: Job, module: Tuning) -> Erased:
        """Return what has changed."""
        return Erased(
            {
                component: {name: parameter.detach() for name, parameter in named.items()}
                for component, named in module.trained.items()
            }
        )


@dataclass(kw_only=True)
class PictureEraser(TunedEraser):
    """A method that trains parameters of its own on pictures, which each step noises anew.

    Args:
        batch_size: noised pictures of a kind in each step.
        levels: noise levels, those of a sampling run of so many steps.
    """

    batch_size: Count = 1
    levels: Count = 999

    def sources(self, job: Job) -> dict[str, Source]:
        """Return no cached points."""
        return {}

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return no parameters of the pipeline."""
        return {}

    def factor_of(self, term: str) -> str:
        """Return the learning rate's option, since no other number can make a loss infinite."""
        return "lr"


@dataclass(kw_only=True)
class PromptEraser(TunedEraser):
    """A tuned method whose points lie on sampling runs for its texts.

    Args:
        prompts: texts to erase: the concept's ``names``, or its ``sentences``.
        guide: what takes the place of an erased text: the ``empty`` prompt, or its safe ``counterpart``.
        batch_size: points of each step.
        draws: points of each sampling run. Published methods sample anew for each point, which is 1.
        first_step: the first step, from pure noise on, that points come from.
        last_step: the step after the last one that points come from. 0 is ``num_steps``.
    """

    batch_size: Count = 1
    draws: Count = 1
    prompts: Annotated[str, OneOf(PROMPTS)] = "names"
    guide: Annotated[str, OneOf(GUIDES)] = "empty"
    first_step: Natural = 0
    last_step: Natural = 0

    @property
    def evaluations_per_step(self) -> int:
        """Return one evaluation a point, over all ranks."""
        return self.batch_size

    def draw(
        self,
        job: Job,
        kind: str,
        prompts: Sequence[str],
        texts_of: Callable[[str, int], tuple[str, ...]],
        points: int,
        taught: Sequence[str] | None = None,
    ) -> Walks:
        """Return walks of prompts with ``points`` rows; see :func:`.teachers.draw_walks`."""
        return draw_walks(
            kind,
            prompts,
            texts_of,
            taught=taught,
            points=points,
            draws=self.draws,
            steps=range(self.first_step, self.last_step or self.num_steps),
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            seed=job.seed,
        )

    def erased_prompts(self, job: Job) -> dict[str, str]:
        """Return the texts to erase, each with its guide text."""
        pairs = erased_pairs(job.concepts, self.prompts, self.guide)
        return {pair.malicious: pair.safe for pair in pairs}
