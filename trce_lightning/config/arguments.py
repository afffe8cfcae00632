"""A translator of a user's arguments for Hydra.

It accepts Lightning's `--a.b c`, and concepts as paths or free words.
"""

import dataclasses
import difflib
import logging
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import regex
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Quote, QuotedString, Sweep
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from trce_lightning.concepts import Concept, load_concept
from trce_lightning.concepts.fields import contains_name
from trce_lightning.concepts.naming import mentions
from trce_lightning.config.schema import ConceptConfig
from trce_lightning.errors import InputError

log = logging.getLogger(__name__)
OWN = "own_"  # the prefix of choices made of paths and words, so that shipped files do not shadow them
_HYDRA_FLAGS = frozenset(
    "--help -h --hydra-help --version --resolve --run -r --multirun -m --shell-completion -sc".split()
)
_HYDRA_OPTIONS = frozenset(
    "--cfg -c --package -p --config-path -cp --config-name -cn --config-dir -cd --info -i "
    "--experimental-rerun".split()
)
_WORDS = frozenset(f"concept.{entry.name}" for entry in dataclasses.fields(ConceptConfig))
# \w of the regex package matches combining marks too.
_OVERRIDE = regex.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[\w./@:-]+)(?:=(?P<value>.*))?", regex.DOTALL)
_PLAIN_LIST = re.compile(r"\[((?:\s*[^\s'\"\[\]{},][^\[\]{},]*(?:,|(?=\])))+)\]")
_PLAIN_CHOICE = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)


def rewrite(argv: list[str], schema: type, groups: Iterable[str]) -> list[str]:
    """Return the arguments for Hydra.

    A concept given by path or by words is put in Hydra's ConfigStore, and the override names it there. If
    Hydra's grammar doesn't allow a value, such as [café], the value is read as YAML and quoted.

    Args:
        argv: the arguments that the user typed.
        schema: the dataclass of all options outside of `groups`.
        groups: the config groups.

    Raises:
        InputError: an option is unknown or has no value, neither Hydra nor YAML reads a value, or a concept
            file is not valid.
    """
    multirun = bool({"-m", "--multirun"} & set(argv))
    result: list[str] = []
    words: dict[str, Any] = {}
    for argument in _join(argv, schema, groups):
        match = _OVERRIDE.fullmatch(argument)
        if argument.startswith("-") or match is None or match["value"] is None:
            result.append(argument)
            continue
        sign, key, value = match["sign"] or "", match["key"], match["value"]
        if not value and sign != "~":
            raise InputError(f"option {key!r} needs a value: {key}=VALUE")
        if not key.isascii():
            raise InputError(
                f"option {key!r}: expected letters of ASCII in an option's name; "
                "what has other letters is changed in its own file"
            )
        if key in _WORDS:
            words[key.removeprefix("concept.")] = _parsed(key, value)
        elif key == "concept":
            result.append(f"{sign}concept={_concepts(value)}")
        elif key.startswith(("hydra.", "hydra/")) or "@" in key or key in groups:
            if key in groups:
                argument = f"{sign}{key}={_readable(key, value)}"
                _check_names(key, _parse_override(argument))
            result.append(argument)
        else:
            kind = annotation(schema, key, groups)
            if _has_own_names(schema, key, groups):
                sign = sign or "++"  # Hydra wants this for a name that isn't there yet
            result.append(f"{sign}{key}={_readable(key, _value(value, kind, multirun))}")
    if words and any(argument.startswith("concept=") for argument in result):
        raise InputError(
            f"concept=NAME beside concept.{next(iter(words))}: free words are a concept of their own.\n"
            f"To change a chosen concept, name it: concept.NAME.{next(iter(words))}=..."
        )
    return [*result, f"concept={_choice(_from_words(words))}"] if words else result


def settle(concepts: Mapping[str, ConceptConfig], overrides: Iterable[str]) -> None:
    """Drop a concept's aliases and descriptions that name a term or a wording which the user has changed.

    Such an alias is a name that the erasure is given. Aliases and descriptions that the user gives stay. They
    are checked like others.

    Args:
        concepts: the chosen concepts by name.
        overrides: Hydra's arguments.
    """
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for name, concept in concepts.items():
        changed = tuple(f"concept.{name}.{option}" for option in ("terms", "wordings"))
        if not any(key.startswith(changed) for key in keys):
            continue
        rest = {**dataclasses.asdict(concept), "aliases": [], "descriptions": []}
        own = Concept.from_mapping(rest, source="options")
        for option, texts in (("aliases", concept.aliases), ("descriptions", concept.descriptions)):
            named = [
                text
                for text in texts
                if (contains_name(text, own.name_phrases) if option == "aliases" else mentions(text, [own]))
            ]
            if named and f"concept.{name}.{option}" not in keys:
                log.warning(
                    "concept.%s.%s: left out, since they now name the concept: %s", name, option, named
                )
                setattr(concept, option, [text for text in texts if text not in named])


