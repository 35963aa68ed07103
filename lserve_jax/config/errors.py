"""The one type of errors that a user can correct, and values in messages."""

from collections.abc import Sequence

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
    """Returns a value for a message: its Python notation, cut after ``length`` characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deeply"
    return text if len(text) <= length else f"{text[:length]}…"
