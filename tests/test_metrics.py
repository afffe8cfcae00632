"""Scores against independent references, with networks of random weights; one rank against two."""

import io
import math
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import build_tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import multiprocessing
from torchmetrics import SumMetric
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from trce_lightning.cli import config_folder
from trce_lightning.concepts import Concept, load_concept
from trce_lightning.emoji.groups import concept_subjects
from trce_lightning.emoji.judge import Judge, JudgeDetector, judge_fid, to_unit
from trce_lightning.emoji.subjects import STYLES, SUBJECTS
from trce_lightning.errors import InputError
from trce_lightning.generation.image_folder import write_png
from trce_lightning.generation.loop import shard
from trce_lightning.metrics import (
    AttackSuccessRate,
    Clip,
    ClipZeroShotDetector,
    Evaluator,
    inception_fid,
    load_clip,
    load_detector,
    load_real_statistics,
    paired_test,
    save_real_statistics,
)
from trce_lightning.metrics.collateral import accuracies, check_labels
from trce_lightning.metrics.detectors import ClipJudge, ClipJudgeDetector
from trce_lightning.metrics.fidelity import SECOND_MOMENTS, symmetric, upper_triangle
from trce_lightning.metrics.real_images import load_real
from trce_lightning.prompts.records import PromptRecord, PromptSet, seed_of

VIOLENCE = Concept("violence", {"a dagger": "a rose"})
STYLE = Concept("style", {"3d": "flat"}, kind="style")
NAMES = [subject.name for subject in SUBJECTS]


def brightness(images):
    """A detector of bright images."""
    return images.float().mean((1, 2, 3)) / 255


def build_bright_detector(concepts, gain=1.0):
    return lambda images: gain * brightness(images)


