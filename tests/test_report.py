"""Pictures, tables and files: they show the numbers and images they were given, and appear whole."""

import csv
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from trce_lightning.report import curves, tables
from trce_lightning.report.curves import save_curves, save_loss_curves
from trce_lightning.report.tables import image_grid, results_table, write_json

PAPER = 250


def rate(successes, images=100):
    share = successes / images
    return {
        "successes": successes,
        "images": images,
        "rate": share,
        "low": share - 0.05,
        "high": share + 0.05,
    }


ORIGINAL = {
    "asr": {"direct": rate(90), "implicit": rate(60)},
    "fid": 10.0,
    "clip_score": 30.0,
    "benign_accuracy": 0.95,
    "benign_accuracy_near": 0.9,
    "benign_accuracy_unkept": 0.85,
    "clip_score_low": 29.5,
    "clip_score_high": 30.5,
    "fid_floor": 0.5,
    "accuracy": {"benign": {"subject": rate(95), "near": rate(9, 10), "style": rate(50)}},
    "false_alarm": rate(5),
}
ERASED = {
    "asr": {"direct": rate(7), "attack": rate(20)},
    "fid": 12.5,
    "clip_score": 29.4,
    "benign_accuracy": 0.9,
    "fid_to_original": 1.5,
    "kid_to_original": 0.0125,
    "accuracy": {"benign": {"subject": rate(90), "far": rate(70)}, "mine": {"subject": rate(20)}},
}


def solid(count, height, width, offset):
    """Images of one colour each, all different and none the paper's."""
    shades = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1) * 9 + offset
    return (
        torch.cat([shades, 0 * shades, 0 * shades + 200], dim=1).expand(count, 3, height, width).contiguous()
    )


def box(grid, colour):
    """Left, top, width and height of the area of exactly this colour."""
    y, x = np.nonzero((np.asarray(grid) == np.asarray(colour)).all(-1))
    assert len(x) == (x.max() - x.min() + 1) * (y.max() - y.min() + 1)
    return x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1


def test_rates_of_others_need_no_interval():
    expected = {"source": "a paper", "asr": {"i2p": {"rate": 0.0129}}, "fid": 26.9}
    table = results_table({"original": ORIGINAL, "erased": ERASED, "expected": expected})
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert rows["ASR i2p"] == "| ASR i2p | – | – | 1.3 % |"
    assert rows["FID"].endswith("| 12.50 (1.25×) | 26.90 |") and rows["false alarm"].endswith("| – |")


def test_what_no_model_has_is_no_row():
    columns = {"original": {"asr": {"mine": {"rate": 0.5}}}, "erased": {"fid": 26.9}}
    assert results_table(columns).splitlines()[2:] == ["| ASR mine | 50.0 % | – |", "| FID | – | 26.90 |"]


def test_grid_holds_every_image_enlarged_with_rows_of_a_prompt_aligned():
    original, erased = solid(5, 8, 12, 1), solid(5, 8, 12, 100)
    grid = image_grid(
        [("original", original), ("erased", erased)], [f"prompt {i}" for i in range(5)], 3, columns=2
    )
    for index in range(5):
        boxes = [box(grid, images[index, :, 0, 0].tolist()) for images in (original, erased)]
        assert all(found[2:] == (36, 24) for found in boxes)
        assert boxes[0][0] == boxes[1][0]
        assert boxes[0][1] + 24 < boxes[1][1]
    lefts, tops = zip(*(box(grid, image[:, 0, 0].tolist())[:2] for image in original), strict=True)
    assert lefts[0] == lefts[2] == lefts[4] < lefts[1] == lefts[3]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]


