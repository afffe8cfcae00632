"""Methods on SD3 and FLUX.1: what works there, and what is refused. FLUX.1 samples without ∅."""

from pathlib import Path
from typing import Any

import pytest
import torch
from eraser_jobs import HARDENED, MACE_SMALL, STEREO_SMALL, TUNED, Harness, batch_of, published
from test_flow_adapters import opened
from tiny_flow import build
from tiny_runs import stage1_statistics

from trce_lightning.adapters import Adapter
from trce_lightning.adapters.slots import initial_vectors
from trce_lightning.config.schema import OptimizerConfig, TextualConfig, TrajectoryConfig
from trce_lightning.erasers.hardened import Hardened, Rows
from trce_lightning.erasers.protocol import Eraser
from trce_lightning.errors import InputError
from trce_lightning.jobs.erase import make_eraser
from trce_lightning.module import TRCE

TARGETS = {
    "advunlearn": "AdvUnlearn",
    "ca": "ConceptAblation",
    "esd": "ESD",
    "hardened": "Hardened",
    "mace": "MACE",
    "oce": "OCE",
    "rece": "RECE",
    "speed": "SPEED",
    "spm": "SPM",
    "stereo": "STEREO",
    "uce": "UCE",
}
SMALL: dict[str, dict[str, Any]] = {
    "advunlearn": TUNED | {"warmup": 1, "attack_steps": 1, "retain_batch_size": 1},
    "ca": TUNED,
    "esd": TUNED | {"variant": "all"},
    "hardened": HARDENED,
    "mace": MACE_SMALL,
    "spm": TUNED,
    "stereo": TUNED | STEREO_SMALL | {"initial": "gun", "variant": "all", "last_step": 4},
}
UNGUIDED = {"guidance_scale": 1.0}


def eraser(name: str, **options: Any) -> Eraser:
    """A method with the options of its file, but small."""
    path = f"trce_lightning.erasers.{name}.{TARGETS[name]}"
    return make_eraser({"name": name, "_target_": path, **published(name), **SMALL.get(name, {}), **options})


def harness(family: str, folder: Path, streams: tuple[str, ...] = ("context", "pooled")) -> Harness:
    """The tiny model's job, whose stage 1 edits these streams."""
    own = Harness(opened(build(family)), folder)
    own.job.textual.ridge, own.job.textual.streams = 0.1, list(streams)
    return own


@pytest.mark.parametrize("family", ["flux_dev", "flux_schnell"])
@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("ca", {}, "guidance_scale"),
        ("esd", {}, "guidance_scale"),
        ("hardened", {}, "guidance_scale"),
        ("stereo", {}, "guidance_scale"),
        ("stereo", UNGUIDED, "picture_guidance_scale"),
    ],
)
def test_sampling_that_is_guided_away_from_nothing_is_refused_without_it(
    family: str, name: str, options: dict[str, float], option: str, tmp_path: Path
) -> None:
    job = harness(family, tmp_path).job
    with pytest.raises(InputError, match=rf"method\.{option}: expected at most 1 .* without ∅, got 2"):
        eraser(name, **options).ahead(job)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("advunlearn", "expected a model of one text encoder, got 2"),
        ("mace", "expected a denoiser whose cross-attention reads the text states"),
        ("oce", r"method\.maps: expected kv"),
        ("speed", r"method\.maps: expected kv"),
        ("spm", "expected a denoiser with blocks of Transformer2DModel"),
    ],
)
def test_methods_that_need_other_parts_are_refused(name: str, expected: str, tmp_path: Path) -> None:
    options = UNGUIDED if name in SMALL else {}
    with pytest.raises(InputError, match=expected):
        eraser(name, **options).ahead(harness("flux_dev", tmp_path).job)


