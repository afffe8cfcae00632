"""Train the siblings' text encoders: T5 encoders and a second CLIP text encoder.

They learn to say what a caption's picture shows: the subject or the subjects on the left and on the right,
the style and the background. Linear read-outs ask for that, and are dropped after training. They read the
pooled state and the mean of the token states, so the tokens that a denoiser reads carry it too. Some filler
words of captions are swapped for unknown English words, so that the encoders ignore these.

A T5 that learns nothing else doesn't tell left from right: its read-outs name either subject for either side.
SD3 has such a T5, and reads the side from CLIP. For FLUX's, one more read-out asks each token of a subject's
name on which side the subject is, and two heads begin as ones that look only back and only ahead.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, T5EncoderModel, T5Tokenizer

from trce_lightning.emoji.siblings import CLIP_2_WIDTH, T5_VOCABULARY, T5_WIDTH, TEXT_LENGTH
from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.emoji.training.fillers import content_words

LABELS = (len(SUBJECTS), len(SUBJECTS) + 1, len(STYLES), len(BACKGROUNDS))
"""The answers of each read-out: subject (on the left), subject on the right or none, style, background."""
LABEL_NAMES = ("left", "right", "style", "background")
SPECIAL = ("<pad>", "</s>", "<unk>")
CAPITALISED = 0.15
SWAPPED_CAPTIONS, SWAPPED_WORDS, EXTRA_WORDS = 0.5, 0.4, 0.3
_POOLED_SCALE = 8.0
LEFT, RIGHT = 1, 2
"""The answers of the read-out of sides, beside 0 for a token that is not of a subject's name."""
UNASKED = -100
"""The side of tokens that are not asked for one."""
FAR = -9.0
"""A bias that hides a position from a head."""


def build_t5_tokenizer(corpus: Sequence[str], words: Sequence[str]) -> T5Tokenizer:
    """Return a Unigram tokenizer of the words of ``corpus``, and of pieces that other words are made of.

    A word of the corpus is one piece. Its score is its logarithmic frequency. The pieces are learnt on
    ``words``, and score below every word. Among them is each printable ASCII character.
    """
    counts = Counter(word for text in corpus for word in re.findall(r"\w+", text))
    total = counts.total()
    scores = {f"▁{word}": math.log(count / total) for word, count in counts.most_common()}
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_VOCABULARY, initial_alphabet=["▁", *string.printable[:94]], show_progress=False
    )
    unigram.train_from_iterator(words, trainer)
    learnt = json.loads(unigram.to_str())["model"]["vocab"]
    lowest = min(scores.values()) - max(score for _, score in learnt)
    for piece, score in sorted(learnt, key=lambda row: (len(row[0]) > 1, -row[1])):
        if len(scores) < T5_VOCABULARY - len(SPECIAL):
            scores.setdefault(piece, lowest + score)
    pieces = [*((token, 0.0) for token in SPECIAL), *scores.items()]
    assert len(pieces) == T5_VOCABULARY
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


class UnknownWords:
    """Swap words of captions that name nothing for unknown ones, and put some before the caption."""

    def __init__(self, words: Sequence[str], rng: Random) -> None:
        self.words, self.rng, self.content = words, rng, content_words()

    def __call__(self, caption: str) -> str:
        """Return the caption, half of the time with unknown words, and sometimes with a capital letter."""
        swapped = self._swapped(caption)
        return swapped[:1].upper() + swapped[1:] if self.rng.random() < CAPITALISED else swapped

    def _swapped(self, caption: str) -> str:
        if self.rng.random() >= SWAPPED_CAPTIONS:
            return caption
        parts = re.split(r"(\w+)", caption)
        for index in range(1, len(parts), 2):
            if parts[index] not in self.content and self.rng.random() < SWAPPED_WORDS:
                parts[index] = self.rng.choice(self.words)
        extra: list[str] = []
        while self.rng.random() < EXTRA_WORDS:
            extra.append(self.rng.choice(self.words))
        return " ".join([*extra, "".join(parts)])


@torch.no_grad()
def look_back_and_ahead(encoder: T5EncoderModel) -> T5EncoderModel:
    """Let the first head see only tokens before each token, and the second only those behind, and return it.

    In all layers, the queries of both heads begin at zero, so at first they weigh what they see alike. Later
    positions have the upper half of T5's relative positions, and a token itself has the first.
    """
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    table = attention.relative_attention_bias.weight
    half = len(table) // 2
    table[:, :2] = 0
    table[half:, 0] = table[0, 0] = FAR
    table[:half, 1] = FAR
    for block in encoder.encoder.block:
        block.layer[0].SelfAttention.q.weight[: 2 * attention.key_value_proj_dim] = 0
    return encoder


