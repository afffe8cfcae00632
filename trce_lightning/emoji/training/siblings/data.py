"""Prepare the siblings' training data: latents of composites and scenes, and token ids of their captions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from trce_lightning.emoji.captions import caption, scene_caption
from trce_lightning.emoji.package import weights_folder
from trce_lightning.emoji.siblings import (
    T5_VOCABULARY,
    TEXT_LENGTH,
    load_t5_tokenizer,
    t5_tokenizer_folder,
)
from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.emoji.training.art import sprites
from trce_lightning.emoji.training.fillers import unknown_words, words_in
from trce_lightning.emoji.training.scenes import NOTHING, random_labels, render
from trce_lightning.emoji.training.siblings.encoders import UnknownWords, build_t5_tokenizer
from trce_lightning.emoji.training.vae import encode_latents
from trce_lightning.runtime.storage import replacing, write_json

SCENE_SHARE = 0.5
"""The share of scenes in a batch."""
SINGLES, SCENES, CAPTIONS = 20_000, 30_000, 6
"""The pictures of one subject, the scenes, and the captions of each picture."""
_CHUNK = 2000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bank:
    """Pictures with captions. Row ``i`` of every tensor belongs to picture ``i``. Composites come first."""

    latents: Tensor
    """The latents, unscaled, ``[N, 4, 16, 16]`` float16."""
    labels: Tensor
    """The subject (on the left), the one on the right or ``NOTHING``, style, background: ``[N, 4]`` int64."""
    clip_ids: Tensor
    """The token ids of each caption for the first CLIP, ``[N, K, 32]`` int16."""
    t5_ids: Tensor
    """The token ids of the same captions for T5, ``[N, K, 32]`` int16."""

    def to(self, device: torch.device) -> Bank:
        """Return the bank on ``device``."""
        return Bank(*(getattr(self, field.name).to(device) for field in fields(self)))

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return random rows: latents, labels, and the token ids of one caption of each, ``[size, …]``."""
        device, singles = self.labels.device, self.singles
        single = torch.randint(singles, (size,), device=device)
        scene = torch.randint(singles, len(self.labels), (size,), device=device)
        rows = torch.where(torch.rand(size, device=device) < SCENE_SHARE, scene, single)
        which = torch.randint(self.clip_ids.shape[1], (size,), device=device)
        return (
            self.latents[rows].float(),
            self.labels[rows],
            self.clip_ids[rows, which].long(),
            self.t5_ids[rows, which].long(),
        )

    @cached_property
    def singles(self) -> int:
        """The number of composites."""
        return int((self.labels[:, 1] == NOTHING).sum())


