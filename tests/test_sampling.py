"""One denoising step against diffusers' schedulers, step by step; noise and seeds."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import (
    PREDICTION_TYPES,
    Schedule,
    classifier_free_guidance,
    clean_and_eps,
    ddim_schedule,
    denoise_step,
    mix,
    noise,
    prediction_of,
)

SHAPE = (2, 4, 8, 8)
SEED_OF_DAGGER_0 = 3347987718963679620


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def ddim_scheduler(
    prediction_type: str, steps_offset: int, set_alpha_to_one: bool, num_steps: int
) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=steps_offset,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def schedule_of(scheduler: DDIMScheduler) -> Schedule:
    config = scheduler.config
    return ddim_schedule(
        scheduler.alphas_cumprod,
        scheduler.timesteps,
        config.prediction_type,
        set_alpha_to_one=config.set_alpha_to_one,
    )


@pytest.mark.parametrize("num_steps", [1, 7, 50])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_diffusers_ddim_step_by_step(
    prediction_type: str, steps_offset: int, set_alpha_to_one: bool, num_steps: int
) -> None:
    scheduler = ddim_scheduler(prediction_type, steps_offset, set_alpha_to_one, num_steps)
    schedule = schedule_of(scheduler)
    ours = theirs = randn(0)
    for step_index, timestep in enumerate(scheduler.timesteps):
        prediction = randn(step_index + 1)
        reference = scheduler.step(prediction, timestep, theirs)
        signal, sigma = schedule.signal[step_index], schedule.sigma[step_index]
        clean, _ = clean_and_eps(prediction, ours, signal, sigma, prediction_type)
        ours = denoise_step(prediction, ours, schedule, step_index)
        theirs = reference.prev_sample
        torch.testing.assert_close(clean, reference.pred_original_sample, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def flow_schedule(scheduler: FlowMatchEulerDiscreteScheduler) -> Schedule:
    """The levels of a scheduler of flow matching: a = 1 − σ, and each step arrives where the next begins."""
    sigma = scheduler.sigmas
    return Schedule(scheduler.timesteps, 1 - sigma[:-1], sigma[:-1], 1 - sigma[1:], sigma[1:], "flow")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_diffusers_flow_matching_step_by_step(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    schedule = flow_schedule(scheduler)
    ours = theirs = randn(0)
    for step_index, timestep in enumerate(scheduler.timesteps):
        prediction = randn(step_index + 1)
        ours = denoise_step(prediction, ours, schedule, step_index)
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    as_v = schedule._replace(prediction_type="v_prediction")
    wrong, right = (denoise_step(randn(1), randn(0), levels, 3) for levels in (as_v, schedule))
    assert not torch.allclose(wrong, right, atol=1e-2)


def test_comparison_with_diffusers_can_fail() -> None:
    scheduler = ddim_scheduler("epsilon", 1, False, 50)
    z_t, prediction = randn(0), randn(1)
    theirs = scheduler.step(prediction, 1, z_t).prev_sample
    last, before = schedule_of(scheduler), schedule_of(ddim_scheduler("v_prediction", 1, True, 50))
    torch.testing.assert_close(denoise_step(prediction, z_t, last, 49), theirs, atol=1e-6, rtol=1e-5)
    for wrong in (
        last._replace(next_signal=before.next_signal, next_sigma=before.next_sigma),
        last._replace(signal=last.next_signal, sigma=last.next_sigma),
        last._replace(prediction_type="v_prediction"),
    ):
        assert (denoise_step(prediction, z_t, wrong, 49) - theirs).abs().max() > 1e-3


def test_mix_equals_diffusers_with_one_timestep_per_image() -> None:
    scheduler = ddim_scheduler("epsilon", 0, False, 50)
    timesteps = torch.tensor([3, 800])
    signal, sigma = (
        level(scheduler.alphas_cumprod[timesteps]).sqrt() for level in (lambda a: a, lambda a: 1 - a)
    )
    theirs = scheduler.add_noise(randn(0), randn(1), timesteps)
    torch.testing.assert_close(mix(randn(0), randn(1), signal, sigma), theirs)
    four = (slice(None), None, None, None)
    torch.testing.assert_close(mix(randn(0), randn(1), signal[four], sigma[four]), theirs)
    assert not torch.allclose(mix(randn(0), randn(1), signal.flip(0), sigma.flip(0)), theirs)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_true_prediction_recovers_the_clean_latent(prediction_type: str) -> None:
    z_0, eps, sigma = randn(0), randn(1), torch.tensor([0.3, 0.8])
    signal = 1 - sigma if prediction_type == "flow" else (1 - sigma**2).sqrt()
    z_t = mix(z_0, eps, signal, sigma)
    predictions = {"epsilon": eps, "v_prediction": mix(eps, z_0, signal, -sigma), "flow": eps - z_0}
    found = prediction_of(z_0, eps, signal, sigma, prediction_type)
    torch.testing.assert_close(found, predictions[prediction_type])
    found = clean_and_eps(predictions[prediction_type], z_t, signal, sigma, prediction_type)
    for tensor, expected in zip(found, (z_0, eps), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-5)
    for other in set(PREDICTION_TYPES) - {prediction_type}:
        assert not torch.allclose(
            clean_and_eps(predictions[prediction_type], z_t, signal, sigma, other)[0], z_0, atol=1e-2
        )


def test_latents_are_float32_whatever_the_network_returns() -> None:
    low, schedule = randn(1).bfloat16(), schedule_of(ddim_scheduler("epsilon", 0, False, 50))
    z_prev = denoise_step(low, randn(0), schedule, 20)
    assert z_prev.dtype == torch.float32
    assert torch.equal(z_prev, denoise_step(low.float(), randn(0), schedule, 20))


def test_guidance() -> None:
    uncond, cond = torch.zeros(SHAPE), torch.ones(SHAPE)
    assert classifier_free_guidance(uncond, cond, guidance_scale=7.5).unique().tolist() == [7.5]
    assert torch.equal(classifier_free_guidance(randn(0), randn(0), 7.5), randn(0))


def test_noise_is_a_function_of_shape_and_seed() -> None:
    first = noise((4, 8, 8), seed=7)
    torch.manual_seed(0)
    expected_global = torch.randn(3)
    torch.manual_seed(0)
    assert torch.equal(noise((4, 8, 8), seed=7), first)
    assert torch.equal(torch.randn(3), expected_global)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    assert not torch.equal(noise((4, 8, 8), seed=8), first)
    assert torch.equal(noise((4, 8, 8), seed=7 + 2**32), first)
    big = noise((4, 64, 64), seed=seed_of("weapon-3", 1))
    assert abs(big.mean().item()) < 0.03
    assert abs(big.std().item() - 1) < 0.03


def test_seeds_are_stable_and_distinct() -> None:
    assert seed_of("dagger", 0) == SEED_OF_DAGGER_0
    seeds = {seed_of(f"{prompt}", sample) for prompt in range(100) for sample in range(20)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert seed_of("1", 11) != seed_of("11", 1)


def test_wrong_arguments_refused() -> None:
    schedule = schedule_of(ddim_scheduler("epsilon", 0, True, 50))
    with pytest.raises(ValueError, match=r"prediction_type must be one of .* got 'sample'"):
        prediction_of(randn(0), randn(1), 0.5, 0.5, "sample")
    with pytest.raises(ValueError, match=r"prediction_type must be one of .* got 'sample'"):
        denoise_step(randn(0), randn(1), schedule._replace(prediction_type="sample"), 0)
    for step_index in (-1, 50):
        with pytest.raises(ValueError, match=r"step_index must be in \[0, 50\)"):
            denoise_step(randn(0), randn(1), schedule, step_index)
