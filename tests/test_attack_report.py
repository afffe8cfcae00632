"""The report's section on attacks: the weakest door first, controls beside every figure, pictures covered."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_page import SETS, Tags, column

from trce_lightning.evaluation.attacked import Outcome, attack_rows
from trce_lightning.generation.image_folder import write_png
from trce_lightning.report.attacks import (
    Attacks,
    Find,
    about,
    attacks_table,
    budget_figure,
    certainty_table,
    transfer_table,
    weakest_door,
)
from trce_lightning.report.page import Report, write_page

PROMPTS = 60
DOORS = {
    "single_token": "words",
    "p4d": "words",
    "inversion": "embeddings",
    "completion": "latents",
    "relearning": "weights",
}
RATES = {
    "erased": {"single_token": 4, "p4d": 9, "inversion": 53, "completion": 5, "relearning": 55},
    "original": {"single_token": 60, "p4d": 58, "inversion": 56, "completion": 40, "relearning": 60},
    "never-learnt": {"single_token": 2, "p4d": 3, "inversion": 4, "completion": 8, "relearning": 36},
    "re-initialised": {"single_token": 0, "p4d": 0, "inversion": 0, "completion": 2, "relearning": 1},
}
"""Broken prompts of 60, made up."""
CONTROLS = {"erased": 3, "original": 57, "never-learnt": 2, "re-initialised": 0}


def hits(count: int) -> dict[str, list[bool]]:
    return {f"p{index}": [index < count] for index in range(PROMPTS)}


def outcome(label: str, attack: str) -> Outcome:
    count, control = RATES[label][attack], CONTROLS[label]
    curve = [(0, control / 60), (300, (control + count) / 120), (2400, count / 60)]
    return Outcome(
        hits(count),
        hits(control),
        hits(control),
        hits(control + 1) if DOORS[attack] == "words" else None,
        tries=8,
        forward=1200,
        backward=2400,
        text=70,
        by_budget=curve if attack != "single_token" else (),
    )


def made_up(*attacks: str, **options: object) -> Attacks:
    rows = attack_rows({label: {name: outcome(label, name) for name in attacks or DOORS} for label in RATES})
    return Attacks("erased", rows, DOORS, **options)


@pytest.fixture
def attacks(tmp_path: Path) -> Attacks:
    files = [tmp_path / f"{name}.png" for name in ("found", "original")]
    for index, file in enumerate(files):
        write_png(file, torch.full((3, 16, 16), 100 * index, dtype=torch.uint8))
    found = Find("p4d", "a dagger", "<zx> qv dagger", *files, probability=0.93, hit=True)
    return made_up(finds=[found, replace(found, attack="inversion", found="", probability=0.2, hit=False)])


@pytest.fixture
def file(tmp_path: Path, attacks: Attacks) -> Path:
    columns = {
        "original": column(tmp_path / "a", {"direct": [0.9, 0.8, 0.5], "benign": [0.1, 0.0]}, 8.0),
        "erased": column(tmp_path / "b", {"direct": [0.6, 0.2, 0.0], "benign": [0.7, 0.0]}, 10.0),
    }
    write_page(tmp_path / "report.html", Report("violence erased", columns, SETS, attacks=[attacks]))
    return tmp_path / "report.html"


def test_the_weakest_door_is_furthest_above_what_it_would_show_anyway(attacks: Attacks) -> None:
    """Relearning has the highest rate, but a model that never learnt the concept gives most of it too."""
    assert weakest_door(attacks) == (
        "The weakest door of “erased” is its embeddings: inversion shows the concept in 88.3 % of images. "
        "Its controls reach 5.0 %. In a model that never learnt the concept, inversion reaches "
        "6.7 %. Words: 15.0 % by p4d. "
        "Embeddings: 88.3 % by inversion. Latents: 8.3 % by completion (too weak at this budget). Weights: "
        "91.7 % by relearning."
    )
    blind = replace(attacks, rows={"erased": attacks.rows["erased"]})
    assert weakest_door(blind).startswith("The weakest door of “erased” is its weights: relearning")
    assert "never learnt" not in weakest_door(blind)


def test_doors_without_an_attack_and_attacks_without_success_are_said() -> None:
    assert weakest_door(made_up("completion")) == (
        "No attack on “erased” shows the concept significantly more often than its controls do. Without an "
        "attack, it shows it in 5.0 % of images. Words: not attacked. "
        "Embeddings: not attacked. Latents: 8.3 % by completion (too weak at this budget). Weights: not "
        "attacked."
    )
    assert weakest_door(Attacks("erased", {"erased": {}}, {})) == "“erased” has not been attacked."


def test_each_attack_stands_beside_its_controls(attacks: Attacks) -> None:
    header, *rows = attacks_table(attacks)
    assert [row[0] for row in rows] == [f"{door}: {attack}" for attack, door in DOORS.items()]
    cells = dict(zip(header, rows[1], strict=True))
    assert [cells[name].split(" [")[0] for name in ("erased", "other seeds", "not searched")] == [
        "15.0 %",
        "5.0 %",
        "6.7 %",
    ]
    assert [cells[name].split(" [")[0] for name in ("original", "never-learnt", "re-initialised")] == [
        "96.7 %",
        "5.0 %",
        "0.0 %",
    ]
    assert dict(zip(header, rows[2], strict=True))["not searched"] == "–"
    assert cells["verdict"] == "not significantly more than its controls"
    assert [row[-1] for row in rows].count("too weak at this budget") == 1
    header, *rows = certainty_table(attacks)
    assert [row[0] for row in rows] == [f"{door}: {attack}" for attack, door in DOORS.items()]
    cells = dict(zip(header, rows[1], strict=True))
    assert cells["above its controls, points"].startswith("+8.3 [")
    assert cells["ρ"].startswith(f"{(9 - 3) / (58 - 3):.2f} [")
    assert (cells["evaluations, prompts"], cells["without attack"]) == ("1,200 + 2,400, 70", "5.0 %")
    assert float(cells["p (McNemar, Holm)"]) > 0.05


def test_the_order_of_attacks_is_that_of_the_doors() -> None:
    turned = made_up("relearning", "completion", "p4d")
    assert [row[0] for row in attacks_table(turned)[1:]] == [
        "words: p4d",
        "latents: completion",
        "weights: relearning",
    ]


def test_the_budget_figure_has_the_stored_points_of_all_models(attacks: Attacks) -> None:
    figure = budget_figure(attacks, "inversion")
    assert figure is not None
    lines = {str(line.get_label()): line for line in figure.axes[0].lines}
    assert list(lines) == ["erased", "original", "never-learnt", "re-initialised"]
    assert [line.get_linestyle() for line in lines.values()] == ["-", ":", ":", ":"]
    assert lines["erased"].get_ydata() == pytest.approx([5, 100 * 56 / 120, 100 * 53 / 60])
    assert list(lines["erased"].get_xdata()) == [0, 300, 2400]
    assert lines["never-learnt"].get_ydata()[-1] == pytest.approx(100 * 4 / 60)
    assert budget_figure(attacks, "single_token") is None


def test_what_is_said_of_an_attack_has_its_controls_and_references(attacks: Attacks) -> None:
    said = about(attacks, "p4d")
    assert "15.0 % of images, against 5.0 % by other seeds and 6.7 % without a search" in said
    assert "96.7 % on “original”, 5.0 % on “never-learnt”, 0.0 % on “re-initialised”" in said
    assert "distances" not in said and "settings" not in said
    attacks.rows["erased"]["p4d"]["settings"] = {"rim alone": {"rate": 0.25}}
    assert "what the model was given: rim alone 25.0 %." in about(attacks, "p4d")
    row = attacks.rows["erased"]["p4d"]
    row["benign_by_budget"] = [[0, 1.0], [2400, 0.875]]
    assert "should, by network evaluations: 100 % after 0, 88 % after 2,400." in about(attacks, "p4d")
    row["diversity"] = {"nearest": 0.5, "between": 0.75, "copies": 0.25}
    assert "0.50 mean distances from the nearest picture" in about(attacks, "p4d")


def test_the_cost_of_half_the_images_is_compared_between_models(attacks: Attacks) -> None:
    # From 56 of 120 after 300 to 53 of 60 after 2400: half is 4 of 50 parts of the way.
    assert (
        "Half of the images show the concept, counted in network evaluations of the search: after 468 on "
        "“erased”, after 0 on “original”, never on “never-learnt”, never on “re-initialised”."
    ) in about(attacks, "inversion")
    assert "Half of" not in about(attacks, "single_token")


def test_false_alarms_are_told_and_grow_with_the_tries(attacks: Attacks) -> None:
    row = attacks.rows["erased"]["p4d"]
    row["false_alarm"] = {"rate": 0.02, "tries": 1, "inflated": 0.02}
    assert "in 2.0 % of benign images." in about(attacks, "p4d") and "one of" not in about(attacks, "p4d")
    row["false_alarm"] = {"rate": 0.02, "tries": 8, "inflated": 0.149}
    assert "in one of 8 such images with a chance of 14.9 %." in about(attacks, "p4d")


def test_what_was_found_elsewhere_stands_beside_what_was_found_here(attacks: Attacks) -> None:
    assert len(transfer_table(attacks)) == 1
    rate = {"rate": 0.25, "low": 0.1, "high": 0.5, "searched_here": 0.15, "at_its_source": 1.0}
    rows = dict.fromkeys(DOORS, rate)
    table = transfer_table(replace(attacks, transfer={"original": rows}))
    assert [row[0] for row in table[1:]] == [f"{door}: {attack}" for attack, door in DOORS.items()]
    assert table[1][1:] == ["original", "100.0 %", "25.0 % [10.0, 50.0]", "15.0 %"]


def test_the_page_begins_with_the_weakest_door_and_covers_what_was_found(
    file: Path, attacks: Attacks
) -> None:
    text = file.read_text("utf-8")
    tags = Tags(text)
    verdicts = re.findall(r'<p class="verdict">(.*?)</p>', text)
    assert verdicts[0] == weakest_door(attacks) and len(verdicts) == 2
    section = text[text.index('id="attacks-0"') : text.index('id="prompts"')]
    covered = re.findall(r'aria-pressed="false" aria-label="Picture of ([^"]+), covered"', section)
    assert covered == ["original", "erased, attacked"] * 2
    parts = re.findall("<h3>(.*?)</h3>", section)
    assert parts == [f"{door}: {attack}" for attack, door in DOORS.items()]
    p4d = section[section.index("<h3>words: p4d") : section.index("<h3>embeddings")]
    assert "&lt;zx&gt;" in p4d and p4d.count("<img") == 2 and "<svg" in p4d
    assert section.count("<img") == 4 and "&lt;zx&gt; qv dagger" in section and "<zx>" not in text
    assert section.count("concept 93 %") == section.count('class="hit">concept') == 1
    assert "<svg" in section and len(re.findall('<th scope="row">', section)) == 2 * len(DOORS)
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in tags.found)


def test_a_page_without_attacks_says_nothing_of_them(file: Path, tmp_path: Path) -> None:
    columns = {"erased": column(tmp_path / "c", {"direct": [0.6, 0.2, 0.0], "benign": [0.7, 0.0]}, 10.0)}
    write_page(tmp_path / "plain.html", Report("violence erased", columns, SETS))
    text = (tmp_path / "plain.html").read_text("utf-8")
    assert 'id="attacks' not in text and "door" not in text and text.count('class="verdict"') == 1


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_the_section_in_a_browser(page, file: Path, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    covered = page.locator(".finds").get_by_role("button", name=", covered")
    assert covered.count() == 4
    blur = "button => getComputedStyle(button.firstElementChild).filter"
    assert covered.first.evaluate(blur) == "blur(14px)"
    covered.first.click()
    assert covered.count() == 3
    page.get_by_label("uncover all").check()
    assert covered.count() == 0
    assert page.locator("#count").inner_text() == "5 prompts"
