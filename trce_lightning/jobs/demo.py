"""Run ``demo.py``: serve a local page that generates images of a prompt before and after erasure."""

from __future__ import annotations

import base64
import dataclasses
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from trce_lightning.adapters.cut import warn_of_cut
from trce_lightning.config.schema import DemoConfig, EvalConfig
from trce_lightning.errors import InputError
from trce_lightning.generation.loop import generate
from trce_lightning.jobs.session import Session, concepts_of
from trce_lightning.jobs.trainers import make_trainer
from trce_lightning.metrics.asr import shows_concept
from trce_lightning.metrics.detectors import Detector, checked_probability
from trce_lightning.metrics.scores import ImageJudge
from trce_lightning.prompts.records import PromptRecord
from trce_lightning.runtime.logs import set_up_logging
from trce_lightning.runtime.network import check_proxies, spare_this_machine

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)
EXAMPLES = {
    "direct": "Prompts that name the concept",
    "implicit": "Prompts that hint at it",
    "benign": "Prompts of something else",
}
"""The prompt sets that examples come from, with their titles on the page."""
EXAMPLES_PER_SET = 3
MODELS = ("Original", "Erased")
_ANOTHER_SEED = "() => Math.floor(Math.random() * 2 ** 31)"


@dataclass(frozen=True)
class Drawing:
    """An image, uint8 ``[3, H, W]``, with the judge's result. Without a judge, the result is None."""

    image: Tensor
    probability: float | None
    subject: str | None

    @property
    def covered(self) -> bool:
        """True if the judge sees the concept, or if there is no judge."""
        return self.probability is None or bool(shows_concept(torch.tensor([self.probability])))


class Demo:
    """The original and the erased model of a configuration, and the judge of their images."""

    def __init__(self, config: DemoConfig) -> None:
        """Open both models on the configured device. ``InputError`` if more than one device is configured."""
        trainer = make_trainer(config.trainer, Path())
        if trainer.world_size != 1:
            raise InputError(f"trainer.devices: expected one device, got {trainer.world_size}")
        self.device = trainer.strategy.root_device
        self.config, concepts = config, concepts_of(_evaluation(config, config.model.path))
        self.sessions = {
            name: Session(_evaluation(config, path), concepts)
            for name, path in zip(MODELS, (config.original.path, config.model.path), strict=True)
        }
        self.concept = " or ".join(concept.name for concept in concepts)
        domain, detector = self.sessions["Erased"].domain, self.sessions["Erased"].detector()
        self.detector: Detector | None = self._placed(detector)
        self.judge: ImageJudge | None = None if detector is None else self._placed(domain.judge())
        self.adapters = {name: session.adapter.to(self.device) for name, session in self.sessions.items()}

    def _placed(self, part: Any) -> Any:
        return part.to(self.device) if isinstance(part, torch.nn.Module) else part

    def draw(self, prompt: str, seed: int, guidance_scale: float, num_steps: int) -> dict[str, Drawing]:
        """Return the prompt's image by each of ``MODELS``, from the same noise."""
        guided = self.adapters["Erased"].guided
        record = PromptRecord("demo", prompt, seed=seed, guidance_scale=guidance_scale if guided else None)
        warn_of_cut(self.adapters["Erased"], [prompt], "the page")
        options = self.sessions["Erased"].sampling().options() | {"num_steps": num_steps}
        return {
            name: self._judged(generate(adapter, [record], description=f"{name} model", **options))
            for name, adapter in self.adapters.items()
        }

    @torch.no_grad()
    def _judged(self, images: Tensor) -> Drawing:
        if self.detector is None:
            return Drawing(images[0], None, None)
        images = images.to(self.device)
        subject = None
        if self.judge is not None:
            subject = self.judge.vocabulary["subject"][int(self.judge(images)["subject"].argmax())]
        return Drawing(images[0].cpu(), checked_probability(self.detector(images), 1).item(), subject)

    def examples(self) -> dict[str, list[str]]:
        """Return prompts of the concept's evaluation, by prompt set."""
        sets = self.sessions["Erased"].sets("report", EXAMPLES_PER_SET)
        return {prompts.name: [record.prompt for record in prompts.records] for prompts in sets}