def random_images(count, seed=0):
    """Blotches of random colour and brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 4, 4), generator=generator) * torch.rand(
        (count, 1, 1, 1), generator=generator
    )
    return (coarse.repeat_interleave(16, 2).repeat_interleave(16, 3) * 400).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def judge():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge().eval()
        judge(random_images(2))
        for module in judge.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # so that one pass gives the features a deviation near 1
        with torch.no_grad():
            judge.train().features(random_images(64, seed=1))
        for head in judge.heads.values():
            head.weight.data *= 20  # decided, not uniform
    return judge.eval()


@pytest.fixture(scope="module")
def clip():
    tokenizer = build_tiny_tokenizer()
    special = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=190, max_position_embeddings=32, **sizes, **special)
    vision = CLIPVisionConfig(image_size=64, patch_size=16, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
        model = CLIPModel(config)
    half = [0.5] * 3
    size = {"height": 64, "width": 64}
    processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=half, image_std=half)
    return Clip(model.eval(), tokenizer, processor)


def textbook_wilson(successes, images, z=1.959963984540054):
    rate = successes / images
    centre = (rate + z * z / (2 * images)) / (1 + z * z / images)
    half = z * math.sqrt(rate * (1 - rate) / images + z * z / (4 * images**2)) / (1 + z * z / images)
    return centre - half, centre + half


@pytest.mark.parametrize(("successes", "images"), [(0, 7), (2, 10), (10, 10), (37, 512)])
def test_attack_success_rate_and_its_interval(successes, images) -> None:
    metric = AttackSuccessRate()
    probability = torch.full((images,), 0.49)
    probability[:successes] = 0.5  # the threshold itself counts
    for part in probability.split(3):
        metric.update(part)
    result = metric.compute()
    assert (result["successes"], result["images"]) == (successes, images)
    assert result["rate"] == successes / images
    assert (result["low"], result["high"]) == pytest.approx(textbook_wilson(successes, images), abs=1e-9)
    assert all(type(value) in (int, float) for value in result.values())
    if images == 10 and successes == 2:
        assert (result["low"], result["high"]) == pytest.approx((0.0567, 0.5098), abs=1e-4)


def test_attack_success_rate_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        AttackSuccessRate().compute()
    for wrong in (torch.tensor([0.2, math.nan]), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="finite probabilities"):
            AttackSuccessRate().update(wrong)


def test_paired_test_is_exact_mcnemar() -> None:
    # 1 and 6 discordant: 2 · (C(7,0) + C(7,1)) / 2⁷ = 0.125, whatever the 20 concordant ones.
    a = dict(enumerate([True] + [False] * 6 + [True] * 10 + [False] * 10))
    b = dict(enumerate([False] + [True] * 6 + [True] * 10 + [False] * 10))
    assert paired_test(a, b) == paired_test(b, a) == pytest.approx(0.125)
    assert paired_test(a, a) == 1
    with pytest.raises(ValueError, match="same images"):
        paired_test(a, dict(list(b.items())[1:]))


def closed_form_fid(real, fake):
    gap = real.mean(0) - fake.mean(0)
    cov_real, cov_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    return gap @ gap + np.trace(cov_real + cov_fake - 2 * sqrtm(cov_real @ cov_fake).real)


def test_fid_equals_the_closed_form_and_keeps_real_statistics(judge, tmp_path) -> None:
    real, fake = random_images(40), random_images(30, seed=2) // 2
    with torch.no_grad():
        expected = closed_form_fid(*(judge.features(images).double().numpy() for images in (real, fake)))
    metric = judge_fid(judge)
    metric.update(real, real=True)
    save_real_statistics(metric, tmp_path / "real.safetensors")
    metric.update(fake, real=False)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-3)

    loaded = judge_fid(judge)
    load_real_statistics(loaded, tmp_path / "real.safetensors")
    for _ in range(2):  # and after reset
        for part in fake.split(7):
            loaded.update(part, real=False)
        assert float(loaded.compute()) == pytest.approx(expected, rel=1e-3)
        loaded.reset()
    loaded.update(real, real=False)
    assert float(loaded.compute()) == pytest.approx(0, abs=1e-3 * expected)


def test_second_moments_are_stored_as_a_triangle_and_whole_ones_still_load(judge, tmp_path) -> None:
    halves = symmetric(torch.arange(1.0, 7), 3)
    assert halves.tolist() == [[1, 2, 3], [2, 4, 5], [3, 5, 6]]
    assert upper_triangle(halves).tolist() == [1, 2, 3, 4, 5, 6]
    metric, file = judge_fid(judge), tmp_path / "real.safetensors"
    metric.update(random_images(9), real=True)
    save_real_statistics(metric, file)
    size = judge.num_features
    assert load_file(file)[SECOND_MOMENTS].shape == (size * (size + 1) // 2,)
    whole = load_file(file) | {SECOND_MOMENTS: metric.real_features_cov_sum}
    with safe_open(file, "pt") as stored:
        save_file(whole, tmp_path / "whole.safetensors", stored.metadata())
    for source in (file, tmp_path / "whole.safetensors"):
        loaded = judge_fid(judge)
        load_real_statistics(loaded, source)
        torch.testing.assert_close(
            loaded.real_features_cov_sum, metric.real_features_cov_sum, rtol=1e-12, atol=0
        )


def test_fid_features_ignore_autocast(judge) -> None:
    images = random_images(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = judge_fid(judge).inception(images)
        assert not torch.equal(judge.features(images).float(), inside)
    assert torch.equal(inside, judge_fid(judge).inception(images))


def test_statistics_of_another_network_or_none_are_refused(judge, tmp_path) -> None:
    file = tmp_path / "real.safetensors"
    with pytest.raises(FileNotFoundError, match="real"):
        load_real_statistics(judge_fid(judge), file)
    metric = judge_fid(judge)
    metric.update(random_images(3), real=True)
    save_real_statistics(metric, file)
    with pytest.raises(ValueError, match=r"real.safetensors: expected statistics of feature network"):
        load_real_statistics(judge_fid(Judge()), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"real.safetensors"):
        load_real_statistics(judge_fid(judge), file)
    with pytest.raises(FileNotFoundError, match="Inception"):
        inception_fid(tmp_path / "nope.pth")


def cosine(clip, images, texts):
    """100 · cos by hand: no processor, no torchmetrics."""
    ids = [[188, *clip.tokenizer(text, add_special_tokens=False).input_ids[:30], 189] for text in texts]
    with torch.no_grad():
        text = torch.stack(
            [clip.model.get_text_features(torch.tensor([row])).pooler_output[0] for row in ids]
        )
        image = clip.model.get_image_features(to_unit(images)).pooler_output
    return 100 * torch.cosine_similarity(text, image)


def test_clip_score_is_the_raw_cosine(clip) -> None:
    images, texts = random_images(6), ["a rose", "a dagger", "x" * 90, "", "a cat", "sunflower"]
    assert torch.allclose(clip.pixels(images)["pixel_values"], to_unit(images), atol=1e-6)
    expected = cosine(clip, images, texts)
    assert torch.allclose(clip.scores(images, texts), expected, atol=1e-3)
    assert torch.allclose(clip.scores(images[3:4], texts[3:4]), expected[3:4], atol=1e-3)
    assert expected.min() < 0 or expected.max() < 0
    with pytest.raises(ValueError, match="uint8"):
        clip.scores(images / 255, texts)


def test_clip_folder(clip, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        load_clip(tmp_path)
    for part in clip:
        part.save_pretrained(tmp_path)
    images, texts = random_images(3), ["a rose", "a dagger", "x" * 90]
    loaded = load_clip(tmp_path)
    assert torch.allclose(cosine(loaded, images, texts), cosine(clip, images, texts), atol=1e-4)
    assert torch.equal(loaded.pixels(images)["pixel_values"], clip.pixels(images)["pixel_values"])
    assert torch.equal(loaded.tokenize(texts).input_ids, clip.tokenize(texts).input_ids)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_judge_detector_sums_the_concepts_subjects(judge) -> None:
    images = random_images(16)
    with torch.no_grad():
        probability = judge(images)
    members = [NAMES.index(name) for name in concept_subjects(VIOLENCE)]
    violent = probability["subject"][:, members].sum(1)
    rendered = probability["style"][:, STYLES.index("fluent")]
    assert violent.std() > 0
    assert rendered.std() > 0
    assert torch.allclose(JudgeDetector(judge, [VIOLENCE])(images), violent, atol=1e-6)
    assert torch.equal(JudgeDetector(judge, [STYLE])(images), rendered)
    both = JudgeDetector(judge, [VIOLENCE, STYLE])(images)
    assert torch.allclose(both, torch.maximum(violent, rendered), atol=1e-6)
    with pytest.raises(ValueError, match="got 'gravity'"):
        JudgeDetector(judge, [VIOLENCE, Concept("gravity", {"gravity": "a rose"})])
    with pytest.raises(ValueError, match="at least one"):
        JudgeDetector(judge, [])


def test_clip_detector_is_a_softmax_over_texts(clip) -> None:
    images, positive, negative = random_images(5), ["a dagger", "blood"], ["a rose", "a cat", "x" * 90]
    scores = torch.stack([cosine(clip, images, [text] * 5) for text in (*positive, *negative)], 1) / 100
    expected = (clip.model.logit_scale.exp() * scores).softmax(1)[:, :2].sum(1)
    probability = ClipZeroShotDetector(clip, positive, negative)(images)
    assert expected.std() > 0
    assert torch.allclose(probability, expected, atol=1e-4)
    with pytest.raises(ValueError, match="positive and negative"):
        ClipZeroShotDetector(clip, positive, [])


def failing_detector(concepts):
    return {}["weights"]


def test_a_detector_that_fails_keeps_its_own_error_and_names_the_option() -> None:
    with pytest.raises(KeyError, match="weights") as raised:
        load_detector(f"{__name__}.failing_detector", [VIOLENCE])
    (note,) = raised.value.__notes__
    assert "model.judge" in note and "failing_detector" in note


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (lambda images: brightness(images).tolist(), "returns list"),
        (lambda images: brightness(images).numpy(), "returns ndarray"),
        (lambda images: None, "returns NoneType"),
        (lambda images: brightness(images)[:, None], r"got \[3, 1\]"),
        (lambda images: brightness(images)[:2], r"got \[2\]"),
        (lambda images: brightness(images).mean(), r"got \[\]"),
        (lambda images: brightness(images) + 1, r"\[0, 1\], got 1"),
        (lambda images: brightness(images) - 1, r"\[0, 1\], got -"),
        (lambda images: brightness(images) * math.nan, r"\[0, 1\], got nan"),
    ],
)
def test_what_is_no_probability_for_each_image_is_refused_by_the_options_name(found, got) -> None:
    records = PromptSet("direct", tuple(PromptRecord(str(i), "x") for i in range(3))).records
    with pytest.raises(InputError, match=rf"model\.judge: expected .*{got}"):
        Evaluator(found, ["direct"]).update("direct", random_images(3), records)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_of_any_type_count(dtype) -> None:
    """A sum of probabilities may be a little above 1."""
    records = tuple(PromptRecord(str(i), "x") for i in range(3))
    evaluator = Evaluator(lambda images: torch.tensor([0, 1, 1 + 1e-6]).to(dtype), ["direct"])
    evaluator.update("direct", random_images(3), records)
    assert evaluator.compute()["asr"]["direct"]["rate"] == pytest.approx(2 / 3)


def test_load_detector() -> None:
    images = random_images(3)
    detector = load_detector(f"{__name__}.build_bright_detector", [VIOLENCE], gain=0.5)
    assert torch.equal(detector(images), brightness(images) / 2)
    for wrong in (f"{__name__}.nope", "no_such_module.Detector", "not a name", f"{__name__}.NAMES"):
        with pytest.raises(ValueError, match=r"model.judge: .*" + wrong):
            load_detector(wrong, [VIOLENCE])


def benign_records(judge, images):
    """Labels: the judge's own answer for even images, a wrong one for odd ones, none for the last."""
    with torch.no_grad():
        top = judge(images)["subject"].argmax(1).tolist()
    labels = [NAMES[(index + i % 2) % len(NAMES)] for i, index in enumerate(top)]
    labels[-1] = None
    return [
        PromptRecord(f"benign/{i}", f"a {label or 'thing'}", label=label) for i, label in enumerate(labels)
    ]


