"""Show why stage 2 moves what it moves: `python -m benchmarks.steering [--part PART …] [OPTION …]`.

The options are those of `train.py`. Each part prints a table with a line for each step of sampling.

- ``asked``: how far the predictions for the three prompts are apart, and how far along the line from ε(c_m)
  to ε(c_s) the hinge asks ε̂ to go before it is zero, for several β and margins. It needs the cached
  trajectories alone.
- ``decides``: which step decides what is drawn. The original network draws with c_m up to a step and with
  c_s from it on, and the other way round, and the pictures are judged.
- ``reached``: what training reaches, on the points that it was trained on: the displacement along that line
  and off it, as shares of the line, the fraction of active hinges before and after, and the norm of the
  hinge's gradient at the trainable parameters before.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fitting import compose
from trce_lightning.concepts import PromptPair, prompt_pairs
from trce_lightning.data.trajectories import load_rows
from trce_lightning.jobs.session import concepts_of
from trce_lightning.jobs.train import TrainingRun
from trce_lightning.losses import (
    guided_prediction,
    needed_displacement,
    relative_hinge,
    squared_distance,
    steering_hinge,
)
from trce_lightning.metrics.detectors import Detector
from trce_lightning.prompts.records import seed_of
from trce_lightning.sampling import classifier_free_guidance, denoise_step, noise
from trce_lightning.tokens import Text

PICTURES = 16
"""The number of pairs whose pictures are drawn."""
ROWS = 48
"""The largest number of points of a step that are compared."""
DETECTED = 0.5
"""The detector's probability from which a picture shows the concept."""
ASKED = ((1.0, 0.0), (1.0, 0.01), (3.0, 0.01), (16.0, 0.01))
"""β and margin of the hinges whose demands are compared."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rms(squares: Tensor) -> Tensor:
    """Return the root of the mean of squared distances."""
    return squares.mean().sqrt()


class Points:
    """The cached points of malicious trajectories, by step."""

    def __init__(self, run: TrainingRun) -> None:
        assert run.plan is not None
        self.run, self.adapter, self.config = run, run.adapter, run.config.trajectory
        rows = load_rows(run.plan, run.trajectory_folder, self.config.shard_size, "malicious")
        self.rows, self.steps = rows, sorted(set(rows["step_index"].tolist()))
        self.prompts = [row.pair.malicious for row in run.plan.malicious if row.pair]

    def of(self, step_index: int, limit: int | None = None) -> dict[str, Tensor]:
        """Return the first rows of a step."""
        chosen = (self.rows["step_index"] == step_index).nonzero().flatten()[:limit]
        return {name: values[chosen] for name, values in self.rows.items()}

    def asked(self) -> str:
        """Return the table of distances, and of the shares of the way that the hinge asks for."""
        header = ["step", "timestep", "c_m to ∅", "c_s to ∅", "c_s to c_m"]
        header += [f"asked: β {beta:g}, margin {margin:g}" for beta, margin in ASKED]
        lines = []
        for step_index in self.steps:
            rows = self.of(step_index)
            uncond, malicious, safe = (rows[kind] for kind in ("uncond", "malicious", "safe"))
            apart = rms(squared_distance(safe, malicious))
            distances = [rms(squared_distance(eps, uncond)) for eps in (malicious, safe)]
            cells = [f"{step_index}", f"{int(rows['timestep'][0])}"]
            cells += [f"{float(distance):.3f}" for distance in (*distances, apart)]
            for beta, margin in ASKED:
                f_safe, f_unsafe = (guided_prediction(uncond, eps, beta) for eps in (safe, malicious))
                needed = needed_displacement(malicious, f_safe, f_unsafe, margin)
                cells.append(f"{float(rms(needed.square()) / apart):.2f}")
            lines.append(cells)
        return table(header, lines)

    def predict(self, rows: dict[str, Tensor]) -> Tensor:
        """Return ε̂(z_t, c_m) of these rows."""
        text = self.adapter.encode([self.prompts[index] for index in rows["trajectory"].tolist()])
        return self.adapter.predict(rows["z_t"], rows["timestep"], text)

    def hinge(self, prediction: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """Return the configured hinge of these rows."""
        safe, unsafe = (
            guided_prediction(rows["uncond"], rows[kind], self.config.beta) for kind in ("safe", "malicious")
        )
        hinge = relative_hinge if self.config.relative_hinge else steering_hinge
        return hinge(prediction, safe, unsafe, self.config.margin)

    def gradient_norm(self, step_index: int) -> float:
        """Return the norm of the mean hinge's gradient at the trainable parameters."""
        parameters = list(self.adapter.trainable(self.config.trainable).values())
        for parameter in parameters:
            parameter.requires_grad_(True)
        rows = self.of(step_index, ROWS)
        gradients = torch.autograd.grad(self.hinge(self.predict(rows), rows).mean(), parameters)
        return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())

    def reached(self) -> str:
        """Train, and return the table of what it reaches."""
        norms = {step_index: self.gradient_norm(step_index) for step_index in self.steps}
        self.run.solve()
        self.run.fit()
        header = ["step", "reached", "off the line", "active before", "active after", "‖∇ hinge‖ before"]
        return table(
            header, [[*self._moved(step_index), f"{norms[step_index]:.2g}"] for step_index in self.steps]
        )

    @torch.no_grad()
    def _moved(self, step_index: int) -> list[str]:
        rows = self.of(step_index, ROWS)
        before, line = rows["malicious"], rows["safe"] - rows["malicious"]
        after = self.predict(rows)
        moved, length = after - before, line.square().flatten(1).mean(1)
        share = (moved * line).flatten(1).mean(1) / length
        off = rms((moved - share.view(-1, 1, 1, 1) * line).square()) / rms(length)
        active = [float((self.hinge(eps, rows) > 0).float().mean()) for eps in (before, after)]
        return [
            f"{step_index}",
            f"{float(share.mean()):.2f}",
            f"{float(off):.2f}",
            *(f"{100 * part:.0f} %" for part in active),
        ]


