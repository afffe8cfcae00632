"""The one way from a dotted name that a user gives to an object: Hydra's ``instantiate``."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from trce_lightning.errors import InputError

Made = TypeVar("Made")


def made_by(option: str, path: str, kind: type[Made], *arguments: Any, **options: Any) -> Made:
    """Return what the class or function of dotted name ``path`` makes of ``arguments`` and ``options``.

    Hydra looks the name up. A map with ``_target_`` among the options is made into an object first.

    Raises:
        InputError: nothing has that name, it takes other arguments, Hydra refuses to call it, or it makes
            something else than a ``kind``. The message names ``option``.
    """
    target = {**options, "_target_": path, "_partial_": True, "_convert_": "all"}
    try:
        make = instantiate(target, *arguments)
        _check_arguments(make.func, *make.args, **make.keywords)
    except (InstantiationException, TypeError) as error:
        wanted = f"makes a {kind.__name__}" + (f" with the options {options}" if options else "")
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"{option}: expected the dotted name of a class or function that {wanted}, got '{path}': {reason}"
        ) from error
    try:
        made = make()
    except Exception as error:
        error.add_note(f"raised by '{path}', which {option} names")  # its own fault, and its own traceback
        raise
    if not isinstance(made, kind):
        lacking = [name for name in vars(kind) if name[0] != "_" and not hasattr(made, name)]
        which = f" without {', '.join(lacking)}" if lacking else ""
        raise InputError(
            f"{option}: expected what makes a {kind.__name__}, got '{path}', which makes a "
            f"{type(made).__name__}{which}"
        )
    return made


def _check_arguments(factory: Any, *arguments: Any, **options: Any) -> None:
    """Raise ``TypeError`` on wrong arguments before the call, so that one from inside it stays its own."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some that are built in have none
        return
    signature.bind(*arguments, **options)