def evaluation(judge, clip, statistics):
    """An evaluator, and the images and records of its sets; one image is alone in its set."""
    images = {"direct": random_images(9, 3), "my.own": random_images(1, 4), "benign": random_images(24, 5)}
    records = {
        name: [PromptRecord(f"{name}/{i}", "a gun") for i in range(len(rows))]
        for name, rows in images.items()
    }
    records["benign"] = benign_records(judge, images["benign"])
    fid = judge_fid(judge)
    load_real_statistics(fid, statistics)
    evaluator = Evaluator(brightness, list(images), judge=judge, fid=fid, clip=clip, batch_size=5)
    return evaluator, images, records


@pytest.fixture
def statistics(judge, tmp_path):
    metric = judge_fid(judge)
    metric.update(random_images(40), real=True)
    save_real_statistics(metric, tmp_path / "real.safetensors")
    return tmp_path / "real.safetensors"


def test_evaluator_gives_every_score(judge, clip, statistics) -> None:
    evaluator, images, records = evaluation(judge, clip, statistics)
    evaluator.train()
    for _ in range(2):  # and after reset
        for name, rows in images.items():
            evaluator.update(name, rows[:4], records[name][:4])
            evaluator.update(name, rows[4:], records[name][4:])
        scores = evaluator.compute()
        hits = {name: (brightness(rows) >= 0.5).tolist() for name, rows in images.items()}
        assert 0 < sum(hits["direct"]) < 9
        assert set(scores["asr"]) == {"direct", "my.own"}
        assert scores["asr"]["direct"]["successes"] == sum(hits["direct"])
        assert scores["false_alarm"]["successes"] == sum(hits["benign"])
        assert scores["false_alarm"]["images"] == 24
        seen = evaluator.detections("direct")
        with torch.no_grad():
            heads = {name: rows.argmax(-1).tolist() for name, rows in judge(images["direct"]).items()}
        for index, record in enumerate(records["direct"]):
            bright = float(brightness(images["direct"][index : index + 1]))
            answers = [judge.vocabulary[name][row[index]] for name, row in heads.items()]
            assert seen[seed_of(record.id, 0)] == (pytest.approx(bright), *answers, None, None)

        prompts = [record.prompt for record in records["benign"]]
        expected = cosine(clip, images["benign"], prompts)
        assert scores["clip_score"] == pytest.approx(float(expected.mean()), abs=1e-3)
        benign = evaluator.detections("benign")
        by_image = [benign[seed_of(record.id, 0)].clip_score for record in records["benign"]]
        assert by_image == pytest.approx(expected.tolist(), abs=1e-3)
        with torch.no_grad():
            real, fake = (judge.features(x).double().numpy() for x in (random_images(40), images["benign"]))
        assert scores["fid"] == pytest.approx(closed_form_fid(real, fake), rel=1e-3)
        evaluator.reset()
    with pytest.raises(ValueError, match="at least one image"):
        evaluator.compute()


