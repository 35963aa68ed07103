"""Settings as fields of dataclasses: one description per field, from which flags and ``field=value`` are derived.

A field whose ``metadata`` has "help" is a setting. The keys of ``metadata``:

- "help": what the setting does, without its default;
- "default": its default in words, where "{}" stands for the value;
- "least": the lowest whole number that it may be;
- "choices": the words that it may be;
- "words": words that it may be besides a number, such as "all";
- "metavar": what stands for its value in ``--help``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, NamedTuple

from lserve_jax.config.errors import InputError

TokenBiases = Mapping[int, float] | Sequence[tuple[int, float]]
"""The type of a setting that gives each of some tokens a number."""
Texts = str | Sequence[str]
TextsOrTokens = str | Sequence[str | Sequence[int]]
"""The types of settings whose flag is repeated, once per text."""
type Bytes = int
type BytesOrWord = int | str | None
"""The types of settings that are a number of bytes, or a word."""


class Kind(NamedTuple):
    """How the values of one type are written as text.

    Attributes:
      parse: text to value; raises `InputError` or `KeyError`.
      what: what the text must be, for messages.
      metavar: what stands for the value in ``--help``.
    """

    parse: Callable[[str], Any]
    what: str
    metavar: str


def _layer_numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers of a list; an empty text is an empty list."""
    return tuple(int(part) for part in text.split(",")) if text.strip() else ()


def _token_ids(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _token_biases(text: str) -> tuple[tuple[int, float], ...]:
    pairs = (part.split("=") for part in text.split(",")) if text else ()
    return tuple((int(token), float(bias)) for token, bias in pairs)


_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def memory_size(text: str) -> int:
    """Returns the bytes that a text such as ``80GiB`` names; raises `ValueError` for another text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    size = float(found[1]) * _UNITS[found[2].upper()] if found and found[2].upper() in _UNITS else -1
    if not 0 <= size < 2**63:
        raise ValueError(f"{text!r} is no number of bytes")
    return int(size)


_WHOLE = Kind(int, "a whole number", "N")
_BYTES = Kind(memory_size, "a number of bytes, or one with GB or GiB, such as 80GiB", "SIZE")
_WORD = Kind(str, "a word", "WORD")

KINDS: dict[Any, Kind] = {
    int: _WHOLE,
    int | None: _WHOLE,
    float: Kind(float, "a number", "X"),
    bool: Kind({"true": True, "false": False}.__getitem__, "true or false", ""),
    tuple[int, ...]: Kind(_layer_numbers, "layer numbers with commas between, such as 0,1", "I,J"),
    str: _WORD,
    str | None: _WORD,
    Texts: _WORD,
    TextsOrTokens: _WORD,
    Sequence[int]: Kind(_token_ids, "token ids with commas between, such as 5,17", "ID,ID"),
    Bytes: _BYTES,
    BytesOrWord: _BYTES,
    TokenBiases: Kind(_token_biases, "token ids and numbers, such as 5=-1.5,17=2", "ID=X,ID=X"),
}
"""The kind of values of each type of field."""


def settings(cls: type) -> dict[str, Field[Any]]:
    """Returns the settings of a dataclass by name."""
    return {one.name: one for one in fields(cls) if "help" in one.metadata}


def read(setting: Field[Any], text: str) -> Any:
    """Returns the value that a text stands for; a word of "words" stands for itself.

    Raises:
      InputError: "must be …", to be completed with the name and the text.
    """
    words = setting.metadata.get("words", ())
    if text in words:
        return text
    kind = KINDS[setting.type]
    try:
        return kind.parse(text)
    except (ValueError, KeyError):
        raise InputError(f"must be {' or '.join((kind.what, *words))}") from None


def describe_default(setting: Field[Any], value: Any, template: str = "{}") -> str:
    """Returns a default in words: the setting's "default", else ``template``, with the value in the place of "{}"."""
    return setting.metadata.get("default", template).format(_write(value))


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or value == ():
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
