"""Judge pictures of one subject or of two. A scene has one subject on the left and one on the right."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from trce_lightning.emoji.judge import Judge
from trce_lightning.emoji.package import INSTALL_AGAIN
from trce_lightning.metrics.collateral import BESIDE
from trce_lightning.runtime.storage import read_safetensors

CENTRES = ((16, 32), (48, 32))
"""The centres (x, y) of the subjects on the left and on the right, in pixels of 64×64."""
WINDOW = 32
"""The side of the square around a centre that a subject fits in."""


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square around each centre, enlarged to a whole picture, ``[B, 3, 64, 64]`` uint8 each."""
    reach = WINDOW // 2
    left, right = (
        F.interpolate(
            images[..., y - reach : y + reach, x - reach : x + reach].float(),
            scale_factor=images.shape[-1] / WINDOW,
            mode="bicubic",
        )
        for x, y in CENTRES
    )
    return left.round().clamp(0, 255).to(images.dtype), right.round().clamp(0, 255).to(images.dtype)


class SceneJudge(nn.Module):
    """The embedded model's judge, which looks at each half of a scene.

    A linear read-out of the judge's features says whether a picture is a scene. The judge has learnt nothing
    of scenes: it sees a half as a picture of one subject.
    """

    vocabulary = MappingProxyType({**Judge.vocabulary, BESIDE: Judge.vocabulary["subject"]})
    """The names of the judge's read-outs, and those of the subject on the right of a scene."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge, self.scene = judge, nn.Linear(judge.num_features, 1)

    def is_scene(self, images: Tensor) -> Tensor:
        """Return whether uint8 images are scenes, bool ``[B]``."""
        return self.scene(self.judge.features(images)).squeeze(-1) > 0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return probabilities ``[B, n]`` of subject, style, background and the subject beside it.

        The subject of a scene is the one on the left. Both are the same in a picture of one subject.
        """
        whole = self.judge(images)
        whole[BESIDE] = whole["subject"]
        rows = self.is_scene(images)
        if rows.any():
            left, right = (self.judge(half) for half in halves(images[rows]))
            both = {name: (left[name] + right[name]) / 2 for name in ("style", "background")}
            for name, seen in {**both, "subject": left["subject"], BESIDE: right["subject"]}.items():
                whole[name] = whole[name].masked_scatter(rows[:, None], seen)
        return whole


def load_scene_judge(judge: Judge, file: Path) -> SceneJudge:
    """Return the judge of scenes, frozen, with the read-out in ``file``."""
    scene_judge = SceneJudge(judge)
    scene_judge.scene.load_state_dict(read_safetensors(file, "the read-out of scenes", INSTALL_AGAIN))
    return scene_judge.requires_grad_(False).eval()
