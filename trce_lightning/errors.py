"""The error that a user can correct. The module imports nothing."""


class InputError(ValueError):
    """An error about a value, a file or a model from a user that doesn't fit.

    The message names the option, what it expects and what it got. The command lines show it without a
    traceback and exit with code 2. Any other ``ValueError`` is a fault of this project and keeps its
    traceback.
    """
