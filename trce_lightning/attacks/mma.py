"""MMA: prompts of other words whose pooled text state is that of the attacked prompt.

    min over n tokens x of  1 − cos(pool(x), pool(P))        pool: the text encoder's state at the end of text

Greedy coordinate gradient: the gradient at a token's one-hot code ranks replacements, a batch of prompts with
one replaced token each is encoded, and the best of them is kept even if it is worse. (MMA-Diffusion:
MultiModal Attack on Diffusion Models, arXiv 2311.17516; Universal and Transferable Adversarial Attacks on
Aligned Language Models, arXiv 2307.15043.)

It shows whether a word filter can be passed and the concept asked for without its words, by somebody who has
the text encoder alone. It doesn't look at the denoiser, so it can't find what an eraser of the denoiser has
left open, except by chance. It doesn't show how natural such prompts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

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
    end_states,
    generators_of,
    parts,
)
from trce_lightning.concepts.naming import mentions
from trce_lightning.prompts.records import PromptRecord


class Mma:
    """The attack.

    Args:
        tokens: tokens of a prompt that is found.
        steps: replacements.
        candidates: prompts that are encoded in each step.
        top_k: replacements of each position that candidates are drawn from.
        checkpoints: looks at the best prompt so far, evenly spread over the steps.
        blocked: no token and no found prompt may name the concept.
        batch_size: attacked prompts that are searched for together.
        texts_at_once: prompts that go through the text encoder together.
    """

    name = "mma"
    door = Door.WORDS
    reads = Reads.TEXT_ENCODER
    universal = False

    def __init__(
        self,
        *,
        tokens: int = 20,
        steps: int = 1000,
        candidates: int = 512,
        top_k: int = 256,
        checkpoints: int = 10,
        blocked: bool = True,
        batch_size: int = 64,
        texts_at_once: int = 512,
    ) -> None:
        check_positive(
            self.name,
            tokens=tokens,
            steps=steps,
            candidates=candidates,
            top_k=top_k,
            batch_size=batch_size,
            texts_at_once=texts_at_once,
        )
        check_checkpoints(self.name, steps, checkpoints)
        self.tokens, self.steps, self.candidates, self.top_k = tokens, steps, candidates, top_k
        self.checkpoints, self.blocked = checkpoints, blocked
        self.batch_size, self.texts_at_once = batch_size, texts_at_once

    def cost(self, target: Target) -> Cost:
        """Return the prompts through the text encoder: each attacked one, then 1 + candidates a step."""
        return Cost(text=len(target.records) * self._texts_by(self.steps))

    def _texts_by(self, step: int) -> int:
        return 1 + step * (1 + self.candidates)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Search for a prompt in each record's place. No network evaluations are made."""
        base, vocabulary = base_of(generator), self._vocabulary(target)
        findings: list[Finding] = []
        for rows in parts(records, self.batch_size):
            findings += self._search(target, rows, vocabulary, base)
        return findings

    def _vocabulary(self, target: Target) -> Vocabulary:
        check_room(self.name, target.adapter, self.tokens)
        return Vocabulary.of(target.adapter, self.name, target.concepts if self.blocked else ())

    def _layout(self, target: Target, vocabulary: Vocabulary, count: int) -> Layout:
        return Layout.of(target.adapter, vocabulary, [alone(self.tokens)] * count)

    def _search(
        self, target: Target, records: Sequence[PromptRecord], vocabulary: Vocabulary, base: int
    ) -> list[Finding]:
        layout, generators = self._layout(target, vocabulary, len(records)), generators_of(records, base)
        goal = end_states(target.original.encode([record.prompt for record in records])).to(
            vocabulary.embeddings.device
        )
        fixed, letters = layout.fixed(), _letters(vocabulary)
        tokens = torch.stack(
            [
                letters[torch.randint(len(letters), (self.tokens,), generator=generator)]
                for generator in generators
            ]
        )
        looks = set(checkpoint_steps(self.steps, self.checkpoints))
        lowest = [float("inf")] * len(records)
        best: list[Candidate | None] = [None] * len(records)
        shown: list[list[Candidate]] = [[] for _ in records]
        losses: list[list[float | None]] = [[] for _ in records]
        for step in range(1, self.steps + 1):
            slopes = one_hot_gradient(layout, fixed, vocabulary, tokens, goal)
            drawn, texts = self._drawn(target, layout, vocabulary, tokens, slopes, generators)
            found = self._losses(target, texts, goal.repeat_interleave(self.candidates, 0))
            found = found.reshape(len(records), self.candidates)
            least = found.min(1)
            tokens = drawn[torch.arange(len(records)), least.indices]
            for row, (loss, index) in enumerate(zip(*(part.tolist() for part in least), strict=True)):
                losses[row].append(loss if loss < torch.inf else None)
                text = texts[row * self.candidates + index]
                if loss < lowest[row] and text is not None:
                    ids = vocabulary.ids[tokens[row]].tolist()
                    best[row] = Candidate(step, self._texts_by(step), text, ids, -loss)
                    lowest[row] = loss
                if step in looks and (one := best[row]) is not None:
                    shown[row].append(Candidate(step, self._texts_by(step), one.text, one.ids, one.score))
        spent = Cost(text=self._texts_by(self.steps))
        return [
            finding_of(record.id, record.prompt, candidates, spent, losses=losses[row])
            for row, (record, candidates) in enumerate(zip(records, shown, strict=True))
        ]

    def _drawn(
        self,
        target: Target,
        layout: Layout,
        vocabulary: Vocabulary,
        tokens: Tensor,
        slopes: Tensor,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, list[str | None]]:
        """Return candidates ``[B, candidates, n]`` with one replaced token each, and their texts.

        The candidate before it replaces one that can't be typed, that names the concept or that equals what
        is there. A text is None where there is none before it.
        """
        count, top_k = self.candidates, min(self.top_k, len(vocabulary))
        likely = (-slopes).topk(top_k, dim=-1).indices.cpu()
        place = torch.arange(count) * self.tokens // count if count >= self.tokens else None
        drawn = tokens[:, None].repeat(1, count, 1)
        for row, generator in enumerate(generators):
            # Fewer candidates than positions: some of these, others in each step.
            at = torch.randperm(self.tokens, generator=generator)[:count] if place is None else place
            choice = torch.randint(top_k, (count,), generator=generator)
            drawn[row, torch.arange(count), at] = likely[row, at, choice]
        texts = layout.repeated(count).texts(vocabulary.ids[drawn].flatten(0, 1))
        blocked = target.concepts if self.blocked else ()
        for row in range(len(tokens)):
            last: tuple[Tensor, str | None] = (tokens[row].clone(), None)
            for i in range(count):
                text = texts[row * count + i]
                if text is None or drawn[row, i].equal(tokens[row]) or (blocked and mentions(text, blocked)):
                    drawn[row, i], texts[row * count + i] = last
                else:
                    last = drawn[row, i].clone(), text
        return drawn, texts

    def _losses(self, target: Target, texts: Sequence[str | None], goal: Tensor) -> Tensor:
        """Return 1 − cos of each text, ``[N]`` on the CPU; infinity in place of None."""
        states = [
            end_states(target.adapter.encode([text or UNTYPED for text in part], trimmed=True))
            for part in parts(texts, self.texts_at_once)
        ]
        losses = distance(torch.cat(states), goal).cpu()
        return losses.masked_fill(torch.tensor([text is None for text in texts]), torch.inf)

    def random(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator
    ) -> list[Finding]:
        """Return as many random tokens, which don't name the concept either."""
        vocabulary = self._vocabulary(target)
        layout = self._layout(target, vocabulary, len(records))
        return random_findings(records, layout, vocabulary, base_of(generator))

    def ways(self, target: Target, findings: Mapping[str, Finding]) -> Iterator[Way]:
        """Yield the best prompts by each checkpoint."""
        return ways(self.name, target, findings)


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
