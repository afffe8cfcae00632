"""A class or function that a user names by its dotted path, and that returns a detector or a domain."""

from __future__ import annotations

import inspect
import pkgutil
from typing import Any, TypeVar

from trce_lightning.errors import InputError

Made = TypeVar("Made")


def made_by(option: str, path: str, kind: type[Made], *arguments: Any, **options: Any) -> Made:
    """Call what the dotted name ``path`` names with ``arguments`` and ``options``; it returns a ``kind``.

    ``InputError`` naming ``option`` when there is none of that name, it takes other arguments, or it returns
    something else.
    """
    try:
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{option}: expected the dotted name of a {kind.__name__}, got '{path}': {error}"
        ) from error
    if callable(factory):
        _check_arguments(option, path, factory, arguments, options)
    made = None
    if callable(factory):
        try:
            made = factory(*arguments, **options)
        except Exception as error:
            error.add_note(
                f"raised by '{path}', which {option} names"
            )  # its own fault, and its own traceback
            raise
    if not isinstance(made, kind):
        lacking = [name for name in vars(kind) if name[0] != "_" and not hasattr(made, name)]
        which = f", whose result lacks {', '.join(lacking)}" if lacking else ""
        raise InputError(f"{option}: expected what returns a {kind.__name__}, got '{path}'{which}")
    return made


def _check_arguments(
    option: str, path: str, factory: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some that are built in have none
        return
    # Before the call, so that a TypeError from inside it stays what it is.
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise InputError(
            f"{option}: expected one that takes {len(arguments)} argument(s) and the options {options}, "
            f"got '{path}': {error}"
        ) from error
