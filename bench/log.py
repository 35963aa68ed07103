"""JSON lines that lose nothing: the file has every finished result, and none is measured again."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.provenance import sources

type Key = list[str]


class Log:
    """JSON lines in a file, each written at once: what has finished is never lost, and not done again.

    A task is begun under a key and ended by the line that holds its outcome. A task without one was interrupted, and
    is open.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Returns all whole lines."""
        return read_lines(self.path) if self.path else []

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the process that wrote the last line was killed
                    file.write(b"\n")
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def has(self, key: Key) -> bool:
        """Whether the log has the outcome of a task from the current sources."""
        return any(is_outcome(line) and line["key"] == key for line in self.lines())

    def begin(self, key: Key) -> bool:
        """Returns whether a task is still to do, that is, whether the log lacks its outcome."""
        if self.has(key):
            return False
        self.write({"kind": "begin", "key": key, "sources": sources(), "time": time.time()})
        return True

    def end(self, key: Key, line: Mapping[str, Any]) -> None:
        """Appends the outcome of a task."""
        self.write({**line, "key": key, "sources": sources()})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a log, without an interrupted one."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def is_outcome(line: Mapping[str, Any]) -> bool:
    """Whether a line is the outcome of a task from the current sources."""
    return "key" in line and line["kind"] != "begin" and line["sources"] == sources()


def open_task(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the last begun task if it has no outcome."""
    tasks = [line for line in lines if "key" in line]
    return tasks[-1] if tasks and tasks[-1]["kind"] == "begin" else None


def newest(lines: list[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    """Returns the newest line that has these fields."""
    found = (line for line in reversed(lines) if all(line.get(name) == value for name, value in fields.items()))
    return next(found, None)
