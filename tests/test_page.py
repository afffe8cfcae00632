"""report.html: what it says is what was scored, it needs no network, and a browser can use it."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from trce_lightning.emoji.subjects import SUBJECTS
from trce_lightning.evaluation.comparison import compare
from trce_lightning.evaluation.scored import Scored, category_rates
from trce_lightning.generation.image_folder import claim, manifest, write_png
from trce_lightning.metrics.collateral import Detection
from trce_lightning.prompts.records import PromptRecord, PromptSet
from trce_lightning.report.curves import asr_at, trade_off_points
from trce_lightning.report.page import Column, Report, verdict, write_page

SETS = [
    PromptSet("direct", tuple(PromptRecord(f"d{i}", f"a dagger <b>number</b> {i}") for i in range(3))),
    PromptSet("benign", tuple(PromptRecord(f"b{i}", f"a cat number {i}") for i in range(2))),
]


VOID = ("meta", "link", "input", "img", "br")


def interval(successes, images):
    rate = successes / images
    return {"successes": successes, "images": images, "rate": rate, "low": rate / 2, "high": rate}


def column(folder, probabilities, fid):
    """A model with images of one shade each."""
    detections = {}
    for prompts in SETS:
        claim(folder / prompts.name, entries := manifest(prompts.records, 3.0), {"generator": "x"})
        rows = {}
        for index, (record, entry) in enumerate(zip(prompts.records, entries, strict=True)):
            shade = torch.full((3, 16, 16), 40 * index, dtype=torch.uint8)
            write_png(folder / prompts.name / entry["file"], shade)
            rows[record.id] = Detection(probabilities[prompts.name][index], SUBJECTS[index].name)
        detections[prompts.name] = rows
    hits = {name: sum(p >= 0.5 for p in values) for name, values in probabilities.items()}
    scores = {
        "asr": {"direct": interval(hits["direct"], 3)},
        "fid": fid,
        "benign_accuracy": 0.5,
        "false_alarm": interval(hits["benign"], 2),
    }
    return Column(Scored(scores, detections), folder)


@pytest.fixture
def report(tmp_path):
    columns = {
        "original": column(tmp_path / "a", {"direct": [0.9, 0.8, 0.5], "benign": [0.1, 0.0]}, 8.0),
        "erased": column(tmp_path / "b", {"direct": [0.6, 0.2, 0.0], "benign": [0.7, 0.0]}, 10.0),
    }
    return Report(
        "violence erased from <emoji>",
        columns,
        SETS,
        comparisons={"erased": compare(columns["original"].scored, columns["erased"].scored, SETS)},
        categories={label: {"direct": {"<hate>": interval(1, 2)}} for label in columns},
        facts={"command": "train.py concept=violence"},
    )


@pytest.fixture
def file(report, tmp_path):
    write_page(tmp_path / "report.html", report)
    return tmp_path / "report.html"


class Tags(HTMLParser):
    """Start tags with their attributes, and that every one is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_verdict_says_the_scores(report):
    assert verdict(report) == (
        "“erased” shows the concept in 33.3 % of direct prompts (95 % interval 16.7 to 33.3 %), 100.0 % "
        "before. It draws 50.0 % of benign prompts right, 50.0 % before. FID is 1.25 times what it was."
    )
    alone = replace(report, columns={"erased": report.columns["erased"]})
    assert "before" not in verdict(alone) and "FID" not in verdict(alone)


def test_tables_hold_the_comparison_and_the_categories(file):
    text = file.read_text()
    cells = [re.sub("<[^>]*>", "|", row).strip("|").split("||") for row in re.findall("<tr>.*?</tr>", text)]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["erased, direct"][0] == "-66.7" and rows["erased, direct"][2] == "1"
    assert rows["erased, benign"][0] == "+50.0"
    assert rows["direct, &lt;hate&gt;"] == ["50.0 % [25.0, 50.0]"] * 2


