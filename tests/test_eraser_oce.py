"""OCE: the rotation is the best of all, and values keep their norms and angles."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import D, Harness, normal

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.linear import edited_stream, read_weights
from trce_lightning.erasers.oce import OCE, rotation, span


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


def test_oce_leaves_all_norms_and_angles_of_values(adapter: StableDiffusionAdapter, tmp_path: Path) -> None:
    before = read_weights(edited_stream(adapter, "v"))
    OCE().erase(Harness(adapter, tmp_path).job)
    for name, w in read_weights(edited_stream(adapter, "v")).items():
        assert (w - before[name]).abs().max() > 1e-2
        torch.testing.assert_close(w.mT @ w, before[name].mT @ before[name], atol=1e-4, rtol=1e-4)
