"""Other samplers, negative prompts, image-to-image and LoRAs: images are those of diffusers' pipelines."""

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file
from torchvision.transforms.v2.functional import to_pil_image

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.config.schema import SAMPLERS, SPACINGS
from trce_lightning.generation.image_folder import write_png
from trce_lightning.generation.loop import generate, generate_to, network_steps, planned_evaluations
from trce_lightning.generation.lora import Lora, lora_applied
from trce_lightning.generation.variation import Start, Variation
from trce_lightning.prompts.records import PromptRecord

RECORDS = (PromptRecord("a/0", "a dagger", seed=5), PromptRecord("a/1", "a rose", seed=6))
SETTINGS = {"guidance_scale": 4.0, "num_steps": 4}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def drawn_by(pipeline, record, **options):
    """Return what a user of diffusers gets from this seed."""
    images = pipeline(
        record.prompt,
        generator=torch.Generator("cpu").manual_seed(record.seed),
        guidance_scale=4.0,
        num_inference_steps=4,
        output_type="pt",
        **options,
    ).images
    return (images[0] * 255).round()


def of_folder(scheduler, name, folder):
    """Return the scheduler of another class that a saved pipeline gives: its settings are all written out."""
    scheduler.save_pretrained(folder)
    return getattr(diffusers, name).from_pretrained(folder)


def draw(adapter, variation, **changes):
    return generate(adapter, RECORDS, **{"batch_size": 2, **SETTINGS, **changes}, variation=variation)


@pytest.fixture(scope="module")
def usual(tiny_adapter):
    return draw(tiny_adapter, Variation())


def test_the_samplers_are_those_that_take_ddims_settings() -> None:
    compatible = {kind.__name__ for kind in DDIMScheduler().compatibles}
    # The one's noise is not of an image's generator, and the other has no noise schedule of a thousand steps.
    unusable = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
    # Consistency samplers take the settings, though diffusers declares nothing.
    assert set(SAMPLERS) == compatible - unusable | {"LCMScheduler", "TCDScheduler"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_scheduler_draws_what_its_pipeline_does(tiny_pipeline, usual, name, tmp_path) -> None:
    adapter = StableDiffusionAdapter(tiny_pipeline)
    ours = draw(adapter, Variation(scheduler=name))
    counted = adapter.network_evaluations
    assert counted == planned_evaluations(RECORDS, network_steps(adapter, 4, Variation(scheduler=name)), 4.0)
    tiny_pipeline.scheduler = of_folder(tiny_pipeline.scheduler, name, tmp_path)
    theirs = drawn_by(tiny_pipeline, RECORDS[1])
    assert largest_difference(ours[1], theirs) <= 1
    # Euler's step in σ is DDIM's.
    is_ddim = name in ("DDIMScheduler", "EulerDiscreteScheduler")
    assert (largest_difference(usual[1], theirs) > 1) != is_ddim


@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_are_placed_as_asked(tiny_pipeline, usual, spacing) -> None:
    adapter = StableDiffusionAdapter(tiny_pipeline)
    assert tiny_pipeline.scheduler.config.timestep_spacing == "leading"
    variation = Variation(scheduler="DDIMScheduler", timestep_spacing=spacing)
    ours = draw(adapter, variation)
    tiny_pipeline.scheduler = DDIMScheduler.from_config(
        tiny_pipeline.scheduler.config, timestep_spacing=spacing
    )
    assert largest_difference(ours[1], drawn_by(tiny_pipeline, RECORDS[1])) <= 1
    assert (largest_difference(ours, usual) > 1) == (spacing != "leading")


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "UniPCMultistepScheduler"]
)
def test_its_noise_and_memory_are_each_images_own(tiny_adapter, name) -> None:
    variation = Variation(scheduler=name)
    whole = draw(tiny_adapter, variation)
    assert largest_difference(draw(tiny_adapter, variation, batch_size=1), whole) <= 1
    last = generate(tiny_adapter, RECORDS[1:], batch_size=1, variation=variation, **SETTINGS)
    assert largest_difference(last[0], whole[1]) <= 1


def test_a_negative_prompt_takes_the_empty_ones_place(tiny_pipeline) -> None:
    adapter = StableDiffusionAdapter(tiny_pipeline)
    ours = draw(adapter, Variation(negative_prompt="ugly"))
    assert largest_difference(ours, draw(adapter, Variation())) > 1
    for record, image in zip(RECORDS, ours, strict=True):
        assert largest_difference(image, drawn_by(tiny_pipeline, record, negative_prompt="ugly")) <= 1


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        (None, "epsilon"),
        (None, "v_prediction"),
        ("HeunDiscreteScheduler", "epsilon"),
        ("EulerAncestralDiscreteScheduler", "v_prediction"),
    ],
)
def test_image_to_image_is_that_of_the_pipeline(tmp_path, name, prediction_type) -> None:
    pipeline = build_tiny_pipeline(prediction_type)
    adapter = StableDiffusionAdapter(pipeline)
    generate_to(tmp_path, adapter, RECORDS, batch_size=2, **SETTINGS)
    start = Start(tmp_path, 0.5)
    variation = Variation(scheduler=name, start=start)
    counted = adapter.network_evaluations
    ours = draw(adapter, variation)
    planned = planned_evaluations(RECORDS, network_steps(adapter, 4, variation), 4.0)
    assert adapter.network_evaluations - counted == planned
    theirs = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    if name is not None:
        theirs.scheduler = of_folder(pipeline.scheduler, name, tmp_path / "scheduler")
    # As latents, since the pipeline draws from the posterior where we take its mean.
    latents = adapter.encode_images(start.images(RECORDS, adapter.side))
    expected = drawn_by(theirs, RECORDS[1], image=latents[1:], strength=0.5)
    assert largest_difference(ours[1], expected) <= 1
    weaker = drawn_by(theirs, RECORDS[1], image=latents[1:], strength=0.25)
    assert largest_difference(ours[1], weaker) > 1


