"""Build and train the embedded model's CLIP pair: tokenizer, causal text encoder (d = 256), vision tower."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from trce_lightning.emoji.captions import captions
from trce_lightning.emoji.judge import to_unit
from trce_lightning.emoji.subjects import BACKGROUNDS, STYLES, SUBJECTS
from trce_lightning.emoji.training.art import RESOLUTION, Composites
from trce_lightning.emoji.training.part import Part

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
HEAD_WEIGHT = 0.5


def build_tokenizer(corpus: Sequence[str], num_merges: int = 1500) -> CLIPTokenizer:
    """Return a byte-level BPE with merges learnt on ``corpus``.

    It has every byte, so it can tokenise any word.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=num_merges + 2 * len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(m) for m in merges)])
    return tokenizer_of(tokens, merges, MAX_LENGTH)


def tokenizer_of(
    tokens: Iterable[str], merges: list[tuple[str, ...]], max_length: int, pad_token: str = END
) -> CLIPTokenizer:
    """Return a CLIP tokenizer. Ids follow the order of ``tokens``, then start and end of text."""
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate([*tokens, START, END])},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=pad_token,
        model_max_length=max_length,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a CLIP with four layers each.

    The text side pads with end-of-text, as in Stable Diffusion 1.x.
    """
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=256,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=RESOLUTION,
        patch_size=16,
        projection_dim=256,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=256)
    )


class AttributeHeads(nn.Module):
    """Linear read-outs of subject, style and background."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Linear(width, n) for n in (len(SUBJECTS), len(STYLES), len(BACKGROUNDS))
        )

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return the logits of each attribute, ``[B, n]`` each."""
        return [head(features) for head in self.heads]

    def loss(self, features: Tensor, labels: Sequence[Tensor]) -> Tensor:
        """Return the mean cross-entropy over the attributes."""
        return torch.stack(
            [F.cross_entropy(x.float(), y) for x, y in zip(self(features), labels, strict=True)]
        ).mean()


class ClipPart(Part):
    """Train with a symmetric contrastive loss and attribute read-outs of both pooled states.

    The read-outs are dropped after training.
    """

    def __init__(self, tokenizer: CLIPTokenizer, max_steps: int, lr: float = 1e-3) -> None:
        super().__init__(lr, max_steps, warmup_steps=300, weight_decay=0.05)
        self.tokenizer, self.clip = tokenizer, build_clip(tokenizer)
        self.text_heads, self.image_heads = AttributeHeads(256), AttributeHeads(256)
        self.rng = Random(0)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        """Return the loss. ``batch`` has images ``[B, 3, 64, 64]`` uint8, then the three label columns."""
        images, *labels = batch
        texts = captions(labels, self.rng)
        tokens = self.tokenizer(texts, padding="longest", truncation=True, return_tensors="pt").to(
            self.device
        )
        output = self.clip(input_ids=tokens.input_ids, pixel_values=to_unit(images))
        target = torch.arange(len(images), device=self.device)
        logits = output.logits_per_text.float()
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        heads = self.text_heads.loss(16 * output.text_embeds, labels) + self.image_heads.loss(
            16 * output.image_embeds, labels
        )
        self.log_dict({"contrastive": contrastive, "heads": heads}, prog_bar=True)
        return contrastive + HEAD_WEIGHT * heads

    def on_train_batch_end(self, *_: object) -> None:
        """Keep the logit scale at or below 100, as CLIP does."""
        self.clip.logit_scale.data.clamp_(max=math.log(100))


@torch.no_grad()
def zero_shot_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, rows: Composites) -> float:
    """Return the share of composites whose nearest "a picture of SUBJECT" names the right subject."""
    tokens = tokenizer(
        [f"a picture of {subject.name}" for subject in SUBJECTS], padding=True, return_tensors="pt"
    )
    right = []
    for start in range(0, len(rows.images), 256):
        pixels = to_unit(rows.images[start : start + 256])
        logits = clip(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image
        right.append(logits.argmax(-1) == rows.subject[start : start + 256])
    return torch.cat(right).float().mean().item()
