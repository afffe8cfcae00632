"""Statistics of a folder of real images: those of its pictures one by one, whoever shares the work."""

from pathlib import Path

import pytest
import torch
from tiny_runs import cpu_trainer, one_thread
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from trce_lightning.errors import InputError
from trce_lightning.generation.image_folder import write_png
from trce_lightning.metrics import real_images
from trce_lightning.metrics.fidelity import REAL_STATES, load_real_statistics
from trce_lightning.metrics.real_images import batches_of_one_size, load_real
from trce_lightning.runtime.ranks import Rank, on_each_rank

SIZES = ((16, 24), (24, 16), (16, 24), (20, 20), (16, 24), (24, 16), (16, 24))


class Quarters(nn.Module):
    """Mean colours of the four quarters; notes how many pictures came together."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) * self.weight


def fid() -> FrechetInceptionDistance:
    return FrechetInceptionDistance(feature=Quarters(), reset_real_features=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for index, (height, width) in enumerate(SIZES):
        picture = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        write_png(tmp_path / "real" / f"{index}.png", picture)
    return tmp_path / "real"


def one_by_one(folder: Path) -> dict[str, Tensor]:
    metric = fid()
    for picture in sorted(folder.iterdir()):
        metric.update(real_images.read_image(picture)[None], real=True)
    return {name: getattr(metric, name) for name in REAL_STATES}


def test_pictures_of_one_size_go_together_and_sum_to_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_images, "PIXELS_AT_ONCE", 3 * 16 * 24)
    metric = fid()
    load_real(metric, folder, tmp_path / "cache")
    assert sorted(metric.inception.seen) == [
        (1, 3, 16, 24),
        (1, 3, 20, 20),
        (2, 3, 24, 16),
        (3, 3, 16, 24),
    ]
    for name, expected in one_by_one(folder).items():
        torch.testing.assert_close(getattr(metric, name), expected, rtol=1e-6, atol=0)
    assert "real images: 100%" in (shown := capsys.readouterr().err) and "7/7" in shown
    again = fid()
    load_real(again, folder, tmp_path / "cache")
    assert again.inception.seen == [] and torch.equal(again.real_features_sum, metric.real_features_sum)
    # One that is larger than the limit goes alone.
    monkeypatch.setattr(real_images, "PIXELS_AT_ONCE", 1)
    assert [len(batch) for batch in batches_of_one_size(sorted(folder.iterdir()))] == [1] * 7


def test_ranks_share_the_pictures(folder: Path, tmp_path: Path) -> None:
    trainer = cpu_trainer(tmp_path, devices=2, strategy="ddp_fork")

    def load(rank: Rank) -> None:
        metric = fid()
        load_real(metric, folder, tmp_path / "cache", rank.device)
        seen = sum(shape[0] for shape in metric.inception.seen)
        states = {name: getattr(metric, name) for name in REAL_STATES}
        torch.save((seen, states), tmp_path / f"{rank.index}.pt")

    with one_thread():
        on_each_rank(trainer, load)
    (file,) = (tmp_path / "cache").iterdir()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [seen for seen, _ in found] == [4, 3]
    stored = fid()
    load_real_statistics(stored, file)
    for name, expected in one_by_one(folder).items():
        for states in ({name: getattr(stored, name)}, *(states for _, states in found)):
            torch.testing.assert_close(states[name], expected, rtol=1e-6, atol=0)


def test_an_unreadable_picture_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"3\.png: expected a readable image"):
        load_real(fid(), folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
