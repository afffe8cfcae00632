"""Options of an evaluation: its prompts, and the further uses that each model is scored in. Torch-free."""

from dataclasses import dataclass, field

from trce_lightning.data.prompt_sets import BENIGN, DIRECT, IMPLICIT, MIXED, NEIGHBOURS, UNERASED
from trce_lightning.schema import (
    SAMPLERS,
    TIMESTEPS,
    ConceptConfig,
    DeviceConfig,
    ModelConfig,
    ScoresConfig,
    option,
)

CONCEPT_SETS = (DIRECT, IMPLICIT, BENIGN)
OWN_SETS = (*CONCEPT_SETS, MIXED, UNERASED, NEIGHBOURS)
PLACES = ("early", "late")
MISSPELLINGS = ("swap", "drop", "double")


@dataclass
class RobustnessConfig:
    """Other uses of a model, each scored by itself: one for each item of the lists that are not empty."""

    images_per_set: int = option(128, at_least=1)  # the first of metrics.final_images_per_set
    sets: list[str] = option(list(CONCEPT_SETS), choices=CONCEPT_SETS)
    # Of every condition; enough for any of the samplers.
    num_inference_steps: int = option(20, at_least=1, at_most=TIMESTEPS)
    samplers: list[str] = option([], choices=SAMPLERS)  # diffusers' names, in place of model.sampler
    guidance_scales: list[float] = option([], at_least=0)
    steps: list[int] = option([], at_least=1, at_most=TIMESTEPS)
    negative_prompts: list[str] = option([])  # {safe}: the concept's safe counterparts
    strengths: list[float] = option([], above=0, at_most=1)  # image-to-image, share of the steps
    picture: str | None = None  # that image-to-image starts from; null: what the original drew of each prompt
    lora: list[str] = option([])  # files or folders of LoRAs, each on top of the model
    lora_scale: float = 1.0
    long_prompts: list[str] = option([], choices=PLACES)  # where the prompt stands in its filler
    filler: list[str] = option([])  # benign phrases
    misspellings: list[str] = option([], choices=MISSPELLINGS)  # of the words that name the concept


@dataclass
class PromptFileConfig:
    """A prompt file: `path` goes before `filename` of the Hub's data set `hub_id`."""

    path: str | None = None
    hub_id: str | None = None
    filename: str | None = None
    revision: str | None = None
    sha256: str | None = None  # that the file must have
    columns: dict[str, list[str]] = field(default_factory=dict)  # field → names of its column


@dataclass
class EvalConfig:
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    models: list[str] = option([])  # folders of further pipelines, compared with `model` on equal noise
    sets: list[str] = option(list(CONCEPT_SETS), choices=OWN_SETS)  # of the concept's own
    prompts: list[str] = option([])  # CSV files; NAME or NAME:FILE of a published set
    detectors: list[str] = option([])  # dotted names of class detectors, whose scores are stored by image
    metrics: ScoresConfig = field(default_factory=ScoresConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)
    output: str | None = None
    runs: str = "runs"
    cache: str | None = None
    published: dict[str, PromptFileConfig] = field(default_factory=dict)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
