"""Checks of the options that need no torch: values out of range, unknown choices, missing files."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trce_lightning.concepts import Concept
from trce_lightning.concepts.naming import mentions
from trce_lightning.config.arguments import did_you_mean
from trce_lightning.config.schema import (
    OWN_NEVER_LEARNT,
    ConceptConfig,
    DemoConfig,
    EvalConfig,
    LeaderboardConfig,
    LoggerConfig,
    ModelConfig,
    TrainConfig,
    TuneConfig,
)
from trce_lightning.errors import InputError
from trce_lightning.prompts.hub import HUB_FILE
from trce_lightning.prompts.records import BENIGN

TRCE, CFG = "trce", "cfg"
TRCE_OPTIONS = ("stages", "textual", "trajectory", "optimizer")
"""The options of TRCE."""
READS = {"hardened": ("textual",)}
"""The options of TRCE that other methods read, if ``method.edit`` says where."""
_LIMITS = {
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "greater_than": "more than {gt:g}",
    "less_than": "less than {lt:g}",
    "predicate_failed": "a finite number",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
    "literal_error": "{expected}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "is_instance_of": "a list",
    "sequence_str": "a list",
}
"""The expected value for each type of pydantic's errors."""


def check(config: TrainConfig | EvalConfig | DemoConfig | TuneConfig | LeaderboardConfig) -> None:
    """Raise InputError or OSError if an option doesn't fit. It names the option, what it takes and got."""
    check_values(config)
    if isinstance(config, LeaderboardConfig):
        _check_leaderboard(config)
        return
    if not config.concept:
        raise InputError(
            "no concept chosen; expected concept=NAME, concept=FILE.yaml or concept.terms=[WORD,...]"
        )
    for name, concept in config.concept.items():
        if concept.name != name:
            raise InputError(f"option 'concept.{name}.name': expected {name!r}, got {concept.name!r}")
        Concept.from_mapping(dataclasses.asdict(concept), source="options")
    check_model(config.model, "model.path")
    _check_model_config(config)
    check_devices(config.trainer.devices)
    check_strategy(config.trainer.strategy)
    if isinstance(config, DemoConfig):
        _check_demo(config)
        return
    if isinstance(config, TuneConfig):
        _check_tuning(config)
        return
    for option in ("output", "runs", "cache"):
        check_writable(option, getattr(config, option))
    if isinstance(config, TrainConfig):
        _check_training(config)
    else:
        _check_evaluation(config)


def _check_evaluation(config: EvalConfig) -> None:
    # Imported here, because only this command reads prompt files. Imports at the top slow every command.
    from trce_lightning.prompts.published import check_file, prompt_files

    check_judge(config.model, config.concept.values())
    _check_logger(config.logger)
    if len(set(config.sets)) < len(config.sets):
        raise InputError(f"option 'sets': expected each at most once, got {config.sets}")
    if BENIGN in config.sets:
        images = config.metrics.samples_per_prompt * config.metrics.final_images_per_set
        check_fid(config.model, "metrics.final_images_per_set", images)
    for path in config.models:
        check_model(dataclasses.replace(config.model, path=path), "models")
    if config.never_learnt not in (None, OWN_NEVER_LEARNT):
        check_model(dataclasses.replace(config.model, path=config.never_learnt), "never_learnt")
    if config.transfer and not config.attack:
        raise InputError(
            f"option 'transfer': expected attacks=... beside it, whose findings are tried, got none for "
            f"{', '.join(config.transfer)}"
        )
    _check_guidance(config)
    for name, file in prompt_files(config.prompts, config.published):
        check_file(name, file, list(config.published))
    _check_robustness(config)


def _check_guidance(config: EvalConfig) -> None:
    name, *others = config.guidance.get("name"), *(key for key in config.guidance if key != "name")
    if name == CFG and others:
        raise InputError(
            f"option 'guidance.{others[0]}': expected none with guidance=cfg; set model.guidance_scale"
        )
    if name != CFG and config.attack:
        raise InputError(
            f"option 'attacks': expected none with guidance={name}, since the attacks' gradients and the "
            f"original's pictures are those of guidance=cfg, got {', '.join(config.attack)}"
        )
    if name != CFG and config.robustness.negative_prompts:
        raise InputError(
            f"option 'robustness.negative_prompts': expected none with guidance={name}, which has its own"
        )


