"""The command lines: they read the options, refuse wrong ones, and start the job.

Only the job imports torch, so that help and refusals appear at once.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, get_args

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from trce_lightning.config import arguments, checks
from trce_lightning.config.composition import config_folder, config_groups
from trce_lightning.config.schema import DemoConfig, EvalConfig, LeaderboardConfig, TrainConfig, TuneConfig
from trce_lightning.errors import InputError
from trce_lightning.runtime.resources import explain_machine, is_peer_gone
from trce_lightning.runtime.signals import GOES_ON, Stopped, leave, shared, stop

REMARKS = {"demo": ""}
"""The remark that a command adds after a signal has stopped it. The default is `GOES_ON`."""
_HELP = frozenset({"--help", "-h"})
_EXPECTED: dict[Any, str] = {
    BooleanNode: "true or false",
    **dict.fromkeys((IntegerNode, int), "a whole number"),  # int: the items of a list
    **dict.fromkeys((FloatNode, float), "a number"),
}


def train(argv: Sequence[str] | None = None) -> None:
    """Erase a concept. `argv` defaults to the command line. An expected failure exits with code 2."""
    _main("train", TrainConfig, argv)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Score a pipeline. `argv` defaults to the command line. An expected failure exits with code 2."""
    _main("eval", EvalConfig, argv)


def demonstrate(argv: Sequence[str] | None = None) -> None:
    """Serve the demo page. `argv` defaults to the command line. An expected failure exits with code 2."""
    _main("demo", DemoConfig, argv)


def tune(argv: Sequence[str] | None = None) -> None:
    """Choose methods' options. `argv` defaults to the command line. An expected failure exits with code 2."""
    _main("tune", TuneConfig, argv)


def leaderboard(argv: Sequence[str] | None = None) -> None:
    """Compare methods. `argv` defaults to the command line. An expected failure exits with code 2."""
    _main("leaderboard", LeaderboardConfig, argv)


