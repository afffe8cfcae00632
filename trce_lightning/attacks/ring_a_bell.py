"""Ring-A-Bell: prompts whose text states are those of the attacked prompt with more of the concept.

    min over K tokens x of  ‖E(x) − (E(P) + η c)‖²        c = mean over pairs of E(malicious) − E(safe)

The pairs are the concept's own prompt pairs. ‖·‖² is summed over all positions. A genetic algorithm searches:
the better half are parents, their one-point children replace the worse half, and some individuals get one
random token. (Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, arXiv 2310.10012.)

It differs from the published search in three ways. The best individual of a generation stays as it is. Every
generation has the same number of children, so that the cost is known. The attacked model draws the nearest
prompts at each checkpoint (``finalists``), and the selector chooses.

It shows whether prompts found by the text encoder and a few images bring the concept back. The search doesn't
look at the denoiser: a failure says little about an attacker who does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trce_lightning.adapters import Adapter
from trce_lightning.attacks.protocol import Target
from trce_lightning.attacks.text_search import Step, TextSearch
from trce_lightning.attacks.tries import check_positive, parts
from trce_lightning.attacks.words import Layout, Vocabulary
from trce_lightning.concepts import Concept, PromptPair, prompt_pairs
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.tokens import Text


@dataclass(kw_only=True, eq=False)
class RingABell(TextSearch):
    """The attack; see :class:`~.text_search.TextSearch` for the other options.

    Args:
        eta: η, how much of the concept is added.
        population: individuals for each attacked prompt, a multiple of 4.
        generations: times that the worse half is replaced.
        mutation: share of individuals that get a random token in each generation.
    """

    tokens: int = 16
    eta: float = 3.0
    population: int = 200
    generations: int = 3000
    mutation: float = 0.25
    checkpoints: int = 10
    _known: tuple[weakref.ref[Target], Tensor] | None = field(default=None, init=False, repr=False)
    """The concept's direction for one target."""

    name = "ring_a_bell"
    unit = "generations"

    def __post_init__(self) -> None:
        check_positive(self.name, population=self.population, generations=self.generations)
        super().__post_init__()
        if self.population % 4:
            raise InputError(
                f"attack.{self.name}.population: expected a multiple of 4, got {self.population}"
            )
        if not 0 <= self.mutation <= 1:
            raise InputError(f"attack.{self.name}.mutation: expected a share in [0, 1], got {self.mutation}")

    @property
    def length(self) -> int:
        """Return the generations."""
        return self.generations

    def texts_by(self, step: int) -> int:
        """Return the texts of a record: its own, the first population, all but the best of later ones."""
        return 1 + self.population + step * (self.population - 1)

    def shared_texts(self, target: Target) -> int:
        """Return both prompts of the concept's pairs."""
        return 2 * len(_pairs(target.concepts))

    def prepare(self, target: Target) -> int:
        """Encode the concept's pairs, once for a target."""
        if self._known is not None and self._known[0]() is target:
            return 0
        direction = concept_direction(target.original, target.concepts, self.texts_at_once)
        self._known = weakref.ref(target), direction
        return self.shared_texts(target)

    def steps_of(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        layout: Layout,
        vocabulary: Vocabulary,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """Yield the best individual of each generation."""
        assert self._known is not None
        direction = self._known[1]
        goal = _flat(target.original.encode([record.prompt for record in records])) + self.eta * direction
        size = (self.population, self.tokens)
        population = torch.stack([torch.randint(len(vocabulary), size, generator=own) for own in generators])
        typed: dict[tuple[int, ...], bool] = {}
        losses = self._losses(layout, vocabulary, population, goal, typed)
        for _ in range(self.generations):
            order = losses.argsort(dim=1, stable=True)
            kept = losses.gather(1, order[:, :1])
            ranked = population.gather(1, order[..., None].expand_as(population))
            population = torch.stack(
                [
                    self._next(individuals, len(vocabulary), generator)
                    for individuals, generator in zip(ranked, generators, strict=True)
                ]
            )
            later = self._losses(layout, vocabulary, population[:, 1:], goal, typed)
            losses = torch.cat([kept, later], 1)
            least, index = losses.min(1)
            yield Step(least, population[torch.arange(len(records)), index])

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
        self,
        layout: Layout,
        vocabulary: Vocabulary,
        population: Tensor,
        goal: Tensor,
        typed: dict[tuple[int, ...], bool],
    ) -> Tensor:
        """Return the loss of each individual, ``[B, P, K]`` → ``[B, P]`` on the CPU.

        It is infinite where the text can't be typed; ``typed`` remembers which can.
        """
        count = population.shape[1]
        of = torch.arange(len(population), device=goal.device).repeat_interleave(count)
        losses = torch.cat(
            [
                (_flat(text) - goal[of[rows]]).square().sum(1).cpu()
                for text, rows in self.encoded(
                    layout.repeated(count), vocabulary.ids[population].flatten(0, 1)
                )
            ]
        )
        individuals = [tuple(tokens) for tokens in population.flatten(0, 1).tolist()]
        if new := list(dict.fromkeys(one for one in individuals if one not in typed)):
            texts = layout.row(0).repeated(len(new)).texts(vocabulary.ids[torch.tensor(new)])
            typed |= {one: text is not None for one, text in zip(new, texts, strict=True)}
        unread = torch.tensor([not typed[one] for one in individuals])
        return losses.masked_fill(unread, torch.inf).reshape(len(population), count)


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
