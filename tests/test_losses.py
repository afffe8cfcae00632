"""Stage-2 losses: values by hand, the hinge's constant gradient, the distance to zero loss, precision."""

import pytest
import torch
from torch import Tensor

from trce_lightning.losses import (
    guided_prediction,
    hinge_active_fraction,
    needed_displacement,
    per_image,
    preserve_loss,
    pull_loss,
    relative_hinge,
    squared_distance,
    steering_hinge,
)

SHAPE = (3, 4, 5, 6)
CHW = 4 * 5 * 6


def randn(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def image(*pixels: float) -> Tensor:
    return torch.tensor(pixels).reshape(1, 1, 1, -1)


def test_values_by_hand() -> None:
    """The values are by hand. With ε̂ = (1, 1), f_s = (2, 0), f_u = (1, 3), means over two elements:

    ‖ε̂ − f_s‖² = (1 + 1) / 2 = 1;  ‖ε̂ − f_u‖² = (0 + 4) / 2 = 2;  their difference is −1, so
    margin 0.5 gives max(−0.5, 0) = 0 and margin 1.25 gives 0.25.
    Needed: RMS(f_s − f_u) = √((1 + 9) / 2) = √5, so 0.25 / (2 √5).
    Guided from (1, 1) to (2, 0) with β = 3: (1, 1) + 3 (1, −1) = (4, −2).
    """
    prediction, safe, unsafe = image(1, 1), image(2, 0), image(1, 3)
    assert squared_distance(prediction, safe).tolist() == [1.0]
    assert preserve_loss(prediction, unsafe).tolist() == [2.0]
    assert pull_loss(prediction, safe).tolist() == [1.0]
    assert steering_hinge(prediction, safe, unsafe, margin=0.5).tolist() == [0.0]
    assert steering_hinge(prediction, safe, unsafe, margin=1.25).tolist() == [0.25]
    assert needed_displacement(prediction, safe, unsafe, margin=0.5).tolist() == [0.0]
    needed = needed_displacement(prediction, safe, unsafe, margin=1.25)
    assert needed.item() == pytest.approx(0.25 / (2 * 5**0.5))
    assert guided_prediction(prediction, safe, beta=3.0).flatten().tolist() == [4.0, -2.0]
    assert hinge_active_fraction(torch.tensor([0.0, 0.1, 2.0, 0.0])).item() == 0.5


def test_one_value_per_image() -> None:
    a, b = randn(0), randn(1)
    distance = squared_distance(a, b)
    assert distance.shape == (3,)
    for row in range(3):
        torch.testing.assert_close(distance[row], torch.nn.functional.mse_loss(a[row], b[row]))


def test_hinge_is_the_difference_of_squared_distances() -> None:
    prediction, safe, unsafe = randn(0), randn(1), randn(2)
    difference = squared_distance(prediction, safe) - squared_distance(prediction, unsafe)
    assert difference.min() < 0.05 < difference.max() + 0.1
    for margin in (-0.1, 0.0, 0.1, 5.0):
        expected = (difference + margin).clamp_min(0)
        torch.testing.assert_close(steering_hinge(prediction, safe, unsafe, margin), expected)


def test_gradient_is_constant_where_active() -> None:
    beta, uncond, cond_safe, cond_malicious = 16.0, randn(0), randn(1), randn(2)
    safe, unsafe = (guided_prediction(uncond, cond, beta) for cond in (cond_safe, cond_malicious))
    expected = -2 * beta * (cond_safe - cond_malicious) / CHW
    for seed, scale in ((3, 1.0), (4, 100.0)):
        prediction = (scale * randn(seed)).requires_grad_()
        hinge = steering_hinge(prediction, safe, unsafe, margin=1e6)
        assert hinge_active_fraction(hinge) == 1
        (gradient,) = torch.autograd.grad(hinge.sum(), prediction)
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
        # The gradient of an attraction does depend on ε̂.
        (attraction,) = torch.autograd.grad(pull_loss(prediction, cond_safe).sum(), prediction)
        assert not torch.allclose(attraction, expected, atol=1e-2)

        inactive = steering_hinge(prediction, safe, unsafe, margin=-1e6)
        assert torch.autograd.grad(inactive.sum(), prediction)[0].abs().max() == 0


def test_needed_displacement_is_just_enough() -> None:
    margin, prediction = 3.0, randn(0).requires_grad_()
    safe, unsafe = randn(1), randn(2)
    hinge = steering_hinge(prediction, safe, unsafe, margin)
    assert (hinge > 0).all()
    (gradient,) = torch.autograd.grad(hinge.sum(), prediction)
    unit = -gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    needed = needed_displacement(prediction, safe, unsafe, margin)[:, None, None, None]
    assert steering_hinge(prediction + 1.0001 * needed * unit, safe, unsafe, margin).max() == 0
    assert steering_hinge(prediction + 0.999 * needed * unit, safe, unsafe, margin).min() > 0
    # Of equal length in any other direction it does not suffice.
    other = unit + 0.3 * randn(3)
    other = other / other.square().mean((1, 2, 3), keepdim=True).sqrt()
    assert steering_hinge(prediction + 1.0001 * needed * other, safe, unsafe, margin).min() > 0


@pytest.mark.parametrize("beta", [1.0, 3.0, 16.0])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_share_of_the_way_from_which_the_hinge_is_zero(beta: float, margin: float) -> None:
    """The docstring's s, on the line from ε_cm to ε_cs: just below it the hinge is active, just above not."""
    uncond, unsafe, safe = randn(0), randn(1), randn(2)
    targets = [guided_prediction(uncond, eps, beta) for eps in (safe, unsafe)]
    apart = squared_distance(safe, unsafe)
    longer = squared_distance(safe, uncond) - squared_distance(unsafe, uncond)
    share = 0.5 + (beta - 1) * longer / (2 * apart) + margin / (2 * beta * apart)

    def hinge(step: float) -> Tensor:
        way = per_image(share + step, safe)
        return steering_hinge(unsafe + way * (safe - unsafe), *targets, margin)

    assert (hinge(-0.01) > 0).all() and (hinge(0.01) == 0).all()


def test_the_relative_hinge_has_no_unit() -> None:
    """At β = 1 it is 1 − 2s + margin on the line, however far apart the two predictions are."""
    unsafe, safe = randn(1), randn(2)
    for size in (1.0, 1e-3):
        low, high = size * unsafe, size * safe
        for share, expected in ((0.0, 1.3), (0.25, 0.8), (0.65, 0.0), (1.0, 0.0)):
            found = relative_hinge(torch.lerp(low, high, share), high, low, margin=0.3)
            torch.testing.assert_close(found, torch.full((3,), expected), atol=1e-5, rtol=1e-5)
    prediction = randn(3).requires_grad_()
    hinge = relative_hinge(prediction, safe, safe, margin=0.3)
    hinge.sum().backward()
    assert hinge.tolist() == [0.0] * 3 and not prediction.grad.any()


def test_equal_safe_and_unsafe_leave_a_flat_hinge() -> None:
    same, prediction = randn(1), randn(0).requires_grad_()
    assert needed_displacement(prediction, same, same, margin=0.1).tolist() == [0, 0, 0]
    hinge = steering_hinge(prediction, same, same, margin=0.1)
    torch.testing.assert_close(hinge, torch.full((3,), 0.1))
    assert torch.autograd.grad(hinge.sum(), prediction)[0].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computed_in_float32(dtype: torch.dtype) -> None:
    a, b, c = (randn(seed).to(dtype) for seed in range(3))
    for loss, inputs in ((squared_distance, (a, b)), (preserve_loss, (a, b)), (pull_loss, (a, b))):
        assert loss(*inputs).dtype == torch.float32
        assert torch.equal(loss(*inputs), loss(*(x.float() for x in inputs)))
    for steering in (steering_hinge, needed_displacement):
        result = steering(a, b, c, 0.1)
        assert result.dtype == torch.float32
        assert torch.equal(result, steering(a.float(), b.float(), c.float(), 0.1))
    assert guided_prediction(a, b, 7.5).dtype == torch.float32
    if dtype != torch.float64:
        coarse = (a + 7.5 * (b - a)).float()
        assert not torch.equal(guided_prediction(a, b, 7.5), coarse)


def test_guidance_scale_per_image() -> None:
    """A [B] scale belongs to images, also where B equals the width and would broadcast along it."""
    uncond, cond = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    guided = guided_prediction(uncond, cond, torch.tensor([1.0, 3.0]))
    assert guided[0].unique().tolist() == [1.0]
    assert guided[1].unique().tolist() == [3.0]
    assert per_image(2.0, cond).shape == ()
    assert torch.equal(guided, guided_prediction(uncond, cond, torch.tensor([1.0, 3.0])[:, None, None, None]))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected tensors of one shape, got .*'b': \[1, 4, 5, 6\]"):
        squared_distance(randn(0), randn(1)[:1])
    with pytest.raises(ValueError, match="'safe'"):
        steering_hinge(randn(0), randn(1)[:1], randn(2), 0.1)
    with pytest.raises(ValueError, match="'eps_cond'"):
        guided_prediction(randn(0), randn(1)[:1], 2.0)