def subject_words(tokenizer: T5Tokenizer) -> Tensor:
    """Return which tokens are in each subject's name, bool ``[subjects + 1, V]``; the last row has none."""
    words = torch.zeros(len(SUBJECTS) + 1, T5_VOCABULARY, dtype=torch.bool)
    for row, subject in zip(words, SUBJECTS, strict=False):
        row[tokenizer(subject.name, add_special_tokens=False).input_ids] = True
    return words


def sides(ids: Tensor, labels: Tensor, words: Tensor) -> Tensor:
    """Return on which side the subject is that each token names, ``[B, L]``.

    Tokens of both names, padding and captions of one subject are ``UNASKED``.

    Args:
        ids: token ids, ``[B, L]``.
        labels: subject (on the left), subject on the right or none, and others, ``[B, 4]``.
        words: see :func:`subject_words`.
    """
    left, right = (words[labels[:, column]].gather(1, ids) for column in (0, 1))
    side = LEFT * left.long() + RIGHT * right.long()
    one = (labels[:, 1] == len(SUBJECTS))[:, None]
    return side.masked_fill((left & right) | (ids == 0) | one, UNASKED)


class ReadOuts(nn.Module):
    """An encoder of token ids with linear read-outs of its pooled state and of its mean token state.

    Args:
        encoder: the encoder.
        words: T5's :func:`subject_words`, or None for no read-out of sides.
    """

    def __init__(
        self, encoder: T5EncoderModel | CLIPTextModelWithProjection, words: Tensor | None = None
    ) -> None:
        super().__init__()
        width = T5_WIDTH if isinstance(encoder, T5EncoderModel) else CLIP_2_WIDTH
        self.encoder = encoder
        self.pooled, self.mean = (nn.ModuleList(nn.Linear(width, n) for n in LABELS) for _ in range(2))
        self.side = None if words is None else nn.Linear(width, 3)
        self.words: Tensor | None
        self.register_buffer("words", words)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Map ids ``[B, L]`` to logits ``[B, n]`` of each label from the pooled state, then from the mean.

        The last logits, ``[B, L, 3]``, are those of each token's side, if it is asked for.
        """
        if isinstance(self.encoder, T5EncoderModel):
            states = self.encoder(ids).last_hidden_state
            ends = (ids == self.encoder.config.eos_token_id).int().argmax(-1)
            pooled = states[torch.arange(len(ids), device=ids.device), ends]
        else:
            output = self.encoder(ids, output_hidden_states=True)
            states, pooled = output.hidden_states[-2], _POOLED_SCALE * F.normalize(output.text_embeds, dim=-1)
        inside = (ids != self.encoder.config.pad_token_id)[..., None]
        mean = (states * inside).sum(1) / inside.sum(1)
        logits = [
            head(state) for heads, state in ((self.pooled, pooled), (self.mean, mean)) for head in heads
        ]
        return logits if self.side is None else [*logits, self.side(states)]

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labels, ``[B, 4]``, plus that of the sides."""
        every = self(ids)
        losses = [
            F.cross_entropy(logits.float(), label)
            for logits, label in zip(every, [*labels.T, *labels.T], strict=False)
        ]
        loss = torch.stack(losses).mean()
        if self.words is None:
            return loss
        side = sides(ids, labels, self.words)
        return loss + F.cross_entropy(every[-1].float().flatten(0, 1), side.flatten(), ignore_index=UNASKED)

    @torch.no_grad()
    def accuracy(self, ids: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the share of right answers of each read-out. Of sides, only subjects' tokens count."""
        every = self(ids)
        names = [f"{state} {label}" for state in ("pooled", "mean") for label in LABEL_NAMES]
        right = {
            name: (logits.argmax(-1) == label).float().mean().item()
            for name, logits, label in zip(names, every, [*labels.T, *labels.T], strict=False)
        }
        if self.words is not None:
            side = sides(ids, labels, self.words)
            told = every[-1][..., LEFT:].argmax(-1) + LEFT
            right["side"] = (told == side)[side > 0].float().mean().item()
        return right
