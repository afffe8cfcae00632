"""The options of the command lines: types, defaults and allowed values. The module imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, get_args

from annotated_types import Ge, Gt, Interval, IsFinite, Len
from omegaconf import MISSING

from trce_lightning.concepts.defaults import DEFAULT_TEMPLATES, KINDS
from trce_lightning.prompts.files import PromptFileConfig
from trce_lightning.prompts.phrasings import Split
from trce_lightning.prompts.records import (
    BENIGN,
    DIRECT,
    IMPLICIT,
    MIXED,
    NEIGHBOURS,
    SCENES,
    UNERASED,
    WORDINGS,
)
from trce_lightning.prompts.variants import MISSPELLINGS

Item = TypeVar("Item")
POSITIONS = ("sot", "keyword", "eot", "padding")
FORMS = ("ridge", "null_space", "projection")
"""The closed forms of stage 1."""
MATRICES = ("key", "value")
STREAMS = ("context", "pooled")
"""The kinds of matrices that read text states."""
STAGES = ("textual", "trajectory")
SCHEDULES = ("constant", "cosine")
EXPORTS = ("pipeline", "delta", "single_file")
ALL = "all"
"""The name that stands for all methods."""
GUIDANCES = ("sld", "sld_max", "safree")
"""The rules of guidance of the leaderboard."""
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
    "LCMScheduler",
    "TCDScheduler",
)
FLOW_SAMPLERS = ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
"""The samplers of models of flow matching. The first is their own."""
SPACINGS = ("leading", "linspace", "trailing")
OWN_NEVER_LEARNT = "domain"
"""The value of ``never_learnt`` that stands for the model which the domain ships."""
TIMESTEPS = 1000
"""The number of timesteps of every supported model's noise schedule. No sampler takes more steps."""


def items(*defaults: Item) -> list[Item]:
    """Return a field of a dataclass whose default is a list."""
    return field(default_factory=lambda: list(defaults))


