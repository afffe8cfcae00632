"""ESD, Erased Stable Diffusion (arXiv 2303.07345): the prediction for a concept moves away from it.

    min_θ ‖ε_θ(z_t, c, t) − (ε(z_t, g, t) − η (ε(z_t, c, t) − ε(z_t, ∅, t)))‖²

ε is the original network. z_t lies on a guided sampling run for c. g is the guide: ∅, as in the paper, or the
text with the safe counterpart. η = 1 is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor, nn

from trce_lightning.adapters import Adapter
from trce_lightning.config.schema import NonNegative, OneOf
from trce_lightning.erasers.protocol import Job, denoiser_name
from trce_lightning.erasers.teachers import EMPTY
from trce_lightning.erasers.tuning import Batch, PromptEraser, Source, Tuning
from trce_lightning.erasers.weights import KINDS, weights_of
from trce_lightning.losses import squared_distance


def esd_target(guide: Tensor, concept: Tensor, empty: Tensor, eta: float) -> Tensor:
    """Return ε(g) − η (ε(c) − ε(∅)), all ``[B, C, H, W]``."""
    return guide - eta * (concept - empty)


@dataclass(kw_only=True)
class ESD(PromptEraser):
    """Erase by negative guidance.

    Args:
        variant: the weights that train: cross-attention ``x``, its K and V ``x_strict``, all else ``u``,
            everything ``all``, or self-attention ``self``.
        eta: η, the strength of the negative guidance.
    """

    variant: Annotated[str, OneOf(KINDS)] = "x"
    eta: NonNegative = 1.0
    name: ClassVar[str] = "esd"
    title: ClassVar[str] = "ESD (arXiv 2303.07345)"

    def sources(self, job: Job) -> dict[str, Source]:
        """Return points on sampling runs for the texts to erase."""
        pairs = self.erased_prompts(job)
        points = self.iterations * self.batch_size

        def texts(prompt: str, _: int) -> tuple[str, ...]:
            return prompt, EMPTY, pairs[prompt]

        return {"erase": Source(self.draw(job, "erase", list(pairs), texts, points), self.batch_size)}

    def trained(self, adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
        """Return the variant's weights."""
        return {denoiser_name(adapter): weights_of(adapter, self.variant)}

    def losses(self, module: Tuning, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared distance from the target."""
        rows = batch["erase"]
        concept, empty, guide = rows["predictions"].unbind(1)
        predicted = module.adapter.predict(rows["z_t"], rows["timestep"], module.text(rows["taught"]))
        target = esd_target(guide, concept, empty, self.eta)
        return {"erase": squared_distance(predicted, target).mean()}