def did_you_mean(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return ` Did you mean 'x'?` for the closest choice, with `prefix` before it.

    If no choice is close, return an empty text.
    """
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {prefix + close[0]!r}?" if close else ""


def annotation(schema: type, key: str, groups: Iterable[str] = ()) -> Any:
    """Return the type of the option with the dotted name `key`. Below an option of type `Any`, it is `Any`.

    If `schema` has no such option, raise InputError.
    """
    current: Any = schema
    walked: list[str] = []
    for part in key.split("."):
        if current is Any:
            continue
        if get_origin(current) is dict:
            current = get_args(current)[1]
        elif dataclasses.is_dataclass(current):
            hints = get_type_hints(current)
            if part not in hints:
                raise InputError(_unknown(key, walked, part, hints if walked else {*hints, *groups}))
            current = hints[part]
        else:
            raise InputError(f"unknown option {key!r}: {'.'.join(walked)!r} has no parts")
        walked.append(part)
    return current


def _has_own_names(schema: type, key: str, groups: Iterable[str]) -> bool:
    """Return whether `key` is, or lies in, a map whose keys a user chooses."""
    kinds = (annotation(schema, prefix, groups) for prefix in accumulate(key.split("."), "{}.{}".format))
    return any(get_origin(kind) is dict and not dataclasses.is_dataclass(get_args(kind)[1]) for kind in kinds)


def _unknown(key: str, walked: list[str], part: str, valid: Iterable[str]) -> str:
    prefix = "".join(f"{name}." for name in walked)
    names = sorted({prefix + name for name in valid})
    return f"unknown option {key!r}.{did_you_mean(part, valid, prefix)}\nvalid here: {', '.join(names)}"


def _join(argv: list[str], schema: type, groups: Iterable[str]) -> Iterator[str]:
    """Yield each `--a.b c`, `--a.b=c` and, for a switch, `--a` as `a.b=c`. Hydra's own options stay."""
    waiting = list(argv)
    roots = {"hydra", *groups, *(entry.name for entry in dataclasses.fields(schema))}
    while waiting:
        argument = waiting.pop(0)
        name, has_value, _ = argument.partition("=")
        follower = waiting[0] if waiting and not _starts_option(waiting[0], roots) else None
        if name in _HYDRA_FLAGS or name in _HYDRA_OPTIONS:
            yield argument
            if name in _HYDRA_OPTIONS and not has_value and follower is not None:
                yield waiting.pop(0)
        elif not argument.startswith("--"):
            if not (argument.startswith(("~", "-")) or has_value):
                raise InputError(
                    f"{argument!r} is not OPTION=VALUE; a concept is chosen by concept={argument}"
                )
            yield argument
        elif has_value:
            yield argument[2:]
        elif annotation(schema, argument[2:]) is bool and follower not in ("true", "false"):
            yield f"{argument[2:]}=true"
        elif follower is None:
            raise InputError(f"option {argument!r} needs a value: {argument} VALUE")
        else:
            yield f"{argument[2:]}={waiting.pop(0)}"


def _starts_option(argument: str, roots: set[str]) -> bool:
    match = _OVERRIDE.fullmatch(argument)
    is_override = (
        match is not None and match["value"] is not None and re.split(r"[./@]", match["key"])[0] in roots
    )
    return argument.startswith("--") or is_override or argument in _HYDRA_FLAGS | _HYDRA_OPTIONS


def _parse_override(argument: str) -> Any:
    return OverridesParser.create().parse_overrides([argument])[0].value()


def _check_names(group: str, value: Any) -> None:
    """Refuse names of choices that are not texts. Hydra would fail on them."""
    items = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, str | QuotedString | Sweep | Glob):
            raise InputError(f"option {group!r}: expected the name of a choice, or [NAME,...], got {item!r}")


def _parsed(option: str, text: str) -> Any:
    """Return the value that Hydra reads from the text, or else the value that YAML reads.

    If Hydra can't read the text, and it is no list, map or quotation, return the text itself. If YAML can't
    read it either, or if it has several values without brackets, raise InputError.
    """
    try:
        value = _parse_override(f"{option}={text}")
    except OverrideParseException:
        value = _parsed_yaml(option, text)
    if isinstance(value, ChoiceSweep):
        raise InputError(f"{f'{option}={text}'!r}: write a list in brackets")
    return value