def test_a_detector_may_answer_on_the_cpu() -> None:
    evaluator = Evaluator(lambda images: torch.tensor([0.2, 0.7]), ["direct"]).to("meta")
    # Attack success reads its numbers, which this device has none of.
    evaluator.rates["direct"] = SumMetric(nan_strategy="disable").to("meta")
    evaluator.update("direct", random_images(2), [PromptRecord("0", "a gun"), PromptRecord("1", "an axe")])
    *_, rows = evaluator.detections_by_image["direct"].rows
    assert rows.device.type == "meta" and rows.shape[0] == 2


def test_evaluator_refuses_wrong_input(judge) -> None:
    evaluator, images = Evaluator(brightness, ["benign"], judge=judge), random_images(1)
    known = PromptRecord("0", "a cat", label="cat")
    for expected, arguments in (
        ("one of the sets benign, got 'direct'", ("direct", images, [known])),
        ("expected 2 uint8 images, got 1", ("benign", images, [known] * 2)),
        ("uint8", ("benign", images / 255, [known])),
    ):
        with pytest.raises(ValueError, match=expected):
            evaluator.update(*arguments)
    with pytest.raises(ValueError, match=r"mine: label: .*'gravity'"):
        check_labels([PromptSet("mine", (known, PromptRecord("1", "a cat", label="gravity")))], NAMES)


