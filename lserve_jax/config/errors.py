"""The one type of errors that a user can correct, and values in messages."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

_LONGEST = 4000
"""Characters of a message; what a file holds may be quoted in one, and can be of any length."""


class InputError(ValueError):
    """Something given from outside is wrong: an argument, a setting, a file, a prompt.

    The message is one line that names what is wrong and what to do. Commands print it and end with status 2. Any other
    exception is a fault of this package, and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        rest = len(line) - _LONGEST
        super().__init__(line if rest <= 0 else f"{line[:_LONGEST]}… and {rest} more characters")


def shown_list(names: Sequence[str], most: int = 20) -> str:
    """Returns names for a message, separated by commas: the first ``most``, each on one line and cut as by `shown`."""
    found = [name if name.isprintable() and len(name) <= 80 else shown(name) for name in names[:most]]
    return ", ".join([*found, *([f"and {len(names) - most} more"] if len(names) > most else [])])


def shown(value: object, length: int = 80) -> str:
    """Returns a value for a message: its Python notation, cut after ``length`` characters.

    It takes no longer for a large value: to write one of 64 MB, which a client may send, takes seconds, in which no
    other thread runs.
    """
    try:
        text = repr(_beginning(value, [length + 1]))
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= length else f"{text[:length]}…"


def _beginning(value: Any, left: list[int]) -> Any:
    """Returns a value whose notation begins like that of ``value``.

    Args:
      value: the value.
      left: how many more characters of the notation are wanted, in a list to count down; each part has at least one.
    """
    left[0] -= 1
    kind = type(value)  # another one of these may have a notation of its own
    if kind in (str, bytes):
        return value[: max(left[0], 0) + 2]
    if kind in (list, tuple):
        return kind(_beginning(one, left) for one in takewhile(lambda _: left[0] > 0, value))
    if kind is dict:
        pairs = takewhile(lambda _: left[0] > 0, value.items())
        return {_beginning(key, left): _beginning(one, left) for key, one in pairs}
    return value
