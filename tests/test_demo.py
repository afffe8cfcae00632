"""demo.py: its pictures are those of `generate`, its verdicts the detector's, and a browser can use it."""

import importlib.util
import socket
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import yaml
from conftest import entries_of

from trce_lightning import cli
from trce_lightning.adapters import load_adapter
from trce_lightning.concepts import load_concept
from trce_lightning.config import checks
from trce_lightning.config.schema import ConceptConfig, DemoConfig, DeviceConfig, ModelConfig
from trce_lightning.emoji.judge import JudgeDetector
from trce_lightning.emoji.package import load_judge, weights_folder
from trce_lightning.emoji.subjects import SUBJECTS
from trce_lightning.generation.loop import generate
from trce_lightning.jobs.demo import MODELS, Demo, Drawing, build_page, picture, serve
from trce_lightning.prompts.records import PromptRecord

CPU = DeviceConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)
VIOLENCE = load_concept(cli.config_folder() / "concept" / "violence.yaml")


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """A folder of the embedded model with other cross-attention values, so that its pictures differ."""
    adapter = load_adapter(weights_folder())
    for name, projection in entries_of(adapter).items():
        if name.endswith("to_v"):
            projection.weight.data *= -0.5
    folder = tmp_path_factory.mktemp("erased")
    adapter.pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(erased):
    terms = {"a dagger": "a rose"}
    model = ModelConfig(
        "emoji",
        path=str(erased),
        resolution=64,
        guidance_scale=3.0,
        num_inference_steps=2,
        domain="trce_lightning.emoji.domain.EmojiDomain",
    )
    return DemoConfig(concept={"violence": ConceptConfig("violence", terms)}, model=model, trainer=CPU)


@pytest.fixture(scope="module")
def demo(config):
    return Demo(config)


def test_pictures_and_verdicts_are_those_of_an_evaluation(demo, erased):
    drawings = demo.draw("a dagger", 7, 2.0, 3)
    record = PromptRecord("x", "a dagger", seed=7)
    judge = load_judge(weights_folder())
    for name, folder in zip(MODELS, (weights_folder(), erased), strict=True):
        image = generate(load_adapter(folder), [record], guidance_scale=2.0, num_steps=3, batch_size=1)
        assert torch.equal(drawings[name].image, image[0])
        expected = JudgeDetector(judge, [VIOLENCE])(image).item()
        assert drawings[name].probability == pytest.approx(expected, abs=1e-6)
        assert drawings[name].subject == SUBJECTS[int(judge(image)["subject"].argmax())].name
    assert not torch.equal(drawings["Original"].image, drawings["Erased"].image)


class Attributes(HTMLParser):
    """The start tags of an HTML text with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.mark.parametrize(
    ("probability", "covered", "said"),
    [
        (0.9, True, "Shows violence"),
        (0.5, True, "Shows violence"),
        (0.1, False, "Does not show violence"),
        (None, True, "No judge"),
    ],
)
def test_what_shows_the_concept_or_may_show_it_is_covered(probability, covered, said, demo):
    drawing = Drawing(torch.zeros(3, 64, 64, dtype=torch.uint8), probability, None)
    text = picture(demo, "Erased", '<script>"', drawing)
    tags = Attributes(text).found
    assert ("trce-covered" in tags[0][1]["class"]) == covered
    assert said in " ".join(text.split()) and "script" not in [tag for tag, _ in tags]


def test_examples_come_from_every_prompt_set(demo):
    examples = demo.examples()
    assert list(examples) == ["direct", "implicit", "benign"]
    assert all(len(set(prompts)) == 3 for prompts in examples.values())


def test_demo_is_refused_without_an_erased_model_or_gradio(config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gradio is not installed; .* pip install 'trce-lightning\[demo\]'"):
        checks.check(config)
    with pytest.raises(ValueError, match=r"option 'model\.path': expected the folder of an erased pipeline"):
        checks.check(DemoConfig(concept=config.concept, model=replace(config.model, path=None)))


def test_options_are_read_as_by_the_other_commands(erased, capsys):
    cli.demonstrate(["concept=violence", f"model.path={erased}", "--port", "8000", "--cfg", "job"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["port"], config["model"]["path"], config["trainer"]["devices"]) == (8000, str(erased), 1)
    for argv in (["model.path=gone"], ["port=70000"], ["original.path=gone"], []):
        options = [] if argv == [] or argv[0].startswith("model") else [f"model.path={erased}"]
        with pytest.raises(SystemExit) as stopped:
            cli.demonstrate(["concept=violence", *options, *argv])
        named = argv[0].partition("=")[0] if argv else "model.path"
        assert stopped.value.code == 2 and f"option '{named}'" in capsys.readouterr().err


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def address(demo):
    served = build_page(demo)
    port = free_port()
    serve(served, port)
    yield f"http://127.0.0.1:{port}"
    served.close()


@pytest.mark.browser
def test_a_browser_draws_with_both_models(address, page):
    page.goto(address)
    page.get_by_label("Prompt", exact=True).fill("a dagger")
    page.get_by_role("button", name="Draw", exact=True).click()
    images = page.locator("figure img")
    images.nth(1).wait_for(timeout=120_000)
    assert images.count() == 2
    assert images.evaluate_all("images => images.every(image => image.naturalWidth === 64)")
    for verdict in page.locator("figcaption").all_inner_texts():
        assert "probability" in verdict and "the judge sees" in verdict
    figures = page.locator("figure").evaluate_all(
        "figures => figures.map(figure => [figure.classList.contains('trce-covered'),"
        " getComputedStyle(figure.querySelector('img')).filter !== 'none'])"
    )
    assert all(covered == blurred for covered, blurred in figures)
    page.get_by_label("Show covered pictures").check()
    assert images.evaluate_all("images => images.every(image => getComputedStyle(image).filter === 'none')")
