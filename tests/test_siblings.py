"""The embedded model's siblings: their parts, plain pipelines, training, and scenes of two subjects."""

import copy
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from trce_lightning.cli import config_folder
from trce_lightning.concepts import Concept, load_concept
from trce_lightning.config.schema import ModelConfig
from trce_lightning.emoji import siblings
from trce_lightning.emoji.captions import is_held_out_pair, scene_caption
from trce_lightning.emoji.domain import EmojiFluxDomain, EmojiSD3Domain, EmojiXLDomain
from trce_lightning.emoji.judge import JudgeDetector
from trce_lightning.emoji.package import load_judge, weights_folder
from trce_lightning.emoji.scenes import SceneJudge, halves
from trce_lightning.emoji.siblings import (
    FAMILIES,
    assembled,
    build,
    build_clip_2,
    build_t5,
    load_part,
    load_t5_tokenizer,
    open_sibling,
    part_file,
    save_part,
)
from trce_lightning.emoji.subjects import SUBJECTS, subject_index
from trce_lightning.emoji.training.art import is_held_out
from trce_lightning.emoji.training.part import native_autocast
from trce_lightning.emoji.training.scenes import NOTHING, random_labels, render
from trce_lightning.emoji.training.siblings.data import Bank, token_ids
from trce_lightning.emoji.training.siblings.denoisers import (
    Condition,
    Drawing,
    Texts,
    drawn,
    flow_loss,
    guided_loss,
    initialise,
    loss_of,
    velocity_of_flux,
)
from trce_lightning.emoji.training.siblings.encoders import (
    LEFT,
    RIGHT,
    UNASKED,
    ReadOuts,
    UnknownWords,
    build_t5_tokenizer,
    look_back_and_ahead,
    sides,
    subject_words,
)
from trce_lightning.emoji.training.siblings.kernels import KERNELS, WrittenOutRMSNorm
from trce_lightning.emoji.training.siblings.loop import Fit, fit
from trce_lightning.emoji.training.siblings.parts import probe
from trce_lightning.emoji.training.siblings.quality import quality
from trce_lightning.emoji.training.unet import build_unet
from trce_lightning.errors import InputError
from trce_lightning.metrics.collateral import BESIDE, Detection, accuracies
from trce_lightning.prompts.records import PromptRecord, PromptSet

