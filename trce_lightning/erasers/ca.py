"""CA, concept ablation (arXiv 2303.13516): under the concept, the network predicts as for an anchor.

    min_θ ‖ε_θ(z_t, c, t) − ε(z_t, a, t)‖² + λ ‖ε_θ(z_t, a, t) − ε(z_t, a, t)‖²

a is the text with the safe counterpart, and z_t lies on a guided sampling run for a. This is the model-based
variant: the target is the original's prediction. In the second term the anchor keeps its own prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import NonNegative, OneOf
from trce_lightning.erasers.protocol import Job, denoiser_name
from trce_lightning.erasers.tuning import Batch, PromptEraser, Source, Tuning
from trce_lightning.erasers.weights import KINDS, weights_of
from trce_lightning.losses import squared_distance


@dataclass(kw_only=True)
class ConceptAblation(PromptEraser):
    """Map the concept to its anchor.

    Args:
        variant: the weights that train, as in ESD.
        preserve_weight: λ. 0 leaves the second term, and its evaluations, out.
    """

    variant: Annotated[str, OneOf(KINDS)] = "x_strict"
    preserve_weight: NonNegative = 1.0
    name: ClassVar[str] = "ca"
    title: ClassVar[str] = "concept ablation (arXiv 2303.13516)"

    def sources(self, job: Job) -> dict[str, Source]:
        """Return points on sampling runs for the anchors. Each belongs to a text that is erased."""
        pairs = self.erased_prompts(job)
        anchors, points = list(pairs.values()), self.iterations * self.batch_size
        walks = self.draw(job, "anchor", anchors, lambda anchor, _: (anchor,), points, taught=list(pairs))
        return {"anchor": Source(walks, self.batch_size)}

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return the variant's weights."""
        return {denoiser_name(adapter): weights_of(adapter, self.variant)}

    @property
    def evaluations_per_step(self) -> int:
        """Return the evaluations of a step: under the concept, and under the anchor if it is preserved."""
        return self.batch_size * (1 + (self.preserve_weight > 0))

    def weight_of(self, term: str) -> float:
        """Return λ for the anchor, else 1."""
        return self.preserve_weight if term == "preserve" else 1.0

    def factor_of(self, term: str) -> str:
        """Return λ's option."""
        return "preserve_weight"

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return both terms, from one forward pass."""
        rows = batch["anchor"]
        anchors = [texts[0] for texts in rows["texts"]]
        read = [*rows["taught"], *(anchors if self.preserve_weight else ())]
        times = len(read) // len(anchors)
        output = module.adapter.predict(
            rows["z_t"].repeat(times, 1, 1, 1), rows["timestep"].repeat(times), module.text(read)
        )
        target = rows["predictions"][:, 0]
        return {
            name: squared_distance(part, target).mean()
            for name, part in zip(("erase", "preserve"), output.split(len(anchors)), strict=False)
        }
