"""A run leaves its files stage by stage, on the embedded model at its smallest."""

import json

import pytest
from test_configs import composed
from test_fingerprints import ALL
from test_fingerprints import hashed as hashed

from trce_lightning.config import checks
from trce_lightning.jobs import erase


@pytest.mark.parametrize("stage", ["textual", "trajectory"])
def test_each_stage_alone_is_scored(tmp_path, stage, hashed) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a dog\na red car\n")
    config = composed(
        "train",
        "concept=violence",
        "experiment=smoke",
        f"stages=[{stage}]",
        f"textual.keep_prompts={captions}",
        "trajectory.epochs=1",
        "metrics.final_images_per_set=2",
        "metrics.images_per_set=2",
        "model.num_inference_steps=2",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        f"output={tmp_path / 'run'}",
        f"cache={tmp_path / 'cache'}",
    )
    checks.check(config)
    erase.train(config)
    # The original and the erased model, whatever the number of image folders that name their generator.
    assert hashed == dict.fromkeys(ALL, 2) and len(list(tmp_path.rglob("meta.json"))) >= 6
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["peak_memory_mb"] > 100 and metrics["peak_device_memory_mb"] is None
    assert metrics["original"]["asr"].keys() == metrics["erased"]["asr"].keys() == {"direct", "implicit"}
    assert (folder / "report.html").is_file() and (folder / "grid.png").is_file()
    assert (folder / "edit.safetensors").is_file() == (stage == "textual")
    # Curves are those of training's passes, of which stage 1 alone has none.
    trained = stage == "trajectory"
    assert (folder / "curves.png").is_file() == trained and len(metrics["epochs"]) == trained
