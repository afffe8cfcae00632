"""Both stages of TRCE written anew from the formulas, in float64, prompt by prompt and row by row."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from published_models import states_of
from tiny_runs import KEEP_PROMPTS, WEAPONS, cpu_trainer, sample_plan, stage1_statistics, trajectory_config
from torch import Tensor

from trce_lightning.adapters import StableDiffusionAdapter
from trce_lightning.config.schema import OptimizerConfig, TextualConfig
from trce_lightning.data.datamodule import TrajectoryDataModule
from trce_lightning.data.plan import TrajectoryPlan
from trce_lightning.data.trajectories import load_rows
from trce_lightning.module import TRCE

TEXTUAL = TextualConfig(eta=0.5, ridge=1.0, keep_eot_weight=2.0, empty_prompt_weight=0.5, safe_weight=0.25)
TRAJECTORY = trajectory_config(
    num_trajectories=2,
    num_unconditional=2,
    num_steps=4,
    early_steps=2,
    batch_size=2,
    unconditional_per_malicious=1,
    draws_per_epoch=1,
    epochs=1,
    uncond_hinge_weight=0.5,
    pull_weight=2.0,
)


class EditByHand:
    """W' = (mean W e_s e_mᵀ + η Σ w_k W e_k e_kᵀ + λ W)(mean e_m e_mᵀ + η Σ w_k e_k e_kᵀ + λ I)⁻¹ of every W.

    e_m and e_s are the states of a pair at their first end of text. e_k, with weights w_k that sum to 1:
    every position of the padded prompts to keep (1), their first end of text, every position of the empty
    prompt, and the safe prompts' first end of text, each kind as one mean with ``TEXTUAL``'s weight.
    """

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.malicious, self.safe = (
            self._ends(pipeline, [getattr(pair, side) for pair in WEAPONS.pairs()])
            for side in ("malicious", "safe")
        )
        every = np.concatenate([states_of(pipeline, prompt)[0].numpy() for prompt in KEEP_PROMPTS])
        kinds = [
            (1.0, every),
            (TEXTUAL.keep_eot_weight, self._ends(pipeline, KEEP_PROMPTS)),
            (TEXTUAL.empty_prompt_weight, states_of(pipeline, "")[0].numpy()),
            (TEXTUAL.safe_weight, self.safe),
        ]
        total = sum(weight for weight, _ in kinds)
        self.kept = np.concatenate([rows for _, rows in kinds])
        self.weights = np.concatenate(
            [np.full(len(rows), weight / total / len(rows)) for weight, rows in kinds]
        )

    @staticmethod
    def _ends(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> np.ndarray:
        found = [states_of(pipeline, prompt) for prompt in prompts]
        return np.stack([states[end].numpy() for states, end in found])

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W' of every W by name, in float64; each is a solution of its own, of which one call finds all."""
        kept = self.kept * self.weights[:, None]
        left = []
        for w in (weight.double().numpy() for weight in weights.values()):
            moved = (self.safe @ w.T).T @ self.malicious / len(self.malicious)
            left.append(moved + TEXTUAL.eta * (self.kept @ w.T).T @ kept + TEXTUAL.ridge * w)
        right = self.malicious.T @ self.malicious / len(self.malicious) + TEXTUAL.eta * self.kept.T @ kept
        right += TEXTUAL.ridge * np.eye(len(right))
        found = torch.from_numpy(np.linalg.solve(right.T, np.concatenate(left).T).T)
        return dict(zip(weights, found.split([len(rows) for rows in left]), strict=True))