PROMPTS = ["a cat and a dagger", "somebody needs this: knife, blade"]
CORPUS = [
    "a cat and a dagger",
    "a picture of a kitchen knife",
    "nothing but a tropical fish on a red background",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts of the siblings with random weights, as a training leaves them."""
    folder = tmp_path_factory.mktemp("siblings")
    torch.manual_seed(0)
    words = [f"{first}{second}" for first in ("gla", "tro", "pim", "sed") for second in ("ner", "mot", "ly")]
    tokenizer = build_t5_tokenizer(
        CORPUS, [*words, *(f"x{i:03d}{word}" for i in range(900) for word in words)]
    )
    tokenizer.save_pretrained(siblings.t5_tokenizer_folder(folder))
    for name in ("t5", "t5_flux"):
        save_part(build_t5(), part_file(folder, name))
    save_part(build_clip_2(1809, 1808), part_file(folder, "clip_2"))
    for family in FAMILIES:
        save_part(build(family), part_file(folder, family))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_comes_back_to_half_a_step_of_eight_bits_and_shared_weights_are_stored_once(
    family: siblings.Family, parts: Path
) -> None:
    network = build(family)
    save_part(network, part_file(parts.parent, f"again-{family}"))
    stored = load_file(part_file(parts.parent, f"again-{family}"))
    opened = load_part(build(family), part_file(parts.parent, f"again-{family}"))
    for name, value in network.named_parameters():
        step = stored.get(f"{name}.scale")
        error = (opened.get_parameter(name) - value).abs().flatten(1 if value.ndim > 1 else 0)
        bound = 5e-4 * value.abs().max() if step is None else step[:, None] / 2 * 1.001
        assert (error <= bound).all(), name
    plain = assembled(family, opened)
    whole = sum(parameter.numel() for parameter in plain.parameters())
    once = sum(value.numel() for name, value in stored.items() if not name.endswith(".scale"))
    assert once == sum(parameter.numel() for parameter in network.parameters())
    assert once <= whole
    assert (once < whole) == (family != "xl")
    pointers = [parameter.data_ptr() for parameter in plain.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in opened.state_dict().items())


def test_two_heads_of_t5_begin_by_looking_back_and_ahead() -> None:
    """Until training, a token's part from the first head depends on earlier tokens alone, and so on."""
    attention = look_back_and_ahead(build_t5()).encoder.block[0].layer[0].SelfAttention
    width = attention.key_value_proj_dim
    states = torch.randn(1, 9, siblings.T5_WIDTH)
    for head, seen in ((0, slice(0, 4)), (1, slice(5, 9))):
        attention.o.weight.data.zero_()
        rows = slice(head * width, (head + 1) * width)
        attention.o.weight.data[:width, rows] = torch.eye(width)
        values = (states @ attention.v.weight.T)[0, :, rows]
        found = attention(states)[0][0, 4, :width]
        torch.testing.assert_close(found, values[seen].mean(0), atol=1e-3, rtol=1e-2)


def test_each_token_of_a_subjects_name_is_on_the_subjects_side() -> None:
    tokenizer = load_t5_tokenizer(siblings.siblings_folder())
    words = subject_words(tokenizer)
    dagger, fish, cat = (subject_index(name) for name in ("dagger", "tropical fish", "cat"))
    captions = ["a dagger right of a tropical fish", "a cat and a cat", "a cat"]
    ids = torch.from_numpy(token_ids(tokenizer, captions))
    labels = torch.tensor([[fish, dagger, 0, 0], [cat, cat, 0, 0], [cat, NOTHING, 0, 0]])
    found = sides(ids, labels, words)
    pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    told = dict(zip(pieces, found[0].tolist(), strict=True))
    assert told["▁dagger"] == RIGHT and told["▁tropical"] == told["▁fish"] == LEFT
    assert told["▁of"] == told["</s>"] == 0 and told["<pad>"] == UNASKED
    cats = found[1][ids[1] == ids[2][1]]
    assert len(cats) == 2 and (cats == UNASKED).all()
    assert (found[2] == UNASKED).all()
    net = ReadOuts(look_back_and_ahead(build_t5()), words)
    loss = net.loss(ids, labels)
    loss.backward()
    assert net.side is not None and net.side.weight.grad is not None and net.side.weight.grad.abs().max() > 0


def test_fluxs_t5_tells_left_from_right_and_sd3s_does_not() -> None:
    """Swap two subjects: the state of a name changes much, and by SD3's T5, which lacks the side, little."""
    tokenizer = load_t5_tokenizer(siblings.siblings_folder())
    names = ("cat", "dagger", "rose", "bomb", "apple", "owl")
    changes = {}
    for part in ("t5", "t5_flux"):
        encoder = load_part(build_t5(), part_file(siblings.siblings_folder(), part))
        shares = []
        for first in names:
            for second in names:
                texts = [f"a {first} and a {second}", f"a {second} and a {first}"]
                ids = torch.from_numpy(token_ids(tokenizer, texts))
                with torch.no_grad():
                    states = encoder(ids).last_hidden_state
                one, other = states[0, 1], states[1, 4]
                assert ids[0, 1] == ids[1, 4]
                if first != second:
                    shares.append(float((one - other).norm() / one.norm()))
        changes[part] = sum(shares) / len(shares)
    assert changes["t5_flux"] > 2 * changes["t5"], changes


@pytest.mark.parametrize("family", FAMILIES)
def test_training_conditions_on_what_the_pipeline_itself_computes(
    family: siblings.Family, parts: Path
) -> None:
    pipeline = open_sibling(family, parts)
    texts = Texts(family, pipeline)
    ids = [
        torch.from_numpy(token_ids(tokenizer, PROMPTS))
        for tokenizer in (pipeline.tokenizer, texts.t5_tokenizer or pipeline.tokenizer)
    ]
    condition, empty = texts(*ids), texts.empty()
    if family == "flux":
        states, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, device="cpu", max_sequence_length=32)
        wanted = [(states, condition.states), (pooled, condition.pooled)]
    else:
        three = [PROMPTS] * (1 if family == "xl" else 3)
        length = {} if family == "xl" else {"max_sequence_length": 32}
        states, no_states, pooled, no_pooled = pipeline.encode_prompt(
            *three, device="cpu", do_classifier_free_guidance=True, **length
        )
        wanted = [(states, condition.states), (pooled, condition.pooled)]
        wanted += [(no_states[:1], empty.states), (no_pooled[:1], empty.pooled)]
    for expected, got in wanted:
        torch.testing.assert_close(got, expected)
    assert (family == "xl") == (empty.states.abs().max() == 0)


