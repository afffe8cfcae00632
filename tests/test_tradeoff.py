"""The trade-off: models between the original and the hardened one, and the table and picture of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import sweep, tradeoff
from trce_lightning.adapters import load_adapter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose erased denoiser is the original with one other weight."""
    folder = tmp_path_factory.mktemp("run")
    adapter = tradeoff.session_of().adapter
    with torch.no_grad():
        adapter.denoiser.conv_in.weight += 1
    adapter.pipeline.save_pretrained(folder / "erased")
    return folder


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.25])
def test_weights_lie_on_the_line_through_both_models(run: Path, strength: float, tmp_path: Path) -> None:
    tradeoff.save_blend(run, strength, tmp_path)
    original, found = tradeoff.session_of().adapter.denoiser, load_adapter(tmp_path).denoiser
    moved = found.conv_in.weight - original.conv_in.weight
    torch.testing.assert_close(moved, torch.full_like(moved, strength), atol=1e-6, rtol=0)
    assert torch.equal(found.conv_out.weight, original.conv_out.weight)


def row(rate: float, fid: float) -> dict[str, Any]:
    scores = {
        "asr": {name: {"rate": rate} for name in ("direct", "implicit")},
        "fid": fid,
        "clip_score": 73.0,
        "benign_accuracy": 0.99,
        "benign_accuracy_unkept": 0.9,
    }
    references = {tradeoff.NEVER_LEARNT: dict.fromkeys(sweep.ATTACKS, 0.05)}
    return {"scores": scores, "attacks": dict.fromkeys(sweep.ATTACKS, rate), "references": references}


def test_the_table_is_ordered_by_strength_and_ends_with_the_never_learnt_model() -> None:
    lines = tradeoff.lines_of({1.0: row(0.1, 8.5), 0.0: row(1.0, 8.0)})
    attacks = len(sweep.ATTACKS)
    assert lines[2] == "| 0 |" + " 100.0 % |" * (2 + attacks) + " 8.00 | 73.00 | 99.0 % | 90.0 % |"
    assert lines[3].startswith("| 1 | 10.0 % |")
    assert lines[4].startswith("| never-learnt |  |  |" + " 5.0 % |" * attacks)


def test_the_picture_has_a_line_for_each_attack() -> None:
    figure = tradeoff.figure_of({1.0: row(0.1, 8.5), 0.0: row(1.0, 8.0)})
    assert isinstance(figure, Figure)
    lines = figure.axes[0].get_lines()
    assert len(lines) == len(sweep.ATTACKS)
    assert lines[0].get_xydata().tolist() == [[8.0, 100.0], [8.5, 10.0]]