@dataclass(frozen=True)
class OneOf:
    """An annotation that limits a text to some names. OmegaConf doesn't support ``Literal``."""

    names: Sequence[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema for a literal of the names."""
        from pydantic_core.core_schema import literal_schema

        return literal_schema(list(self.names))


# OmegaConf reads the type in such an annotation, and pydantic reads its limits: see `checks.check_values`.
Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Steps = Annotated[int, Interval(ge=1, le=TIMESTEPS)]
Finite = IsFinite[float]
NonNegative = Annotated[Finite, Ge(0)]
Positive = Annotated[Finite, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Sampler = Annotated[str, OneOf((*SAMPLERS, FLOW_SAMPLERS[0]))]


@dataclass
class ConceptConfig:
    """The concept to erase. `terms` maps each malicious term to its safe counterpart."""

    name: str = MISSING
    terms: dict[str, str] = field(default_factory=dict)
    wordings: dict[str, list[str]] = field(default_factory=dict)  # term → other words for it
    templates: list[str] | None = None  # each has one {}; null: the templates of the kind
    neighbours: list[str] = items()  # benign lookalikes that must survive
    related: list[str] = items()  # further phrases that name the concept
    aliases: list[str] = items()  # other names of the terms, for the prompt set alias
    descriptions: list[str] = items()  # phrases that describe it without its words, for the set description
    translations: dict[str, list[str]] = field(default_factory=dict)  # language → its names there
    unrelated: list[str] = items()  # phrases in which its words mean something else
    classes: list[str] = items()  # ImageNet's and COCO's class names that show it, beside its terms
    kind: Annotated[str, OneOf(KINDS)] = "subject"
    source: str = "unstated"

    def __post_init__(self) -> None:
        if self.templates is None:
            self.templates = list(DEFAULT_TEMPLATES.get(self.kind, ()))


@dataclass
class ModelConfig:
    """A text-to-image pipeline. `path` replaces `hub_id`. If both are null, `domain` provides one."""

    name: str = MISSING
    path: str | None = None  # folder in diffusers' format, or a checkpoint in one .safetensors file
    hub_id: str | None = None
    revision: str | None = None
    config: str | None = None  # for a single file: folder or hub id of its pipeline; null: hub_id
    resolution: Annotated[int, Ge(8)] = 512  # pixels
    dtype: Annotated[str, OneOf(("float32", "float16", "bfloat16"))] = "float32"
    # of a T5 encoder, in tokens; an edit holds for one length; null: as diffusers' pipeline; no T5: null
    max_sequence_length: Annotated[int, Interval(ge=8, le=512)] | None = None
    channels_last: bool = False  # memory layout NHWC of denoiser and decoder; its speed depends on the device
    guidance_scale: NonNegative = 7.5  # for evaluation images
    num_inference_steps: Steps = 50  # for evaluation images
    sampler: Sampler | None = None  # for evaluation images: diffusers' name; null: DDIM
    timestep_spacing: Annotated[str, OneOf(SPACINGS)] | None = None  # of that sampler; null: the model's own
    domain: str | None = None  # dotted name of a class of evaluation.domain.Domain; null: any pictures
    judge: str | None = None  # dotted name of a detector class, or "clip" (zero-shot); null: the domain's own
    judge_options: dict[str, Any] = field(default_factory=dict)  # further arguments of that class
    clip: str | None = None  # folder or hub id of the CLIP model for CLIP-S
    inception: str | None = None  # file of torch-fidelity's Inception weights for FID
    real_images: str | None = None  # folder of real images for FID, or a statistics file


@dataclass
class TextualConfig:
    """The options of stage 1, textual semantic erasure in closed form."""

    form: Annotated[str, OneOf(FORMS)] = "ridge"
    matrices: Annotated[list[Annotated[str, OneOf(MATRICES)]], Len(1)] = items(*MATRICES)  # that are edited
    streams: Annotated[list[Annotated[str, OneOf(STREAMS)]], Len(1)] = items(*STREAMS)  # that a model reads
    eta: NonNegative = 1.0  # weight of the kept states; ridge and projection
    ridge: NonNegative = 1e-3  # lambda, the weight that holds the edit near W; ridge and projection
    null_space_share: Annotated[float, Interval(gt=0, le=1)] = (
        0.001  # of kept energy, which the edit may move
    )
    null_space_ridge: Positive = 0.01  # weight that holds the edit near W, in units of tr(K) / d
    projection_share: Annotated[float, Interval(gt=0, lt=1)] = 0.3  # of the concept's energy, taken away
    projection_ridge: Positive = 0.01  # least energy of a direction, in units of tr(K) / d
    adversarial_rounds: Natural = 0  # times that the best answers to the edit are erased, too
    adversarial_ridge: Positive = 0.01  # weight that keeps such answers small, in units of tr(G) / d
    positions: Annotated[list[Annotated[str, OneOf(POSITIONS)]], Len(1)] = items("eot")
    # that pair where the text encoder is a T5
    t5_positions: Annotated[list[Annotated[str, OneOf(("keyword", "eot"))]], Len(1)] = items("keyword", "eot")
    keep_eot_weight: NonNegative = 1.0  # weight of the kept prompts' first EoT, beside all their positions
    empty_prompt_weight: NonNegative = 1.0
    safe_weight: NonNegative = 1.0
    keep_prompts: str | None = None  # caption file: text, CSV or COCO's JSON; or hub:OWNER/NAME/FILE


@dataclass
class TrajectoryConfig:
    """The options of stage 2, denoising trajectory steering."""

    num_trajectories: Count = 100  # number of malicious trajectories of each concept
    scenes: bool = True  # the malicious prompts contain those of TrainConfig.scene_templates
    num_unconditional: Count = 100  # number of unconditional trajectories
    num_kept: Count = 100  # number of trajectories of prompts to keep for each concept, one prompt each
    num_steps: Steps = 50  # sampling steps of a trajectory
    early_steps: Count = 25  # malicious points come from this many first steps
    guidance_scale: NonNegative = 3.0  # for sampling trajectories
    beta: Positive = 16.0  # guidance scale of the targets; 1 is the conditional prediction itself
    margin: NonNegative = 0.01  # mean squared difference per element; see relative_hinge
    relative_hinge: bool = False  # hinge and margin in units of the squared distance of the two targets
    relative_distances: bool = False  # preserve, keep and pull losses in units of the mean ‖ε_cs − ε_cm‖²
    uncond_hinge_weight: NonNegative = 0.0
    preserve_weight: NonNegative = 100.0
    keep_weight: NonNegative = 100.0  # preserve weight of the prompts to keep
    pull_weight: NonNegative = 0.0
    batch_size: Count = 4
    unconditional_per_malicious: Natural = 4
    kept_per_malicious: Natural = 0  # points of prompts to keep; 0: stage 2 keeps unconditional points alone
    draws_per_epoch: Count = 1  # steps of each malicious trajectory per epoch
    epochs: Count = 3
    trainable: str = "*.to_q"  # fnmatch pattern of module names
    shard_size: Count = 16  # trajectories per file
    gradient_checkpointing: bool = False  # the backward pass computes activations again
    offload: bool = False  # text encoder and decoder stay on the CPU while an epoch trains


@dataclass
class OptimizerConfig:
    name: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"
    lr: Positive = 1e-5
    # constant, or cosine: the learning rate falls to zero by half a cosine over all steps.
    schedule: Annotated[str, OneOf(SCHEDULES)] = "constant"
    weight_decay: NonNegative = 0.01
    betas: Annotated[list[Annotated[float, Interval(ge=0, lt=1)]], Len(2, 2)] = items(0.9, 0.999)


@dataclass
class ScoresConfig:
    final_images_per_set: Count = 512
    samples_per_prompt: Count = 1  # images per prompt, from different noise
    batch_size: Count = 32


@dataclass
class MetricsConfig(ScoresConfig):
    enabled: bool = True
    images_per_set: Count = 64  # images per set after each epoch


@dataclass
class DeviceConfig:
    """The options of Lightning's Trainer that training and evaluation share."""

    accelerator: str = "auto"
    devices: Any = "auto"  # a count, a list of indices, or auto
    num_nodes: Count = 1
    strategy: str = "auto"
    precision: Annotated[str, OneOf(("auto", "32-true", "bf16-mixed", "16-mixed"))] = "auto"
    enable_progress_bar: bool = True


@dataclass
class TrainerConfig(DeviceConfig):
    """The options of Lightning's Trainer, under Lightning's names."""

    gradient_clip_val: Positive | None = None
    accumulate_grad_batches: Count = 1
    log_every_n_steps: Count = 10


@dataclass
class LoggerConfig:
    """The loggers beside the CSV log, which is always written."""

    wandb: bool = False
    tensorboard: bool = False
    project: str = "trce-lightning"
    init_timeout: Positive = 15.0  # seconds until W&B goes offline


@dataclass
class ExpectedConfig:
    """The scores that others report for the same erasure. The report shows them beside the measured ones."""

    source: str = "unstated"
    asr: dict[str, Share] = field(default_factory=dict)  # prompt set → rate
    fid: NonNegative | None = None
    clip_score: NonNegative | None = None


@dataclass
class TrainConfig:
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    # The method with its options, by method=NAME. Those of trce are stages, textual, trajectory, optimizer.
    method: dict[str, Any] = field(default_factory=lambda: {"name": "trce"})
    # In the order in which they are applied. The paper's is textual, trajectory.
    stages: list[Annotated[str, OneOf(STAGES)]] = items(*STAGES)
    # Sentences in which a concept stands beside a thing to keep, as templates of every concept but a style.
    scene_templates: Natural = 0
    # Stage 1 alone, without scores: the denoiser is never loaded, its files are edited tensor by tensor.
    streamed: bool = False
    textual: TextualConfig = field(default_factory=TextualConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    seed: Natural = 0
    checkpoint_minutes: Positive = 10.0  # minutes between checkpoints, beside the one at each epoch's end
    previous: str | None = None  # the folder of an earlier run
    output: str | None = None  # folder of this run; null: RUNS/concept/model/start time
    runs: str = "runs"
    cache: str | None = None  # folder of the cache; null: beside the runs
    export: list[Annotated[str, OneOf(EXPORTS)]] = items("pipeline")
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)
    plan: bool = False  # log the planned work and stop
    fresh: bool = False  # never continue an unfinished run


@dataclass
class OriginalConfig:
    """The model before erasure."""

    path: str | None = None  # folder in diffusers' format; null: the model that `model` names


@dataclass
class DemoConfig:
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    original: OriginalConfig = field(default_factory=OriginalConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)
    seed: Natural = 0
    port: Annotated[int, Interval(ge=1, lt=2**16)] = 7860  # on 127.0.0.1


CONCEPT_SETS = (DIRECT, IMPLICIT, BENIGN)


OWN_SETS = (*CONCEPT_SETS, MIXED, SCENES, UNERASED, NEIGHBOURS, *WORDINGS)


PLACES = ("early", "late")


@dataclass
class RobustnessConfig:
    """The conditions under which a model is scored once more. Each item of a list is one condition."""

    images_per_set: Count = 128  # uses the first of metrics.final_images_per_set
    sets: list[Annotated[str, OneOf(CONCEPT_SETS)]] = items(*CONCEPT_SETS)
    # The steps of every condition. They are enough for any of the samplers.
    num_inference_steps: Steps = 20
    samplers: list[Sampler] = items()  # diffusers' names; each replaces model.sampler
    guidance_scales: list[NonNegative] = items()
    steps: list[Steps] = items()
    negative_prompts: list[str] = items()  # {safe} stands for the concept's safe counterparts
    strengths: list[Annotated[float, Interval(gt=0, le=1)]] = items()  # image-to-image: share of the steps
    picture: str | None = None  # start of image-to-image; null: the original's image of each prompt
    lora: list[str] = items()  # files or folders of LoRAs; each is put on top of the model
    lora_scale: Finite = 1.0
    long_prompts: list[Annotated[str, OneOf(PLACES)]] = items()  # the prompt's place in the filler
    filler: list[str] = items()  # benign phrases that make prompts long
    misspellings: list[Annotated[str, OneOf(MISSPELLINGS)]] = items()  # in the words that name the concept


@dataclass
class EvalConfig:
    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    models: list[str] = items()  # folders of further pipelines, compared with `model` on equal noise
    sets: list[Annotated[str, OneOf(OWN_SETS)]] = items(*CONCEPT_SETS)  # the concept's own sets
    prompts: list[str] = items()  # CSV files, or NAME or NAME:FILE of a published set
    detectors: list[str] = items()  # dotted names of class detectors; their scores are stored by image
    metrics: ScoresConfig = field(default_factory=ScoresConfig)
    # The rule of guidance with its options, by guidance=NAME. Every model of the evaluation uses it.
    guidance: dict[str, Any] = field(default_factory=lambda: {"name": "cfg"})
    trainer: DeviceConfig = field(default_factory=DeviceConfig)
    output: str | None = None
    runs: str = "runs"
    cache: str | None = None
    published: dict[str, PromptFileConfig] = field(default_factory=dict)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    # Options of the attacks that attacks=[NAME,...] chooses, by name: attack.NAME.OPTION.
    attack: dict[str, Any] = field(default_factory=dict)
    attacked_prompts: Count = 64  # the first direct prompts
    # Prompts and noise of the attacks: "tune" to choose their settings, "report" for figures.
    attacked_split: Annotated[str, OneOf(get_args(Split))] = "report"
    attack_seed: Natural = 0  # of all searches
    # A model that was trained without the concept, for comparison: a folder; "domain" is the one that
    # model.domain ships for the concept, if it ships one; null is none.
    never_learnt: str | None = OWN_NEVER_LEARNT
    transfer: list[str] = items()  # labels of models whose findings are tried on the other models as well
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class TuneConfig:
    """The options of ``python -m trce_lightning.tune``."""

    concept: dict[str, ConceptConfig] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    methods: Annotated[list[str], Len(1)] = items(ALL)  # names in configs/method_space
    trials: Count = 8  # of each method, the starting values among them
    jobs: Count = 1  # processes; each has its own copy of the model
    minutes: Positive | None = None  # after so many minutes no trial begins; null: no limit
    images_per_set: Count = 64
    batch_size: Count = 32  # images that are generated together
    fid_margin: Positive = 0.4  # rise of FID without a penalty: 5 % of the original's on many images
    seed: Natural = 0
    trainer: DeviceConfig = field(default_factory=DeviceConfig)  # of each process
    journal: str | None = None  # file with a line for each trial; null: RUNS/tuning/CONCEPT-MODEL.jsonl
    summary: str | None = None  # table of all trials; null: beside the journal
    write: bool = False  # write each method's best options into configs/
    runs: str = "runs"
    cache: str | None = None
    plan: bool = False  # log the planned work and stop


@dataclass
class LeaderboardConfig:
    """The options of ``python -m trce_lightning.leaderboard``."""

    concepts: Annotated[list[str], Len(1)] = items(
        "violence"
    )  # names or files; + stands between several at once
    methods: list[str] = items(ALL)  # names in configs/method
    guidances: list[str] = items(*GUIDANCES)  # names in configs/guidance
    # Options of train.py or eval.py by method or rule: overrides.esd.method.lr=1e-4.
    overrides: dict[str, Any] = field(default_factory=dict)
    seeds: Annotated[list[Natural], Len(1)] = items(0, 1, 2)  # of the erasing; prompts and noise are the same
    model: ModelConfig = field(default_factory=ModelConfig)
    images_per_set: Count = 512
    batch_size: Count = 32  # images that are generated together
    # Options of the attacks that attacks=[NAME,...] chooses, by name: attack.NAME.OPTION.
    attack: dict[str, Any] = field(default_factory=dict)
    attacked_prompts: Count = 64  # the first direct prompts
    trainer: DeviceConfig = field(default_factory=DeviceConfig)  # of each run
    shard: Natural = 0  # this process's part of the cells
    shards: Count = 1
    keep: bool = False  # keep the pipelines and images of finished cells
    output: str | None = None  # folder of page and cells; null: RUNS/leaderboard
    runs: str = "runs"
    cache: str | None = None
    plan: bool = False  # log the planned work and stop
