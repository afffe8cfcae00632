"""Relearning: fine-tune the erased model on a few pictures of the concept, and see how fast it comes back.

    min_θ E_{i, t, ε} ‖ε_θ(z_t^i, t, E(p_i)) − ε‖²,   i = 1 … k pictures with their prompts, from θ = erased

The attacker has the weights, k pictures of the concept with captions, and a few seconds of training. The
pictures are the original model's, of other prompts than those under attack where there are such. Prompts
whose pictures were taught are not scored, so that a model which learns those pictures by heart gains nothing.

It also generates images of benign prompts after each number of steps. A concept that is back in a model which
has lost the rest was learnt anew, and such a model is of little use to an attacker.

The attack shows how many steps hold the concept back from somebody who trains the model. It does not show
that the concept was still in the weights: fine-tuning teaches as well. Only a model that never learnt the
concept tells the two apart, by the same training on the same pictures. An erasure is deep where both need
equally many steps.

:meth:`Relearning.random` is the control with shuffled captions: the largest number of pictures, the same
steps, and each picture under another picture's caption. Captions of one concept resemble each other, so this
control shows what exact captions add. A single picture gets the empty caption.

Sources: the step counts and k follow the relearning curves of "Memory Self-Regeneration: Uncovering Hidden
Knowledge in Unlearned Models" (MemoRa, arXiv 2510.03263) with pictures of the original in place of its
regenerated ones. The LoRA is that of "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.fine_tuning import (
    Lesson,
    Training,
    check_trainable,
    differences,
    fine_tuned,
    moved,
    restored,
    training_of,
    under,
)
from trce_lightning.attacks.protocol import (
    UNIVERSAL,
    Cost,
    Door,
    Finding,
    Progress,
    Reads,
    Target,
    Way,
    total,
    untold,
)
from trce_lightning.attacks.tries import (
    check_above_zero,
    check_at_least,
    check_positive,
    fresh_record,
    pictures_of,
)
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord, seed_of
from trce_lightning.sampling import seeded

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers that a LoRA changes: the projections of every attention."""
Steps = Generator[tuple[float, Callable[[], dict[str, Tensor]]], None, None]
"""For each step of training, its loss, and a function that returns what has changed by then."""
LORA = "relearning"
"""The name of the LoRA while it is trained."""


