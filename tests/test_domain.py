"""A domain of the user's own judges a run from end to end; the embedded model's is one among others."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import build_tiny_pipeline
from torch import nn

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.api import compose
from trce_lightning.concepts import Concept
from trce_lightning.config import checks
from trce_lightning.config.schema import EvalConfig, ModelConfig
from trce_lightning.emoji.domain import EmojiDomain
from trce_lightning.errors import InputError
from trce_lightning.evaluation.conditions import conditions
from trce_lightning.evaluation.domain import Domain, OpenDomain, domain_of
from trce_lightning.evaluation.scored import Scored
from trce_lightning.jobs.erase import train
from trce_lightning.jobs.session import Session
from trce_lightning.metrics.fidelity import feature_fid
from trce_lightning.prompts.own import concept_prompt_sets
from trce_lightning.prompts.phrasings import Stream, units

ROOT = Path(__file__).parents[1]
NIGHT = Concept("night", {"a night": "a day"}, templates=("{}", "see {}"))
SHADES = f"{__name__}.Shades"


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean((1, 2, 3)) / 255


class ShadeJudge(nn.Module):
    """It tells light from dark."""

    vocabulary: ClassVar = {"subject": ("dark", "light")}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        light = brightness(images)
        return {"subject": torch.stack([1 - light, light], 1)}


class Channels(nn.Module):
    """Features of FID: the mean of each channel."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


class Shades:
    """A model that draws light and darkness, and nothing else. It owes nothing to another domain."""

    source: Path | None = None

    def __init__(self, model: ModelConfig, concepts: list[Concept]) -> None:
        self.concepts = concepts

    def check(self, denoiser: nn.Module) -> None:
        if denoiser.config["sample_size"] != 8:
            raise InputError("model: expected one that draws shades")

    def prompt_sets(self, size, split, names):
        return concept_prompt_sets(self.concepts, self._streams, size=size, split=split, names=names)

    @staticmethod
    def _streams(concepts, split):
        words = {"direct": ("dark", "darkness"), "benign": ("light", "light")}
        return {
            name: [Stream({label: [word]}, [f"{split} {{}}", f"see {{a}}, {split}"])]
            for name, (label, word) in words.items()
        }

    def keep_prompts(self, limit, seed):
        return ["light", f"light {seed}"][:limit]

    def scene_templates(self, count, seed):
        return []

    def concept_names(self):
        return ["darkness"]

    def labels(self):
        return ShadeJudge.vocabulary["subject"]

    def label_groups(self):
        return {"bright": frozenset({"light"})}

    def detector(self):
        return lambda images: 1 - brightness(images)

    def never_learnt(self):
        return None

    def second_detector(self):
        return lambda images: torch.ones(len(images))

    def judge(self):
        return ShadeJudge()

    def clip(self):
        return None

    def features(self):
        return Channels()

    def fid(self, cache, device):
        metric = feature_fid(Channels())
        metric.update(torch.arange(4 * 3 * 256).view(4, 3, 16, 16).to(torch.uint8), real=True)
        return metric


class Nothing:
    """It lacks most of what a domain has."""

    source = None

    def __init__(self, model: ModelConfig, concepts: list[Concept]) -> None:
        pass

    def detector(self):
        return None


class Weather(OpenDomain):
    """It differs from any pictures by its prompts alone."""

    def prompt_sets(self, size, split, names):
        def streams(concepts, split):
            return {"direct": [Stream(units(["rain", "fog"]), [f"{split}: {{}}"])]}

        return concept_prompt_sets(self.concepts, streams, size=size, split=split, names=names)


def test_a_run_is_judged_by_the_users_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    """A tiny pipeline that the domain itself brings is erased, and scored by everything that it has."""
    build_tiny_pipeline().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(Shades, "source", tmp_path / "tiny")
    config = compose(
        NIGHT,
        "experiment=smoke",
        "model=sd15",
        "model.hub_id=null",
        "model.judge=null",
        "model.clip=null",
        f"model.domain={SHADES}",
        "model.resolution=16",
        "model.num_inference_steps=2",
        "trajectory.num_steps=3",
        "trajectory.early_steps=2",
        "trajectory.unconditional_per_malicious=1",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        f"output={tmp_path / 'run'}",
        f"cache={tmp_path / 'cache'}",
    )
    checks.check(config)
    train(config)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = metrics["erased"]
    assert set(scores["asr"]) == {"direct"} and scores["fid"] > 0 and scores.get("clip_score") is None
    assert set(scores["accuracy"]["benign"]) == {"subject", "bright"}
    assert metrics["zero_shot_clip"]["erased"]["direct"]["rate"] == 1
    detections = Scored.load(tmp_path / "run" / "scored" / "erased.json").detections
    assert {seen.subject for rows in detections.values() for seen in rows.values()} <= {"dark", "light"}