def random_bank(rows: int, vocabulary: int, end: int) -> Bank:
    """Return random rows, half of them scenes, with texts of random tokens of CLIP and of T5.

    ``end`` is CLIP's token of the end of a text, behind which all tokens are that one.
    """
    clip_ids = torch.randint(3, min(vocabulary, end), (rows, CAPTIONS, TEXT_LENGTH)).short()
    t5_ids = torch.randint(3, T5_VOCABULARY, clip_ids.shape).short()
    clip_ids[..., TEXT_LENGTH // 2 :], t5_ids[..., TEXT_LENGTH // 2 :] = end, 0
    t5_ids[..., TEXT_LENGTH // 2] = 1
    labels = torch.zeros(rows, 4, dtype=torch.int64)
    labels[: rows // 2, 1] = NOTHING
    return Bank(torch.randn(rows, 4, 16, 16).half(), labels, clip_ids, t5_ids)


def prepare_captions(folder: Path) -> Bank:
    """Return the training data without pictures. What was prepared before is read from ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "captions.safetensors"
    if not file.exists():
        with replacing(file) as aside:
            save_file(captioned(folder), aside)
    columns = load_file(file)
    labels = columns.pop("labels").long()
    return Bank(latents=torch.empty(len(labels), 0, dtype=torch.float16), labels=labels, **columns)


def prepare(folder: Path, device: torch.device) -> Bank:
    """Return the training data. What was prepared before is read from ``folder``.

    ``device`` is where the autoencoder encodes the pictures. Call this before it is used for anything else:
    the processes that render and write captions are forks of this one.
    """
    bank, pictures = prepare_captions(folder), folder / "pictures.safetensors"
    if not pictures.exists():
        art = sprites(folder.parent)
        images = torch.from_numpy(render(art, bank.labels.numpy(), seed=0, workers=os.cpu_count() or 1))
        log.info("encoding %d pictures", len(images))
        vae = AutoencoderKL.from_pretrained(weights_folder() / "vae", torch_dtype=torch.float32).to(device)
        with replacing(pictures) as aside:
            save_file({"latents": encode_latents(vae, images).half()}, aside)
    return replace(bank, **load_file(pictures))


def captioned(folder: Path) -> dict[str, Tensor]:
    """Return labels of pictures, int16, and the token ids of their captions."""
    t5_tokenizer(folder)
    labels = random_labels(SINGLES, SCENES, held_out=False, seed=0)
    starts = range(0, len(labels), _CHUNK)
    make = partial(_captioned, folder, filler_words(folder))
    with ProcessPoolExecutor() as pool:
        parts = pool.map(make, starts, [labels[start : start + _CHUNK].tolist() for start in starts])
        clip_ids, t5_ids = (torch.from_numpy(np.concatenate(ids)) for ids in zip(*parts, strict=True))
    return {"labels": torch.from_numpy(labels).short(), "clip_ids": clip_ids, "t5_ids": t5_ids}


def _captioned(
    folder: Path, words: Sequence[str], seed: int, rows: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of captions of each row of labels for CLIP and for T5, int16 ``[N, CAPTIONS, 32]``."""
    rng = Random(seed)
    swap = UnknownWords(words, rng)
    texts = [
        swap(
            caption(left, style, background, rng)
            if right == NOTHING
            else scene_caption(left, right, style, background, rng)
        )
        for left, right, style, background in rows
        for _ in range(CAPTIONS)
    ]
    tokenizers = (CLIPTokenizer.from_pretrained(weights_folder() / "tokenizer"), load_t5_tokenizer(folder))
    # A forked process must not compute with torch, whose threads it lacks.
    shape = (len(rows), CAPTIONS, TEXT_LENGTH)
    clip_ids, t5_ids = (
        token_ids(tokenizer, texts).astype(np.int16).reshape(shape) for tokenizer in tokenizers
    )
    return clip_ids, t5_ids


def filler_words(folder: Path) -> list[str]:
    """Return English words that no caption and no held-out phrasing has. They are kept in ``folder``."""
    file = folder / "words.json"
    if not file.exists():
        words = unknown_words(folder.parent / "art", words_in(*_corpus(4000)))
        write_json(file, {"words": words})
    return json.loads(file.read_text("utf-8"))["words"]


def _corpus(count: int) -> list[str]:
    """Return ``count`` captions of composites and as many of scenes, of any subjects."""
    rng = Random(3)
    numbers = (len(SUBJECTS), len(SUBJECTS), len(STYLES), len(BACKGROUNDS))
    labels = [[rng.randrange(number) for number in numbers] for _ in range(count)]
    single = [caption(subject, style, background, rng) for subject, _, style, background in labels]
    return single + [
        scene_caption(left, right, style, background, rng) for left, right, style, background in labels
    ]


def t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Return T5's tokenizer. It is learnt once from captions and kept in ``folder``."""
    kept = t5_tokenizer_folder(folder)
    if not kept.exists():
        build_t5_tokenizer(_corpus(30_000), filler_words(folder)).save_pretrained(kept)
    return load_t5_tokenizer(folder)


def token_ids(tokenizer: CLIPTokenizer | T5Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return padded token ids of texts, int64 ``[N, 32]``."""
    options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True}
    return np.array(tokenizer(list(texts), **options).input_ids)
