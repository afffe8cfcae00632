"""``train.py method=NAME``: what all methods share, as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_tiny_pipeline
from diffusers import StableDiffusionPipeline
from eraser_jobs import HARDENED, STEREO_SMALL, TUNED, quick
from safetensors.torch import load_file
from test_configs import composed
from tiny_runs import KEEP_PROMPTS, WEAPONS

from trce_lightning import cli
from trce_lightning.api import erase
from trce_lightning.config import checks
from trce_lightning.errors import InputError
from trce_lightning.jobs.erase import make_eraser
from trce_lightning.sampling import noise

NAMES = sorted(file.stem for file in (cli.config_folder() / "method").glob("*.yaml") if file.stem != "trce")
SMALL = [
    "method.iterations=4",
    "method.draws=2",
    "method.num_steps=4",
    "method.lr=0.01",
]
MORE = {
    "hardened": [
        *(f"method.{name}={count}" for name, count in HARDENED.items() if name not in TUNED),
    ],
    "stereo": [
        *(f"method.{name}={value}" for name, value in STEREO_SMALL.items()),
        "method.variant=x",
        "method.last_step=4",
        "method.inversion_steps=2",
    ],
    "mace": ["method.pictures=2", "method.levels=4", "method.ridge=0.1"],
    "spm": ["method.warmup=1", "method.anchors=1"],
    "advunlearn": ["method.warmup=2", "method.attack_steps=2", "method.retain_batch_size=2"],
}


def options_of(name: str) -> list[str]:
    """Options that make a method of the command line small."""
    if "iterations" not in composed("train", "concept=violence", f"method={name}").method:
        return [f"method={name}"]
    batch = [] if name == "hardened" else ["method.batch_size=2"]
    small = [option for option in SMALL if name != "mace" or "draws" not in option]
    return [f"method={name}", *small, *batch, *MORE.get(name, [])]


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """The tiny pipeline in a folder, as a model of the command line."""
    build_tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "captions.txt").write_text("\n".join(KEEP_PROMPTS))
    return [
        "concept.terms=[a gun,an axe]",
        "model=sd15",
        f"model.path={tmp_path / 'model'}",
        "model.resolution=16",
        "metrics.enabled=false",
        f"textual.keep_prompts={tmp_path / 'captions.txt'}",
        f"runs={tmp_path / 'runs'}",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
    ]


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (path for path in (tmp_path / "runs").glob("*/sd15/*") if path.is_dir())
    return folder


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("name", quick(NAMES, "advunlearn", "spm", "uce"))
def test_a_run_stores_what_has_changed_and_counts_it(name: str, tiny: list[str], tmp_path: Path) -> None:
    cli.train([*tiny, *options_of(name), "export=[pipeline,delta]"])
    folder = folder_of(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["method"]["name"] == name
    counted, planned = metrics["network_evaluations"], metrics["method"]["planned_network_evaluations"]
    assert sum(counted.values()) == planned["forward"] + planned["backward"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "erased")
    own = build_tiny_pipeline()
    parts = {"unet": "delta.safetensors", "text_encoder": "delta.text_encoder.safetensors"}
    changed = {part: folder / file for part, file in parts.items() if (folder / file).is_file()}
    assert set(changed) == ({"text_encoder"} if name == "advunlearn" else {"unet"})
    for part, file in changed.items():
        delta = load_file(file)
        before = getattr(own, part).state_dict()
        assert any(not torch.equal(value, before[key]) for key, value in delta.items())
        assert not getattr(own, part).load_state_dict(delta, strict=False).unexpected_keys
    for part in ("unet", "text_encoder"):
        expected = getattr(own, part).state_dict()
        found = getattr(pipeline, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
    card = (folder / "erased" / "README.md").read_text()
    assert make_eraser(composed("train", "concept=violence", f"method={name}").method).title in card
    assert (folder / "losses.png").is_file() == bool(planned["backward"])
    assert (folder / "lora.safetensors").is_file() == (name == "spm")


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("name", quick([name for name in NAMES if len(options_of(name)) > 1], "esd"))
def test_a_killed_run_continues_to_the_same_weights(
    name: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends at the third step, after the checkpoint of the second."""
    from trce_lightning.erasers.tuning import Tuning

    options = [*tiny, *options_of(name), "export=[delta]", "checkpoint_minutes=1e-6"]
    cli.train([*options, f"output={tmp_path / 'whole'}"])
    whole_step = Tuning.training_step

    def killed(self: Any, batch: Any, index: int) -> Any:
        if batch["step"] == 2:
            raise KeyError("killed")
        return whole_step(self, batch, index)

    monkeypatch.setattr(Tuning, "training_step", killed)
    with pytest.raises(KeyError, match="killed"):
        cli.train([*options, f"output={tmp_path / 'killed'}"])
    steps: list[int] = []

    def counting(self: Any, batch: Any, index: int) -> Any:
        steps.append(batch["step"])
        return whole_step(self, batch, index)

    monkeypatch.setattr(Tuning, "training_step", counting)
    cli.train([*options, f"output={tmp_path / 'killed'}"])
    assert steps == [2, 3]
    (file,) = (tmp_path / "whole").glob("delta*.safetensors")
    found, expected = load_file(tmp_path / "killed" / file.name), load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.slow