def session(model: ModelConfig, **options) -> Session:
    model.resolution = 16
    config = EvalConfig(model=model, **options)
    return Session(config, [NIGHT], StableDiffusionAdapter(build_tiny_pipeline()))


def test_a_domain_may_change_one_thing_of_the_open_one() -> None:
    own = session(ModelConfig("tiny", domain=f"{__name__}.Weather"), sets=["direct"])
    (prompts,) = own.sets("report", 2)
    assert set(prompts.texts) == {"report: rain", "report: fog"}
    assert own.domain.labels() is None and own.detector() is None
    with pytest.raises(InputError, match=r"'model.judge': expected the dotted name of a detector.*Weather"):
        own.evaluator_factory()


def dark(concepts: list[Concept]):
    """A detector of the user's."""
    return lambda images: torch.full((len(images),), 0.75)


def test_a_detector_of_the_users_goes_before_the_domains() -> None:
    """It decides on the domain's prompts; the domain's judge still says what they show."""
    own = session(ModelConfig("tiny", domain=SHADES, judge=f"{__name__}.dark"), sets=["direct", "benign"])
    scorer = own.scorer("report", 2)
    evaluator = scorer.make_evaluator(["direct"])
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    evaluator.update("direct", images, scorer.records("direct"))
    assert evaluator.compute()["asr"]["direct"]["rate"] == 1
    found = evaluator.detections("direct").values()
    assert {(d.probability, d.subject) for d in found} == {(0.75, "dark")}
    assert evaluator.fid is not None


def test_words_of_the_domain_are_misspelt(tmp_path: Path) -> None:
    scorer = session(ModelConfig("tiny", domain=SHADES), sets=["direct"]).scorer("report", 2)
    options = EvalConfig().robustness
    options.misspellings = ["drop"]
    _, varied = conditions(options, scorer, [NIGHT], tmp_path)
    assert all("darkness" not in text and "dar" in text.replace("dr", "dar") for text in varied.sets[0].texts)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("gone.X", r"model\.domain: expected the dotted name of .* that makes a Domain, got 'gone\.X'"),
        (
            f"{__name__}.Nothing",
            r"makes a Domain, got .*Nothing', which makes a Nothing without .*prompt_sets",
        ),
        (f"{__name__}.brightness", r"makes a Domain, got .*brightness': too many positional arguments"),
    ],
)
def test_what_is_no_domain_is_refused_by_a_sentence(path: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        domain_of(ModelConfig("tiny", domain=path), [NIGHT])


def test_a_domain_without_a_model_is_refused_where_none_is_named() -> None:
    session = Session(EvalConfig(model=ModelConfig("tiny", domain=SHADES)), [NIGHT])
    with pytest.raises(
        InputError, match=r"neither model\.path nor model\.hub_id, and model\.domain=.* no model"
    ):
        session.adapter  # noqa: B018


def test_the_shipped_domains_are_domains() -> None:
    for kind in (OpenDomain, EmojiDomain, Shades):
        assert isinstance(kind(ModelConfig("any"), [NIGHT]), Domain)
    assert type(domain_of(ModelConfig("any"), [NIGHT])) is OpenDomain


@pytest.mark.parametrize(
    ("name", "value"), [("clip", "x"), ("inception", "x"), ("real_images", "x"), ("judge", "clip")]
)
def test_what_the_embedded_models_domain_would_not_read_is_refused(name: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"option 'model\.{name}': expected n.*model\.domain=me"):
        EmojiDomain(ModelConfig("any", domain="me", **{name: value}), [NIGHT])


def words(source: str) -> Iterator[str]:
    """Yield the names and texts of a source, docstrings aside."""
    tree = ast.parse(source)
    remarks = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in remarks:
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


def test_the_check_sees_names_and_texts() -> None:
    lines = [
        "import a.emoji",
        "def f(emoji):",
        "    'emoji'",
        "    x.embedded('an emoji', f'emoji {y}')",
    ]
    source = "\n".join(lines)
    found = [word for word in words(source) if "emoji" in word or "embedded" in word]
    assert sorted(found) == ["a.emoji", "an emoji", "embedded", "emoji", "emoji "]


@pytest.mark.parametrize("top", sorted(path.name for path in (ROOT / "trce_lightning").iterdir()))
def test_nothing_but_its_own_folder_names_the_embedded_model(top: str) -> None:
    """Only configurations name it."""
    if top == "emoji":
        pytest.skip("its own folder")
    place = ROOT / "trce_lightning" / top
    for path in [place] if place.suffix == ".py" else sorted(place.rglob("*.py")):
        found = [word for word in words(path.read_text()) if "emoji" in word or "embedded" in word]
        assert not found, path


def test_the_embedded_model_needs_neither_jobs_nor_its_training() -> None:
    for path in (ROOT / "trce_lightning" / "emoji").glob("*.py"):
        found = [word for word in words(path.read_text()) if ".jobs" in word or ".training" in word]
        assert not found, path
