"""Make an object from a dotted name that a user gives, by Hydra's ``instantiate``."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from trce_lightning.errors import InputError

Made = TypeVar("Made")


def made_by(option: str, path: str, kind: type[Made], *arguments: Any, **options: Any) -> Made:
    """Call the class or function with the dotted name ``path`` and return the object that it makes.

    Hydra looks up the name. If an option is a map with ``_target_``, Hydra first makes an object of it.

    Raises:
        InputError: nothing has that name, the arguments don't fit, Hydra refuses the call, or the object is
            not a ``kind``. The message names ``option``.
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
        error.add_note(f"raised by '{path}', which {option} names")  # the user's code failed
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
    """Raise ``TypeError`` on wrong arguments before the call.

    A ``TypeError`` from inside the call is then an error of the called code.
    """
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in classes have no signature
        return
    signature.bind(*arguments, **options)