def worst_edit(by_hand: EditByHand, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Largest ‖found − expected‖ / ‖expected − W‖ of the edited matrices ``before``."""
    expected = by_hand(before)
    errors = [
        (after[name] - expected[name]).norm() / (expected[name] - w).norm() for name, w in before.items()
    ]
    return float(max(errors))


@torch.no_grad()
def losses_by_hand(unet: UNet2DConditionModel, empty: Tensor, batch: dict[str, Tensor]) -> float:
    """L_erase(c_m) + w_∅ L_erase(∅) + λ_p L_preserve + w_pull L_pull of a batch, sums in float64.

    The hinge of ∅ leaves out the first step; ‖·‖² is the mean over C, H, W.
    """

    def predict(kind: str, row: int, states: Tensor) -> Tensor:
        z_t, timestep = batch[f"{kind}_z_t"][row][None], batch[f"{kind}_timestep"][row]
        return unet(z_t.to(unet.dtype), timestep, states.to(unet.dtype)[None]).sample[0].double()

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b.double()).square().mean())

    erase, uncond, pull, preserve = [], [], [], []
    for row in range(len(batch["malicious_z_t"])):
        base, unsafe, safe = (
            batch[f"malicious_{kind}"][row].double() for kind in ("uncond", "malicious", "safe")
        )
        f_safe, f_unsafe = (base + TRAJECTORY.beta * (kind - base) for kind in (safe, unsafe))
        steered = predict("malicious", row, batch["malicious_text"].states["clip"][row])
        erase.append(max(distance(steered, f_safe) - distance(steered, f_unsafe) + TRAJECTORY.margin, 0.0))
        pull.append(distance(steered, safe))
        uncond.append(0.0)
        if batch["malicious_step_index"][row] > 0:
            free = predict("malicious", row, empty)
            uncond[-1] = max(distance(free, f_safe) - distance(free, f_unsafe) + TRAJECTORY.margin, 0.0)
    for row in range(len(batch["unconditional_z_t"])):
        preserve.append(distance(predict("unconditional", row, empty), batch["unconditional_uncond"][row]))
    terms = [(1.0, erase), (TRAJECTORY.uncond_hinge_weight, uncond)]
    terms += [(TRAJECTORY.preserve_weight, preserve), (TRAJECTORY.pull_weight, pull)]
    return math.fsum(weight * math.fsum(values) / len(values) for weight, values in terms)


class Losses(pl.Callback):
    """The loss of every step, beside the one by hand of the same weights; those that got a gradient."""

    def __init__(self, empty: Tensor, dtype: torch.dtype) -> None:
        self.empty, self.dtype = empty, dtype
        self.by_hand: list[float] = []
        self.found: list[float] = []
        self.with_gradient: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        unet = pl_module.denoiser
        if self.dtype != unet.dtype:
            copy = UNet2DConditionModel.from_config(unet.config).to(self.dtype).eval()
            copy.load_state_dict(unet.state_dict())
            unet = copy
        self.by_hand.append(losses_by_hand(unet, self.empty, batch))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.with_gradient |= {
            name for name, p in pl_module.denoiser.named_parameters() if p.grad is not None
        }

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(float(outputs["loss"]))


@torch.no_grad()
def worst_cached_prediction(adapter: StableDiffusionAdapter, plan: TrajectoryPlan, folder: Path) -> float:
    """Largest difference of a cached prediction from the network's own at its (z_t, t) and prompt."""
    rows = load_rows(plan, folder, TRAJECTORY.shard_size, "malicious")
    worst = 0.0
    for row, index in enumerate(rows["trajectory"].tolist()):
        pair = next(trajectory.pair for trajectory in plan.malicious if trajectory.index == index)
        for kind, prompt in {"uncond": "", "malicious": pair.malicious, "safe": pair.safe}.items():
            states = states_of(adapter.pipeline, prompt)[0].float()[None]
            found = adapter.denoiser(rows["z_t"][row][None], rows["timestep"][row], states).sample[0]
            worst = max(worst, float((found - rows[kind][row]).abs().max()))
    return worst


def erase_by_both_stages(
    pipeline: StableDiffusionPipeline, folder: Path, *, resolution: int, dtype: torch.dtype
) -> tuple[TRCE, Losses, float]:
    """Sample, solve and fit as ``train.py`` does; the module, its losses, :func:`worst_cached_prediction`."""
    adapter = StableDiffusionAdapter(pipeline, resolution=resolution)
    losses = Losses(states_of(pipeline, "")[0], dtype)
    plan = sample_plan(adapter, TRAJECTORY, folder)
    worst = worst_cached_prediction(adapter, plan, folder)
    edit = stage1_statistics(adapter, TEXTUAL).solve(TEXTUAL)
    module = TRCE(adapter, edit, TRAJECTORY, OptimizerConfig(lr=1e-3, weight_decay=0.0))
    data = TrajectoryDataModule(adapter, plan, folder, TRAJECTORY, seed=0)
    cpu_trainer(folder, callbacks=(losses,)).fit(module, data)
    return module, losses, worst