def test_pictures_are_encoded_as_the_pipeline_does_and_a_file_is_cut_square(tiny_adapter, tmp_path) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pixels = torch.cat([VaeImageProcessor().preprocess(to_pil_image(image)) for image in images])
    vae = tiny_adapter.vae
    expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(tiny_adapter.encode_images(images), expected, atol=1e-5)
    wide = torch.cat([torch.zeros(3, 16, 8), torch.full((3, 16, 16), 200), torch.zeros(3, 16, 8)], dim=2)
    write_png(tmp_path / "wide.png", wide.to(torch.uint8))
    cut = Start(tmp_path / "wide.png", 0.5).images(RECORDS, 16)
    assert cut.shape == (2, 3, 16, 16) and (cut == 200).all()
    (tmp_path / "wide.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"robustness\.picture.*wide\.png"):
        Start(tmp_path / "wide.png", 0.5).images(RECORDS, 16)


def test_what_can_not_be_is_refused(tiny_adapter, tmp_path) -> None:
    for expected, variation, changes in (
        (r"sampler: expected one of .*DDPM", Variation(scheduler="NoScheduler"), {}),
        (r"robustness\.strengths.* 0\.2 of", Variation(start=Start(tmp_path, 0.2)), {}),
        (r"num_inference_steps.*1000.*1001", Variation(), {"num_steps": 1001}),
    ):
        with pytest.raises(ValueError, match=expected):
            draw(tiny_adapter, variation, **changes)


def test_a_folder_resumes_and_refuses_another_variation(tiny_adapter, tmp_path) -> None:
    picture = tmp_path / "picture.png"
    write_png(picture, torch.zeros(3, 16, 16, dtype=torch.uint8))
    variation = Variation("EulerAncestralDiscreteScheduler", "linspace", "ugly", Start(picture, 0.5))

    def fill(variation):
        return generate_to(
            tmp_path / "x", tiny_adapter, RECORDS, batch_size=2, variation=variation, **SETTINGS
        )

    assert fill(variation) == 2
    first = tmp_path / "x" / "00000.png"
    before = first.read_bytes()
    first.unlink()
    assert fill(variation) == 1 and first.read_bytes() == before
    for other in (
        replace(variation, scheduler="DDPMScheduler"),
        replace(variation, timestep_spacing=None),
        replace(variation, negative_prompt="bad"),
        replace(variation, start=Start(picture, 0.75)),
        Variation(),
    ):
        with pytest.raises(ValueError, match=r"meta\.json: expected"):
            fill(other)
    write_png(picture, torch.ones(3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r'meta\.json: expected "pictures"'):
        fill(variation)


def save_lora(folder: Path) -> StableDiffusionPipeline:
    """Weights of rank 2 for a tiny pipeline's queries, and that pipeline with W + ½ BA."""
    peft = pytest.importorskip("peft")
    pipeline = build_tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pipeline.unet.add_adapter(
            peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
        )
    weights = peft.utils.get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    merged = build_tiny_pipeline()
    for name, module in merged.unet.named_modules():
        if name.endswith("to_q"):
            module.weight.data += 0.5 * weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    return merged


def test_a_lora_is_added_at_its_scale_and_leaves_no_trace(tmp_path) -> None:
    merged = StableDiffusionAdapter(save_lora(tmp_path))
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    before, usual = adapter.fingerprint(), draw(adapter, Variation())
    lora = Lora(str(tmp_path), 0.5)
    with_lora = draw(adapter, Variation(lora=lora))
    assert largest_difference(with_lora, draw(merged, Variation())) <= 1
    assert largest_difference(with_lora, usual) > 1
    assert adapter.fingerprint() == before
    assert not any(parameter.requires_grad for parameter in adapter.denoiser.parameters())
    assert torch.equal(draw(adapter, Variation()), usual)
    with lora_applied(adapter, lora):
        assert adapter.fingerprint() != before


def test_a_lora_of_another_model_is_refused(tmp_path) -> None:
    pytest.importorskip("peft")
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    before = adapter.fingerprint()
    for name, weights in {
        "nowhere": {
            "unet.nowhere.lora_A.weight": torch.ones(2, 16),
            "unet.nowhere.lora_B.weight": torch.ones(16, 2),
        },
        "prior": {
            "prior.to_q.lora_A.weight": torch.ones(2, 16),
            "prior.to_q.lora_B.weight": torch.ones(16, 2),
        },
    }.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(weights, file)
        with (
            pytest.raises(ValueError, match=rf"robustness\.lora.*{name}"),
            lora_applied(adapter, Lora(str(file))),
        ):
            pass
        assert adapter.fingerprint() == before
