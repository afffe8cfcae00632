"""Given latents, kept regions and noise in DDIM: images are those of diffusers' pipelines."""

import pytest
import torch
from conftest import build_tiny_pipeline
from diffusers import StableDiffusionInpaintPipeline

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate, generate_to, latents_after, network_steps
from trce_lightning.generation.variation import LatentStart, NoisyDdim, Variation
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.sampling import noise

RECORDS = (PromptRecord("a/0", "a dagger", seed=5), PromptRecord("a/1", "a rose", seed=6))
SETTINGS = {"guidance_scale": 4.0, "num_steps": 4}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def draw(adapter, variation, batch_size=2):
    return generate(adapter, RECORDS, batch_size=batch_size, variation=variation, **SETTINGS)


def drawn_by(pipeline, record, **options):
    images = pipeline(
        record.prompt, guidance_scale=4.0, num_inference_steps=4, output_type="pt", **options
    ).images
    return (images[0] * 255).round()


def by_id(values):
    return {record.id: value for record, value in zip(RECORDS, values, strict=True)}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_latents_after_a_step_are_the_pipelines_and_lead_to_its_image(prediction_type) -> None:
    pipeline = build_tiny_pipeline(prediction_type)
    adapter = StableDiffusionAdapter(pipeline)
    theirs: dict[int, torch.Tensor] = {}

    def keep(_, step, timestep, tensors):
        theirs[step + 1] = tensors["latents"].clone()
        return tensors

    image = drawn_by(
        pipeline,
        RECORDS[1],
        latents=noise(adapter.latent_shape, 6)[None],
        callback_on_step_end=keep,
    )
    before = adapter.network_evaluations
    ours = latents_after(adapter, RECORDS, [0, 1, 3], batch_size=1, **SETTINGS)
    assert adapter.network_evaluations - before == 2 * 2 * 3  # no step after the third
    assert torch.equal(ours[0][1], noise(adapter.latent_shape, 6))
    for step in (1, 3):
        assert torch.allclose(ours[step][1], theirs[step][0], atol=1e-4)
        variation = Variation(start=LatentStart(step, by_id(ours[step])))
        assert network_steps(adapter, 4, variation) == 4 - step
        before = adapter.network_evaluations
        images = draw(adapter, variation)
        assert adapter.network_evaluations - before == 2 * 2 * (4 - step)
        assert largest_difference(images[1], image) <= 1
    # At the last step the latents are decoded.
    clean = LatentStart(4, by_id(latents_after(adapter, RECORDS, [4], batch_size=2, **SETTINGS)[4]))
    assert largest_difference(draw(adapter, Variation(start=clean))[1], image) <= 1
    wrong = Variation(start=LatentStart(2, by_id(ours[3])))
    assert largest_difference(draw(adapter, wrong)[1], image) > 1


def test_a_kept_region_is_that_of_the_inpainting_pipeline(tiny_pipeline) -> None:
    adapter = StableDiffusionAdapter(tiny_pipeline)
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))
    known = adapter.encode_images(pictures)
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 3:7] = 1
    start = LatentStart(known=by_id(known), mask=by_id([mask, mask]))
    ours = draw(adapter, Variation(start=start))
    inpainting = StableDiffusionInpaintPipeline(**tiny_pipeline.components, requires_safety_checker=False)
    inpainting.set_progress_bar_config(disable=True)
    theirs = drawn_by(
        inpainting,
        RECORDS[1],
        image=known[1:],
        masked_image_latents=known[1:],
        mask_image=mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[None],
        latents=noise(adapter.latent_shape, 6)[None],
        height=16,
        width=16,
        strength=1.0,
    )
    assert largest_difference(ours[1], theirs) <= 1
    assert largest_difference(ours, draw(adapter, Variation())) > 1
    after = latents_after(adapter, RECORDS, [4], batch_size=2, variation=Variation(start=start), **SETTINGS)
    outside = (mask == 0).expand(2, 4, 8, 8)
    assert torch.equal(after[4][outside], known[outside])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_noise_in_ddim_is_that_of_the_pipeline(prediction_type, eta) -> None:
    pipeline = build_tiny_pipeline(prediction_type)
    adapter = StableDiffusionAdapter(pipeline)
    ours = draw(adapter, Variation(NoisyDdim({"a/0": (0.0, 1.0), "a/1": (eta, 1.0)})))
    generator = torch.Generator("cpu").manual_seed(6)
    theirs = drawn_by(pipeline, RECORDS[1], generator=generator, eta=eta)
    assert largest_difference(ours[1], theirs) <= 1
    usual = draw(adapter, Variation())
    assert largest_difference(ours[0], usual[0]) <= 1
    assert (largest_difference(ours[1], usual[1]) > 1) == (eta > 0)


def test_noise_above_ddpm_is_finite_and_each_images_own(tiny_adapter) -> None:
    variation = Variation(NoisyDdim({"a/0": (1.85, 1.04), "a/1": (1.34, 1.0)}))
    whole = draw(tiny_adapter, variation)
    assert largest_difference(draw(tiny_adapter, variation, batch_size=1), whole) <= 1
    weaker = Variation(NoisyDdim({"a/0": (1.85, 1.0), "a/1": (1.34, 1.0)}))
    assert largest_difference(draw(tiny_adapter, weaker)[0], whole[0]) > 1


def test_other_latents_are_another_folder_and_the_usual_ones_keep_their_name(tiny_adapter, tmp_path) -> None:
    # Scores are stored under a hash of this text.
    assert repr(Variation()) == (
        "Variation(scheduler=None, timestep_spacing=None, negative_prompt='', start=None, lora=None)"
    )
    assert Variation().meta() == {}
    latents = latents_after(tiny_adapter, RECORDS, [2], batch_size=2, **SETTINGS)[2]

    def fill(start):
        variation = Variation(start=start)
        return generate_to(tmp_path, tiny_adapter, RECORDS, batch_size=2, variation=variation, **SETTINGS)

    start = LatentStart(2, by_id(latents))
    assert fill(start) == 2 and fill(LatentStart(2, by_id(latents.clone()))) == 0
    for other in (LatentStart(2, by_id(latents + 1)), LatentStart(1, by_id(latents)), None):
        with pytest.raises(InputError, match=r"meta\.json: expected"):
            fill(other)
    noisy = NoisyDdim({"a/0": (1.0, 1.0)})
    assert repr(Variation(noisy)) != repr(Variation(NoisyDdim({"a/0": (1.0, 1.1)})))
    assert Variation(noisy).meta() == {"scheduler": repr(noisy)}


def test_latents_that_do_not_fit_are_refused(tiny_adapter) -> None:
    latents = torch.zeros(4, 8, 8)
    for expected, variation in (
        (r"variation\.start: expected latents .* 'a/1', got none", LatentStart(1, {"a/0": latents})),
        (
            r"variation\.start: .*\[4, 8, 8\].*\[4, 8, 9\]",
            LatentStart(1, by_id([latents, torch.zeros(4, 8, 9)])),
        ),
        (r"variation\.start: .*from 0 to 4, got 5", LatentStart(5, by_id([latents, latents]))),
    ):
        with pytest.raises(InputError, match=expected):
            draw(tiny_adapter, Variation(start=variation))
    with pytest.raises(InputError, match=r"variation\.scheduler.*DDPMScheduler"):
        draw(tiny_adapter, Variation("DDPMScheduler", start=LatentStart(0, by_id([latents, latents]))))
    with pytest.raises(InputError, match=r"variation\.scheduler.*'a/1'"):
        draw(tiny_adapter, Variation(NoisyDdim({"a/0": (1.0, 1.0)})))
