"""Errors of libraries and of files as one line, and what is text at all."""

from pathlib import Path
from typing import Any, TypeGuard

from lserve_jax.config.errors import InputError


def one_line(error: BaseException) -> str:
    """Returns the message of an error on one line of at most 300 characters, or else the name of its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"


def read_text(path: Path) -> str:
    """Returns the text of a file of the user.

    Raises:
      InputError: if it cannot be read, or is not UTF-8; the message begins with the path.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {one_line(error)}") from None


def is_text(value: Any) -> TypeGuard[str]:
    """Returns whether a value is a string that UTF-8 can encode; JSON can hold others."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
