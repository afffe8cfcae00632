"""OCE: the rotation is the best of all, and values keep their norms and angles."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_tiny_pipeline
from eraser_jobs import D, Harness, normal
from tiny_runs import WEAPONS

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.cli import config_folder
from trce_lightning.config.checks import check_values
from trce_lightning.erasers.linear import edited_stream, read_weights
from trce_lightning.erasers.oce import OCE, leading, rotation, span
from trce_lightning.erasers.speed import SPEED
from trce_lightning.errors import InputError
from trce_lightning.jobs.erase import make_eraser


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def test_the_rotation_is_the_best_of_all() -> None:
    a = normal(6, 6)
    best = rotation(a)
    torch.testing.assert_close(best @ best.mT, torch.eye(6, dtype=torch.float64))
    for seed in range(50):
        other, _ = torch.linalg.qr(normal(6, 6, seed=seed))
        assert (other * a).sum() < (best * a).sum()
    assert torch.linalg.det(rotation(torch.diag(torch.tensor([1.0, 1, -1]).double()))) < 0


def test_one_erased_direction_is_reflected_and_repeated_guides_count_once() -> None:
    w, erased, none = normal(6, D), normal(1, D, seed=1), normal(1, D)[:0]
    v = (w @ erased.mT).flatten()
    v = v / v.norm()
    zero = torch.zeros(D, D, dtype=torch.float64)
    r = OCE(erase_scale=1e6, general_scale=0, ridge=1.0).rotation_of(w, erased, none, none, zero)
    assert float(v @ r @ v) < -0.999
    torch.testing.assert_close(
        r, torch.eye(6, dtype=torch.float64) - 2 * torch.outer(v, v), atol=2e-3, rtol=0
    )
    columns = normal(6, 1, seed=3)
    torch.testing.assert_close(span(columns.repeat(1, 5)), span(columns))


@pytest.mark.parametrize(("keep_scale", "read"), [(0.0, False), (0.3, True)])
def test_neighbours_are_read_where_they_have_a_weight(keep_scale: float, read: bool, tmp_path: Path) -> None:
    """Another neighbour gives another edit. The shipped weight is nudity's, 0."""
    shipped = yaml.safe_load((config_folder() / "method" / "oce.yaml").read_text())
    assert shipped["keep_scale"] == 0
    found = []
    for neighbour in ("a fork", "a river of cold tea"):
        own = StableDiffusionAdapter(build_tiny_pipeline())
        concept = replace(WEAPONS, neighbours=(neighbour,))
        make_eraser(shipped | {"keep_scale": keep_scale}).erase(Harness(own, tmp_path, [concept]).job)
        found.append(torch.cat([w.flatten() for w in read_weights(edited_stream(own, "v")).values()]))
    assert torch.equal(*found) != read


@pytest.mark.parametrize(("eraser", "wrong"), [(OCE, "empty"), (SPEED, "none")])
def test_states_to_keep_that_would_change_nothing_are_no_choice(eraser: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=r"'method\.keep': expected .*'prompts'"):
        check_values(eraser(keep=wrong), "method")


def test_oce_leaves_all_norms_and_angles_of_values(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    before = read_weights(edited_stream(adapter, "v"))
    OCE().erase(Harness(adapter, tmp_path).job)
    for name, w in read_weights(edited_stream(adapter, "v")).items():
        assert (w - before[name]).abs().max() > 1e-2
        torch.testing.assert_close(w.mT @ w, before[name].mT @ before[name], atol=1e-4, rtol=1e-4)


def test_leading_directions_spare_what_the_span_negates() -> None:
    """Twelve values near one direction span all. Only that direction is reflected if one is asked for."""
    w, none = torch.eye(6, dtype=torch.float64), normal(1, 6)[:0]
    v = torch.linalg.qr(normal(6, 6, seed=2))[0]
    erased = v[:, :1].mT + 0.05 * normal(12, 6, seed=3)
    zero = torch.zeros(6, 6, dtype=torch.float64)
    whole, one = (
        OCE(erase_scale=1e6, general_scale=0, ridge=1.0, directions=count).rotation_of(
            w, erased, none, none, zero
        )
        for count in (0, 1)
    )
    assert (v.mT @ whole @ v).diagonal().max() < -0.9
    kept = (v.mT @ one @ v).diagonal()
    assert kept[0] < -0.9 and kept[1:].min() > 0.9
    torch.testing.assert_close(leading(erased.mT, 6), span(erased.mT))
    assert torch.linalg.matrix_rank(leading(erased.mT, 2)) == 2