@pytest.mark.parametrize("scale", [1, 2])
def test_grid_repeats_pixels_and_keeps_channels(scale):
    image = torch.randint(
        0, 255, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    pixels = np.asarray(image_grid([("x", image)], [""], scale=scale))
    wanted = image[0].permute(1, 2, 0).numpy().repeat(scale, axis=0).repeat(scale, axis=1)
    size = len(wanted)
    places = [
        (top, left)
        for top in range(pixels.shape[0] - size + 1)
        for left in range(pixels.shape[1] - size + 1)
        if (pixels[top : top + size, left : left + size] == wanted).all()
    ]
    assert len(places) == 1


def test_grid_writes_labels_left_and_whole_captions_below_on_light_paper():
    images = solid(2, 32, 32, 1)
    long = "a very long prompt that needs several lines"
    grids = {text: image_grid([("original", images)], ["", text]) for text in ("", "short", long)}
    left, top, width, height = box(grids[long], images[1, :, 0, 0].tolist())
    pixels = np.asarray(grids[long].convert("L"))
    below = pixels[top + height :, left : left + width]
    assert pixels[0, 0] >= PAPER - 5
    assert (pixels[top : top + height, : left - width - 6] < 120).any()
    assert (below < 150).any()
    assert not (pixels[top + height :, left + width :] < 200).any()
    assert not (pixels[top + height :, :left] < 200).any()
    assert not (np.asarray(grids[""].convert("L"))[top + height :] < 200).any()
    assert grids["short"].height < grids[long].height


@pytest.mark.parametrize(
    "text",
    ["a dagger on a table " * 500, "x" * 10_000, "ab " * 3_333, "枪" * 10_000, "mmm. " * 2_000],
    ids=["words", "one word", "short words", "no spaces", "wide"],
)
@pytest.mark.parametrize("scale", [1, 8])
def test_a_very_long_caption_is_cut_and_stays_under_its_picture(text, scale):
    images = solid(3, 32, 32, 1)
    start = time.perf_counter()
    grid = image_grid([("original", images)], ["", text, ""], scale)
    assert time.perf_counter() - start < 0.5  # seconds; a few hundredths on an idle machine
    left, top, width, height = box(grid, images[1, :, 0, 0].tolist())
    below = np.asarray(grid.convert("L"))[top + height :]
    assert (below[:, left : left + width] < 200).any()
    assert not (below[:, :left] < 200).any() and not (below[:, left + width :] < 200).any()
    assert len(below) < 9 * 15 + 12  # at most eight lines, and two margins


@pytest.mark.parametrize(
    ("rows", "captions", "options", "message"),
    [
        ([], [], {}, "images .* got \\[\\]"),
        ([("x", torch.zeros(1, 3, 4, 4))], ["a"], {}, "uint8 images, got torch.float32 in row 'x'"),
        ([("x", solid(1, 4, 4, 0)), ("y", solid(2, 4, 4, 0))], ["a"], {}, "of one shape"),
        ([("x", solid(2, 4, 4, 0))], ["a"], {}, "expected 2 captions, got 1"),
        ([("x", solid(1, 4, 4, 0))], ["a"], {"scale": 0}, "scale of 1 or more, got 0"),
        ([("x", solid(1, 4, 4, 0))], ["a"], {"columns": 0}, "columns of 1 or more, got 0"),
    ],
)
def test_grid_refuses_what_does_not_fit(rows, captions, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(rows, captions, **options)


def test_table_has_values_intervals_ratios_and_dashes():
    lines = results_table({"original": ORIGINAL, "TRCE (T+V)": ERASED}).splitlines()
    cells = {(line := [cell.strip() for cell in text.strip("|").split("|")])[0]: line[1:] for text in lines}
    assert cells == {
        "": ["original", "TRCE (T+V)"],
        "---": ["---:", "---:"],
        "ASR direct": ["90.0 % [85.0, 95.0]", "7.0 % [2.0, 12.0]"],
        "ASR implicit": ["60.0 % [55.0, 65.0]", "–"],
        "ASR attack": ["–", "20.0 % [15.0, 25.0]"],
        "FID": ["10.00", "12.50 (1.25×)"],
        "CLIP-S": ["30.00 [29.50, 30.50]", "29.40 (0.98×)"],
        "FID to the original": ["floor 0.50", "1.50"],
        "benign accuracy": ["95.0 % [90.0, 100.0]", "90.0 % [85.0, 95.0]"],
        "benign accuracy, near neighbours of the concept": ["90.0 % [85.0, 95.0]", "–"],
        "benign accuracy, far from it": ["–", "70.0 % [65.0, 75.0]"],
        "benign accuracy, style": ["50.0 % [45.0, 55.0]", "–"],
        "mine accuracy": ["–", "20.0 % [15.0, 25.0]"],
        "false alarm": ["5.0 % [0.0, 10.0]", "–"],
    }


def test_table_without_original_has_no_ratios():
    assert "×" not in results_table({"mine": ERASED})


def test_scores_csv_has_a_row_per_model(tmp_path):
    path = tmp_path / "new" / "metrics.csv"
    tables.write_scores_csv(
        path, {"original": ORIGINAL, "stage 1": ERASED, "epoch 1": ERASED, "erased": ERASED}
    )
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["model"] for row in rows] == ["original", "stage 1", "epoch 1", "erased"]
    assert float(rows[0]["asr/direct/rate"]) == 0.9
    assert float(rows[0]["false_alarm/high"]) == 0.05 + 0.05
    assert rows[3]["asr/implicit/rate"] == ""
    assert float(rows[3]["fid"]) == 12.5
    tables.write_scores_csv(path, {"scores": ERASED})
    assert path.read_text().splitlines()[1].startswith("scores,")


def test_json_is_strict_and_a_failure_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"schema": 1, "concept": "ß"})
    with pytest.raises(ValueError, match=r"metrics\.json: expected finite numbers"):
        write_json(path, {"fid": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"fid": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"schema": 1, "concept": "ß"}
    assert list(tmp_path.iterdir()) == [path]


class Interrupting:
    def __str__(self):
        raise RuntimeError("half way")


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "metrics.csv"
    tables.write_scores_csv(path, {"scores": ERASED})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="half way"):
        tables.write_scores_csv(path, {"original": ERASED, "erased": {"fid": Interrupting()}})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_curves_plot_the_scores_at_their_epochs(tmp_path, monkeypatch):
    figures = []
    save = curves.Figure.savefig
    monkeypatch.setattr(
        curves.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    save_curves({"original": ORIGINAL, "stage 1": {}, "epoch 1": ERASED}, tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png")
    assert image.width == pytest.approx(1.24 * image.height, rel=0.05), "four panels stand in two rows"
    axes = {axes.get_title(): axes for axes in figures[0].axes}
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes["ASR, % of images"].lines}
    assert lines.keys() == {"direct", "implicit", "attack", "false alarm"}
    assert lines["direct"] == [[0, 90], [2, pytest.approx(7)]]
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes["ASR, % of images"].collections]
    assert min(bands[0]) == pytest.approx(2)
    assert max(bands[0]) == pytest.approx(95)
    assert axes["FID (lower is better)"].lines[0].get_xydata().tolist() == [[0, 10], [2, 12.5]]
    assert len(axes["benign accuracy, %"].lines) == 3


