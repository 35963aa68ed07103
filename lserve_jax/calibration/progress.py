"""What a calibration has computed so far, on disk beside the pattern, so that an interrupted one goes on from there."""

import json
import zipfile
from collections import UserDict
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lserve_jax.config.errors import InputError

PROGRESS_FILE = "progress.npz"
_SETTINGS = "settings"

type Done = MutableMapping[str, NDArray[Any]]
"""Name of a piece of work → its result: a dict, or `Progress`, which also keeps it on disk."""


class Progress(UserDict[str, NDArray[Any]]):
    """The results of finished pieces of work by name, saved with every change. Reading changes nothing.

    Attributes:
      path: the file.
      settings: JSON values; results count only under the settings with which they were computed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Reads what an interrupted run left in ``folder``, if anything.

        Raises:
          InputError: if it was begun with other settings, or the file is damaged.
        """
        super().__init__()
        self.path, self.settings = folder / PROGRESS_FILE, json.loads(json.dumps(settings))
        if self.path.exists():
            self.data = self._read()

    def __setitem__(self, name: str, result: NDArray[Any]) -> None:
        """Keeps one result."""
        self.update({name: result})

    def update(self, results: Mapping[str, NDArray[Any]]) -> None:
        """Keeps several results at once: after a kill, all of them are there or none."""
        self.data.update(results)
        self.save()

    def save(self) -> None:
        """Writes the file, which marks the folder as one to go on from."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{PROGRESS_FILE}.partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_SETTINGS: np.array(json.dumps(self.settings))}, **self.data)
        partial.replace(self.path)

    def remove(self) -> None:
        """Deletes the file: the work is done."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, NDArray[Any]]:
        try:
            # Opened here because np.load leaves a file open that is no archive.
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                found = dict(saved)
                begun = json.loads(str(found.pop(_SETTINGS)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: damaged ({error}); delete it to start again") from None
        others = [name for name in sorted({*self.settings, *begun}) if self.settings.get(name) != begun.get(name)]
        if others:
            pairs = ", ".join(f"{name}={begun.get(name)} (now {self.settings.get(name)})" for name in others)
            raise InputError(f"{self.path}: was begun with {pairs}: continue with that, or name another folder")
        return found