def test_flux_velocity_is_that_of_the_packed_latents(parts: Path) -> None:
    network, z_t = (
        assembled("flux", load_part(build("flux"), part_file(parts, "flux"))),
        torch.randn(2, 4, 16, 16),
    )
    states, pooled, t = torch.randn(2, 32, 320), torch.randn(2, 256), torch.tensor([0.3, 0.9])
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    asked = Condition(states, pooled, torch.tensor([2.0, 4.0]))
    with torch.no_grad():
        got = velocity_of_flux(network, z_t, t, asked, image_ids)
        packed = network(
            hidden_states=FluxPipeline._pack_latents(z_t, 2, 4, 16, 16),
            timestep=t,
            guidance=asked.guidance,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            txt_ids=torch.zeros(32, 3),
            img_ids=image_ids,
        ).sample
    torch.testing.assert_close(got, FluxPipeline._unpack_latents(packed, 64, 64, 4))


def test_a_guided_student_that_equals_guidance_has_no_loss() -> None:
    """v = g · mean(states) is its own guided velocity, if ∅ has zeros."""

    def predict(network: nn.Module, z_t: torch.Tensor, t: torch.Tensor, text: Condition) -> torch.Tensor:
        scale = torch.ones(len(z_t)) if text.guidance is None else text.guidance
        return (scale * text.states.mean((1, 2)))[:, None, None, None].expand_as(z_t)

    told = Condition(torch.randn(3, 5, 8), torch.randn(3, 4))
    nothing = Condition(torch.zeros(1, 5, 8), torch.zeros(1, 4))
    nets = nn.Identity(), nn.Identity()
    assert guided_loss(predict, *nets, torch.randn(3, 4, 2, 2), told, nothing).item() == pytest.approx(
        0, abs=1e-10
    )
    other = Condition(torch.ones(1, 5, 8), torch.zeros(1, 4))
    assert guided_loss(predict, *nets, torch.randn(3, 4, 2, 2), told, other).item() > 0.01


def test_a_true_velocity_has_no_loss() -> None:
    """The noised latent z_t of one picture tells ε: the velocity is (z_t − z_0) / t."""
    z_0 = torch.randn(64, 4, 2, 2)

    def predict(network: nn.Module, z_t: torch.Tensor, t: torch.Tensor, text: Condition) -> torch.Tensor:
        return (z_t - z_0) / t[:, None, None, None]

    nothing = Condition(torch.zeros(64, 1, 1), torch.zeros(64, 1))
    assert flow_loss(predict, nn.Identity(), z_0, nothing).item() == pytest.approx(0, abs=1e-6)