def score_on_a_rank(rank, world_size, folder, judge, clip, statistics, queue):
    torch.set_num_threads(1)  # a forked process must not use its parent's thread pool
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
    evaluator, images, records = evaluation(judge, clip, statistics)
    for name, rows in images.items():
        evaluator.update(name, rows[rank::world_size], shard(records[name], rank, world_size))
    queue.put((rank, evaluator.compute(), {name: evaluator.detections(name) for name in images}))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_equal_one(judge, clip, statistics, tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    common = (str(tmp_path), judge, clip, statistics, queue)
    workers = [context.Process(target=score_on_a_rank, args=(rank, 2, *common)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    two = [queue.get() for _ in workers]
    score_on_a_rank(0, 1, *common)
    _, scores, hits = queue.get()

    assert {len(values) for values in hits.values()} == {9, 1, 24}
    for _, synced, synced_hits in two:
        for name, rows in hits.items():
            assert synced_hits[name].keys() == rows.keys()
            for key, row in rows.items():
                *exact, clip_score, _ = synced_hits[name][key]
                assert tuple(exact) == row[:-2]
                # Texts of another batch are padded to another length.
                assert clip_score == (row.clip_score and pytest.approx(row.clip_score, abs=1e-4))
        flat = [dict(chain(x["asr"].items(), x.items())) for x in (synced, scores)]
        for name, value in flat[1].items():
            if name != "asr":
                assert flat[0][name] == pytest.approx(value, rel=1e-5), name
        assert synced.keys() == scores.keys()


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights in torch-fidelity's format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, file)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(network.state_dict(), file)
    return file


def not_weights():
    """Files that a user may take for Inception's weights, by what they are."""

    def saved(content):
        torch.save(content, stream := io.BytesIO())
        return stream.getvalue()

    return {
        "empty": b"",
        "text": b"hello",
        "a list": saved([1]),
        "a number": saved(3),
        "no tensors": saved({}),
        "others' tensors": saved({"a": torch.zeros(1)}),
        "a whole module": saved(torch.nn.Linear(1, 1)),
        "a pickle": pickle.dumps({"a": 1}),
    }


@pytest.mark.parametrize("kind", not_weights())
def test_what_is_no_inception_weights_is_refused_by_the_options_name(kind, tmp_path) -> None:
    file = tmp_path / "inception.pth"
    file.write_bytes(not_weights()[kind])
    with pytest.raises(InputError, match=r"model\.inception: expected torch-fidelity's weights, got .*\.pth"):
        inception_fid(file)


def test_inception_fid_reads_a_folder_of_real_images_once(inception_weights, tmp_path, monkeypatch) -> None:
    images = random_images(6)
    for index, image in enumerate(images[:4]):
        size = 64 if index % 2 else 48
        (tmp_path / "real" / str(index % 2)).mkdir(parents=True, exist_ok=True)
        write_png(tmp_path / "real" / str(index % 2) / f"{index}.png", image[:, :size])
    metrics = [inception_fid(inception_weights) for _ in range(2)]
    load_real(metrics[0], tmp_path / "real", tmp_path / "cache")
    (statistics,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr("trce_lightning.metrics.real_images.read_image", None)
    load_real(metrics[1], tmp_path / "real", tmp_path / "cache")
    load_real(metrics[1], statistics, tmp_path / "nowhere")
    features = metrics[0].inception(images)
    assert features.shape == (6, 2048)
    assert int(metrics[0].real_features_num_samples) == 4
    expected = (
        torch.cat(
            [
                metrics[0].inception(image[None, :, : 64 if i % 2 else 48])
                for i, image in enumerate(images[:4])
            ]
        )
        .double()
        .sum(0)
    )
    assert torch.allclose(metrics[1].real_features_sum, expected, rtol=1e-5)
    for metric in metrics:
        metric.update(images, real=False)
    assert float(metrics[0].compute()) == pytest.approx(float(metrics[1].compute()))

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model.real_images: expected pictures .*got 0"):
        load_real(metrics[0], tmp_path / "empty", tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of pictures or a file"):
        load_real(metrics[0], tmp_path / "none", tmp_path)
    (tmp_path / "wrong.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model.inception: expected torch-fidelity's weights"):
        inception_fid(tmp_path / "wrong.pth")


def test_the_clip_judge_detects_what_it_gives_the_concepts_names(clip) -> None:
    names, images = ["rose", "a dagger", "steak knife", "knife rack"], random_images(8)
    concept = Concept("blades", {"a dagger": "a rose", "a knife": "a spoon"})
    judge = ClipJudge(clip, names)
    expected = judge(images)["subject"][:, 1:].sum(1)
    assert torch.equal(ClipJudgeDetector(judge, [concept])(images), expected)
    assert expected.min() > 0.1 and expected.max() < 1
    alike = ["steak knife", "killer whale", "bow", "bow tie", "baseball glove", "water bottle"]
    violence = load_concept(config_folder() / "concept" / "violence.yaml")
    assert ClipJudgeDetector(ClipJudge(clip, alike), [violence]).members == [0, 2]


def test_clip_judge_names_what_is_most_alike(clip, tmp_path) -> None:
    names, images = ["rose", "cat", "sunflower"], random_images(8)
    scores = torch.stack([cosine(clip, images, [f"a photo of {name}"] * 8) for name in names], 1)
    answers = ClipJudge(clip, names)(images)["subject"].argmax(1)
    assert torch.equal(answers, scores.argmax(1))
    records = [PromptRecord(str(i), "a rose", label="rose") for i in range(8)]
    evaluator = Evaluator(brightness, ["neighbours"], judge=ClipJudge(clip, names))
    evaluator.update("neighbours", images, records)
    seen = {record.id: evaluator.detections("neighbours")[seed_of(record.id, 0)] for record in records}
    assert [seen[str(i)].subject for i in range(8)] == [names[index] for index in answers]
    assert {(row.style, row.background) for row in seen.values()} == {(None, None)}
    assert "asr" in (found := evaluator.compute()) and found["asr"] == {}
    assert accuracies(PromptSet("neighbours", tuple(records)), seen, {})["subject"]["successes"] == int(
        (answers == 0).sum()
    )
