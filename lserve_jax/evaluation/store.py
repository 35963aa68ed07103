"""A run's files: append-only lines of JSON, so that an interrupted run continues."""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lserve_jax.config.errors import InputError
from lserve_jax.evaluation.origin import NAMED_BY, Origin, compare_origins

type PromptKey = tuple[str, int, int]
"""Task, length, index."""
type Key = tuple[str, int, int, str]
"""Task, length, index, variant's label."""

_PROMPT_FIELDS = {"task": str, "length": int, "index": int}
_ROW_FIELDS = {**_PROMPT_FIELDS, "variant": str}


class JsonLines:
    """A growing file with one JSON object per line.

    Reading changes nothing. A last line without its end, which an interrupted run leaves, does not count; the first new
    line replaces it.

    Attributes:
      lines: the objects in the file.
      is_cut: whether there is such a last line.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file, if there is one; raises InputError naming a line that is no JSON object."""
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        self._size, self._complete = len(data), data.rfind(b"\n") + 1
        self.is_cut = self._complete < self._size
        self.lines = [self._parse(number, line) for number, line in enumerate(data[: self._complete].split(b"\n")[:-1])]
        self._file: BinaryIO | None = None

    def _parse(self, place: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(
                f"{self.path}: line {place + 1} is no JSON object: mend or delete it, or name another --out"
            )
        return value

    def require(self, place: int, types: Mapping[str, type]) -> None:
        """Raises InputError if a line lacks one of the fields or has one with another type."""
        wrong = [name for name, kind in types.items() if not isinstance(self.lines[place].get(name), kind)]
        if wrong:
            raise InputError(
                f"{self.path}: line {place + 1} has no valid {wrong[0]!r}: mend or delete it, or name another --out"
            )

    def open(self) -> None:
        """Opens the file for writing by this process only; raises InputError if another one writes to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"{self.path}: another run is writing to it: wait for it, or name another --out") from None
        if os.fstat(file.fileno()).st_size != self._size:
            file.close()
            raise InputError(f"{self.path} has changed since it was read: run the command again")
        file.truncate(self._complete)
        self._file = file

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line and flushes it to the operating system."""
        assert self._file is not None, "open() comes first"
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        self._file.write(text.encode() + b"\n")
        self._file.flush()
        self.lines.append(json.loads(text))

    def close(self) -> None:
        """Lets others write."""
        if self._file is not None:
            self._file.close()


class Store:
    """The folder of a run: settings and rows in results.jsonl, prompts in prompts.jsonl.

    Attributes:
      rows: results by task, length, index and variant, in the order of measurement.
      notes: remarks about the files that were read, one line each.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], origin: Origin | None = None) -> None:
        """Reads the files and changes nothing.

        Args:
          folder: folder of the run; need not exist.
          settings: the settings that all results of a folder share.
          origin: what new results are measured on; each of them keeps it as "measured_on".

        Raises:
          InputError: in one line, for a malformed line, or for other settings or another origin than those in the file.
        """
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.origin = origin or {}
        self._results, self._prompts = JsonLines(folder / "results.jsonl"), JsonLines(folder / "prompts.jsonl")
        self.notes = [
            f"{file.path}: the last line is cut off, as an interrupted run leaves it: dropped, and computed again"
            for file in (self._results, self._prompts)
            if file.is_cut
        ]
        self.rows = {}
        for place, row in enumerate(self._results.lines[1:], start=1):
            self._results.require(place, _ROW_FIELDS)
            self.rows[row["task"], row["length"], row["index"], row["variant"]] = row
        if self._results.lines:
            self._check_settings(self._results.lines[0].get("settings"))
        self.notes += compare_origins(self.rows.values(), self.origin, str(self._results.path)) if self.origin else []
        self._records = {}
        for place, record in enumerate(self._prompts.lines):
            self._prompts.require(place, _PROMPT_FIELDS)
            self._records[record["task"], record["length"], record["index"]] = record

    def _check_settings(self, found: Any) -> None:
        path = self._results.path
        if not isinstance(found, dict):
            raise InputError(f"{path}: line 1 holds no settings, so it is no file of this program: name another --out")
        digests = [row.get("measured_on", {}) for row in self.rows.values()]
        for name in dict.fromkeys((*self.settings, *found)):
            if digests and all(NAMED_BY.get(name) in one for one in digests):
                continue  # the digests are compared
            old, new = found.get(name), self.settings.get(name)
            if old != new:
                raise InputError(
                    f"{path} was made with {name}={json.dumps(old)}, this run has {json.dumps(new)}: "
                    f"name another --out, or take the same {name}"
                )

    def start(self, prompts: Iterable[Mapping[str, Any]]) -> None:
        """Opens the folder for new rows, and adds the prompts that it lacks.

        Raises:
          InputError: if the folder holds another prompt under the same name, or another run writes to it.
        """
        new = []
        for prompt in prompts:
            record = json.loads(json.dumps(prompt))
            key = record["task"], record["length"], record["index"]
            if self._records.setdefault(key, record) != record:
                raise InputError(
                    f"{self._prompts.path}: {key[0]} at length {key[1]}, index {key[2]}, is another prompt than the "
                    "one made now (from another version, corpus or data set?): name another --out"
                )
            if self._records[key] is record:
                new.append(record)
        for file in (self._results, self._prompts):
            file.open()
        if not self._results.lines:
            self._results.append({"settings": self.settings})
        for record in new:
            self._prompts.append(record)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a result, with what it was measured on."""
        self._results.append({**row, "measured_on": self.origin} if self.origin else row)
        kept = self._results.lines[-1]
        self.rows[kept["task"], kept["length"], kept["index"], kept["variant"]] = kept

    def close(self) -> None:
        """Lets others write."""
        self._results.close()
        self._prompts.close()


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
