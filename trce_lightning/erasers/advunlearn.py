"""AdvUnlearn (arXiv 2405.15234): the text encoder learns to erase prompts that attack it while it learns.

    min_θ ‖ε(z_t, T_θ([δ; c]), t) − (ε(z_t, ∅, t) − η (ε(z_t, c, t) − ε(z_t, ∅, t)))‖²
          + w ‖ε(z_r, T_θ(r), t_r) − ε(z_r, r, t_r)‖²
    δ = argmin ‖ε(z_t, T_θ([δ; c]), t) − ε(z_t, c, t)‖²

δ are token embeddings right after the start of text. r are prompts to retain. T_θ is the text encoder, and
the denoiser is the original throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import Count, Natural, NonNegative, Positive
from trce_lightning.erasers.esd import esd_target
from trce_lightning.erasers.protocol import Ahead, Cost, Job
from trce_lightning.erasers.teachers import EMPTY
from trce_lightning.erasers.tuning import TRAINING, Batch, PromptEraser, Source, Tuning
from trce_lightning.errors import InputError
from trce_lightning.losses import squared_distance
from trce_lightning.tokens import Text


def with_inserted(adapter: Adapter, prompts: Sequence[str], vectors: Mapping[str, Tensor]) -> Text:
    """Return prompts with vectors ``[B, k, e]`` by segment right after the start of text, differentiable.

    The last k positions, which are padding, fall away. With k = 0 these are the states of the prompts.
    """
    ids = adapter.tokenize(prompts)
    embeddings, shifted = {}, {}
    for name, own in adapter.embed(ids).items():
        inserted = vectors[name].to(own)
        count, length = inserted.shape[1], own.shape[1]
        embeddings[name] = torch.cat([own[:, :1], inserted, own[:, 1:]], dim=1)[:, :length]
        words = ids[name][:, :1].expand(-1, count)  # any id: the roles look for the EoT alone
        shifted[name] = torch.cat([ids[name][:, :1], words, ids[name][:, 1:]], dim=1)[:, :length]
    return adapter.encode_embeddings(embeddings, shifted)


@dataclass(kw_only=True)
class AdvUnlearn(PromptEraser):
    """Train the text encoder against an attack on its token embeddings.

    Args:
        eta: η, the strength of the negative guidance.
        warmup: steps before the attack begins.
        tokens: number k of attacking embeddings.
        attack_steps: steps of Adam on them, anew for each step of training.
        attack_lr: learning rate of the attack.
        retain_weight: w.
        retain_batch_size: points of prompts to retain in each step.
    """

    eta: NonNegative = 1.0
    warmup: Natural = 200
    tokens: Count = 1
    attack_steps: Count = 30
    attack_lr: Positive = 1e-3
    retain_weight: NonNegative = 0.3
    retain_batch_size: Count = 5
    name: ClassVar[str] = "advunlearn"
    title: ClassVar[str] = "AdvUnlearn (arXiv 2405.15234)"

    def sources(self, job: Job) -> dict[str, Source]:
        """Return points of the texts to erase, and of prompts to retain."""
        pairs = self.erased_prompts(job)
        adapter = job.adapter
        for prompt, count in zip(pairs, adapter.token_counts(list(pairs)), strict=True):
            if count + self.tokens > adapter.prompt_tokens:
                raise InputError(
                    f"method.tokens: expected a prompt of at most {adapter.prompt_tokens} tokens, got "
                    f"{self.tokens} more in '{prompt}'"
                )
        points, others = self.iterations * self.batch_size, self.iterations * self.retain_batch_size

        def texts(prompt: str, _: int) -> tuple[str, ...]:
            return prompt, EMPTY, pairs[prompt]

        erased = self.draw(job, "erase", list(pairs), texts, points)
        retained = self.draw(job, "retain", job.keep_prompts(), lambda prompt, _: (prompt,), others)
        return {
            "erase": Source(erased, self.batch_size),
            "retain": Source(retained, self.retain_batch_size),
        }

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return the text encoder's parameters without those of its embeddings."""
        encoders = {name: network for name, network in adapter.networks().items() if _reads_tokens(network)}
        if len(encoders) != 1:
            raise InputError(
                f"method=advunlearn: expected a model of one text encoder, got {len(encoders)} in "
                f"'{adapter.name}'"
            )
        ((name, encoder),) = encoders.items()
        if other := {p.dtype for p in encoder.parameters()} - {torch.float32}:
            raise InputError(
                f"model.dtype: expected float32 where a text encoder is trained, got {next(iter(other))}"
            )
        tables = {
            f"{module}.{parameter}"
            for module, part in encoder.named_modules()
            if isinstance(part, nn.Embedding)
            for parameter, _ in part.named_parameters(recurse=False)
        }
        return {name: {key: p for key, p in encoder.named_parameters() if key not in tables}}

    def ahead(self, job: Job) -> Ahead:
        """Return the work with the attack's evaluations, which are part of training."""
        work = super().ahead(job)
        attacked = max(0, self.iterations - self.warmup) * self.attack_steps * self.batch_size
        steps = work.parts[TRAINING].backward + attacked
        return replace(work, parts=work.parts | {TRAINING: Cost(backward=steps)})

    @property
    def evaluations_per_step(self) -> int:
        """Return the evaluations of a step without its attack."""
        return self.batch_size + self.retain_batch_size

    def weight_of(self, term: str) -> float:
        """Return w for the retained prompts, else 1."""
        return self.retain_weight if term == "retain" else 1.0

    def factor_of(self, term: str) -> str:
        """Return the attack's learning rate where it moves before the network does, w's option, or η's."""
        if term == "retain":
            return "retain_weight"
        return "eta" if self.warmup else "attack_lr"

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of the attacked prompts and of the retained ones."""
        adapter, rows, kept = module.adapter, batch["erase"], batch["retain"]
        concept, empty, guide = rows["predictions"].unbind(1)
        prompts, others = rows["taught"], kept["taught"]
        vectors = self.no_vectors(adapter, prompts)
        if batch["step"] >= self.warmup:
            vectors = self.attack(module, batch)
        text = with_inserted(adapter, prompts, vectors)
        predicted = adapter.predict(rows["z_t"], rows["timestep"], text)
        retained = with_inserted(adapter, others, self.no_vectors(adapter, others))
        again = adapter.predict(kept["z_t"], kept["timestep"], retained)
        return {
            "erase": squared_distance(predicted, esd_target(guide, concept, empty, self.eta)).mean(),
            "retain": squared_distance(again, kept["predictions"][:, 0]).mean(),
        }

    def no_vectors(self, adapter: Adapter, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return no vectors for each prompt, ``[B, 0, e]`` by segment."""
        return {name: own[:, :0] for name, own in adapter.embed(adapter.tokenize(prompts)).items()}

    def attack(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return embeddings that bring the concept back, ``[B, k, e]`` by segment, without gradients.

        They begin at random embeddings of the prompt's scale. Each prompt has its own.
        """
        adapter, rows = module.adapter, batch["erase"]
        prompts = rows["taught"]
        generator = module.generator(batch["step"], "attack")
        vectors = {}
        for name, own in adapter.embed(adapter.tokenize(prompts)).items():
            start = torch.randn(len(own), self.tokens, own.shape[2], generator=generator).to(own.device)
            vectors[name] = (start * own.float().std()).requires_grad_(True)
        optimizer = torch.optim.Adam(vectors.values(), lr=self.attack_lr)
        goal = rows["predictions"][:, 0]
        for _ in range(self.attack_steps):
            text = with_inserted(adapter, prompts, vectors)
            predicted = adapter.predict(rows["z_t"], rows["timestep"], text)
            # Each prompt's loss reads its own vectors alone, so the sum's gradient is that of each.
            loss = squared_distance(predicted, goal).sum()
            for vector, slope in zip(
                vectors.values(), torch.autograd.grad(loss, list(vectors.values())), strict=True
            ):
                vector.grad = slope
            optimizer.step()
        return {name: vector.detach() for name, vector in vectors.items()}


def _reads_tokens(network: nn.Module) -> bool:
    return hasattr(network, "get_input_embeddings")
