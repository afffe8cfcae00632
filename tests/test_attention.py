"""The precision of attention in a pass whose gradient is asked for, on a CPU under autocast."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from tiny_flow import build_flux, build_sd3
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trce_lightning.adapters import Adapter, adapter_of, attention
from trce_lightning.sampling import noise, seeded
from trce_lightning.tokens import Text

FAMILIES: dict[str, Callable[[], Any]] = {
    "unet": build_tiny_pipeline,
    "sd3": build_sd3,
    "flux": build_flux,
}
HALF = torch.autocast("cpu", torch.bfloat16)


@pytest.fixture(params=FAMILIES)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return adapter_of(FAMILIES[request.param]())


class Noted(TorchFunctionMode):
    """Note the types in which attention is computed within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            casts = torch.is_autocast_enabled("cpu")
            self.seen.add(torch.get_autocast_dtype("cpu") if casts else query.dtype)
        return func(*args, **(kwargs or {}))


def predicted(adapter: Adapter, text: Text) -> Tensor:
    z_t = noise((2, *adapter.latent_shape), seeded(0))
    return adapter.predict(z_t, torch.tensor([500, 500]), text)


def read(adapter: Adapter) -> Text:
    return adapter.encode(["a cat", "a dog"])


def gradient(adapter: Adapter, autocast: Any = HALF) -> Tensor:
    """Return the gradient of all weights that the prediction depends on."""
    weights = list(adapter.denoiser.requires_grad_(True).parameters())
    text = read(adapter)
    with autocast:
        loss = predicted(adapter, text).square().mean()
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([each.flatten().float() for each in found if each is not None])


def without_the_context(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(attention, "AttentionInFloat32", nullcontext)
        return gradient(adapter)


@pytest.mark.parametrize(
    ("context", "autocast", "dtype"),
    [
        (nullcontext, HALF, torch.float32),
        (torch.no_grad, HALF, torch.bfloat16),
        (torch.inference_mode, HALF, torch.bfloat16),
        (nullcontext, nullcontext(), torch.float32),
    ],
    ids=["gradients in half precision", "no gradients", "inference", "float32"],
)
def test_attention_is_in_float32_where_a_gradient_is_asked_for(
    adapter: Adapter, context: Any, autocast: Any, dtype: torch.dtype
) -> None:
    text = read(adapter)
    with Noted() as noted, context(), autocast:
        predicted(adapter, text)
    assert noted.seen == {dtype}


def test_the_gradient_is_as_near_to_that_of_float32(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, half = gradient(adapter), without_the_context(adapter, monkeypatch)
    exact = gradient(adapter, nullcontext())
    assert not ours.equal(half), "the context changes the pass"
    assert (ours - exact).norm() < 1.2 * (half - exact).norm()


def test_gradient_checkpointing_goes_without(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    half = without_the_context(adapter, monkeypatch)
    adapter.denoiser.train()
    adapter.denoiser.enable_gradient_checkpointing()
    assert gradient(adapter).equal(half)


def test_a_mask_of_truth_values_stays_one() -> None:
    query, mask = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16), torch.ones(3, 3, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(query.float(), query.float(), query.float(), attn_mask=mask)
    with HALF, attention.AttentionInFloat32():
        found = F.scaled_dot_product_attention(query, key=query, value=query, attn_mask=mask)
    assert found.equal(expected)
