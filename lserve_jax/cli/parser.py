"""The parser of all commands: its errors are one line, in the words of the derived flags."""

import argparse
import difflib
import re
from collections.abc import Callable
from typing import Any, NoReturn

WRONG = 2
"""Exit status that a shell expects after a wrong call."""

# What `argparse` says, and what the derived flags would say.
_REWORDED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"argument (\S+): invalid int value: ('.*')", r"\1 \2 must be a whole number"),
    (r"argument (\S+): invalid float value: ('.*')", r"\1 \2 must be a number"),
    (
        r"argument (\S+): invalid choice: ('.*') \(choose from (.*)\)",
        lambda found: f"{found[1]} {found[2]} must be one of {found[3].replace("'", '')}",
    ),
    (r"argument (--[^\s/]+)\S*: ignored explicit argument ('.*')", r"\1 takes no value, got \2"),
    (r"argument (\S+): (?=')", r"\1 "),  # of a derived flag
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage message before it; flags are written in full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        for pattern, words in _REWORDED:
            message = re.sub(f"^{pattern}", words, message, flags=re.DOTALL)
        self.exit(WRONG, error_line(f"{message}{self._hint(message)} (--help lists the flags)"))

    def _hint(self, message: str) -> str:
        """Returns what helps where a value begins with a dash, or a flag is misspelt; else nothing."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if found := re.match(r"argument (--[^\s/]+)\S*: expected (one|at least one) argument", message):
            from_file = f", or comes from {found[1]}-file" if f"{found[1]}-file" in flags else ""
            return f"; a value that begins with a dash is written {found[1]}=-x{from_file}"
        if message.startswith("unrecognized arguments: "):
            for unknown in re.findall(r"--[^\s=]+", message):
                longer = [flag for flag in flags if flag.startswith(unknown)]
                if near := longer or difflib.get_close_matches(unknown, flags, n=1):
                    return f"; did you mean {' or '.join(near[:3])}?"
        return ""


def error_line(message: str) -> str:
    """Returns the line on stderr that tells an error."""
    return f"error: {' '.join(message.split())}\n"