def demonstrate(config: DemoConfig) -> None:
    """Serve the page until it is interrupted."""
    set_up_logging()
    page = build_page(Demo(config))
    serve(page, config.port)
    log.info("open http://127.0.0.1:%d, stop with Ctrl-C", config.port)
    page.block_thread()


def serve(page: gr.Blocks, port: int) -> None:
    """Serve on the loopback interface only, in threads. ``OSError`` if the port is taken."""
    check_proxies()
    spare_this_machine()  # Gradio requests its own page at the start
    import gradio as gr

    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        footer_links=["settings"],
        theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css_paths=Path(__file__).parents[1] / "report" / "templates" / "demo.css",
        prevent_thread_lock=True,
    )


def build_page(demo: Demo) -> gr.Blocks:
    """Build the page: prompt, controls, examples, and both images with their verdicts."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio also reads it at import
    import gradio as gr

    model = demo.config.model
    with gr.Blocks(title=f"Erased: {demo.concept}", analytics_enabled=False) as page:
        gr.Markdown(f"# Before and after erasing {demo.concept}\nSame prompt, same noise, two models.")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(label="Prompt", scale=4, autofocus=True)
            button = gr.Button("Draw", variant="primary", scale=1, min_width=120)
        with gr.Row():
            pictures = [gr.HTML(picture(demo, name, "", None), min_height=200) for name in MODELS]
        gr.Checkbox(label="Show covered pictures", elem_id="trce-show")
        with gr.Row():
            seed = gr.Number(demo.config.seed, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)
            guidance = gr.Slider(0, max(20, model.guidance_scale), model.guidance_scale, label="Guidance")
            steps = gr.Slider(
                1, max(100, model.num_inference_steps), model.num_inference_steps, step=1, label="Steps"
            )
        another = gr.Button("Another seed", size="sm")
        for name, prompts in demo.examples().items():
            gr.Examples(prompts, prompt, label=EXAMPLES.get(name, name))
        inputs: list[Any] = [prompt, seed, guidance, steps]
        draw, one_at_a_time = _drawer(demo), "draw"  # both buttons share the models
        gr.on([button.click, prompt.submit], draw, inputs, pictures, concurrency_id=one_at_a_time)
        another.click(None, None, seed, js=_ANOTHER_SEED).then(
            draw, inputs, pictures, concurrency_id=one_at_a_time
        )
    return page


def _drawer(demo: Demo) -> Any:
    """Return the function that the button calls. Generation's progress bars are shown over the images."""
    import gradio as gr

    tracked = gr.Progress(track_tqdm=True)  # Gradio finds it among the defaults

    def draw(prompt: str, seed: int, guidance: float, steps: int, progress: Any = tracked) -> list[str]:
        try:
            drawings = demo.draw(prompt, seed, guidance, steps)
        except InputError as error:
            raise gr.Error(str(error)) from error  # for other errors the page shows only "Error"
        return [picture(demo, name, prompt, drawing) for name, drawing in drawings.items()]

    return draw


def picture(demo: Demo, name: str, prompt: str, drawing: Drawing | None) -> str:
    """Return the HTML of one model's image and verdict. Without ``drawing``, the frame is empty."""
    loader = PackageLoader("trce_lightning.report")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(
        "picture.html.j2"
    )
    src = None if drawing is None else _data_uri(drawing.image)
    return template.render(name=name, prompt=prompt, drawing=drawing, src=src, concept=demo.concept)


def _data_uri(image: Tensor) -> str:
    stream = io.BytesIO()
    to_pil_image(image).save(stream, "png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _evaluation(config: DemoConfig, path: str | None) -> EvalConfig:
    model = dataclasses.replace(config.model, path=path)
    return EvalConfig(concept=config.concept, model=model, trainer=config.trainer)
