"""Reads the JSON files of checkpoints; whatever is wrong with one is said in one line."""

import json
from pathlib import Path
from typing import Any

from lserve_jax.config.errors import InputError, shown

LARGEST_FILE = 1 << 28  # bytes; the largest indices of published checkpoints have some million


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, which may begin with a byte order mark.

    Raises:
      InputError: if it cannot be read, is too large, is not UTF-8 or JSON, holds no object, or a key of an object has
        two different values: programs differ in which of them they take.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file")
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= LARGEST_FILE else b""
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if size > LARGEST_FILE:
        raise InputError(f"{path}: has {size} bytes, more than {LARGEST_FILE}, and is no such file")
    return parse_json(text, str(path))


def parse_json(data: bytes, source: str, *, allows_constants: bool = True) -> dict[str, Any]:
    """Returns the object in the bytes of a file. Raises as `read_json` does.

    Args:
      data: the bytes.
      source: the file's name, for messages.
      allows_constants: whether numbers may be NaN and Infinity, which are not JSON but stand in some files.
    """
    try:
        constant = None if allows_constants else _refuse_constant
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=constant)
    except _TwiceError as error:
        raise InputError(f"{source}: key {error} has two different values; remove one") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{source}: must hold a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class _TwiceError(Exception):
    """A key stands twice in one object; the text names it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        for key, item in pairs:
            if item != value[key]:
                raise _TwiceError(shown(key))
    return value
