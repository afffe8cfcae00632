"""Every option of the command lines: its type, its default and the values it takes. Torch-free.

Those of an evaluation alone are in :mod:`~trce_lightning.config.evaluation_schema`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from trce_lightning.concepts.defaults import DEFAULT_TEMPLATES, KINDS
from trce_lightning.prompts.files import PromptFileConfig
from trce_lightning.prompts.records import BENIGN, DIRECT, IMPLICIT, MIXED, NEIGHBOURS, UNERASED

POSITIONS = ("sot", "keyword", "eot", "padding")
STAGES = ("textual", "trajectory")
EXPECTED = ("source", "asr", "fid", "clip_score")
EXPORTS = ("pipeline", "delta", "single_file")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
SAMPLERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "DDPMScheduler",
)
SPACINGS = ("leading", "linspace", "trailing")
TIMESTEPS = 1000
"""Of every supported model's noise schedule: no sampler takes more steps."""


def option(
    default: Any,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field together with the values that `trce_lightning.config.option_checks` accepts for it.

    `choices` holds for each item of a list; `at_least` and `at_most` are inclusive, `above` and
    `below` are not.
    """
    metadata = {
        "choices": choices,
        "at_least": at_least,
        "at_most": at_most,
        "above": above,
        "below": below,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ConceptConfig:
    """What to erase. `terms` maps each malicious term to its safe counterpart."""

    name: str = MISSING
    terms: dict[str, str] = field(default_factory=dict)
    wordings: dict[str, list[str]] = field(default_factory=dict)  # term → other words for it
    templates: list[str] | None = None  # each with one {}; null: those of the kind
    neighbours: list[str] = option([])  # benign lookalikes that must survive
    related: list[str] = option([])  # further phrases that name the concept
    unrelated: list[str] = option([])  # phrases in which its words mean something else
    classes: list[str] = option([])  # ImageNet's and COCO's class names that show it, beside its terms
    kind: str = option("subject", choices=KINDS)
    source: str = "unstated"

    def __post_init__(self) -> None:
        if self.templates is None:
            self.templates = list(DEFAULT_TEMPLATES.get(self.kind, ()))


@dataclass
class ModelConfig:
    """A text-to-image pipeline: `path` goes before `hub_id`; neither means the one that `domain` ships."""

    name: str = MISSING
    path: str | None = None  # folder in diffusers' format, or a checkpoint in one .safetensors file
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None  # of a single file: folder or hub id of its pipeline; null: hub_id
    resolution: int = option(512, at_least=8)  # pixels
    dtype: str = option("float32", choices=("float32", "float16", "bfloat16"))
    channels_last: bool = False  # memory layout of denoiser and decoder: NHWC, faster or slower by device
    guidance_scale: float = option(7.5, at_least=0)  # of evaluation images
    num_inference_steps: int = option(50, at_least=1, at_most=TIMESTEPS)  # of evaluation images
    sampler: str | None = option(None, choices=SAMPLERS)  # of them: diffusers' name; null: DDIM
    timestep_spacing: str | None = option(None, choices=SPACINGS)  # of that sampler; null: the model's own
    domain: str | None = None  # dotted name of a class of evaluation.domain.Domain; null: any pictures
    judge: str | None = None  # dotted name of a detector class, "clip" (zero-shot); null: the domain's own
    judge_options: dict[str, Any] = field(default_factory=dict)  # what that class takes beside the concepts
    clip: str | None = None  # CLIP for CLIP-S: folder or hub id
    inception: str | None = None  # file of Inception's weights for FID, of torch-fidelity
    real_images: str | None = None  # folder of real images for FID, or a statistics file


@dataclass
class TextualConfig:
    """Stage 1, textual semantic erasure in closed form."""

    eta: float = option(1.0, at_least=0)  # weight of the kept states
    ridge: float = option(1e-3, at_least=0)  # lambda, weight of staying at W
    positions: list[str] = option(["eot"], choices=POSITIONS)
    keep_eot_weight: float = option(1.0, at_least=0)  # of kept prompts' first EoT, beside all their positions
    empty_prompt_weight: float = option(1.0, at_least=0)
    safe_weight: float = option(1.0, at_least=0)
    keep_prompts: str | None = None  # captions: text, CSV or COCO's JSON; or hub:OWNER/NAME/FILE


@dataclass
class TrajectoryConfig:
    """Stage 2, denoising trajectory steering."""

    num_trajectories: int = option(100, at_least=1)  # malicious
    num_unconditional: int = option(100, at_least=1)
    num_steps: int = option(50, at_least=1, at_most=TIMESTEPS)  # of sampling
    early_steps: int = option(25, at_least=1)  # how many first steps are used
    guidance_scale: float = option(3.0, at_least=0)  # of sampling
    beta: float = option(16.0, above=0)  # of the targets; 1 is the conditional prediction itself
    margin: float = option(0.01, at_least=0)  # mean squared difference per element
    uncond_hinge_weight: float = option(0.0, at_least=0)
    preserve_weight: float = option(100.0, at_least=0)
    pull_weight: float = option(0.0, at_least=0)
    batch_size: int = option(4, at_least=1)
    unconditional_per_malicious: int = option(4, at_least=0)
    draws_per_epoch: int = option(1, at_least=1)  # steps of each malicious trajectory
    epochs: int = option(3, at_least=1)
    trainable: str = "*.to_q"  # fnmatch pattern of module names
    shard_size: int = option(16, at_least=1)  # trajectories a file
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass
    offload: bool = False  # text encoder and decoder wait on the CPU while an epoch trains


@dataclass
class OptimizerConfig:
    name: str = option("adamw", choices=OPTIMIZERS)
    lr: float = option(1e-5, above=0)
    weight_decay: float = option(0.01, at_least=0)
    betas: list[float] = option([0.9, 0.999], at_least=0, below=1)


@dataclass
class ScoresConfig:
    final_images_per_set: int = option(512, at_least=1)
    samples_per_prompt: int = option(1, at_least=1)  # images of each prompt, from different noise
    batch_size: int = option(32, at_least=1)


@dataclass
class MetricsConfig(ScoresConfig):
    enabled: bool = True
    images_per_set: int = option(64, at_least=1)  # after each epoch


@dataclass
class DeviceConfig:
    """The part of Lightning's Trainer options that training and evaluation share."""

    accelerator: str = "auto"
    devices: Any = "auto"  # a count, a list of indices, or auto
    num_nodes: int = option(1, at_least=1)
    strategy: str = "auto"
    precision: str = option("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed"))
    enable_progress_bar: bool = True