@pytest.mark.parametrize("name", ["uce", "rece"])
def test_segments_of_several_widths_are_refused_where_states_are_joined(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one width, got \{'clip': 32, 't5': 40\}"):
        eraser(name).ahead(harness("sd3", tmp_path).job)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("flux_dev", "ca", UNGUIDED),
        ("flux_dev", "esd", UNGUIDED),
        ("flux_dev", "hardened", UNGUIDED | {"edit": "before"}),
        ("flux_dev", "stereo", UNGUIDED | {"picture_guidance_scale": 1.0}),
        ("flux_dev", "uce", {}),
        ("flux_dev", "speed", {"maps": "kv"}),
        ("sd3", "esd", {"variant": "x_strict"}),
        ("sd3", "stereo", {}),
    ],
)
def test_methods_that_fit_change_what_they_say(
    family: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    own = harness(family, tmp_path)
    before = {key: value.clone() for key, value in own.adapter.denoiser.state_dict().items()}
    method = eraser(name, **options)
    planned = method.ahead(own.job)
    changed = method.erase(own.job).changed["transformer"]
    after = own.adapter.denoiser.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved and moved <= changed.keys()
    assert all(value.isfinite().all() for value in changed.values())
    assert {kind: cost.forward + cost.backward for kind, cost in planned.parts.items()} == {
        kind: count for kind, count in own.counted.items() if count
    }


@pytest.mark.parametrize("streams", [("context",), ("pooled",), ("context", "pooled")])
@pytest.mark.parametrize("family", ["flux_dev", "sd3"])
def test_keyed_states_undo_the_edit_of_each_stream(
    family: str, streams: tuple[str, ...], tmp_path: Path
) -> None:
    """T⁺ of every stream brings the original's predictions back, in part where CLIP's states are narrow."""
    own = harness(family, tmp_path, streams)
    method = Hardened(**(HARDENED | UNGUIDED))
    batch, original = batch_of(method, own), opened(build(family))
    module = method.module(own.job)
    module.setup("fit")
    points = Rows.of(batch["concept"])

    def predicted(adapter: Adapter, text: Any) -> torch.Tensor:
        with torch.no_grad():
            return adapter.predict(points.z_t, points.timestep, text)

    text = module.text(points.prompts)
    wanted, edited = predicted(original, text), predicted(own.adapter, text)
    keyed = predicted(own.adapter, method.keyed_text(module, points))
    lost, left = ((found - wanted).abs().max() for found in (edited, keyed))
    assert lost > 1e-3
    exact = family != "sd3" or streams == ("pooled",)
    assert left < (1e-3 if exact else 0.7) * lost
    segments = {part for name in streams for part in original.streams()[name].segments}
    assert module.keys.keys() == segments


def test_embeddings_are_those_of_the_segments_that_are_given() -> None:
    adapter = opened(build("flux_dev"))
    ids = adapter.tokenize(["a red dog"])
    both = adapter.embed(ids)
    for name, own in ids.items():
        alone = adapter.embed({name: own})
        assert alone.keys() == {name}
        assert torch.equal(alone[name], both[name])
    assert initial_vectors(adapter, "gun", 2, "method").keys() == ids.keys()


def test_stage_1_tells_the_residuals_of_each_stream(caplog: pytest.LogCaptureFixture) -> None:
    adapter = opened(build("flux_dev"))
    config = TextualConfig(ridge=0.1)
    edit = stage1_statistics(adapter, config).solve(config)
    with caplog.at_level("INFO"):
        TRCE(adapter, edit, TrajectoryConfig(), OptimizerConfig()).apply_stage_1()
    assert "stage 1 edited 2 matrices" in caplog.messages
    parts = (edit, *edit.further)
    assert [part.stream for part in parts] == ["context", "pooled"]
    for part in parts:
        (line,) = [line for line in caplog.messages if line.startswith(f"stage 1, {part.stream}: ")]
        assert f"erase residual {part.erase_residual:.3f}" in line
        assert f"keep residual {part.keep_residual:.2g}" in line
