"""The fields of a concept: reading them from YAML and checking them. The module imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trce_lightning.concepts.defaults import LANGUAGE_NAMES
from trce_lightning.concepts.naming import phrase_of, words_of
from trce_lightning.errors import InputError


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Return the content of a concept's YAML file by key.

    If the file can't be read, raise InputError with file and line.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True, throw_on_missing=True)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: expected well-formed YAML, got: {error.problem}") from error
    except (OSError, UnicodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path}: expected a readable concept file in UTF-8, got: {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: expected a map with the keys name and terms, got a {type(content).__name__}"
        )
    return {str(key): value for key, value in content.items()}


def field_values(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of :class:`~.concepts.Concept` that ``mapping`` has.

    If a field has another type, raise InputError.
    """
    values: dict[str, Any] = {
        "name": _text("concept.name", mapping.get("name")),
        "terms": _text_map("concept.terms", mapping.get("terms")),
    }
    if mapping.get("wordings"):
        values["wordings"] = _text_lists(
            "concept.wordings", mapping["wordings"], "term to a list of wordings"
        )
    if mapping.get("translations"):
        values["translations"] = _text_lists(
            "concept.translations", mapping["translations"], "language to a list of phrases"
        )
    for key in ("templates", "neighbours", "related", "aliases", "descriptions", "unrelated", "classes"):
        if key in mapping:
            values[key] = text_tuple(f"concept.{key}", mapping[key])
    for key in ("kind", "source"):
        if mapping.get(key):
            values[key] = _text(f"concept.{key}", mapping[key])
    return values


def _text(option: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{option}: expected a text (in YAML, quote words like no and 3), got {value!r}")
    return value


def text_tuple(option: str, value: object) -> tuple[str, ...]:
    """Return ``value`` as a tuple. Raise InputError that names the option unless it lists non-empty texts."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{option}: expected a list of texts, got {value!r}")
    return tuple(_text(option, item) for item in value)


def _text_map(option: str, value: object) -> dict[str, str]:
    rows = _mapping(option, value, "from malicious term to safe counterpart")
    return {_text(option, term): _text(f"{option}: {term}", safe) for term, safe in rows.items()}


def _text_lists(option: str, value: object, kind: str) -> dict[str, tuple[str, ...]]:
    rows = _mapping(option, value, f"from {kind}")
    return {_text(option, term): text_tuple(f"{option}: {term}", names) for term, names in rows.items()}


def _mapping(option: str, value: object, kind: str) -> Mapping[Any, object]:
    if not isinstance(value, Mapping):
        raise InputError(f"{option}: expected a map {kind}, got {value!r}")
    return value


def check_references(option: str, value: object) -> None:
    """Refuse ``${`` in any text: the configuration that holds the concept would read it as a reference."""
    if isinstance(value, str) and "${" in value:
        raise InputError(f"{option}: expected texts without '${{', which begins a reference, got {value!r}")
    if isinstance(value, Mapping):
        check_references(option, list(value))
        for key, item in value.items():
            check_references(f"{option}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_references(option, item)


def check_phrases(option: str, phrases: Sequence[str], may_be_empty: bool = False) -> None:
    """Refuse an empty list, a phrase without words, and a phrase that occurs twice."""
    if not phrases and not may_be_empty:
        raise InputError(f"{option}: expected at least one term, got none")
    seen: set[str] = set()
    for phrase in phrases:
        if not words_of(phrase) or phrase.casefold() in seen:
            raise InputError(f"{option}: expected different terms with words in them, got {phrase!r}")
        seen.add(phrase.casefold())


def check_templates(option: str, templates: Sequence[str]) -> None:
    """Refuse an empty list, a template that occurs twice, and a template without exactly one ``{}``."""
    if not templates or len(set(templates)) < len(templates):
        raise InputError(f"{option}: expected one or more templates, each once, got {list(templates)}")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"{option}: expected exactly one {{}} in a template, got {template!r}")


def check_wordings(option: str, wordings: Mapping[str, Sequence[str]], terms: Mapping[str, str]) -> None:
    """Refuse wordings whose key is not a term, and a wording that occurs twice."""
    for term, names in wordings.items():
        if term not in terms:
            raise InputError(f"{option}: expected keys that are terms of the concept, got {term!r}")
        check_phrases(f"{option}: {term}", [term, *names])


def contains_name(alias: str, names: Collection[str]) -> bool:
    """Return whether an alias contains one of a concept's ``names``, which are its terms and wordings."""
    return any(f" {name} " in f" {phrase_of(alias)} " for name in names)


def check_aliases(option: str, aliases: Sequence[str], names: Collection[str]) -> None:
    """Refuse an alias that contains one of the concept's ``names``, which are its terms and wordings."""
    check_phrases(option, aliases, may_be_empty=True)
    for alias in aliases:
        if contains_name(alias, names):
            raise InputError(f"{option}: expected names without a term or a wording in them, got {alias!r}")


def check_translations(option: str, translations: Mapping[str, Sequence[str]]) -> None:
    """Refuse an unknown language, and a phrase without words or twice in one language."""
    for code, phrases in translations.items():
        if code not in LANGUAGE_NAMES:
            raise InputError(f"{option}: expected keys among {', '.join(LANGUAGE_NAMES)}, got {code!r}")
        check_phrases(f"{option}: {code}", phrases)
