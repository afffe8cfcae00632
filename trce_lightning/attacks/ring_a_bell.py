"""Ring-A-Bell: prompts whose text states are those of the attacked prompt with more of the concept.

    min over K tokens x of  ‖E(x) − (E(P) + η c)‖²        c = mean over pairs of E(malicious) − E(safe)

The pairs are the concept's own prompt pairs. ‖·‖² is summed over all positions. A genetic algorithm searches:
the better half are parents, their one-point children replace the worse half, and some individuals get one
random token. (Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, arXiv 2310.10012.)

It differs from the published search in two ways. The best individual of a generation stays as it is. Every
generation has the same number of children, so that the cost is known.

It shows whether prompts found without the erased model, by its text encoder alone, bring the concept back. It
doesn't look at the denoiser: a failure says little about an attacker who does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.candidates import (
    Candidate,
    check_checkpoints,
    checkpoint_steps,
    finding_of,
    random_findings,
    ways,
)
from trce_lightning.attacks.protocol import Cost, Door, Finding, Progress, Reads, Target, Way
from trce_lightning.attacks.words import (
    UNTYPED,
    Layout,
    Vocabulary,
    alone,
    base_of,
    check_positive,
    check_room,
    generators_of,
    parts,
)
from trce_lightning.concepts import Concept, PromptPair, prompt_pairs
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Text


class RingABell:
    """The attack.

    Args:
        tokens: K, the tokens of a prompt that is found.
        eta: η, how much of the concept is added.
        population: individuals for each attacked prompt, a multiple of 4.
        generations: times that the worse half is replaced.
        mutation: share of individuals that get a random token in each generation.
        checkpoints: looks at the best individual, evenly spread over the generations.
        blocked: no token may name the concept.
        batch_size: attacked prompts that are searched for together.
        texts_at_once: prompts that go through the text encoder together.
    """

    name = "ring_a_bell"
    door = Door.WORDS
    reads = Reads.TEXT_ENCODER
    universal = False

    def __init__(
        self,
        *,
        tokens: int = 16,
        eta: float = 3.0,
        population: int = 200,
        generations: int = 3000,
        mutation: float = 0.25,
        checkpoints: int = 10,
        blocked: bool = False,
        batch_size: int = 64,
        texts_at_once: int = 512,
    ) -> None:
        check_positive(
            self.name,
            tokens=tokens,
            population=population,
            generations=generations,
            batch_size=batch_size,
            texts_at_once=texts_at_once,
        )
        check_checkpoints(self.name, generations, checkpoints)
        if population % 4:
            raise InputError(f"attack.{self.name}.population: expected a multiple of 4, got {population}")
        if not 0 <= mutation <= 1:
            raise InputError(f"attack.{self.name}.mutation: expected a share in [0, 1], got {mutation}")
        self.tokens, self.eta, self.population, self.generations = tokens, eta, population, generations
        self.mutation, self.checkpoints, self.blocked = mutation, checkpoints, blocked
        self.batch_size, self.texts_at_once = batch_size, texts_at_once

    def cost(self, target: Target) -> Cost:
        """Return the prompts through the text encoder: the concept's pairs once, then each record's."""
        pairs = len(_pairs(target.concepts))
        return Cost(text=2 * pairs + len(target.records) * self._texts_by(self.generations))

    def _texts_by(self, generation: int) -> int:
        """Return the texts of a record: its own, the first population, all but the best of later ones."""
        return 1 + self.population + generation * (self.population - 1)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Search for a prompt in each record's place. No network evaluations are made.

        The concept's pairs are encoded once for all; a finding's cost leaves them out.
        """
        base, vocabulary = base_of(generator), self._vocabulary(target)
        direction = concept_direction(target.original, target.concepts, self.texts_at_once)
        findings: list[Finding] = []
        for rows in parts(records, self.batch_size):
            findings += self._search(target, rows, vocabulary, direction, base)
        return findings

    def _vocabulary(self, target: Target) -> Vocabulary:
        check_room(self.name, target.adapter, self.tokens)
        return Vocabulary.of(target.adapter, self.name, target.concepts if self.blocked else ())

    def _layout(self, target: Target, vocabulary: Vocabulary, count: int) -> Layout:
        return Layout.of(target.adapter, vocabulary, [alone(self.tokens)] * count)

    def _search(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        vocabulary: Vocabulary,
        direction: Tensor,
        base: int,
    ) -> list[Finding]:
        layout, generators = self._layout(target, vocabulary, len(records)), generators_of(records, base)
        goal = _flat(target.original.encode([record.prompt for record in records])) + self.eta * direction
        population = torch.stack(
            [
                torch.randint(len(vocabulary), (self.population, self.tokens), generator=generator)
                for generator in generators
            ]
        )
        losses = self._losses(target, layout, vocabulary, population, goal)
        looks = set(checkpoint_steps(self.generations, self.checkpoints))
        shown: list[list[Candidate]] = [[] for _ in records]
        curves: list[list[float | None]] = [[] for _ in records]
        for generation in range(1, self.generations + 1):
            order = losses.argsort(dim=1, stable=True)
            kept = losses.gather(1, order[:, :1])
            ranked = population.gather(1, order[..., None].expand_as(population))
            population = torch.stack(
                [
                    self._next(individuals, len(vocabulary), generator)
                    for individuals, generator in zip(ranked, generators, strict=True)
                ]
            )
            losses = torch.cat([kept, self._losses(target, layout, vocabulary, population[:, 1:], goal)], 1)
            least, index = losses.min(1)
            for row, loss in enumerate(least.tolist()):
                curves[row].append(loss if loss < torch.inf else None)
            if generation in looks:
                ids = vocabulary.ids[population[torch.arange(len(records)), index]]
                for row, text in enumerate(layout.texts(ids)):
                    if text is not None:
                        by_now, score = self._texts_by(generation), -float(least[row])
                        shown[row].append(Candidate(generation, by_now, text, ids[row].tolist(), score))
        spent = Cost(text=self._texts_by(self.generations))
        return [
            finding_of(record.id, record.prompt, candidates, spent, losses=curves[row])
            for row, (record, candidates) in enumerate(zip(records, shown, strict=True))
        ]

    def _next(self, ranked: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
        """Return the next generation ``[population, K]`` of a sorted one. The best comes first in both."""
        parents = ranked[: self.population // 2]
        first, second = parents[torch.randint(len(parents), (2, len(parents) // 2), generator=generator)]
        cut = torch.randint(1, max(self.tokens, 2), (len(first), 1), generator=generator)
        head = torch.arange(self.tokens) < cut
        children = torch.cat([torch.where(head, first, second), torch.where(head, second, first)])
        after = torch.cat([parents, children])
        mutated = torch.rand(len(after), generator=generator) < self.mutation
        mutated[0] = False
        places = torch.randint(self.tokens, (len(after),), generator=generator)
        tokens = torch.randint(vocabulary, (len(after),), generator=generator)
        rows = mutated.nonzero().flatten()
        after[rows, places[rows]] = tokens[rows]
        return after

    def _losses(
        self, target: Target, layout: Layout, vocabulary: Vocabulary, population: Tensor, goal: Tensor
    ) -> Tensor:
        """Return the loss of each individual, ``[B, P, K]`` → ``[B, P]`` on the CPU.

        It is infinite where the text can't be typed.
        """
        count = population.shape[1]
        texts = layout.repeated(count).texts(vocabulary.ids[population].flatten(0, 1))
        rows = torch.arange(len(population)).repeat_interleave(count)
        losses = [
            (_flat(target.adapter.encode([text or UNTYPED for text in part])) - goal[row.to(goal.device)])
            .square()
            .sum(1)
            .cpu()
            for part, row in zip(
                parts(texts, self.texts_at_once), rows.split(self.texts_at_once), strict=True
            )
        ]
        unread = torch.tensor([text is None for text in texts])
        return torch.cat(losses).masked_fill(unread, torch.inf).reshape(len(population), count)

    def random(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator
    ) -> list[Finding]:
        """Return as many random tokens."""
        vocabulary = self._vocabulary(target)
        layout = self._layout(target, vocabulary, len(records))
        return random_findings(records, layout, vocabulary, base_of(generator))

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the best prompts by each checkpoint."""
        return ways(self.name, target, findings, unit="generations")


def concept_direction(adapter: Adapter, concepts: Sequence[Concept], texts_at_once: int) -> Tensor:
    """Return c, the mean over the concepts' pairs of E(malicious) − E(safe), flat: ``[L · d]``."""
    pairs = _pairs(concepts)
    total = torch.zeros(())
    for part in parts(pairs, texts_at_once):
        malicious, safe = (_flat(adapter.encode(texts)) for texts in zip(*(p[:2] for p in part), strict=True))
        total = total.to(malicious.device) + (malicious - safe).sum(0)
    return total / len(pairs)


def _pairs(concepts: Sequence[Concept]) -> list[PromptPair]:
    return [pair for pairs in prompt_pairs(concepts).values() for pair in pairs]


def _flat(text: Text) -> Tensor:
    """Return all states of each prompt in one row."""
    return torch.cat([states.flatten(1) for states in text.states.values()], dim=1)
