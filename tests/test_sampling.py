"""DDIM against diffusers' DDIMScheduler, step by step; noise and seeds."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import add_noise, classifier_free_guidance, ddim_step, noise, previous_alpha_bar

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


@pytest.mark.parametrize("num_steps", [1, 7, 50])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_equals_diffusers_step_by_step(
    prediction_type: str, steps_offset: int, set_alpha_to_one: bool, num_steps: int
) -> None:
    scheduler = ddim_scheduler(prediction_type, steps_offset, set_alpha_to_one, num_steps)
    alphas_cumprod, timesteps = scheduler.alphas_cumprod, scheduler.timesteps
    ours = theirs = randn(0)
    for step_index, timestep in enumerate(timesteps):
        prediction = randn(step_index + 1)
        alpha_bar_t = alphas_cumprod[timestep]
        alpha_bar_prev = previous_alpha_bar(alphas_cumprod, timesteps, step_index, set_alpha_to_one)
        reference = scheduler.step(prediction, timestep, theirs)
        clean = ddim_step(prediction, ours, alpha_bar_t, 1.0, prediction_type)
        ours = ddim_step(prediction, ours, alpha_bar_t, alpha_bar_prev, prediction_type)
        theirs = reference.prev_sample
        torch.testing.assert_close(clean, reference.pred_original_sample, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_comparison_with_diffusers_can_fail() -> None:
    scheduler = ddim_scheduler("epsilon", 1, False, 50)
    alphas_cumprod, z_t, prediction = scheduler.alphas_cumprod, randn(0), randn(1)
    theirs = scheduler.step(prediction, 1, z_t).prev_sample
    right = ddim_step(prediction, z_t, alphas_cumprod[1], alphas_cumprod[0], "epsilon")
    torch.testing.assert_close(right, theirs, atol=1e-6, rtol=1e-5)
    for wrong in (
        ddim_step(prediction, z_t, alphas_cumprod[1], 1.0, "epsilon"),
        ddim_step(prediction, z_t, alphas_cumprod[0], alphas_cumprod[0], "epsilon"),
        ddim_step(prediction, z_t, alphas_cumprod[1], alphas_cumprod[0], "v_prediction"),
    ):
        assert (wrong - theirs).abs().max() > 1e-3


def test_add_noise_equals_diffusers_with_one_timestep_per_image() -> None:
    scheduler = ddim_scheduler("epsilon", 0, False, 50)
    timesteps = torch.tensor([3, 800])
    alpha_bar_t = scheduler.alphas_cumprod[timesteps]
    theirs = scheduler.add_noise(randn(0), randn(1), timesteps)
    torch.testing.assert_close(add_noise(randn(0), randn(1), alpha_bar_t), theirs)
    torch.testing.assert_close(add_noise(randn(0), randn(1), alpha_bar_t[:, None, None, None]), theirs)
    assert not torch.allclose(add_noise(randn(0), randn(1), alpha_bar_t.flip(0)), theirs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_true_prediction_recovers_the_clean_latent(prediction_type: str) -> None:
    z_0, eps, alpha_bar_t = randn(0), randn(1), torch.tensor([0.9, 0.2])
    z_t = add_noise(z_0, eps, alpha_bar_t)
    signal, sigma = alpha_bar_t.sqrt()[:, None, None, None], (1 - alpha_bar_t).sqrt()[:, None, None, None]
    prediction = eps if prediction_type == "epsilon" else signal * eps - sigma * z_0
    clean = ddim_step(prediction, z_t, alpha_bar_t, 1.0, prediction_type)
    torch.testing.assert_close(clean, z_0, atol=1e-5, rtol=1e-5)
    z_prev = ddim_step(prediction, z_t, alpha_bar_t, 0.95, prediction_type)
    torch.testing.assert_close(z_prev, add_noise(z_0, eps, 0.95), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(z_prev, add_noise(z_0, eps, 0.9), atol=1e-2)


def test_latents_are_float32_whatever_the_network_returns() -> None:
    low = randn(1).bfloat16()
    z_prev = ddim_step(low, randn(0), 0.5, 0.6, "epsilon")
    assert z_prev.dtype == torch.float32
    assert torch.equal(z_prev, ddim_step(low.float(), randn(0), 0.5, 0.6, "epsilon"))


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
    with pytest.raises(ValueError, match=r"prediction_type must be one of .* got 'sample'"):
        ddim_step(randn(0), randn(1), 0.5, 0.6, "sample")
    timesteps = ddim_scheduler("epsilon", 0, True, 50).timesteps
    for step_index in (-1, 50):
        with pytest.raises(ValueError, match=r"step_index must be in \[0, 50\)"):
            previous_alpha_bar(torch.rand(1000), timesteps, step_index, True)