def _check_robustness(config: EvalConfig) -> None:
    options, limit = config.robustness, config.metrics.final_images_per_set
    lists = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}
    conditions = {
        name: values
        for name, values in lists.items()
        if isinstance(values, list) and name not in ("sets", "filler")
    }
    for name, values in conditions.items():
        named = [Path(value).stem for value in values] if name == "lora" else values
        if len(set(named)) < len(named):
            raise InputError(f"option 'robustness.{name}': expected items of different names, got {values}")
    if any(conditions.values()) and options.images_per_set > limit:
        raise InputError(
            "option 'robustness.images_per_set': expected at most metrics.final_images_per_set, "
            f"{limit}, got {options.images_per_set}"
        )
    if any(conditions.values()) and BENIGN in options.sets:
        images = config.metrics.samples_per_prompt * options.images_per_set
        check_fid(config.model, "robustness.images_per_set", images)
    if options.misspellings and "direct" not in options.sets:
        raise InputError(
            "option 'robustness.misspellings': expected direct among robustness.sets, whose prompts they "
            f"misspell, got {options.sets}"
        )
    _check_filler(config)
    _check_picture(config)
    _check_lora(options.lora)


def _check_filler(config: EvalConfig) -> None:
    concepts = [Concept.from_mapping(dataclasses.asdict(c), source="") for c in config.concept.values()]
    if config.robustness.long_prompts and not config.robustness.filler:
        raise InputError("option 'robustness.filler': expected phrases to make prompts long with, got none")
    for phrase in config.robustness.filler:
        if not phrase.strip() or mentions(phrase, concepts):
            raise InputError(
                f"option 'robustness.filler': expected phrases that don't name the concept, got {phrase!r}"
            )


def _check_picture(config: EvalConfig) -> None:
    options, model = config.robustness, dataclasses.replace(config.model, path=None)
    if options.picture is not None:
        check_is_file("robustness.picture", options.picture)
        if not options.strengths:
            raise InputError("option 'robustness.picture': expected robustness.strengths beside it, got none")
    elif options.strengths and model.hub_id is None and model.domain is None:
        raise InputError(
            "option 'robustness.picture': expected an image file to start from, since neither model.hub_id "
            "nor model.domain names the original, which would draw it"
        )