def _parsed_yaml(option: str, text: str) -> Any:
    if text[0] not in "[{'\"":
        return text
    if plain := _PLAIN_LIST.fullmatch(text):  # YAML takes some plain words for comments or tags
        return [item.strip() for item in plain[1].split(",")]
    try:
        return yaml.load(text, yaml.BaseLoader)  # all scalars are texts
    except yaml.YAMLError as error:
        raise InputError(
            f"cannot read {f'{option}={text}'!r}; write TEXT or [TEXT,...], "
            'and a TEXT that holds brackets, braces, commas, colons or quotes as "TEXT"'
        ) from error


def _readable(option: str, text: str) -> str:
    """Return a value in a form that Hydra reads. If Hydra can't read it as typed, its texts are quoted."""
    try:
        _parse_override(f"{option}={text}")
    except OverrideParseException:
        return _quoted(option, _parsed_yaml(option, text))
    return text


def _quoted(option: str, value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_quoted(option, item) for item in value)}]"
    if isinstance(value, dict):
        if wrong := [key for key in value if not _PLAIN_CHOICE.fullmatch(key)]:
            raise InputError(
                f"option {option!r}: expected letters, digits, '_' and '-' of ASCII in a map's keys, "
                f"got {wrong[0]!r}; write it in a YAML file"
            )
        return f"{{{','.join(f'{key}:{_quoted(option, item)}' for key, item in value.items())}}}"
    return str(QuotedString(value, Quote.single).with_quotes())


def _value(text: str, kind: Any, multirun: bool) -> str:
    """Return a value for an option of type `kind`.

    A text option takes its text as typed. A list option takes a single item without brackets.
    """
    if multirun and "," in text:
        return text
    if get_origin(kind) is list and text[0] != "[" and not text.startswith("${"):
        return f"[{_value(text, get_args(kind)[0], multirun)}]"
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    quoted = text[0] in "'\"" and text[-1] == text[0] and len(text) > 1
    if str not in kinds or quoted or (text == "null" and len(kinds) > 1):
        return text
    return str(QuotedString(text, Quote.single).with_quotes())


def _concepts(text: str) -> str:
    """Return the value of `concept=`, with each path replaced by the choice that stands for it."""
    if Path(text).is_file() or (_is_path(text) and text[0] not in "['\"" and "," not in text):
        return _choice(load_concept(text))
    readable = _readable("concept", text)
    value = _parse_override(f"concept={readable}")
    _check_names("concept", value)
    items: Any = value.list if isinstance(value, ChoiceSweep) else value
    if isinstance(items, str) and _is_path(items):
        return _choice(load_concept(items))
    if not isinstance(items, list) or any(not isinstance(item, str | QuotedString) for item in items):
        return readable
    names = [str(getattr(item, "text", item)) for item in items]
    choices = [_store(load_concept(name)) if _is_path(name) else name for name in names]
    erased = [choice.removeprefix(OWN) for choice in choices]
    if len(set(erased)) < len(erased):
        raise InputError(f"option 'concept': expected each concept once, got {', '.join(erased)}")
    joined = ",".join(map(_written, choices))
    return joined if isinstance(value, ChoiceSweep) else f"[{joined}]"


def _is_path(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or "/" in text


def _from_words(words: dict[str, Any]) -> Concept:
    terms = words.get("terms", [])
    phrases = [terms] if isinstance(terms, str) else list(terms) if isinstance(terms, dict) else terms
    named = Concept.from_terms(phrases, kind=words.get("kind", "subject"))
    counterparts = terms if isinstance(terms, dict) else named.terms
    mapping = dataclasses.asdict(named) | words | {"terms": counterparts}
    return Concept.from_mapping(mapping, source="command line")


def _store(concept: Concept) -> str:
    """Make `concept` a choice of the group `concept`. Return its name, which no shipped file has."""
    node = OmegaConf.structured(ConceptConfig(**_plain(dataclasses.asdict(concept))))
    choice = f"{OWN}{concept.name}"
    ConfigStore.instance().store(choice, node, group="concept", package=f"concept.{concept.name}")
    return choice


def _choice(concept: Concept) -> str:
    return _written(_store(concept))


def _written(choice: str) -> str:
    return choice if _PLAIN_CHOICE.fullmatch(choice) else _quoted("concept", choice)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
