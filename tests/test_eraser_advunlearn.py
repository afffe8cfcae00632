"""AdvUnlearn: the attack attacks, and the text encoder alone learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import TUNED, Harness, batch_of

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.advunlearn import AdvUnlearn, with_inserted
from trce_lightning.errors import InputError


@pytest.fixture
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter(build_tiny_pipeline())


def advunlearn(**options: Any) -> AdvUnlearn:
    small = {"warmup": 1, "attack_steps": 2, "retain_batch_size": 2}
    return AdvUnlearn(**(TUNED | small | options))


def test_inserted_vectors_stand_after_the_start(adapter: StableDiffusionAdapter) -> None:
    """A token's own embedding, inserted, spells the prompt that has the token there."""
    ids = adapter.tokenize(["xa gun"])
    own = {"clip": adapter.embed(ids)["clip"][:, 1:2]}
    (found,) = with_inserted(adapter, ["a gun"], own).states.values()
    # "x" begins the word "xa" here, so the letter behind it is the same token as in "a gun".
    expected = adapter.encode(["xa gun"])
    torch.testing.assert_close(found, expected.states["clip"], atol=1e-5, rtol=1e-5)
    none = {"clip": own["clip"][:, :0]}
    text_alone = with_inserted(adapter, ["a gun"], none)
    torch.testing.assert_close(text_alone.states["clip"], adapter.encode(["a gun"]).states["clip"])
    assert torch.equal(text_alone.roles["clip"], adapter.encode(["a gun"]).roles["clip"])


def test_the_attack_lowers_its_own_loss_and_the_gradients_are_its_alone(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    eraser, harness = advunlearn(attack_lr=0.05), Harness(adapter, tmp_path)
    batch, module = batch_of(eraser, harness, 2), eraser.module(harness.job)
    module.setup("fit")
    rows = batch["erase"]
    prompts = [texts[0] for texts in rows["texts"]]

    def loss(steps: int) -> float:
        eraser.attack_steps = steps
        vectors = eraser.attack(module, batch)
        with torch.no_grad():
            found = adapter.predict(rows["z_t"], rows["timestep"], with_inserted(adapter, prompts, vectors))
        return float((found - rows["predictions"][:, 0]).square().mean())

    assert loss(40) < 0.8 * loss(0)
    assert all(p.grad is None for network in adapter.networks().values() for p in network.parameters())
    # The loss of training does reach the text encoder, and nothing else.
    sum(eraser.losses(module, batch).values()).backward()
    trained = module.trained["text_encoder"]
    assert all(p.grad is not None for p in trained.values())
    assert "embeddings.token_embedding.weight" not in trained
    assert all(p.grad is None for p in adapter.denoiser.parameters())


def test_a_prompt_without_room_for_the_attack_is_refused(
    adapter: StableDiffusionAdapter, tmp_path: Path
) -> None:
    eraser = advunlearn(tokens=27)
    with pytest.raises(InputError, match=r"method\.tokens: expected a prompt of at most 32 tokens"):
        eraser.ahead(Harness(adapter, tmp_path).job)