@dataclass
class TrainerConfig(DeviceConfig):
    """Lightning's Trainer options, under Lightning's names."""

    gradient_clip_val: float | None = option(None, above=0)
    accumulate_grad_batches: int = option(1, at_least=1)
    log_every_n_steps: int = option(10, at_least=1)


@dataclass
class LoggerConfig:
    """CSV is always written; these come beside it."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "trce-lightning"
    init_timeout: float = option(15.0, above=0)  # seconds until W&B goes offline


@dataclass
class TrainConfig:
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: list[str] = option(list(STAGES), choices=STAGES)
    textual: TextualConfig = field(default_factory=TextualConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: int = option(0, at_least=0)
    checkpoint_minutes: float = option(10.0, above=0)  # while training, beside each epoch's end
    previous: str | None = None  # an earlier run's folder
    output: str | None = None  # folder of this run; null: RUNS/concept/model/start time
    runs: str = "runs"
    cache: str | None = None  # folder; null: beside the runs
    export: list[str] = option(["pipeline"], choices=EXPORTS)
    # What others report, shown beside what is measured: source, asr (set → rate), fid, clip_score.
    expected: dict[str, Any] = field(default_factory=dict)
    plan: bool = False  # say what is ahead and stop
    fresh: bool = False  # never continue an unfinished run


@dataclass
class OriginalConfig:
    """The model before erasure."""

    path: str | None = None  # folder in diffusers' format; null: the model that `model` names itself


@dataclass
class DemoConfig:
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    original: OriginalConfig = field(default_factory=OriginalConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)
    seed: int = option(0, at_least=0)
    port: int = option(7860, at_least=1)  # of 127.0.0.1


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
