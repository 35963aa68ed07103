"""The standard streams of a command: no answer is lost because one of them is narrow, closed or full."""

import codecs
import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def open_streams() -> None:
    """Makes the standard streams take every text, and replaces those that the caller has closed by the null device.

    A character that the encoding of stdout lacks becomes its escape in Python.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file would get this number, and with it what libraries write to stderr
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def settle_stdout() -> None:
    """Writes what stdout holds back, or discards it if that fails: at exit the same failure would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def to_json_line(value: Any) -> str:
    """Returns a value as JSON in one line that stdout takes as it is: an escape of `open_streams` is no JSON."""
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    return json.dumps(value, ensure_ascii=not encoding.startswith("utf"))
