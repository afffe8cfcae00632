"""Collateral damage, distances and paired comparisons of models, by hand and on real folders of images."""

import json

import pytest
import torch
from torch import nn

from trce_lightning.concepts import Concept
from trce_lightning.emoji.groups import benign_subjects, label_groups, unkept_subjects
from trce_lightning.emoji.prompts import prompt_sets
from trce_lightning.emoji.subjects import STYLES, SUBJECTS
from trce_lightning.evaluation.comparison import (
    compare,
    distances_to_original,
    measure_distances,
    one_line,
    p_values,
    same_model_floor,
)
from trce_lightning.evaluation.scored import Column, Scored, further_scores
from trce_lightning.generation.image_folder import claim, manifest, write_png
from trce_lightning.metrics.collateral import Detection, accuracies
from trce_lightning.metrics.distance import distances
from trce_lightning.metrics.uncertainty import wilson_rate
from trce_lightning.prompts.records import PromptRecord, PromptSet, image_seed

VIOLENCE = Concept("violence", {"a dagger": "a rose"}, neighbours=("scissors",))


def seen(subject, style="noto", background="white", probability=0.0, clip_score=None):
    return Detection(probability, subject, style, background, clip_score)


def test_groups_share_the_benign_subjects_out() -> None:
    groups = label_groups([VIOLENCE])
    assert "scissors" in groups["near"]
    assert "key" in groups["related"]
    assert "cat" in groups["far"]
    parts = [groups[name] for name in ("near", "related", "far")]
    assert frozenset.union(*parts) == set(benign_subjects([VIOLENCE]))
    assert sum(map(len, parts)) == len(frozenset.union(*parts))
    assert groups["unkept"] == unkept_subjects()


def test_prompts_know_what_they_ask_for() -> None:
    sets = prompt_sets([VIOLENCE], size=96, split="report")
    for record in (record for prompts in sets for record in prompts.records):
        if record.background is not None:
            assert f" {record.background} " in f" {record.prompt.replace(',', ' ')} "
        words = {"noto": "cartoon", "twemoji": "flat", "fluent": "3d"}
        assert [style for style, word in words.items() if word in record.prompt.split()] == (
            [] if record.style is None else [record.style]
        )
        assert record.style or record.background
    assert {record.style for record in sets[2].records} == {None, *STYLES}


def test_unerased_prompts_name_other_sensitive_subjects() -> None:
    (prompts,) = prompt_sets([VIOLENCE], size=40, split="report", names=["unerased"])
    assert {record.label for record in prompts.records} == {
        subject.name for subject in SUBJECTS if subject.category in ("intoxicants", "horror")
    }


def test_accuracies_by_hand() -> None:
    prompts = PromptSet(
        "benign",
        (
            PromptRecord("0", "scissors, cartoon", label="scissors", style="noto"),
            PromptRecord("1", "a key on red", label="key", background="red"),
            PromptRecord("2", "a flat cat on red", label="cat", style="twemoji", background="red"),
            PromptRecord("3", "a dog", label="dog"),
            PromptRecord("4", "anything, cartoon", style="noto"),
        ),
    )
    found = {
        "0": seen("hammer", "noto"),
        "1": seen("key", background="red"),
        "2": seen("cat", "noto", "pink"),
        "3": seen("dog"),
        "4": seen("dog", "fluent"),
    }
    groups = {"near": frozenset({"scissors"}), "far": frozenset({"cat", "dog"}), "none": frozenset()}
    assert accuracies(prompts, found, groups) == {
        "subject": wilson_rate(3, 4),
        "near": wilson_rate(0, 1),
        "far": wilson_rate(2, 2),
        "style": wilson_rate(1, 2),
        "background": wilson_rate(1, 2),
    }
    blind = {name: Detection(0.1) for name in found}
    assert accuracies(prompts, blind, groups) == {}


def test_further_scores_agree_with_each_other() -> None:
    records = tuple(PromptRecord(str(i), f"cat {i}", label="cat") for i in range(4))
    sets = [
        PromptSet("direct", (PromptRecord("d", "a gun"),)).sampled(3),
        PromptSet("benign", records),
    ]
    detections = {
        "direct": {
            "d": seen("gun", probability=0.9),
            "d~1": seen("gun", probability=0.6),
            "d~2": seen("cat"),
        },
        "benign": {str(i): seen("cat" if i else "dog", clip_score=10.0 * i) for i in range(4)},
    }
    scores = further_scores({"asr": {"direct": {}}}, sets, detections, {"near": frozenset({"cat"})})
    assert scores["asr"]["direct"]["successes"] == 2
    assert scores["asr"]["direct"]["images"] == 3
    assert scores["asr"]["direct"]["low"] < 0.5  # one prompt alone says little
    assert scores["benign_accuracy"] == scores["benign_accuracy_near"] == 0.75
    assert "benign_accuracy_unkept" not in scores
    assert 0 <= scores["clip_score_low"] < 15 < scores["clip_score_high"] <= 30
    assert scores["false_alarm"] == wilson_rate(0, 4)
    json.dumps(scores)