@pytest.mark.usefixtures("clean_process")
def test_a_search_that_is_killed_continues_to_the_same_weights(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STEREO's second inversion ends at its second step. The fits before it aren't done again."""
    from trce_lightning.erasers.tuning import Tuning

    options = [*tiny, *options_of("stereo"), "export=[delta]", "checkpoint_minutes=1e-6"]
    cli.train([*options, f"output={tmp_path / 'whole'}", f"cache={tmp_path / 'other'}"])
    whole_step = Tuning.training_step
    steps: list[tuple[str, int]] = []

    def killed(self: Any, batch: Any, index: int) -> Any:
        if (self.eraser.panel, batch["step"]) == ("inversion 2 ", 1):
            raise KeyError("killed")
        return whole_step(self, batch, index)

    def counting(self: Any, batch: Any, index: int) -> Any:
        steps.append((self.eraser.panel, batch["step"]))
        return whole_step(self, batch, index)

    monkeypatch.setattr(Tuning, "training_step", killed)
    with pytest.raises(KeyError, match="killed"):
        cli.train([*options, f"output={tmp_path / 'killed'}"])
    monkeypatch.setattr(Tuning, "training_step", counting)
    cli.train([*options, f"output={tmp_path / 'killed'}"])
    assert steps == [("inversion 2 ", 1), *(("", step) for step in range(4))]
    found, expected = (load_file(tmp_path / run / "delta.safetensors") for run in ("killed", "whole"))
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize("name", ["esd", "uce"])
def test_a_plan_says_the_counts_and_leaves_nothing(
    name: str,
    tiny: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    # It would take caplog's handler away.
    monkeypatch.setattr("trce_lightning.jobs.erase.set_up_logging", lambda: None)
    cli.train([*tiny, *options_of(name), "plan=true"])
    assert not (tmp_path / "runs").exists()
    parts = [record.args[0] for record in caplog.records if record.msg.startswith("ahead: %-36s")]
    trains = len(options_of(name)) > 1
    assert set(parts) >= ({"teachers", "training"} if trains else set())
    assert ("M train)" in caplog.text) == trains == ("optimizer states" in caplog.text)


@pytest.mark.usefixtures("clean_process")
def test_before_training_it_is_the_original_that_is_named(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trce_lightning.erasers.teachers import Teachers
    from trce_lightning.erasers.tuning import Tuning

    named: list[tuple[str, bool]] = []

    def sampled(self: Teachers, trainer: Any, adapter: Any, encode: Any) -> None:
        named.append(("teachers", "erased" in adapter.name))
        sample(self, trainer, adapter, encode)

    def trained(self: Tuning, batch: Any, index: int) -> Any:
        named.append(("training", "erased" in self.adapter.name))
        return step(self, batch, index)

    sample, step = Teachers.sample, Tuning.training_step
    monkeypatch.setattr(Teachers, "sample", sampled)
    monkeypatch.setattr(Tuning, "training_step", trained)
    cli.train([*tiny, *options_of("esd"), "method.iterations=1", "export=[delta]"])
    assert named == [("teachers", False), ("training", True)]


@pytest.mark.usefixtures("clean_process")
def test_a_further_concept_is_erased_with_the_earlier_ones_from_the_original(
    tiny: list[str], tmp_path: Path
) -> None:
    """``previous`` equals both concepts at once."""
    both = [option for option in tiny if not option.startswith("concept")]
    guns, axes = tmp_path / "guns.yaml", tmp_path / "axes.yaml"
    guns.write_text(yaml.safe_dump({"name": "guns", "terms": {"a gun": "a kite"}, "templates": ["{}"]}))
    axes.write_text(yaml.safe_dump({"name": "axes", "terms": {"an axe": "a hat"}, "templates": ["{}"]}))
    options = [*both, "method=uce", "export=[delta]"]
    cli.train([*options, f"concept={guns}", f"output={tmp_path / 'first'}"])
    cli.train([*options, f"concept={axes}", f"previous={tmp_path / 'first'}", f"output={tmp_path / 'then'}"])
    cli.train([*options, f"concept=[{guns},{axes}]", f"output={tmp_path / 'at_once'}"])
    then, at_once, first = (
        load_file(tmp_path / run / "delta.safetensors") for run in ("then", "at_once", "first")
    )
    assert all(torch.equal(value, at_once[key]) for key, value in then.items())
    assert any(not torch.equal(value, first[key]) for key, value in then.items())


def test_erase_in_memory_runs_a_method(tmp_path: Path) -> None:
    pipeline = build_tiny_pipeline()
    z_t, states = noise((1, 4, 8, 8), 0), torch.ones(1, 32, 32)
    with torch.no_grad():
        before = pipeline.unet(z_t, 500, states).sample
        options = ["model=sd15", "model.resolution=16", "trainer.accelerator=cpu"]
        erase(pipeline, WEAPONS, "method=uce", *options)
        after = pipeline.unet(z_t, 500, states).sample
    assert not torch.equal(before, after)


# Wrong options.


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.train(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err


WRONG = [
    (["method=esdd"], ["no method named 'esdd'", "'esd'", "choices: "]),
    (["method=esd", "trajectory.beta=2"], ["'trajectory.beta'", "method=esd", "method=trce"]),
    (["method=uce", "stages=[textual]"], ["'stages'", "method=uce"]),
    (["method=uce", "optimizer.lr=1"], ["'optimizer.lr'", "method=uce"]),
    (["method.lr=1"], ["'method.lr'", "method=trce", "trajectory"]),
    (["method=esd", "method.learning_rate=1"], ["method", "learning_rate"]),
    (["method=esd", "method.lr=-1"], ["'method.lr'", "more than 0", "-1"]),
    (["method=esd", "method.lr=fast"], ["'method.lr'", "expected a number, got 'fast'"]),
    (["method=hardened", "method.scenes=maybe"], ["'method.scenes'", "expected true or false, got 'maybe'"]),
    (["method=hardened", "method.pool=2.5"], ["'method.pool'", "expected a whole number, got 2.5"]),
    (["method=hardened", "method.pool=few"], ["'method.pool'", "expected a whole number, got 'few'"]),
    (["method=esd", "method.variant=y"], ["'method.variant'", "'x_strict'", "'y'"]),
    (["method=esd", "method.last_step=99"], ["steps from 0 to 20", "0 to 99"]),
    (["method=uce", "method.positions=first"], ["'method.positions'", "'last'", "'first'"]),
    (["method=uce", "method.ridge=0"], ["'method.ridge'", "more than 0"]),
]


@pytest.mark.usefixtures("clean_process")
@pytest.mark.parametrize(("argv", "expected"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_wrong_options_are_explained(
    argv: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refusal(
        capsys, "concept=violence", f"runs={tmp_path}", "metrics.enabled=false", "plan=true", *argv
    )
    for part in expected:
        assert part in said, said


CONFIGS = cli.config_folder()


@pytest.mark.parametrize(
    "argv",
    [
        ["method=uce", "textual.keep_prompts=x"],
        ["method=trce,esd", "trajectory.beta=2"],
        ["experiment=hardened", "method.edit=before", "textual.form=ridge"],
        ["experiment=hardened", "model=emoji_xl", "textual.eta=3"],
        ["experiment=smoke", "trajectory.epochs=9"],
        ["experiment=sd14_sexual", "stages=[textual]"],
        ["method=trce", "experiment=hardened", "trajectory.epochs=9"],
        ["experiment=nothing", "trajectory.epochs=9"],
    ],
)
def test_options_that_the_method_reads_are_taken(argv: list[str]) -> None:
    checks.check_method_options(argv, CONFIGS)


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["method=uce", "++textual.eta=2"], "textual.eta"),
        (["experiment=hardened", "trajectory.epochs=9"], "trajectory.epochs"),
        (["experiment=hardened", "stages=[textual]"], "stages"),
        (["experiment=hardened", "optimizer.lr=1"], "optimizer.lr"),
        (["method=uce", "experiment=hardened", "textual.form=ridge"], "textual.form"),
        (["method=hardened", "textual.streams=[pooled]"], "textual.streams"),
        (["method=hardened", "method.edit=none", "textual.eta=1"], "textual.eta"),
        (["method=hardened", "model=emoji_sd3", "textual.eta=1"], "textual.eta"),
        (["method=hardened", "model=emoji_xl", "method.edit=none", "textual.eta=1"], "textual.eta"),
    ],
)
def test_options_that_the_method_does_not_read_are_refused(argv: list[str], option: str) -> None:
    with pytest.raises(InputError, match=f"'{option}': expected none beside method="):
        checks.check_method_options(argv, CONFIGS)


def test_an_experiment_may_take_its_method_from_another(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("defaults: [{override /method: esd}]")
    (tmp_path / "two.yaml").write_text("defaults: [one, {override /model: sd14}, _self_]")
    assert checks.experiment_method(tmp_path, "two") == "esd"
    assert checks.experiment_method(CONFIGS / "experiment", "paper") is None


# Configurations.


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_file_says_all_of_its_options(name: str) -> None:
    """So that a reader sees the published defaults in one place, and tuned files name no others."""
    import dataclasses

    published = yaml.safe_load((cli.config_folder() / "method" / f"{name}.yaml").read_text())
    eraser = make_eraser(published)
    fields = {entry.name for entry in dataclasses.fields(eraser) if entry.init}  # type: ignore[arg-type]
    assert set(published) - {"name", "_target_"} <= fields
    tuned = cli.config_folder() / "method_tuning" / f"{name}_emoji.yaml"
    if tuned.is_file():
        values = yaml.safe_load(tuned.read_text())["method"]
        assert set(values) <= fields
        assert composed("train", "concept=violence", f"method={name}").method.items() >= values.items()
        other = composed("train", "concept=violence", f"method={name}", "model=sd15").method
        assert other == published


def test_trce_is_the_default_and_its_run_is_the_one_it_was() -> None:
    config = composed("train", "concept=violence")
    assert config.method == {"name": "trce"}
    assert config == composed("train", "concept=violence", "method=trce")