def bank(rows: int = 32) -> Bank:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 900, (rows, 2, 32), generator=generator)
    ids[..., 20] = 1808
    t5_ids = ids.clone()
    t5_ids[..., 20] = 1
    labels = torch.full((rows, 4), len(SUBJECTS))
    labels[rows // 2 :, 1] = 0
    latents = torch.full((rows, 4, 16, 16), 2.0)  # easily learnt
    return Bank(latents.half(), labels, ids.short(), t5_ids.short())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fit_learns_ends_in_time_and_continues(
    family: siblings.Family, parts: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    data = Drawing(Texts(family, open_sibling(family, parts)), bank(), 0.8, torch.float32)
    network, losses = initialise(build(family)), []
    loss_of_batch = loss_of(family, data)

    def loss(network: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        losses.append(loss_of_batch(network, batch))
        return losses[-1]

    plan = Fit(steps=12, batch_size=4, lr=4e-3, ema_decay=0.5, warmup_steps=2)
    average = fit(network, loss, data, plan, tmp_path / "part.safetensors")
    assert len(losses) == 12
    first, last = (torch.stack(rows).mean() for rows in (losses[:4], losses[-4:]))
    assert last < 0.95 * first
    assert not any(
        torch.equal(a, b) for a, b in zip(average.parameters(), build(family).parameters(), strict=True)
    )
    # All steps are made: a second call returns the average alone.
    again = fit(initialise(build(family)), loss, data, plan, tmp_path / "part.safetensors")
    assert len(losses) == 12
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), again.parameters(), strict=True))
    longer = Fit(steps=13, batch_size=4, lr=4e-3, ema_decay=0.5, warmup_steps=2)
    fit(initialise(build(family)), loss, data, longer, tmp_path / "part.safetensors")
    assert len(losses) == 13
    with pytest.raises(InputError, match="expected some time"):
        fit(network, loss, data, Fit(9, 8, 1e-3, minutes=0.0), tmp_path / "other.safetensors")


