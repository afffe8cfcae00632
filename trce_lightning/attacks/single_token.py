"""Every single token of the vocabulary, tried one after another.

    max over tokens v of  score(v)  or  score([v ; P])

The score is the selector's mean over a few images, or minus the denoising loss at pictures of the concept:
‖ε_θ(z_t, t, E(v)) − ε‖² (the diffusion classifier, arXiv 2303.16203). The best few are scored again with
other noise, so that the one that is found isn't the luckiest of thousands.

It shows the exact worst case over prompts of one token, or over one token before a prompt, up to the noise of
the score. It is what a search for one token has to be compared with. It says nothing about two tokens, nor
about parts of words, which nobody can type alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
from trce_lightning.attacks.tries import autocast_of, check_positive, own_generator, parts, pictures_of
from trce_lightning.attacks.words import (
    UNTYPED,
    Layout,
    Vocabulary,
    alone,
    check_choice,
    own_words,
    prefixed,
)
from trce_lightning.errors import InputError
from trce_lightning.prompts.records import PromptRecord

PLACES = ("alone", "prefix")
SCORES = ("selector", "loss")


@dataclass(kw_only=True, eq=False)
class SingleToken(WordSearch):
    """The search.

    Args:
        place: ``alone``: one token for all records, which is the whole prompt. ``prefix``: a token of its own
            before each record's prompt, which costs as many times more as there are records.
        score_by: ``selector``: images are drawn and the selector looks at them. ``loss``: the denoising loss.
        tries: images, or noised pictures, for each token.
        finalists: tokens that are scored again.
        final_tries: images, or noised pictures, for each of these.
        sampling_steps: sampling steps of an image of the search; None is as many as judged images have.
        levels: noise levels that the loss draws from.
        checkpoints: looks at the best token so far, evenly spread over the vocabulary, which is gone through
            in random order.
        limit: the largest vocabulary that is gone through.
        blocked: no token may name the concept.
    """

    place: str = "alone"
    score_by: str = "selector"
    tries: int = 1
    finalists: int = 32
    final_tries: int = 8
    sampling_steps: int | None = None
    levels: int = 50
    checkpoints: int = 4
    limit: int = 2000

    name = "single_token"
    unit = "tokens"

    def __post_init__(self) -> None:
        check_choice(self.name, "place", self.place, PLACES)
        check_choice(self.name, "score_by", self.score_by, SCORES)
        check_positive(
            self.name,
            tries=self.tries,
            finalists=self.finalists,
            final_tries=self.final_tries,
            sampling_steps=1 if self.sampling_steps is None else self.sampling_steps,
            levels=self.levels,
            checkpoints=self.checkpoints,
            limit=self.limit,
        )
        self.universal = self.place == "alone"

    def cost(self, target: Target) -> Cost:
        """Return a forward for every token and try, times those that an image takes."""
        tokens = len(self.vocabulary(target))
        return total(self._spent(target, unit, tokens) for unit in self.units(target.records))

    def _spent(self, target: Target, unit: PromptRecord, tokens: int) -> Cost:
        finalists = min(self.finalists, tokens)
        tried = tokens * self.tries + finalists * self.final_tries
        texts = tried if self.score_by == "selector" else tokens + finalists
        return Cost(forward=tried * self._evaluations(target, unit), text=texts)

    def _evaluations(self, target: Target, unit: PromptRecord) -> int:
        """Return the network evaluations of one try."""
        if self.score_by == "loss":
            return 1
        return drawn_evaluations(target, unit.guidance_scale, self._sampling_steps(target), 1)

    def _sampling_steps(self, target: Target) -> int:
        return self.sampling_steps or target.num_steps

    def vocabulary(self, target: Target) -> Vocabulary:
        """Return the tokens that are tried. ``InputError`` if there are too many."""
        vocabulary = super().vocabulary(target)
        if len(vocabulary) > self.limit:
            raise InputError(
                f"attack.{self.name}.limit: expected a vocabulary of at most {self.limit} tokens, got "
                f"{len(vocabulary)} of '{target.adapter.name}'"
            )
        check_checkpoints(self.name, len(vocabulary), self.checkpoints)
        return vocabulary

    def layout(self, target: Target, vocabulary: Vocabulary, records: Sequence[PromptRecord]) -> Layout:
        """Return a free place alone or before each prompt."""
        words = own_words(target.adapter, vocabulary.segment, [record.prompt for record in records])
        patterns = [alone(1) if self.place == "alone" else prefixed(row, 1) for row in words]
        return Layout.of(target.adapter, vocabulary, patterns)

    def check(self, target: Target) -> None:
        """Raise ``InputError`` unless the vocabulary is small enough. A loss needs pictures, too."""
        super().check(target)
        if self.score_by == "loss":
            pictures_of(target, target.records, self.name)
            check_levels(target.adapter, self.name, self.levels)

    def search(
        self, target: Target, records: Sequence[PromptRecord], generator: torch.Generator, progress: Progress
    ) -> list[Finding]:
        """Go through the vocabulary; ``place: alone`` gives one universal finding."""
        self.check(target)
        vocabulary = self.vocabulary(target)
        units = self.units(records)
        layout = self.layout(target, vocabulary, units)
        return [
            self._search(target, unit, layout.row(i), vocabulary, progress) for i, unit in enumerate(units)
        ]

    def _search(
        self,
        target: Target,
        unit: PromptRecord,
        layout: Layout,
        vocabulary: Vocabulary,
        progress: Progress,
    ) -> Finding:
        generator = own_generator(unit, self.name, target)
        order = torch.randperm(len(vocabulary), generator=generator)
        ids = vocabulary.ids[order]
        texts = layout.repeated(len(ids)).texts(ids[:, None])
        first, later = range(self.tries), range(self.tries, self.tries + self.final_tries)
        rows = self._noised(target, unit, generator)
        scores = self._scores(target, unit, texts, first, rows, progress)
        per_token = self.tries * self._evaluations(target, unit)
        shown = []
        for tried in checkpoint_steps(len(ids), self.checkpoints):
            leader = int(scores[:tried].argmax())
            if (text := texts[leader]) is not None:
                score = float(scores[leader])
                shown.append(Candidate(tried, tried * per_token, text, [int(ids[leader])], score))
        leaders = scores.topk(min(self.finalists, len(ids))).indices.tolist()
        finals = self._scores(target, unit, [texts[i] for i in leaders], later, rows, progress)
        spent = self._spent(target, unit, len(vocabulary))
        ranking = [
            {"text": texts[leaders[i]], "id": int(ids[leaders[i]]), "score": float(finals[i])}
            for i in finals.argsort(descending=True, stable=True).tolist()
            if texts[leaders[i]] is not None
        ]
        if ranking:
            best = ranking[0]
            result = Candidate(len(ids), spent.forward, best["text"], [best["id"]], best["score"])
            shown = [one for one in shown if one.step < len(ids)] + [result]
        return finding_of(unit.id, unit.prompt, shown, spent, ranking=ranking)

    def _noised(self, target: Target, unit: PromptRecord, generator: torch.Generator) -> Noised | None:
        """Return noised pictures, one for each try of both rounds: the record's, or any for all records."""
        if self.score_by == "selector":
            return None
        count = self.tries + self.final_tries
        if self.place == "alone":
            chosen = torch.randint(len(target.pictures), (count,), generator=generator)
        else:
            chosen = torch.full((count,), target.records.index(unit))
        levels = torch.randint(self.levels, (count,), generator=generator)
        z_0 = target.adapter.encode_images(target.pictures[chosen])
        return noised(target.adapter, z_0, levels, self.levels, generator)

    @torch.no_grad()
    def _scores(
        self,
        target: Target,
        unit: PromptRecord,
        texts: Sequence[str | None],
        tries: range,
        rows: Noised | None,
        progress: Progress,
    ) -> Tensor:
        """Return the score of each text on the CPU: the higher, the better; −∞ for what can't be typed."""
        typed = [text or UNTYPED for text in texts]
        per_part = max(1, target.batch_size // len(tries))
        found = []
        for part in parts(typed, per_part):
            if rows is None:
                steps = self._sampling_steps(target)
                found.append(selected(self.name, target, [unit] * len(part), part, steps, tries))
            else:
                found.append(
                    -_losses(target, part, Noised(*(value[tries.start : tries.stop] for value in rows)))
                )
            progress(len(part) * len(tries) * self._evaluations(target, unit))
        return torch.cat(found).masked_fill(torch.tensor([text is None for text in texts]), -torch.inf)


def _losses(target: Target, texts: Sequence[str], rows: Noised) -> Tensor:
    """Return the mean loss of each text over all rows, on the CPU."""
    encoded, count = target.adapter.encode(texts), len(rows.z_t)
    each = torch.arange(len(texts)).repeat_interleave(count)
    repeated = Noised(*(value.repeat(len(texts), *[1] * (value.ndim - 1)) for value in rows))
    losses = []
    for part in torch.arange(len(each)).split(target.batch_size):
        with autocast_of(target):
            losses.append(
                denoising_loss(
                    target.adapter, Noised(*(value[part] for value in repeated)), encoded.rows(each[part])
                )
            )
    return torch.cat(losses).reshape(len(texts), count).mean(1).cpu()