def test_samples_have_noise_of_their_own_and_belong_to_their_prompt() -> None:
    prompts = PromptSet("p", (PromptRecord("a", "x", seed=7), PromptRecord("b", "y"))).sampled(3)
    assert [record.id for record in prompts.records] == ["a", "a~1", "a~2", "b", "b~1", "b~2"]
    assert prompts.texts == ["x"] * 3 + ["y"] * 3
    assert len({image_seed(record) for record in prompts.records}) == 6
    assert image_seed(prompts.records[0]) == 7
    assert PromptSet("p", prompts.records[:1]).sampled(1).records == prompts.records[:1]


class Means(nn.Module):
    """Mean colours of the four quarters."""

    num_features = 12

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


def write_images(folder, prompts, images):
    claim(folder, entries := manifest(prompts.records, 3.0), {"generator": "x"})
    for entry, image in zip(entries, images, strict=True):
        write_png(folder / entry["file"], image)


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 200, (80, 3, 2, 2), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_distances_are_zero_for_equal_images_and_grow_with_the_change(pictures, tmp_path) -> None:
    prompts = PromptSet("benign", tuple(PromptRecord(str(i), "a cat") for i in range(40))).sampled(2)
    for name, shift in (("original", 0), ("little", 5), ("much", 40)):
        write_images(tmp_path / name / "benign", prompts, pictures + shift)
    found = {
        name: distances_to_original(
            Means(), prompts, tmp_path / "original" / "benign", tmp_path / name / "benign"
        )
        for name in ("original", "little", "much")
    }
    assert found["original"]["fid_to_original"] == pytest.approx(0, abs=1e-3)
    # A shift of every feature: FID is its square, summed over the twelve.
    assert found["little"]["fid_to_original"] == pytest.approx(12 * 25, rel=1e-3)
    assert found["much"]["fid_to_original"] == pytest.approx(12 * 1600, rel=1e-3)
    assert found["original"]["kid_to_original"] < found["little"]["kid_to_original"]
    assert found["little"]["kid_to_original"] < found["much"]["kid_to_original"]

    floor = same_model_floor(Means(), prompts, tmp_path / "original" / "benign")
    assert floor["fid_floor"] > 1  # other pictures of the same prompts
    once = PromptSet("benign", prompts.records[::2])
    assert same_model_floor(Means(), once, tmp_path / "original" / "benign") == {}

    columns = {name: Column(Scored({}, {}), tmp_path / name) for name in found}
    measure_distances(Means(), [prompts], columns)
    assert columns["original"].scored.scores == floor
    assert columns["much"].scored.scores == found["much"]
    few = PromptSet("benign", once.records[:3])
    assert distances_to_original(Means(), few, *[tmp_path / "much" / "benign"] * 2) == {}
    with pytest.raises(ValueError, match="at least four images"):
        distances(Means(), [pictures[:3]], [pictures[:3]], 3)


class Moved(Means):
    """Notes where it is sent, and stays."""

    def to(self, *arguments):
        self.sent = [*getattr(self, "sent", []), *arguments]
        return self


def test_distances_are_measured_where_the_trainer_works(pictures, tmp_path) -> None:
    prompts = PromptSet("benign", tuple(PromptRecord(str(i), "a cat") for i in range(40)))
    for name in ("original", "much"):
        write_images(tmp_path / name / "benign", prompts, pictures[:40] + 40 * (name == "much"))
    columns = {name: Column(Scored({}, {}), tmp_path / name) for name in ("original", "much")}
    features, device = Moved(), torch.device("meta")
    measure_distances(features, [prompts], columns, device)
    assert features.sent == [device]
    assert columns["much"].scored.scores["fid_to_original"] == pytest.approx(12 * 1600, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_distances_on_a_gpu_are_those_on_the_cpu(pictures) -> None:
    network = nn.Sequential(Means(), nn.Linear(12, 12, dtype=torch.float64))
    network.num_features = 12
    halves = [pictures[:40]], [pictures[40:]]
    expected = distances(network, *halves, 40)
    assert distances(network.to("cuda"), *halves, 40) == pytest.approx(expected, rel=1e-6)


def test_comparison_pairs_images(pictures) -> None:
    prompts = PromptSet("direct", tuple(PromptRecord(str(i), f"gun {i}") for i in range(40)))
    benign = PromptSet("benign", tuple(PromptRecord(str(i), f"cat {i}") for i in range(40)))

    def scored(hits, clip):
        return Scored(
            {},
            {
                "direct": {str(i): Detection(float(i < hits)) for i in range(40)},
                "benign": {str(i): Detection(0.0, clip_score=i + clip) for i in range(40)},
            },
        )

    found = compare(scored(30, 0.0), scored(24, -1.0), [prompts, benign])
    direct = found["detected"]["direct"]
    assert direct["difference"] == pytest.approx(-0.15)
    assert direct["low"] < -0.15 < direct["high"] < 0
    assert direct["p_value"] == pytest.approx(2 * 0.5**6)  # all six discordant ones on one side
    assert direct["p_value_holm"] == pytest.approx(2 * direct["p_value"])  # two sets
    assert found["clip_score"] == {"benign": {"difference": -1.0, "low": -1.0, "high": -1.0}}
    assert p_values(found) == {"direct": direct["p_value"], "benign": 1.0}
    assert "direct -15.0 points" in one_line(found)
    rates = scored(30, 0.0).rates_at([prompts], (0.3, 1.0))
    assert rates["direct"]["0.3"] == wilson_rate(30, 40)
