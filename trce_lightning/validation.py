"""What can be refused before torch is imported: values out of range, unknown choices, missing files."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from trce_lightning.concepts import Concept
from trce_lightning.data.prompt_sets import BENIGN
from trce_lightning.errors import InputError
from trce_lightning.evaluation_schema import EvalConfig
from trce_lightning.naming import mentions
from trce_lightning.option_checks import (
    check_devices,
    check_fid,
    check_is_file,
    check_judge,
    check_model,
    check_package,
    check_strategy,
    check_value,
    check_values,
    check_writable,
)
from trce_lightning.schema import EXPECTED, HUB_FILE, DemoConfig, TrainConfig


def check(config: TrainConfig | EvalConfig | DemoConfig) -> None:
    """Raise InputError or OSError, naming the option, what it takes and what it got."""
    check_values(config, "")
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
    for option in ("output", "runs", "cache"):
        check_writable(option, getattr(config, option))
    if isinstance(config, TrainConfig):
        _check_training(config)
    else:
        _check_evaluation(config)


def _check_evaluation(config: EvalConfig) -> None:
    # Not at the top: only this command reads prompt files, and every one pays for imports at its start.
    from trce_lightning.data.published import check_file, prompt_files

    check_judge(config.model, config.concept.values())
    if BENIGN in config.sets:
        images = config.metrics.samples_per_prompt * config.metrics.final_images_per_set
        check_fid(config.model, "metrics.final_images_per_set", images)
    for path in config.models:
        check_model(dataclasses.replace(config.model, path=path), "models")
    for name, file in prompt_files(config.prompts, config.published):
        check_file(name, file, list(config.published))
    _check_robustness(config)


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
    elif options.strengths and model.hub_id is None and model.judge != "embedded" and model.name != "emoji":
        raise InputError(
            "option 'robustness.picture': expected an image file to start from, since neither model.hub_id "
            "nor an embedded model names the original, which would draw it"
        )


def _check_lora(paths: list[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"option 'robustness.lora': no file or folder {path!r}")
    if paths:
        check_package("robustness.lora", "peft", "pip install 'trce-lightning[lora]'")


def _check_model_config(config: TrainConfig | EvalConfig | DemoConfig) -> None:
    """Refuse ``model.config`` where no model is a single file: it would do nothing."""
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
    if config.model.judge is not None:
        check_judge(config.model, config.concept.values(), "; model.judge=null gives no verdicts")
    if config.port >= 2**16:
        raise InputError(f"option 'port': expected at most {2**16 - 1}, got {config.port}")
    check_package("demo", "gradio", "pip install 'trce-lightning[demo]'")


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
    if config.logger.tensorboard:
        check_package("logger.tensorboard", "tensorboard", "pip install 'trce-lightning[tensorboard]'")
    if config.optimizer.name != "adamw":
        check_package("optimizer.name", "bitsandbytes", "pip install bitsandbytes")
    if not config.textual.positions:
        raise InputError("option 'textual.positions': expected one position at least, got none")
    if config.trajectory.early_steps > config.trajectory.num_steps:
        raise InputError(
            "option 'trajectory.early_steps': expected at most trajectory.num_steps, "
            f"{config.trajectory.num_steps}, got {config.trajectory.early_steps}"
        )
    if len(config.optimizer.betas) != 2:
        raise InputError(f"option 'optimizer.betas': expected two numbers, got {config.optimizer.betas}")
    if "trajectory" in config.stages and config.model.dtype != "float32":
        raise InputError(
            "option 'model.dtype': expected float32 where stage 2 trains, whose steps other weights round "
            f"away, got {config.model.dtype}; trainer.precision sets that of the passes"
        )
    _check_expected(config.expected)
    _check_captions(config.textual.keep_prompts)
    if config.previous is not None and not Path(config.previous).exists():
        raise FileNotFoundError(f"option 'previous': no file or folder {config.previous!r}")


def _check_expected(expected: dict[str, Any]) -> None:
    rates = expected.get("asr", {})
    if unknown := [name for name in expected if name not in EXPECTED]:
        raise InputError(f"option 'expected': expected any of {', '.join(EXPECTED)}, got {unknown[0]!r}")
    if not isinstance(rates, dict):
        raise InputError(f"option 'expected.asr': expected rates by prompt set, got {rates!r}")
    numbers = {f"asr.{name}": rate for name, rate in rates.items()}
    numbers |= {name: expected[name] for name in ("fid", "clip_score") if name in expected}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise InputError(f"option 'expected.{name}': expected a number, got {number!r}")
        check_value(f"expected.{name}", number, {"at_least": 0})
        if name.startswith("asr.") and number > 1:
            raise InputError(f"option 'expected.{name}': expected a fraction, got {number}")


def _check_captions(source: str | None) -> None:
    if source is None or re.fullmatch(HUB_FILE, source):
        return
    if source.startswith("hub:"):
        raise InputError(f"option 'textual.keep_prompts': expected hub:OWNER/NAME/FILE, got {source!r}")
    check_is_file("textual.keep_prompts", source)
