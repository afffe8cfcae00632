"""CA: the network learns the anchor's prediction under the concept's prompt, on the anchor's way."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny_pipeline
from eraser_jobs import TUNED, Harness, batch_of

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.erasers.ca import ConceptAblation
from trce_lightning.losses import squared_distance

ANCHORS = {"a gun": "a kite", "an axe": "a hat"}


@pytest.mark.parametrize("preserve_weight", [0.0, 2.0])
def test_both_terms_are_distances_to_the_anchors_prediction(preserve_weight: float, tmp_path: Path) -> None:
    adapter = StableDiffusionAdapter(build_tiny_pipeline())
    eraser = ConceptAblation(**(TUNED | {"guide": "counterpart", "preserve_weight": preserve_weight}))
    harness = Harness(adapter, tmp_path)
    batch, module = batch_of(eraser, harness), eraser.module(harness.job)
    rows, before = batch["anchor"], adapter.network_evaluations
    assert [texts[0] for texts in rows["texts"]] == [ANCHORS[prompt] for prompt in rows["taught"]]
    with torch.no_grad():
        terms = eraser.losses(module, batch)
        assert adapter.network_evaluations - before == eraser.evaluations_per_step
        under = [
            adapter.predict(rows["z_t"], rows["timestep"], adapter.encode(prompts))
            for prompts in (rows["taught"], [ANCHORS[prompt] for prompt in rows["taught"]])
        ]
    target = rows["predictions"][:, 0]
    assert set(terms) == ({"erase", "preserve"} if preserve_weight else {"erase"})
    torch.testing.assert_close(terms["erase"], squared_distance(under[0], target).mean())
    assert terms["erase"] > 1e-6
    if preserve_weight:
        assert terms["preserve"] < 1e-8 and eraser.weight_of("preserve") == 2
    assert eraser.weight_of("erase") == 1
