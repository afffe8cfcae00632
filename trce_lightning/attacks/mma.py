"""MMA: prompts of other words whose pooled text state is that of the attacked prompt.

    min over n tokens x of  1 − cos(pool(x), pool(P))        pool: the text encoder's state at the end of text

Greedy coordinate gradient: the gradient at a token's one-hot code ranks replacements, a batch of prompts with
one replaced token each is encoded, and the best of them is kept even if it is worse. (MMA-Diffusion:
MultiModal Attack on Diffusion Models, arXiv 2311.17516; Universal and Transferable Adversarial Attacks on
Aligned Language Models, arXiv 2307.15043.)

The published attack returns several prompts for each attacked one, and nothing chooses among them. Here the
attacked model draws the nearest prompts of each run (``finalists``), and the selector chooses.

It shows whether a word filter can be passed and the concept asked for without its words, by somebody who has
the text encoder and sees a few images. The search doesn't look at the denoiser, so it can't find what an
eraser of the denoiser has left open, except by chance. It doesn't show how natural such prompts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trce_lightning.attacks.protocol import Target
from trce_lightning.attacks.text_search import Step, TextSearch
from trce_lightning.attacks.tries import check_positive
from trce_lightning.attacks.words import Layout, Vocabulary, end_states
from trce_lightning.concepts.naming import mentions
from trce_lightning.prompts.records import PromptRecord


@dataclass(kw_only=True, eq=False)
class Mma(TextSearch):
    """The attack; see :class:`~.text_search.TextSearch` for the other options.

    Args:
        steps: replacements of each run.
        restarts: runs from other letters. The best prompt of all runs is the result.
        goals: prompts that the runs aim at in turn: the attacked one, then those under attack after it. Any
            of them asks for the concept, and words may be left near one of them alone.
        candidates: prompts that are encoded in each step.
        top_k: replacements of each position that candidates are drawn from.
    """

    tokens: int = 20
    steps: int = 1000
    restarts: int = 1
    goals: int = 1
    candidates: int = 512
    top_k: int = 256
    checkpoints: int = 10
    blocked: bool = True

    name = "mma"

    def __post_init__(self) -> None:
        check_positive(
            self.name,
            steps=self.steps,
            restarts=self.restarts,
            goals=self.goals,
            candidates=self.candidates,
            top_k=self.top_k,
        )
        super().__post_init__()

    @property
    def length(self) -> int:
        """Return the replacements of all runs."""
        return self.restarts * self.steps

    def texts_by(self, step: int) -> int:
        """Return the encoded prompts: those that runs have aimed at, and 1 + candidates a step."""
        return min(self.goals, -(-step // self.steps)) + step * (1 + self.candidates)

    def steps_of(
        self,
        target: Target,
        records: Sequence[PromptRecord],
        layout: Layout,
        vocabulary: Vocabulary,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """Yield the best candidates of each step, even if they are worse than those before."""
        places = [target.records.index(record) for record in records]
        goals: list[Tensor] = []
        short, letters = layout.trimmed(), _letters(vocabulary)
        fixed, every = short.fixed(), torch.arange(len(records))
        for step in range(self.length):
            if step % self.steps == 0:
                run = step // self.steps
                if run < self.goals:
                    aims = [target.records[(place + run) % len(target.records)].prompt for place in places]
                    goals.append(end_states(target.original.encode(aims)).to(vocabulary.embeddings.device))
                goal = goals[run % self.goals]
                size = (self.tokens,)
                tokens = torch.stack(
                    [letters[torch.randint(len(letters), size, generator=own)] for own in generators]
                )
            slopes = one_hot_gradient(short, fixed, vocabulary, tokens, goal)
            drawn = self._drawn(tokens, slopes, generators)
            losses, chosen = self._best(target, layout, vocabulary, drawn, tokens, goal)
            tokens = torch.where(losses[:, None].isfinite(), drawn[every, chosen], tokens)
            yield Step(losses, tokens)

    def _drawn(self, tokens: Tensor, slopes: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return candidates ``[B, candidates, n]`` with one replaced token each."""
        count, top_k = self.candidates, min(self.top_k, slopes.shape[-1])
        likely = (-slopes).topk(top_k, dim=-1).indices.cpu()
        place = torch.arange(count) * self.tokens // count if count >= self.tokens else None
        drawn = tokens[:, None].repeat(1, count, 1)
        for row, generator in enumerate(generators):
            # Fewer candidates than positions: some of these, others in each step.
            at = torch.randperm(self.tokens, generator=generator)[:count] if place is None else place
            choice = torch.randint(top_k, (count,), generator=generator)
            drawn[row, torch.arange(count), at] = likely[row, at, choice]
        return drawn

    def _best(
        self,
        target: Target,
        layout: Layout,
        vocabulary: Vocabulary,
        drawn: Tensor,
        tokens: Tensor,
        goal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the lowest loss of each row's candidates ``[B]`` on the CPU, and which has it.

        It is infinite if none can be typed, differs from ``tokens`` and doesn't name the concept.
        """
        ids, goals = vocabulary.ids[drawn], goal.repeat_interleave(self.candidates, 0)
        every = layout.trimmed().repeated(self.candidates)
        losses = torch.cat(
            [
                distance(end_states(text), goals[rows]).cpu()
                for text, rows in self.encoded(every, ids.flatten(0, 1))
            ]
        ).reshape(drawn.shape[:2])
        losses = losses.masked_fill((drawn == tokens[:, None]).all(-1), torch.inf)
        for row in range(len(losses)):
            # Nearly all texts can be typed, and no token names the concept by itself. So few are looked at.
            while losses[row].min() < torch.inf:
                index = int(losses[row].argmin())
                (text,) = layout.row(row).texts(ids[row, index][None])
                if text is not None and not (self.blocked and mentions(text, target.concepts)):
                    break
                losses[row, index] = torch.inf
        least = losses.min(1)
        return least.values, least.indices


def distance(states: Tensor, goal: Tensor) -> Tensor:
    """Return 1 − cos of two rows of states, ``[B, d]`` each → ``[B]``."""
    return 1 - F.cosine_similarity(states, goal, dim=-1)


def one_hot_gradient(
    layout: Layout, fixed: Tensor, vocabulary: Vocabulary, tokens: Tensor, goal: Tensor
) -> Tensor:
    """Return the gradient of 1 − cos at the one-hot codes of the tokens: int64 ``[B, n]`` → ``[B, n, V]``.

    Positions are those of the tokens, the start of text not counted.
    """
    embeddings = vocabulary.embeddings[tokens].requires_grad_()
    with torch.enable_grad():
        loss = distance(end_states(layout.text(fixed, embeddings)), goal).sum()
        (slope,) = torch.autograd.grad(loss, embeddings)
    return slope @ vocabulary.embeddings.T


def _letters(vocabulary: Vocabulary) -> Tensor:
    """Return the tokens that are one ASCII letter, where a search begins; all where there is none."""
    letters = [
        i for i, text in enumerate(vocabulary.texts) if len(text) == 1 and text.isascii() and text.isalpha()
    ]
    return torch.tensor(letters or range(len(vocabulary)))