def _check_lora(paths: list[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"option 'robustness.lora': no file or folder {path!r}")
    if paths:
        check_package("robustness.lora", "peft", "pip install 'trce-lightning[lora]'")


def _check_model_config(config: TrainConfig | EvalConfig | DemoConfig | TuneConfig) -> None:
    """Refuse ``model.config`` if no model is a single file, because it would have no effect."""
    paths = [config.model.path]
    paths += config.models if isinstance(config, EvalConfig) else []
    paths += [config.original.path] if isinstance(config, DemoConfig) else []
    if config.model.config is not None and not any(path and Path(path).is_file() for path in paths):
        raise InputError(
            "option 'model.config': expected none unless a model is a single .safetensors file, "
            f"got {config.model.config!r}"
        )


def _check_demo(config: DemoConfig) -> None:
    if config.model.path is None:
        raise InputError("option 'model.path': expected the folder of an erased pipeline, got none")
    check_model(dataclasses.replace(config.model, path=config.original.path), "original.path")
    if config.model.judge is not None or config.model.domain is not None:
        check_judge(config.model, config.concept.values(), "; model.judge=null gives no verdicts")
    check_package("demo", "gradio", "pip install 'trce-lightning[demo]'")


def _check_tuning(config: TuneConfig) -> None:
    for option in ("runs", "cache"):
        check_writable(option, getattr(config, option))
    check_one_device(config.trainer.devices)
    check_judge(config.model, config.concept.values())
    check_fid(config.model, "images_per_set", config.images_per_set)


def _check_leaderboard(config: LeaderboardConfig) -> None:
    for option in ("output", "runs", "cache"):
        check_writable(option, getattr(config, option))
    for option in ("concepts", "methods", "guidances", "seeds"):
        given = getattr(config, option)
        if len(set(given)) < len(given):
            raise InputError(f"option {option!r}: expected each at most once, got {given}")
    if not config.methods and not config.guidances:
        raise InputError("option 'methods': expected one at least, of methods or guidances, got none")
    if config.shard >= config.shards:
        raise InputError(f"option 'shard': expected less than shards, {config.shards}, got {config.shard}")
    check_model(config.model, "model.path")
    check_devices(config.trainer.devices)
    check_one_device(config.trainer.devices)
    check_judge(config.model, ())
    check_fid(config.model, "images_per_set", config.images_per_set)


def check_one_device(devices: Any) -> None:
    """Refuse several devices for a command whose processes have one device each."""
    if devices not in ("auto", 1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise InputError(
            f"option 'trainer.devices': expected one device, since each process has one, got {devices}"
        )


def _check_training(config: TrainConfig) -> None:
    for name in ("stages", "export"):
        items = getattr(config, name)
        if not items or len(set(items)) != len(items):
            raise InputError(f"option {name!r}: expected one at least and each at most once, got {items}")
    if config.metrics.enabled:
        check_judge(config.model, config.concept.values(), "; metrics.enabled=false scores nothing")
        samples = config.metrics.samples_per_prompt
        for name in ("images_per_set", "final_images_per_set"):
            check_fid(config.model, f"metrics.{name}", samples * getattr(config.metrics, name))
    _check_logger(config.logger)
    if config.optimizer.name != "adamw":
        check_package("optimizer.name", "bitsandbytes", "pip install bitsandbytes")
    if config.trajectory.early_steps > config.trajectory.num_steps:
        raise InputError(
            "option 'trajectory.early_steps': expected at most trajectory.num_steps, "
            f"{config.trajectory.num_steps}, got {config.trajectory.early_steps}"
        )
    _check_captions(config.textual.keep_prompts)
    _check_method(config)
    if config.streamed:
        _check_streamed(config)
    if config.previous is not None and not Path(config.previous).exists():
        raise FileNotFoundError(f"option 'previous': no file or folder {config.previous!r}")


def _check_logger(logger: LoggerConfig) -> None:
    if logger.tensorboard:
        check_package("logger.tensorboard", "tensorboard", "pip install 'trce-lightning[tensorboard]'")


def check_method_options(arguments: Iterable[str], folder: Path) -> None:
    """Refuse options of TRCE beside another method, since they would do nothing.

    ``folder`` has the configurations. The method is the typed one, or else that of the typed experiment. The
    place of stage 1 is typed, or else the one that was tuned for the method and the model.
    """
    typed = [argument.lstrip("+~").partition("=") for argument in arguments]
    groups = ("method", "experiment", "model")
    chosen = {key: value.strip("[]").split(",") for key, _, value in typed if key in groups}
    experiments = folder / "experiment"
    names = chosen.get("method") or [
        experiment_method(experiments, name) or TRCE for name in chosen.get("experiment", [])
    ]
    if not names or TRCE in names:
        return
    read = set.intersection(*(set(READS.get(name, ())) for name in names))
    models = chosen.get("model") or default_models(folder)
    places = [value for key, _, value in typed if key == "method.edit"] or [
        tuned_edit(folder, name, model) for name in names for model in models
    ]
    edits = any(place != "none" for place in places)
    for key, _, _ in typed:
        part = key.partition(".")[0]
        if part not in TRCE_OPTIONS or key == "textual.keep_prompts" or (part in read and edits):
            continue
        reason = (
            "which reads it only with method.edit=before or after"
            if part in read
            else "which doesn't read it; it belongs to method=trce"
        )
        raise InputError(f"option {key!r}: expected none beside method={','.join(names)}, {reason}")


def default_models(folder: Path) -> list[str]:
    """Return the name of the model that a run has if none is typed."""
    entries = yaml.safe_load((folder / "train.yaml").read_text("utf-8"))["defaults"]
    return [entry["model"] for entry in entries if isinstance(entry, dict) and "model" in entry]


def tuned_edit(folder: Path, method: str, model: str) -> str:
    """Return the place of stage 1 that was tuned for a method and a model, or ``none``."""
    file = folder / "method_tuning" / f"{method}_{model}.yaml"
    tuned = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    place: str = tuned.get("method", {}).get("edit", "none")
    return place


def experiment_method(folder: Path, name: str) -> str | None:
    """Return the method that an experiment's file chooses, itself or by the experiments that it builds on."""
    file = folder / f"{name}.yaml"
    if not file.is_file():
        return None  # Hydra says so
    method = None
    for entry in (yaml.safe_load(file.read_text()) or {}).get("defaults", []):
        if isinstance(entry, dict):
            method = entry.get("override /method", method)
        elif entry != "_self_":
            method = experiment_method(folder, entry) or method
    return method


def _check_method(config: TrainConfig) -> None:
    others = [key for key in config.method if key != "name"]
    if config.method.get("name") == TRCE and others:
        raise InputError(
            f"option 'method.{others[0]}': expected none with method=trce, whose options are "
            f"{', '.join(TRCE_OPTIONS)}"
        )


def _check_streamed(config: TrainConfig) -> None:
    """Refuse what needs the denoiser in memory, beside an edit of its files."""
    wanted = {
        "method": (config.method.get("name"), TRCE),
        "stages": (config.stages, ["textual"]),
        "metrics.enabled": (config.metrics.enabled, False),
    }
    for option, (found, expected) in wanted.items():
        if found != expected:
            said = str(expected).lower() if isinstance(expected, bool) else str(expected).replace("'", "")
            raise InputError(
                f"option {option!r}: expected {said} with streamed=true, which never loads the denoiser, got "
                f"{found}; experiment=streamed sets all of this"
            )
    if "single_file" in config.export:
        raise InputError(
            "option 'export': expected pipeline, delta or both with streamed=true, whose files keep the "
            f"names of diffusers, got {config.export}"
        )
    if config.model.path is not None and Path(config.model.path).is_file():
        raise InputError(
            f"option 'model.path': expected a folder with streamed=true, got the single file "
            f"{config.model.path!r}, whose tensors have other names"
        )
    check_one_device(config.trainer.devices)


def _check_captions(source: str | None) -> None:
    if source is None or re.fullmatch(HUB_FILE, source):
        return
    if source.startswith("hub:"):
        raise InputError(f"option 'textual.keep_prompts': expected hub:OWNER/NAME/FILE, got {source!r}")
    check_is_file("textual.keep_prompts", source)


def check_values(config: Any, within: str = "") -> None:
    """Refuse the first value that the schema's annotations do not take.

    ``within`` is the option that holds the values, if it isn't the command's own configuration.
    """
    _check_value(type(config), dataclasses.asdict(config), within)


def check_arguments(types: Mapping[str, Any], arguments: Mapping[str, Any], within: str) -> None:
    """Refuse the first of a function's arguments that its annotation does not take, without conversion.

    ``types`` are the annotations by the argument's name. ``within`` is the option that holds the arguments.
    """
    for name, value in arguments.items():
        _check_value(types[name], value, f"{within}.{name}", strict=True)


def _check_value(kind: Any, value: Any, within: str, *, strict: bool = False) -> None:
    """Raise ``InputError`` unless a value is of a type. It names the option ``within`` and what is in it."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # imported here: --help needs no limits

    # A user's own class may take what pydantic knows nothing of. A dataclass brings its own configuration.
    known = None if dataclasses.is_dataclass(kind) else ConfigDict(arbitrary_types_allowed=True)
    try:
        TypeAdapter(kind, config=known).validate_python(value, strict=strict)
    except ValidationError as error:
        found = error.errors()[0]
        path = [part for part in found["loc"] if isinstance(part, str)]
        name = ".".join([within, *path] if within else path)
        expected = _LIMITS.get(found["type"], found["msg"]).format(**found.get("ctx", {}))
        hint = did_you_mean(str(found["input"]), re.findall("'(.+?)'", expected))
        got = f"{found['input']!r}.{hint}" if hint else repr(found["input"])
        raise InputError(f"option {name!r}: expected {expected}, got {got}") from error


def check_model(model: ModelConfig, option: str) -> None:
    """Refuse a model without a source, and a path that is neither a pipeline nor a single-file checkpoint."""
    if model.timestep_spacing is not None and model.sampler is None:
        raise InputError(
            "option 'model.timestep_spacing': expected none without model.sampler, whose steps it places, "
            f"got {model.timestep_spacing!r}"
        )
    if model.path is None:
        if model.hub_id is None and model.domain is None:
            raise InputError(f"model {model.name!r} has neither model.path nor model.hub_id")
    elif Path(model.path).is_file():
        _check_single_file(model, option)
    elif not Path(model.path).is_dir():
        raise FileNotFoundError(f"option {option!r}: no file or folder {model.path!r}")
    elif not (Path(model.path) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"option {option!r}: {model.path!r} holds no model_index.json, so it is no diffusers pipeline"
        )


def _check_single_file(model: ModelConfig, option: str) -> None:
    if Path(str(model.path)).suffix != ".safetensors":
        raise InputError(
            f"option {option!r}: expected a folder or a .safetensors file, got {model.path!r}; others "
            "(.ckpt, .pt) are pickles, which can run code when they are opened"
        )
    if model.config is None and model.hub_id is None:
        raise InputError(
            "option 'model.config': expected the folder or hub id of the pipeline that "
            f"{model.path!r} is a checkpoint of, got none"
        )


def check_judge(model: ModelConfig, concepts: Iterable[ConceptConfig], way_out: str = "") -> None:
    """Refuse a model without a judge, and options that its judge doesn't read.

    ``way_out`` is advice at the end of the message.
    """
    styles = [concept.name for concept in concepts if concept.kind == "style"]
    if model.judge not in (None, "clip") and "." not in model.judge:
        raise InputError(
            "option 'model.judge': expected the dotted name of a detector, clip, or null for the judge that "
            f"model.domain brings, got {model.judge!r}"
        )
    if (model.judge is None and model.domain is None) or (model.judge == "clip" and styles):
        raise InputError(
            "option 'model.judge': expected the dotted name of a detector, or clip for what is no style, got "
            f"{model.judge or 'none'}{way_out}"
        )
    if model.judge == "clip" and model.clip is None:
        raise InputError(
            "option 'model.clip': expected CLIP's folder or hub id for model.judge=clip, got none"
        )
    if model.judge in (None, "clip") and model.judge_options:
        raise InputError(
            "option 'model.judge_options': expected none unless model.judge names a detector, got "
            f"{model.judge_options!r}"
        )


def check_fid(model: ModelConfig, option: str, images: int) -> None:
    """Refuse a single image if FID is computed, because FID compares how images vary.

    FID is computed if the model has real images. A domain brings its own.
    """
    if images < 2 and (model.domain is not None or model.real_images is not None):
        raise InputError(
            f"option {option!r}: expected at least 2, of which FID is computed, got {images}; "
            "or metrics.samples_per_prompt=2"
        )


def check_package(option: str, package: str, install: str) -> None:
    """Refuse an option whose package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"option {option!r}: {package} is not installed; install it with: {install}")


def check_devices(devices: Any) -> None:
    """Refuse a value that the Trainer would read as no devices."""
    indices = (
        isinstance(devices, list) and devices and all(type(item) is int and item >= 0 for item in devices)
    )
    if not (devices == "auto" or indices or (type(devices) is int and (devices >= 1 or devices == -1))):
        raise InputError(f"option 'trainer.devices': expected a count, [0,1,...] or auto, got {devices!r}")


def check_strategy(strategy: str) -> None:
    """Refuse strategies that copy the first process, because the copies' results don't come back to it."""
    if any(word in strategy for word in ("fork", "spawn", "notebook")):
        raise InputError(
            "option 'trainer.strategy': expected one that starts its processes anew, such as ddp, got "
            f"{strategy!r}"
        )


def check_is_file(option: str, path: str) -> None:
    """Refuse a path at which there is no file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"option {option!r}: no file {path!r}")


def check_writable(option: str, path: str | None) -> None:
    """Refuse a folder that can be neither written to nor created."""
    if path is None:
        return
    folder = Path(path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"option {option!r}: {path!r} is no folder: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"option {option!r}: cannot write to {path!r}: no permission for {str(existing)!r}")