def overrides(name: str, schema: type, typed: Sequence[str]) -> list[str]:
    """Return Hydra's arguments for the typed ones, and put `schema` in Hydra's store."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    rewritten = arguments.rewrite(list(typed), schema, config_groups(config_folder(), name))
    checks.check_method_options(rewritten, config_folder())
    return rewritten


def _main(name: str, schema: type, argv: Sequence[str] | None) -> None:
    typed = list(sys.argv)

    def job(config: DictConfig) -> None:
        sys.argv[:] = typed  # Lightning starts its other processes with it; in a sweep they do one job
        # Not resolved: the text of an option may hold an interpolation that leads nowhere.
        task: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            sys.argv[1:] = task
        with expected_failures():
            parsed: Any = OmegaConf.to_object(config)
            if hasattr(parsed, "concept"):
                arguments.settle(parsed.concept, task)
            _run(name, parsed)

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # seconds; a log keeps every line of a progress bar
    # Figures are written to files. A backend that matplotlib doesn't know would fail at its import.
    os.environ["MPLBACKEND"] = "agg"
    with stop.installed(REMARKS.get(name, GOES_ON)), expected_failures():
        folder = config_folder()
        rewritten = overrides(name, schema, typed[1:] if argv is None else list(argv))
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and `explain` explains them
        options = [word for word in rewritten if word not in _HELP]
        if len(options) < len(rewritten) and not any(word.startswith("-") for word in options):
            _show_help(name, folder, options)
            return
        try:
            sys.argv[1:] = rewritten
            hydra.main(config_path=str(folder), config_name=name, version_base="1.3")(job)()
        finally:
            sys.argv[:] = typed


def _show_help(name: str, folder: Path, options: list[str]) -> None:
    """Print Hydra's text for --help, with only the groups of this command.

    Hydra would list all groups, and copy its whole store for each group. That takes seconds.
    """
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        config = hydra.compose(name, options, return_hydra_config=True)
    choices = {
        group: sorted(file.stem for file in (folder / group).glob("*.yaml"))
        for group in sorted(config_groups(folder, name))
    }
    groups = "".join(f"{group}: {', '.join(names)}\n" for group, names in choices.items())
    options_alone = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    text = Template(config.hydra.help.template).substitute(
        APP_CONFIG_GROUPS=groups, CONFIG=OmegaConf.to_yaml(options_alone)
    )
    sys.stdout.write(f"{text}\n")


def _run(name: str, config: Any) -> None:
    checks.check(config)
    with hidden("bitsandbytes"):
        job = _job(name)
    job(config)


def _job(name: str) -> Callable[[Any], None]:
    """Return the function of a command. This imports torch."""
    if name == "train":
        from trce_lightning.jobs.erase import train

        return train
    if name == "demo":
        from trce_lightning.jobs.demo import demonstrate

        return demonstrate
    if name == "leaderboard":
        from trce_lightning.jobs.leaderboard import leaderboard

        return leaderboard
    if name == "tune":
        from trce_lightning.jobs.tune import tune

        return tune
    from trce_lightning.jobs.evaluate import evaluate

    return evaluate


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Hide ``package`` from imports within, unless the process has it already.

    diffusers imports bitsandbytes for quantized models, which the commands refuse. Its library warns on
    machines without a GPU. An 8-bit optimizer imports it later.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # Python treats it as missing
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def expected_failures() -> Iterator[None]:
    """Turn an expected failure into a few lines on stderr and exit code 2, unless TRCE_TRACEBACK=1."""
    try:
        yield
    except SystemExit as end:
        if _is_stop(end):
            stop.leave()
        if isinstance(end.code, int) and end.code:
            leave(end.code)
        raise
    except Exception as error:
        if stop.raised or (stop.told and is_peer_gone(error)):  # the peer got the signal too and ended first
            stop.leave()
        lines = explain(error)
        if lines is not None and os.environ.get("TRCE_TRACEBACK") != "1":
            sys.stderr.write("error: " + "\n  ".join(lines[:4]) + "\n")
            leave(2)
        if not shared():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1)


def _is_stop(end: SystemExit) -> bool:
    """Return whether a signal caused the exit.

    ``SIGTERMException`` is recognised by its name, because Lightning is slow to import.
    """
    return isinstance(end, Stopped) or type(end).__name__ == "SIGTERMException"


def explain(error: Exception) -> list[str] | None:
    """Return lines that tell the user what to change, or None if the user did not cause the error."""
    if lines := explain_machine(error):
        return lines
    if isinstance(error, MissingConfigException) and "/" in str(error.missing_cfg_file):
        return _explain_choice(error)
    if isinstance(error, OverrideParseException):
        return [
            f"cannot read {error.override!r}: {str(error).splitlines()[0]}",
            'a text that holds more than letters, digits and ./_- goes in quotes: OPTION="TEXT"',
        ]
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _explain_option(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return [f"{mark.name}, line {mark.line + 1}: malformed YAML: {error.problem}"]
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return [f"{error.filename}: {error.strerror}"]
    is_setting = type(error).__name__ == "MisconfigurationException"  # Lightning is slow to import
    if isinstance(error, OSError | InputError) or is_setting:
        return [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return None


def _explain_choice(error: MissingConfigException) -> list[str]:
    group, _, name = str(error.missing_cfg_file).partition("/")
    choices = sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))
    hint = arguments.did_you_mean(name, choices)
    lines = [f"no {group} named {name!r}.{hint}", f"choices: {', '.join(choices)}"]
    if group == "model" and Path(name).is_dir():
        lines.append(f"a folder is given by model.path={name}")
    return lines


def _explain_option(error: Exception) -> list[str]:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return lines
    kinds = (type(cause.child_node), *get_args(cause.ref_type)) if type(cause) is ValidationError else ()
    expected = next((_EXPECTED[kind] for kind in kinds if kind in _EXPECTED), None)
    said = f"expected {expected}, got {cause.value!r}" if expected else lines[0]
    return [f"option {cause.full_key!r}: {said}"]