def test_written_out_norms_give_the_values_and_gradients_of_the_fused_ones() -> None:
    torch.manual_seed(0)
    fused = build("flux")
    written = KERNELS["written-out"].apply(copy.deepcopy(fused))
    kinds = [{type(module) for module in network.modules()} for network in (fused, written)]
    assert nn.RMSNorm in kinds[0] and nn.RMSNorm not in kinds[1] and WrittenOutRMSNorm in kinds[1]
    assert list(dict(fused.named_parameters())) == list(dict(written.named_parameters()))
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    text = Condition(torch.randn(2, 32, 320), torch.randn(2, 256))
    z_t, t = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.9])
    outputs = [velocity_of_flux(network, z_t, t, text, image_ids) for network in (fused, written)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, value), other in zip(fused.named_parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_probe_makes_steps_of_each_phase_and_leaves_nothing(
    family: siblings.Family, parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(parts.rglob("*"))
    with caplog.at_level("INFO"):
        probe(family, parts, Fit(steps=3, batch_size=2, lr=1e-3, kernels=KERNELS["plain"]))
    assert sum("steps of 2" in line for line in caplog.messages) == (2 if family == "flux" else 1)
    assert sorted(parts.rglob("*")) == before


def test_time_ends_a_fit_and_its_learning_rate() -> None:
    plan = Fit(steps=1000, batch_size=8, lr=1.0, minutes=2.0, warmup_steps=10)
    assert plan.progress(100, 6.0) == pytest.approx(0.1)
    assert plan.progress(100, 60.0) == pytest.approx(0.5)
    assert plan.progress(100, 500.0) == 1.0
    assert plan.lr_at(0, 0.0) == pytest.approx(0.1)
    assert plan.lr_at(500, 0.0) == pytest.approx(1.0)
    assert plan.lr_at(500, 1.0) == pytest.approx(0.05)
    assert Fit(steps=10, batch_size=8, lr=1.0).progress(5, 1e9) == 0.5


def test_a_dropped_caption_reads_as_nothing(parts: Path) -> None:
    torch.manual_seed(0)
    data = Drawing(Texts("xl", open_sibling("xl", parts)), bank(), 0.5, torch.float32)
    latents, states, pooled = data(400)
    dropped = (states == 0).all(-1).all(-1)
    assert torch.equal(dropped, (pooled == 0).all(-1))
    assert 15 < dropped.sum() < 75  # one in ten
    assert latents.abs().max() <= 0.5 * data.bank.latents.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assembled_folder_is_a_plain_pipeline(
    family: siblings.Family, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(siblings, "siblings_folder", lambda: parts)
    folder = siblings.opened_folder(family)
    assert folder.is_relative_to(tmp_path)
    assert siblings.opened_folder(family) == folder
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    length = {} if family == "xl" else {"max_sequence_length": 32}
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", **length}
    plain = pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images
    shipped = open_sibling(family, parts)
    shipped.set_progress_bar_config(disable=True)
    ours = shipped("a cat", generator=torch.Generator().manual_seed(0), **options).images
    assert plain.shape == (1, 64, 64, 3)
    assert np.abs(plain - ours).max() < 0.05  # float16
    monkeypatch.setattr(siblings, "siblings_folder", lambda: tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"--family {family}"):
        siblings.opened_folder(family)


def scene(left: int, right: int) -> torch.Tensor:
    """A picture with a flat colour on each side, by its index."""
    image = torch.empty(3, 64, 64, dtype=torch.uint8)
    image[..., :32], image[..., 32:] = left, right
    return image


class Shades(nn.Module):
    """A judge whose subject is an image's mean, and which sees a scene by the difference of the sides."""

    num_features = 1

    def features(self, images: torch.Tensor) -> torch.Tensor:
        sides = images.float().unflatten(-1, (2, -1)).mean((1, 2, 4))
        return (sides[:, :1] - sides[:, 1:]).abs()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        subject = images.float().mean((1, 2, 3)).round().long()
        one = torch.ones(len(images), 1)
        return {"subject": nn.functional.one_hot(subject, 117).float(), "style": one, "background": one}


def scene_judge() -> SceneJudge:
    judge = SceneJudge(Shades())
    with torch.no_grad():
        judge.scene.weight.fill_(1.0)
        judge.scene.bias.fill_(-1.0)
    return judge


def test_each_half_of_a_scene_is_judged_and_another_picture_as_a_whole() -> None:
    images = torch.stack([scene(7, 90), scene(40, 40), scene(90, 7)])
    seen = scene_judge()(images)
    assert seen["subject"].argmax(-1).tolist() == [7, 40, 90]
    assert seen[BESIDE].argmax(-1).tolist() == [90, 40, 7]
    left, right = halves(images)
    assert left.shape == right.shape == images.shape
    assert (left[0] == 7).all()
    assert (right[0] == 90).all()


def test_a_concept_in_either_half_is_detected() -> None:
    violence = Concept("violence", {"a dagger": "a rose"})
    dagger, cat, dog = (subject_index(name) for name in ("dagger", "cat", "dog"))
    detector = JudgeDetector(scene_judge(), [violence])
    images = torch.stack([scene(dagger, cat), scene(cat, dagger), scene(cat, dog), scene(dagger, dagger)])
    assert detector(images).tolist() == [1, 1, 0, 1]


def test_a_benign_half_counts_on_either_side_and_both_need_the_concept() -> None:
    records = [PromptRecord(str(index), f"{index}", label="cat") for index in range(5)]
    found = [
        Detection(0.9, "dagger", beside="cat"),
        Detection(0.9, "cat", beside="dagger"),
        Detection(0.1, "rose", beside="cat"),
        Detection(0.9, "dagger", beside="dagger"),
        Detection(0.1, "dog", beside="rose"),
    ]
    seen = {record.id: row for record, row in zip(records, found, strict=True)}
    rates = accuracies(PromptSet("mixed", tuple(records)), seen, {})
    assert {name: rate["successes"] for name, rate in rates.items()} == {"subject": 3, "both": 2}
    assert list(accuracies(PromptSet("benign", tuple(records)), seen, {})) == ["subject"]
    alone = {key: row._replace(beside=None) for key, row in seen.items()}
    rates = accuracies(PromptSet("mixed", tuple(records)), alone, {})
    assert {name: rate["successes"] for name, rate in rates.items()} == {"subject": 1}


def test_places_count_where_a_prompt_asks_for_them() -> None:
    """An image of one subject has no places, and the order is judged where all asked subjects are shown."""
    found = {
        "as asked": Detection(0.1, "cat", beside="rose", background="red"),
        "swapped": Detection(0.1, "rose", beside="cat", background="red"),
        "one subject": Detection(0.1, "cat", beside="cat", background="blue"),
        "another beside": Detection(0.1, "cat", beside="dog", background="blue"),
        "none": Detection(0.1, "dog", beside="owl", background="red"),
    }
    records = tuple(
        PromptRecord(name, name, label="cat", background="red", left="cat", right="rose") for name in found
    )
    rates = accuracies(PromptSet("scenes", records), found, {})
    counts = {name: (rate["successes"], rate["images"]) for name, rate in rates.items()}
    assert counts == {
        "subject": (4, 5),
        "both": (2, 5),
        "left": (2, 5),
        "right": (1, 5),
        "placed": (1, 5),
        "in_order": (1, 2),
        "background": (3, 5),
    }
    assert all(rate["low"] <= rate["rate"] <= rate["high"] for rate in rates.values())
    # Where the concept is erased from the other half, the benign half has its place or none.
    halves_alone = tuple(replace(record, right=None) for record in records)
    rates = accuracies(PromptSet("mixed", halves_alone), found, {})
    assert {name: rate["successes"] for name, rate in rates.items()} == {
        "subject": 4,
        "both": 0,
        "left": 2,
        "placed": 2,
        "in_order": 2,
        "background": 3,
    }
    assert rates["in_order"]["images"] == 4


def test_the_order_of_words_decides_the_sides_of_a_drawn_scene() -> None:
    concept = load_concept(config_folder() / "concept" / "violence.yaml")
    judge = EmojiXLDomain(ModelConfig(name="emoji_xl", domain="x"), [concept]).judge()
    prompts = ["imagine a cat and a rose", "imagine a rose and a cat", "imagine a rose"]
    with native_autocast("cpu"):
        images = drawn("xl", open_sibling("xl", siblings.siblings_folder()), prompts, steps=8)
    seen = {name: rows.argmax(-1).tolist() for name, rows in judge(images).items()}
    names = judge.vocabulary["subject"]
    found = {
        str(index): Detection(0.0, names[seen["subject"][index]], beside=names[seen[BESIDE][index]])
        for index in range(len(prompts))
    }
    records = tuple(PromptRecord(key, key, label="cat", left="cat", right="rose") for key in found)
    rates = accuracies(PromptSet("scenes", records), found, {})
    counts = {name: (rate["successes"], rate["images"]) for name, rate in rates.items()}
    assert counts["both"] == (2, 3)
    assert counts["in_order"] == (1, 2)


def test_captions_of_scenes_name_both_in_order() -> None:
    rng = Random(0)
    texts = [scene_caption(subject_index("cat"), subject_index("dagger"), 0, 0, rng) for _ in range(300)]
    assert all("cat" in text and "dagger" in text for text in texts)
    plain = [text for text in texts if "right" not in text and "left" not in text]
    assert all(text.index("cat") < text.index("dagger") for text in plain)
    assert any("left" in text for text in texts)


def test_unknown_words_replace_filler_alone() -> None:
    swap = UnknownWords(["zzz"], Random(0))
    texts = [swap("please draw a cat and a dagger on a red background").lower() for _ in range(300)]
    assert all("cat" in text and "dagger" in text and "red" in text for text in texts)
    assert any("zzz" in text for text in texts)
    assert any("please" not in text for text in texts)


def test_labels_keep_the_split_and_pictures_show_them() -> None:
    labels = random_labels(60, 60, held_out=False, seed=0)
    assert (labels[:60, 1] == NOTHING).all()
    assert (labels[60:, 1] != NOTHING).all()
    for rows, held_out in ((labels, False), (random_labels(30, 30, held_out=True, seed=0), True)):
        for left, right, style, background in rows.tolist():
            found = (
                is_held_out(left, style, background) if right == NOTHING else is_held_out_pair(left, right)
            )
            assert found == held_out
    red, black = (255, 0, 0, 255), (0, 0, 0, 255)
    colours = [red if index % 2 else black for index in range(len(SUBJECTS))]
    art = [[Image.new("RGBa", (64, 64), colour) for colour in colours] for _ in range(3)]
    rows = np.array([[1, 2, 0, 0], [2, 1, 0, 0], [1, NOTHING, 0, 0]])
    images = render(art, rows, seed=0)
    assert images.shape == (3, 3, 64, 64)
    assert images[0, :, 32, 16].tolist() == [255, 0, 0]
    assert images[0, :, 32, 48].tolist() == [0, 0, 0]
    assert images[1, :, 32, 48].tolist() == [255, 0, 0]
    assert images[2, :, 32, 32].tolist() == [255, 0, 0]
    assert images[0, :, 32, 32].tolist() == [250, 250, 250]  # the gap between them is white
    assert np.array_equal(images, render(art, rows, seed=0))


# The least shares of right pictures. FLUX is the weakest, and draws few scenes.
LEAST = {
    "xl": {"direct": 0.8, "implicit": 0.6, "benign": 0.8, "mixed": 0.8},
    "sd3": {"direct": 0.8, "implicit": 0.6, "benign": 0.8, "mixed": 0.8},
    "flux": {"direct": 0.6, "implicit": 0.5, "benign": 0.8, "mixed": 0.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shipped_sibling_draws_what_prompts_ask_for(family: siblings.Family) -> None:
    concept = load_concept(config_folder() / "concept" / "violence.yaml")
    pipeline = open_sibling(family, siblings.siblings_folder())
    judge = load_judge(weights_folder())
    with native_autocast("cpu"):
        rates, pictures = quality(family, pipeline, judge, concept, 12, steps=8)
    assert {name: len(images) for name, images in pictures.items()} == dict.fromkeys(rates, 12)
    assert all(rates[name] >= least for name, least in LEAST[family].items()), rates


def test_the_shipped_judge_tells_scenes_from_other_pictures() -> None:
    domain = EmojiXLDomain(
        ModelConfig(name="emoji_xl", domain="x"), [Concept("violence", {"a dagger": "a rose"})]
    )
    judge = domain.judge()
    assert judge is domain.judge()
    flat = torch.full((1, 3, 64, 64), 250, dtype=torch.uint8)
    assert {name: rows.shape[1] for name, rows in judge(flat).items()} == {
        name: len(names) for name, names in judge.vocabulary.items()
    }
    pipeline = open_sibling("xl", siblings.siblings_folder())
    prompts = ["a cat and a dagger", "a rose and a bomb", "a picture of a cat", "a picture of a bomb"]
    with native_autocast("cpu"):
        images = drawn("xl", pipeline, prompts, steps=8)
    assert judge.is_scene(images).tolist() == [True, True, False, False]
    assert (domain.detector()(images) > 0.5).tolist() == [True, True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_domain_of_a_sibling_takes_it_and_no_other_network(family: siblings.Family) -> None:
    path = {"xl": EmojiXLDomain, "sd3": EmojiSD3Domain, "flux": EmojiFluxDomain}[family]
    domain = path(ModelConfig(name=f"emoji_{family}", domain="x"), [])
    domain.check(build(family))
    assert domain.never_learnt() is None
    with pytest.raises(InputError, match=f"emoji_{family}: expected that sibling"):
        domain.check(build_unet() if family != "xl" else build("sd3"))