class Switches:
    """Pictures of the original network that change their prompt on the way."""

    def __init__(self, run: TrainingRun) -> None:
        config, adapter = run.config.trajectory, run.adapter
        every = [pair for rows in prompt_pairs(run.session.concepts).values() for pair in rows]
        pairs: list[PromptPair] = every[:: max(1, len(every) // PICTURES)][:PICTURES]
        self.adapter, self.scale = adapter, config.guidance_scale
        self.schedule = adapter.schedule(config.num_steps)
        self.empty = adapter.empty().expand(len(pairs))
        self.texts = {
            "malicious": adapter.encode([pair.malicious for pair in pairs]),
            "safe": adapter.encode([pair.safe for pair in pairs]),
        }
        self.start = torch.stack(
            [noise(adapter.latent_shape, seed_of("steering", index)) for index in range(len(pairs))]
        )
        detector = run.session.detector()
        assert detector is not None
        self.detector: Detector = detector

    def decides(self) -> str:
        """Return the table of the pictures that show the concept, by the step of the switch."""
        shares = [self._shares("malicious", "safe"), self._shares("safe", "malicious")]
        header = ["step", "c_m before it, c_s from it on", "c_s before it, c_m from it on"]
        return table(
            header,
            [
                [f"{step_index}", *(f"{100 * share:.0f} %" for share in both)]
                for step_index, both in enumerate(zip(*shares, strict=True))
            ],
        )

    @torch.no_grad()
    def _shares(self, first: str, then: str) -> list[float]:
        """Return the share of pictures with the concept, for a switch before each step and after the last."""
        found, before, num_steps = [], self.start, len(self.schedule.timesteps)
        for switch in range(num_steps + 1):
            z_t = before
            for step_index in range(switch, num_steps):
                z_t = self._step(z_t, step_index, then)
            found.append(float((self.detector(self.adapter.decode(z_t)) >= DETECTED).float().mean()))
            if switch < num_steps:
                before = self._step(before, switch, first)
        return found

    def _step(self, z_t: Tensor, step_index: int, kind: str) -> Tensor:
        text = Text.cat([self.empty, self.texts[kind]])
        output = self.adapter.predict(z_t.repeat(2, 1, 1, 1), self.schedule.timesteps[step_index], text)
        uncond, cond = output.chunk(2)
        guided = classifier_free_guidance(uncond, cond, self.scale)
        return denoise_step(guided, z_t, self.schedule, step_index)


PARTS: dict[str, Callable[[TrainingRun], str]] = {
    "asked": lambda run: Points(run).asked(),
    "decides": lambda run: Switches(run).decides(),
    "reached": lambda run: Points(run).reached(),
}


def main() -> None:
    """Print the tables."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="several are allowed; none: all")
    chosen, options = parser.parse_known_args()
    config = compose("concept=violence", "metrics.enabled=false", *options)
    with tempfile.TemporaryDirectory() as folder:
        config.cache = config.cache or str(Path(config.runs) / "cache")
        config.runs = folder
        run = TrainingRun(config, concepts_of(config))
        run.open()
        run.sample_trajectories()
        # Training changes the network, so its part is the last one.
        for part in [part for part in PARTS if part in (chosen.part or PARTS)]:
            with torch.autocast(
                run.adapter.device.type, torch.bfloat16, enabled="bf16" in run.trainer.precision
            ):
                text = PARTS[part](run)
            sys.stdout.write(f"{text}\n\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
