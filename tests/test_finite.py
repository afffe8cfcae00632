"""A model that gives NaN or infinity is refused by its name, and nothing is left of what it drew."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_configs import composed
from tiny_runs import cpu_trainer, plan_of, sample_plan, trajectory_config

from trce_lightning import cli
from trce_lightning.adapters import StableDiffusionAdapter, load_adapter
from trce_lightning.adapters.finite import Finite
from trce_lightning.config import checks
from trce_lightning.config.schema import ConceptConfig, DemoConfig, DeviceConfig, ModelConfig, OptimizerConfig
from trce_lightning.data.datamodule import TrajectoryDataModule
from trce_lightning.data.trajectories import load_rows, sample_missing
from trce_lightning.emoji.package import weights_folder
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate, generate_to
from trce_lightning.generation.variation import Start, Variation
from trce_lightning.jobs.demo import Demo
from trce_lightning.jobs.erase import train
from trce_lightning.jobs.evaluate import evaluate
from trce_lightning.module import TRCE
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.textual import pair_states

RECORDS = (PromptRecord("a/0", "a dagger"), PromptRecord("a/1", "a rose"))
CONFIG = trajectory_config()


def nan_in_a_row(weight: torch.Tensor) -> None:
    weight.data[0] = torch.nan


def beyond_float32(weight: torch.Tensor) -> None:
    """Finite weights whose sums are not."""
    weight.data.fill_(3e38)


def denoiser(adapter: StableDiffusionAdapter) -> torch.Tensor:
    return adapter.denoiser.conv_in.weight


def decoder(adapter: StableDiffusionAdapter) -> torch.Tensor:
    return adapter.vae.decoder.conv_out.weight


def text_encoder(adapter: StableDiffusionAdapter) -> torch.Tensor:
    (norm,) = (
        module for name, module in adapter.text_encoder.named_modules() if name.endswith("final_layer_norm")
    )
    return norm.weight


WHAT = {
    denoiser: "the denoiser's output in step 1 of",
    decoder: "the pixels that the autoencoder decodes",
    text_encoder: "the text states of '",
}
BREAKS = [
    (
        part,
        damage,
        WHAT[part] + (".*its tensors hold them" if damage is nan_in_a_row else ".*finite, but too large"),
    )
    for part in WHAT
    for damage in (nan_in_a_row, beyond_float32)
]
IDS = [f"{part.__name__}-{damage.__name__}" for part, damage, _ in BREAKS]
Part = Callable[[StableDiffusionAdapter], torch.Tensor]


@pytest.mark.parametrize(("part", "damage", "message"), BREAKS, ids=IDS)
def test_no_picture_is_left_of_what_is_not_finite(
    part: Part, damage: Callable[[torch.Tensor], None], message: str, tmp_path: Path
) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline(), name="the-model")
    options = {"guidance_scale": 4.0, "num_steps": 3, "batch_size": 2}
    generate_to(tmp_path / "sound", adapter, RECORDS, **options)
    assert len(list((tmp_path / "sound").glob("*.png"))) == 2
    damage(part(adapter))
    for scheduler in (None, "EulerDiscreteScheduler"):
        folder = tmp_path / str(scheduler)
        with pytest.raises(InputError, match=rf"expected finite numbers of 'the-model'.*{message}"):
            generate_to(folder, adapter, RECORDS, variation=Variation(scheduler=scheduler), **options)
        assert not list(folder.glob("*.png"))


def test_float16_that_overflows_is_told_from_damaged_weights(tmp_path: Path) -> None:
    build_tiny_pipeline().save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, dtype=torch.float16)
    adapter.vae.decoder.conv_out.weight.data.fill_(6e4)
    with pytest.raises(
        InputError, match=rf"'{tmp_path}'.*pixels.*float16 ends at 65504: try model\.dtype=float32"
    ):
        generate(adapter, RECORDS, guidance_scale=4.0, num_steps=1, batch_size=2)
    # Autocast to float16 is told as well, though the weights are float32.
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    adapter.denoiser.conv_out.weight.data.fill_(6e4)
    with pytest.raises(InputError, match=r"denoiser.*float16 ends at 65504: try trainer\.precision=32-true"):
        generate(
            adapter, RECORDS, guidance_scale=4.0, num_steps=1, batch_size=2, autocast_dtype=torch.float16
        )


def test_pictures_to_start_from_and_latents_are_looked_at(tmp_path: Path) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    with pytest.raises(InputError, match="latents that are decoded"):
        adapter.decode(torch.full((1, *adapter.latent_shape), torch.inf))
    generate_to(tmp_path, adapter, RECORDS, guidance_scale=4.0, num_steps=2, batch_size=2)
    nan_in_a_row(adapter.vae.encoder.conv_in.weight)
    variation = Variation(start=Start(tmp_path, 0.5))
    with pytest.raises(InputError, match="latents that the autoencoder makes of a picture"):
        generate(adapter, RECORDS, guidance_scale=4.0, num_steps=2, batch_size=2, variation=variation)


def test_one_look_reads_all_flags_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    look = Finite.check
    monkeypatch.setattr(Finite, "check", lambda self: (looks.append(len(self.seen)), look(self)))
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    generate(adapter, RECORDS, guidance_scale=4.0, num_steps=5, batch_size=2)
    assert looks == [2 * 5, 2]  # outputs and latents of all steps, then latents and pixels


@pytest.mark.parametrize(("part", "damage", "message"), BREAKS, ids=IDS)
def test_no_trajectory_is_left_of_what_is_not_finite(
    part: Part, damage: Callable[[torch.Tensor], None], message: str, tmp_path: Path
) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline(), name="the-model")
    damage(part(adapter))
    if part is decoder:  # which no trajectory needs
        sample_plan(adapter, CONFIG, tmp_path)
        return
    with pytest.raises(InputError, match=rf"'the-model'.*{message}"):
        sample_missing(cpu_trainer(tmp_path), adapter, plan_of(CONFIG), tmp_path / "cache", CONFIG.shard_size)
    assert not list((tmp_path / "cache").iterdir())


def test_stage_1_refuses_states_that_are_not_finite() -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    g = int(adapter.tokenize(["a gun"])["clip"][0, 2])  # one token a character
    adapter.text_encoder.get_input_embeddings().weight.data[g] = torch.nan
    pairs = plan_of(CONFIG).malicious
    with pytest.raises(InputError, match=r"text states of '[^']*gun[^']*'"):
        pair_states(adapter, adapter.streams()["context"], [row.pair for row in pairs if row.pair], ["eot"])


def damaged_rows(adapter: StableDiffusionAdapter, folder: Path) -> Path:
    sample_plan(adapter, CONFIG, folder)
    file = sorted(folder.glob("malicious*.safetensors"))[1]
    rows = load_file(file)
    rows["safe"][0, 0, 0, 0] = torch.nan
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    save_file(rows, file, metadata)
    return file


def test_cached_rows_that_are_not_finite_are_named(
    tiny_adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    file = damaged_rows(tiny_adapter, tmp_path)
    with pytest.raises(InputError, match=rf"{file}: expected finite trajectories.*'safe'; delete it"):
        load_rows(plan_of(CONFIG), tmp_path, CONFIG.shard_size, "malicious")
    file.unlink()
    sample_plan(tiny_adapter, CONFIG, tmp_path)
    assert load_rows(plan_of(CONFIG), tmp_path, CONFIG.shard_size, "malicious")


def fit(adapter: StableDiffusionAdapter, folder: Path, lr: float = 1e-3, **options: float) -> None:
    config = trajectory_config(**options)
    module = TRCE(adapter, None, config, OptimizerConfig(lr=lr))
    data = TrajectoryDataModule(adapter, plan_of(CONFIG), folder, config, seed=0)
    cpu_trainer(folder, epochs=config.epochs).fit(module, data)


def test_training_blames_what_is_the_cause(tmp_path: Path) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline(), name="the-model")
    sample_plan(adapter, CONFIG, tmp_path)
    with pytest.raises(InputError, match=r"trajectory\.beta: .* before the optimizer's first step.* 1e\+30"):
        fit(adapter, tmp_path, beta=1e30)
    with pytest.raises(InputError, match=r"optimizer\.lr: expected finite losses, got nan at step 1 "):
        fit(adapter, tmp_path, lr=1e37)
    # The epoch's only step: its weights are looked at, since no loss follows.
    adapter = StableDiffusionAdapter(build_tiny_pipeline(), name="the-model")
    weight = next(iter(adapter.trainable("*.to_q").values())).requires_grad_(True)
    weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    with pytest.raises(InputError, match=r"optimizer\.lr: expected finite weights.* at step 1 with 0\.001"):
        fit(adapter, tmp_path, batch_size=8, epochs=1)
    adapter = StableDiffusionAdapter(build_tiny_pipeline(), name="the-model")
    nan_in_a_row(denoiser(adapter))
    with pytest.raises(
        InputError, match=r"'the-model'.*the denoiser's output before the optimizer's first step"
    ):
        fit(adapter, tmp_path)


SMALL = (
    "concept=violence",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "metrics.final_images_per_set=2",
    "model.num_inference_steps=2",
)


@pytest.mark.parametrize("part", WHAT)
def test_commands_refuse_the_embedded_model_with_a_row_of_nan(part: Part, tmp_path: Path) -> None:
    adapter = load_adapter(weights_folder())
    nan_in_a_row(part(adapter))
    model = tmp_path / "model"
    adapter.pipeline.save_pretrained(model)
    places = [f"model.path={model}", f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
    few = [
        f"trajectory.{name}=1"
        for name in ("num_trajectories", "num_unconditional", "num_steps", "early_steps")
    ]
    training = composed("train", *SMALL, *places, "experiment=smoke", "metrics.images_per_set=2", *few)
    for config, command in ((composed("eval", *SMALL, *places), evaluate), (training, train)):
        checks.check(config)
        with pytest.raises(InputError, match=rf"'{model}'.*{WHAT[part]}") as caught:
            command(config)
        assert cli.explain(caught.value) is not None  # shown as a sentence, with exit code 2
        assert not list(tmp_path.rglob("*.png"))


def test_the_demo_refuses_it_too(tmp_path: Path) -> None:
    adapter = load_adapter(weights_folder())
    nan_in_a_row(denoiser(adapter))
    adapter.pipeline.save_pretrained(tmp_path)
    model = ModelConfig("emoji", path=str(tmp_path), resolution=64, num_inference_steps=2)
    model.domain = "trce_lightning.emoji.domain.EmojiDomain"
    trainer = DeviceConfig(accelerator="cpu", devices=1, precision="32-true", enable_progress_bar=False)
    concept = {"violence": ConceptConfig("violence", {"a dagger": "a rose"})}
    demo = Demo(DemoConfig(concept=concept, model=model, trainer=trainer))
    with pytest.raises(InputError, match=rf"'{tmp_path}'.*denoiser's output in step 1 of 2"):
        demo.draw("a dagger", 7, 2.0, 2)