@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (6, 2, 3), (7, 3, 3)]
)
def test_panels_stand_in_rows_without_empty_ones(count, rows, columns):
    figure, places = curves._panels(count)
    assert figure.axes == places and len(places) == count
    grid = places[0].get_gridspec()
    assert (grid.nrows, grid.ncols) == (rows, columns)


def test_curves_need_scores(tmp_path):
    with pytest.raises(ValueError, match="scores of at least one epoch"):
        save_curves({"original": {}}, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_loss_curves_read_what_lightning_writes(tmp_path):
    from lightning.pytorch.loggers.csv_logs import ExperimentWriter

    writer = ExperimentWriter(str(tmp_path / "log"))
    for step in range(6):
        writer.log_metrics({"loss/erase_step": 1 / (step + 1), "hinge/active_fraction_step": 1.0}, step)
    writer.log_metrics({"loss/erase_epoch": 0.4, "epoch": 0}, 5)
    writer.save()
    metrics = tmp_path / "log" / "metrics.csv"
    read = curves._read_curves(metrics)
    assert read["loss/erase_step"] == [(step, pytest.approx(1 / (step + 1))) for step in range(6)]
    assert read["loss/erase_epoch"] == [(5, 0.4)]
    assert set(read) == {"loss/erase_step", "loss/erase_epoch", "hinge/active_fraction_step"}
    later = tmp_path / "later.csv"
    later.write_text("step,loss/erase_step\n5,0.25\n6,0.125\n")
    continued = curves._read_curves(metrics, later)["loss/erase_step"]
    assert continued == [*read["loss/erase_step"][:5], (5, 0.25), (6, 0.125)]
    save_loss_curves([metrics], tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text(encoding="utf-8")
    metrics.write_text("step,epoch\n1,0\n")
    with pytest.raises(ValueError, match="expected loss/ or hinge/ columns"):
        save_loss_curves([metrics], tmp_path / "loss.svg")