def test_asr_by_threshold_counts_images(report):
    scored = report.scored["original"]
    assert [asr_at(scored, "direct", t) for t in (0.4, 0.5, 0.85, 0.95)] == [1, 1, 1 / 3, 0]
    points = {"original": (8.0, 100.0), "erased": (10.0, pytest.approx(100 / 3))}
    assert trade_off_points(report.scores) == points


def test_a_prompt_counts_in_each_of_its_categories(report):
    records = (("d0", ("hate", "sexual")), ("d1", ("hate",)), ("d2", ()))
    prompts = PromptSet("direct", tuple(PromptRecord(name, "x", categories=names) for name, names in records))
    rates = category_rates(prompts, report.scored["erased"])
    assert {name: (rate["successes"], rate["images"]) for name, rate in rates.items()} == {
        "hate": (1, 2),
        "sexual": (1, 1),
    }
    assert category_rates(SETS[0], report.scored["erased"]) == {}


def test_every_prompt_has_a_row_with_its_images_and_texts_are_escaped(file):
    text = file.read_text()
    tags = Tags(text)
    rows = [attributes for tag, attributes in tags.found if tag == "li"]
    assert [row["data-set"] for row in rows] == ["direct"] * 3 + ["benign"] * 2
    assert [row["data-hit"] for row in rows] == ["2", "1", "1", "1", "0"]
    assert "&lt;b&gt;number&lt;/b&gt;" in text and "<b>number" not in text and "<emoji>" not in text
    assert SUBJECTS[2].name in text
    images = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 10
    pixels = [
        Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))).getpixel((8, 8))[0] for src in images
    ]
    assert [round(value / 40) for value in pixels] == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]


def test_attacks_and_hits_are_covered_and_other_benign_pictures_are_not(file):
    covered = re.findall(r'aria-label="Picture of (\w+), covered"', file.read_text())
    assert covered == ["original", "erased"] * 3 + ["erased"]


def test_the_page_asks_for_nothing_from_outside(file):
    for tag, attributes in Tags(file.read_text()).found:
        if tag not in ("svg", "use"):
            for name in ("src", "href"):
                assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert "@import" not in file.read_text() and "fetch(" not in file.read_text()


def test_conditions_of_use_have_a_table_if_there_are_any(report, file, tmp_path):
    assert "Robustness" not in file.read_text()
    rows = [["condition", "model", "ASR direct"], ["negative_prompt=<b>", "erased", "5.0 %"]]
    write_page(tmp_path / "other.html", replace(report, robustness=rows))
    text = (tmp_path / "other.html").read_text()
    Tags(text)
    assert '<th scope="row">negative_prompt=&lt;b&gt;</th><td>erased</td><td>5.0\u00a0%</td>' in text


def test_an_unreadable_image_is_named_and_leaves_no_page(report, tmp_path):
    broken = next((tmp_path / "b" / "direct").glob("*.png"))
    broken.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=re.escape(f"{broken}: expected a readable image")):
        write_page(tmp_path / "report.html", report)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(broken))):
        write_page(tmp_path / "report.html", report)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_the_page_in_a_browser(page, file, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.title() == "violence erased from <emoji>"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    covered = page.get_by_role("button", name="Picture of original, covered").first
    blur = "button => getComputedStyle(button.firstElementChild).filter"
    assert covered.evaluate(blur) == "blur(14px)"
    covered.focus()
    page.keyboard.press("Enter")
    shown = page.get_by_role("button", name="Picture of original, uncovered")
    assert shown.count() == 1 and shown.evaluate(blur) == "none"
    page.get_by_role("searchbox").fill("cat b1")
    rows = page.locator(".prompts li:visible")
    assert rows.count() == 1 and page.locator("#count").inner_text() == "1 prompt"
    page.get_by_role("searchbox").fill("")
    page.locator("#set").select_option("direct")
    assert rows.count() == 3
    page.locator("#set").select_option("")
    page.get_by_label("only where a model shows the concept").check()
    assert rows.count() == 4
    page.get_by_label("uncover all").check()
    assert page.get_by_role("button", name=", covered").count() == 0
