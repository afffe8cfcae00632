"""Text files of users: UTF-8, and a sentence that names the line where one is not."""

import codecs
from pathlib import Path

from trce_lightning.errors import InputError

_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def decoded(path: Path, content: bytes) -> str:
    """Return the text of a file, without the mark that some programs begin UTF-8 with.

    Raises:
        InputError: other bytes than UTF-8, or NUL among them; names the line.
    """
    found = next((f"{name} by its first bytes" for mark, name in _MARKS.items() if content[:2] == mark), None)
    try:
        text = content.decode("utf-8-sig")
        position = content.find(b"\0")
    except UnicodeDecodeError as error:
        text, position = "", error.start
    if found is None and position < 0:
        return text
    line = len(content[: max(position, 0) + 1].splitlines())
    raise InputError(
        f"{path}, line {line}: expected text in UTF-8, got "
        f"{found or f'the byte 0x{content[position]:02x} in it'}; save it as UTF-8"
    )
