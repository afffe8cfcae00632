"""A search for words by gradients through the denoiser. The attacks that have the weights share it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trce_lightning.adapters.finite import check_finite
from trce_lightning.attacks.candidates import (
    Candidate,
    WordSearch,
    check_checkpoints,
    checkpoint_steps,
    drawn_evaluations,
    finding_of,
    selected,
)
from trce_lightning.attacks.objectives import Noised, check_levels, denoising_loss, noised
from trce_lightning.attacks.protocol import Cost, Finding, Progress, Target, total
from trce_lightning.attacks.tries import (
    autocast_of,
    check_above_zero,
    check_gradients,
    check_positive,
    own_generator,
    parts,
    pictures_of,
)
from trce_lightning.attacks.words import (
    Layout,
    Pattern,
    Vocabulary,
    check_choice,
    check_room,
    own_words,
    room_of,
)
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Text

CHOICES = ("selector", "loss")


@dataclass(kw_only=True, eq=False)
class WhiteBoxWords(WordSearch):
    """A search that moves relaxed tokens by gradients and looks at the nearest real ones at checkpoints.

    Args:
        steps: gradient steps.
        levels: noise levels, the steps of a sampling run.
        lr: learning rate.
        weight_decay: of the optimizer.
        choose_by: what compares the tokens of checkpoints: ``selector``, on images of search seeds, or
            ``loss``.
        tries: images, or noised pictures, by which each is compared.
        batch_size: attacked prompts that are searched for together.
    """

    steps: int
    levels: int
    lr: float
    weight_decay: float = 0.1
    choose_by: str = "selector"
    tries: int = 1
    batch_size: int = 16

    taught = False
    """The goal is the original's prediction under the prompt; else it is the noise in the picture."""

    def __post_init__(self) -> None:
        check_positive(
            self.name,
            steps=self.steps,
            levels=self.levels,
            tries=self.tries,
            batch_size=self.batch_size,
        )
        check_checkpoints(self.name, self.steps, self.checkpoints)
        check_choice(self.name, "choose_by", self.choose_by, CHOICES)
        check_above_zero(self.name, lr=self.lr)

    @abstractmethod
    def pattern(self, words: Sequence[int], room: int, typed: Collection[int]) -> Pattern:
        """Return where the free places of a prompt are; ``typed`` are the tokens that end words."""

    @abstractmethod
    def start(self, layout: Layout, vocabulary: Vocabulary, generators: Sequence[torch.Generator]) -> Tensor:
        """Return what is optimised, ``[B, n, …]``."""

    @abstractmethod
    def optimizer(self, relaxed: Tensor) -> torch.optim.Optimizer:
        """Return the optimizer."""

    @abstractmethod
    def read(self, relaxed: Tensor, vocabulary: Vocabulary, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the tokens that the model reads in a step, ``[B, n]``."""

    @abstractmethod
    def gradient(self, slope: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return what the optimizer follows, by the gradient at the tokens' embeddings ``[B, n, e]``."""

    @abstractmethod
    def found(self, relaxed: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the tokens that the search has come to, ``[B, n]``."""

    @abstractmethod
    def level(self, step: int, generator: torch.Generator) -> int:
        """Return the noise level of a step in [0, ``levels``); 0 is pure noise."""

    def project(self, relaxed: Tensor) -> Tensor:
        """Return what is optimised where it must be."""
        return relaxed

    def cost(self, target: Target) -> Cost:
        """Return the cost of all records: steps with backward, the original's goals and the checkpoints."""
        return total(self._spent(target, record, self.steps) for record in target.records)

    def _spent(self, target: Target, record: PromptRecord, step: int) -> Cost:
        """Return what one record has cost by a step, its checkpoint included."""
        looks = sum(look <= step for look in checkpoint_steps(self.steps, self.checkpoints))
        by_selector = self.choose_by == "selector"
        forward, text = step * self.taught, step + self.taught
        if by_selector:
            forward += looks * drawn_evaluations(target, record.guidance_scale, target.num_steps, self.tries)
            text += looks * self.tries
        else:
            forward += (looks + self.taught) * self.tries
            text += looks
        return Cost(forward=forward, backward=step, text=text)

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless there are pictures, room for words, and gradients at as many levels."""
        super().check(target)
        pictures_of(target, target.records, self.name)
        check_gradients(target, self.name)
        check_levels(target.adapter, self.name, self.levels)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Search for the tokens of each record."""
        self.check(target)
        vocabulary = self.vocabulary(target)
        findings: list[Finding] = []
        for rows in parts(records, self.batch_size):
            findings += self._search(target, rows, vocabulary, progress)
        return findings

    def layout(self, target: Target, vocabulary: Vocabulary, records: Sequence[PromptRecord]) -> Layout:
        """Return the prompts with their free places."""
        room = room_of(target.adapter)
        check_room(self.name, target.adapter, len(self.pattern([], room, ())))
        words = own_words(target.adapter, vocabulary.segment, [record.prompt for record in records])
        return Layout.of(
            target.adapter, vocabulary, [self.pattern(row, room, vocabulary.typed) for row in words]
        )

    def _search(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        vocabulary: Vocabulary,
        progress: Progress,
    ) -> list[Finding]:
        generators = [own_generator(record, self.name, target) for record in records]
        layout = self.layout(target, vocabulary, records)
        fixed = layout.fixed()
        z_0 = target.adapter.encode_images(pictures_of(target, records, self.name))
        prompts = [record.prompt for record in records]
        teacher = target.original.encode(prompts) if self.taught else None
        held = [] if self.choose_by == "selector" else self._held(target, records, z_0, teacher)
        relaxed = self.start(layout, vocabulary, generators).requires_grad_()
        optimizer = self.optimizer(relaxed)
        looks = set(checkpoint_steps(self.steps, self.checkpoints))
        best: list[Candidate | None] = [None] * len(records)
        shown: list[list[Candidate]] = [[] for _ in records]
        losses = []
        told = 0
        for step in range(1, self.steps + 1):
            levels = torch.tensor([self.level(step - 1, generator) for generator in generators])
            rows = self._noised(target, z_0, levels, generators, teacher)
            tokens = self.read(relaxed.detach(), vocabulary, generators)
            with autocast_of(target):
                loss, slope = embedding_gradient(layout, fixed, vocabulary.embeddings[tokens], rows)
            relaxed.grad = self.gradient(slope, vocabulary)
            optimizer.step()
            with torch.no_grad():
                relaxed.copy_(self.project(relaxed))
            losses.append(loss)
            if step in looks:
                check_finite(
                    target.adapter.name,
                    f"the loss of attack.{self.name}",
                    torch.stack(losses),
                    target.adapter.denoiser,
                )
                ids = vocabulary.ids[self.found(relaxed.detach(), vocabulary).cpu()]
                texts = layout.texts(ids)
                shown_as = [text or prompt for text, prompt in zip(texts, prompts, strict=True)]
                scores = self._scores(target, records, shown_as, held)
                for row, (record, text) in enumerate(zip(records, texts, strict=True)):
                    cost = self._spent(target, record, step)
                    spent, score = cost.forward + cost.backward, float(scores[row])
                    one = best[row]
                    if text is not None and (one is None or score > one.score):
                        one = Candidate(step, spent, text, ids[row, : layout.counts[row]].tolist(), score)
                    if one is not None:
                        shown[row].append(replace(one, step=step, spent=spent))
                    best[row] = one
            spent_so_far = sum(
                cost.forward + cost.backward
                for cost in (self._spent(target, record, step) for record in records)
            )
            progress(spent_so_far - told)
            told = spent_so_far
        curves = torch.stack(losses, 1).tolist()
        return [
            finding_of(
                record.id,
                record.prompt,
                shown[row],
                self._spent(target, record, self.steps),
                losses=curves[row],
            )
            for row, record in enumerate(records)
        ]

    def _noised(
        self,
        target: Target,
        z_0: Tensor,
        levels: Tensor,
        generators: Sequence[torch.Generator],
        teacher: Text | None,
    ) -> Noised:
        """Return noised pictures and their goal: the noise in them, or what the original says of them."""
        rows = noised(target.adapter, z_0, levels, self.levels, generators)
        if teacher is None:
            return rows
        with torch.no_grad(), autocast_of(target):
            return rows._replace(goal=target.original.predict(rows.z_t, rows.timestep, teacher))

    def _held(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        z_0: Tensor,
        teacher: Text | None,
    ) -> list[Noised]:
        """Return noised pictures by which all checkpoints are compared."""
        generators = [own_generator(record, f"{self.name} held", target) for record in records]
        held = []
        for _ in range(self.tries):
            levels = torch.cat([torch.randint(self.levels, (1,), generator=each) for each in generators])
            held.append(self._noised(target, z_0, levels, generators, teacher))
        return held

    def _scores(
        self, target: Target, records: Sequence[PromptRecord], texts: Sequence[str], held: Sequence[Noised]
    ) -> Tensor:
        """Return how good each record's text is, ``[B]`` on the CPU."""
        if self.choose_by == "selector":
            return selected(self.name, target, records, texts, target.num_steps, range(self.tries))
        text = target.adapter.encode(texts)
        with torch.no_grad(), autocast_of(target):
            return -torch.stack([denoising_loss(target.adapter, rows, text) for rows in held]).mean(0).cpu()


def embedding_gradient(
    layout: Layout, fixed: Tensor, embeddings: Tensor, rows: Noised
) -> tuple[Tensor, Tensor]:
    """Return the denoising losses ``[B]``, and their gradients at the embeddings in the free places."""
    embeddings = embeddings.detach().requires_grad_()
    with torch.enable_grad():
        loss = denoising_loss(layout.adapter, rows, layout.text(fixed, embeddings))
        (slope,) = torch.autograd.grad(loss.sum(), embeddings)
    return loss.detach(), slope