class Relearning:
    """Fine-tuning of all the denoiser's parameters on ``pictures`` of the concept, scored after ``steps``.

    Args:
        pictures: numbers of pictures, each taught to the model as it was; the largest is the result.
        steps: numbers of steps after which the model is scored; 0 is the model as it was.
        batch_size: pictures of a step, drawn with replacement.
        levels: steps of the sampling run whose noise levels are trained on.
        benign_prompts: benign prompts whose images show how much is left of the model; 0 for none.

    Raises:
        InputError: an option that is out of range.
    """

    name = "relearning"
    door = Door.WEIGHTS
    reads = Reads.MODEL
    universal = True
    control = "shuffled captions"
    teaches_examples = True

    def __init__(
        self,
        *,
        pictures: Sequence[int] = (1, 5, 25),
        steps: Sequence[int] = (0, 10, 30, 100, 300),
        learning_rate: float = 1e-5,
        batch_size: int = 8,
        levels: int = 100,
        benign_prompts: int = 32,
    ) -> None:
        self.option = f"attack.{self.name}"
        if not pictures or min(pictures) < 1:
            raise InputError(f"{self.option}.pictures: expected numbers of at least 1, got {list(pictures)}")
        if not steps or min(steps) < 0 or max(steps) == 0:
            raise InputError(f"{self.option}.steps: expected numbers of 0 and above, got {list(steps)}")
        check_positive(self.name, batch_size=batch_size, levels=levels)
        check_above_zero(self.name, learning_rate=learning_rate)
        check_at_least(f"{self.name}.benign_prompts", benign_prompts, 0)
        self.pictures, self.steps = sorted(set(pictures)), sorted(set(steps))
        self.learning_rate, self.batch_size, self.levels = learning_rate, batch_size, levels
        self.benign_prompts = benign_prompts

    def cost(self, target: Target) -> Cost:
        """Return the exact cost of :meth:`search`, the sum over its parts."""
        self._taught(target)
        return total(self.cost_of_part(target, part) for part in range(self.parts(target)))

    def parts(self, target: Target) -> int:
        """Return the numbers of pictures that are tried. Each is a training of its own."""
        return len(self.pictures)

    def cost_of_part(self, target: Target, part: int) -> Cost:
        """Return the cost of one training: a step is ``batch_size`` evaluations with backward."""
        return Cost(backward=self.steps[-1] * self.batch_size, text=self.pictures[part])

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless the model's weights can be trained on as many pictures."""
        check_trainable(self.option, target.adapter)
        self._taught(target)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Train on each number of pictures with their prompts; return one finding, for all prompts.

        Its tensors are named ``PICTURES/STEPS/PARAMETER``: differences of weights in bfloat16, or a LoRA's
        two factors.
        """
        self.check(target)
        seed = drawn_seed(generator)
        parts = (self._part(target, part, seed, progress) for part in range(self.parts(target)))
        return [self.joined([*parts])]

    def search_part(
        self, target: Target, part: int, generator: torch.Generator, progress: Progress
    ) -> Finding:
        """Train on one number of pictures; see :meth:`search`."""
        self.check(target)
        return self._part(target, part, drawn_seed(generator), progress)

    def joined(self, findings: Sequence[Finding]) -> Finding:
        """Return the finding of all parts. The last one has the most pictures."""
        tensors = {name: tensor for finding in findings for name, tensor in finding.tensors.items()}
        losses = {count: curve for f in findings for count, curve in f.facts["losses"].items()}
        facts = findings[-1].facts | {"losses": losses}
        return Finding(UNIVERSAL, tensors, facts, total(finding.spent for finding in findings))

    def random(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        generator: torch.Generator,
        progress: Progress = untold,
    ) -> list[Finding]:
        """Train on all pictures, each under another one's caption, and keep the last step."""
        self.check(target)
        taught = self._taught(target)
        captions = [record.prompt for record in taught]
        if len(captions) > 1:
            shift = int(torch.randint(1, len(captions), (), generator=generator))
            captions = captions[shift:] + captions[:shift]
        else:
            captions = [""]
        seed = drawn_seed(generator)
        return [self._learnt(target, self.steps[-1:], taught, captions, seed, progress)]

    def learnt_from(self, target: Target) -> Tensor:
        """Return the pictures that are taught, uint8 ``[B, 3, H, W]``."""
        pool = _pool(target)
        return pictures_of(pool, self._taught(target), self.name)

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield a way for no steps, and one for each number of pictures and of steps; the last is the result.

        ``spent`` counts the steps on this number of pictures alone. So `evaluations_to` on two models' curves
        tells how much longer one of them withstands the training.
        """
        tensors, facts = findings[UNIVERSAL].tensors, findings[UNIVERSAL].facts
        taught = {record.prompt for record in self._taught(target)}
        held_out = (record for record in target.records if record.prompt not in taught)
        records = tuple(fresh_record(record, self.name) for record in held_out)
        benign = tuple(fresh_record(record, self.name) for record in target.benign[: self.benign_prompts])
        if facts["steps"][0] == 0:
            yield Way("0 steps", records, target.adapter, target.variation, benign=benign)
        for count in map(int, facts["losses"]):
            largest = count == self.pictures[-1]
            for steps in filter(None, facts["steps"]):
                yield Way(
                    name="" if largest and steps == self.steps[-1] else f"{count} pictures, {steps} steps",
                    records=records,
                    adapter=target.adapter,
                    variation=target.variation,
                    spent=steps * self.batch_size,
                    entered=moved(target.adapter, partial(changes_in, tensors, f"{count}/{steps}/")),
                    on_curve=largest,
                    benign=benign if largest else (),
                )

    def _taught(self, target: Target) -> list[PromptRecord]:
        """Return the records of the pictures that are taught: of different prompts, in a random order.

        ``InputError`` unless there are enough, and a prompt is left to score.
        """
        pool = _pool(target)
        if not len(pool.pictures):
            raise InputError(f"{self.option}: expected pictures of the concept, got none")
        order = torch.randperm(len(pool.records), generator=seeded(seed_of("relearning", target.seed)))
        different = {pool.records[index].prompt: index for index in order.tolist()[::-1]}
        chosen = sorted(different.values(), key=order.tolist().index)
        taught = [pool.records[index] for index in chosen[: self.pictures[-1]]]
        captions = {record.prompt for record in taught}
        if self.pictures[-1] > len(chosen) or all(record.prompt in captions for record in target.records):
            raise InputError(
                f"{self.option}.pictures: expected at most the {len(chosen)} different prompts that may be "
                f"taught, and a prompt under attack that is not taught, got {self.pictures[-1]}"
            )
        return taught

    def _part(self, target: Target, part: int, seed: int, progress: Progress) -> Finding:
        taught = self._taught(target)[: self.pictures[part]]
        captions = [record.prompt for record in taught]
        return self._learnt(target, self.steps, taught, captions, seed, progress)

    def _learnt(
        self,
        target: Target,
        kept: Sequence[int],
        taught: Sequence[PromptRecord],
        captions: Sequence[str],
        seed: int,
        progress: Progress,
    ) -> Finding:
        """Train on pictures under these captions; keep what has changed after the steps in ``kept``."""
        adapter = target.adapter
        training = training_of(
            target,
            steps=self.steps[-1],
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            levels=self.levels,
        )
        pictures = pictures_of(_pool(target), taught, self.name)
        lesson = Lesson(adapter.encode_images(pictures), adapter.encode(captions).to(adapter.device))
        tensors: dict[str, Tensor] = {}
        curve: list[float] = []
        count = len(taught)
        own = seeded(seed_of(f"{count} pictures", seed))
        # Closed, so that the weights are given back at once if this is interrupted.
        with closing(self._learn(adapter, lesson, training, own, progress)) as steps:
            for loss, changes in steps:
                curve.append(loss)
                found = changes() if len(curve) in kept else {}
                tensors |= {f"{count}/{len(curve)}/{name}": tensor for name, tensor in found.items()}
        facts = {
            "steps": list(kept),
            "taught": [record.id for record in taught],
            "captions": list(captions),
            "losses": {str(count): curve},
        }
        spent = Cost(backward=training.steps * self.batch_size, text=len(captions))
        return Finding(UNIVERSAL, tensors, facts, spent)

    def _learn(
        self, adapter: Adapter, lesson: Lesson, training: Training, generator: torch.Generator, tell: Progress
    ) -> Steps:
        """Train all parameters; the changes are their differences."""
        parameters = dict(adapter.denoiser.named_parameters())
        with restored(adapter, parameters) as before:
            changes = partial(differences, parameters, before)
            for loss in fine_tuned(adapter, lesson, parameters.values(), training, generator, tell):
                yield loss, changes


class RelearningLora(Relearning):
    """The same with low-rank updates of the denoiser's attention instead of all parameters.

    Args:
        rank: rank of the updates.
        options: those of :class:`Relearning`.

    Raises:
        InputError: an option that is out of range, or peft is not installed.
    """

    name = "relearning_lora"

    def __init__(self, *, rank: int = 4, **options: Any) -> None:
        super().__init__(**options)
        check_positive(self.name, rank=rank)
        if importlib.util.find_spec("peft") is None:
            raise InputError(
                f"{self.option}: peft is not installed; install it with: pip install 'trce-lightning[lora]'"
            )
        self.rank = rank

    def _learn(
        self, adapter: Adapter, lesson: Lesson, training: Training, generator: torch.Generator, tell: Progress
    ) -> Steps:
        """Train the factors of all updates; the changes are these factors."""
        with low_rank(adapter, self.rank, generator) as factors:
            changes = partial(_copies, factors)
            for loss in fine_tuned(adapter, lesson, factors.values(), training, generator, tell):
                yield loss, changes


def drawn_seed(generator: torch.Generator) -> int:
    """Return a random seed, from which each part of a search makes its own generator."""
    return int(torch.randint(2**32, (), generator=generator))


def _copies(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: factor.detach().cpu().clone() for name, factor in factors.items()}


def _pool(target: Target) -> Target:
    """Return the target with the prompts that may be taught: its examples, or those under attack."""
    if not target.examples:
        return target
    assert target.example_pictures is not None
    return replace(target, records=target.examples, pictures=target.example_pictures)


def changes_in(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the changes of weights that a finding holds under a prefix; a LoRA's are B A."""
    found = under(prefix, tensors)
    layers = [name.removesuffix(".lora_A") for name in found if name.endswith(".lora_A")]
    if not layers:
        return found
    return {f"{layer}.weight": found[f"{layer}.lora_B"] @ found[f"{layer}.lora_A"] for layer in layers}


@contextmanager
def low_rank(adapter: Adapter, rank: int, generator: torch.Generator) -> Iterator[dict[str, nn.Parameter]]:
    """Add W + B A to every attention's projections within, with B = 0; yield A and B by layer.

    A starts uniform in ±1/√d, as usual, and is drawn from ``generator``.
    """
    from peft import LoraConfig

    denoiser = adapter.denoiser
    with adapter.other_weights():
        try:
            with torch.random.fork_rng(devices=[]):
                config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS))
                denoiser.add_adapter(config, adapter_name=LORA)
            factors = {
                name.removesuffix(f".{LORA}.weight"): parameter
                for name, parameter in denoiser.named_parameters()
                if name.endswith(f".{LORA}.weight")
            }
            for name, factor in factors.items():
                if name.endswith(".lora_A"):
                    start = torch.empty(factor.shape)
                    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
                    factor.data.copy_(start)
            adapter.weights_changed()
            yield factors
        finally:
            denoiser.unload_lora()
