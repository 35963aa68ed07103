"""The results of `bench.e2e`, each under a digest of its conditions."""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from bench.log import Log


class Journal:
    """DIR/e2e.jsonl; ``identity`` has the conditions of a result besides its settings."""

    def __init__(self, folder: Path, identity: dict[str, Any], *, is_retrying: bool) -> None:
        self._log, self._identity = Log(folder / "e2e.jsonl"), identity
        self._done = {line.get("id") for line in self._log.lines() if not (is_retrying and "error" in line)}

    def has(self, settings: dict[str, Any]) -> bool:
        """Whether the result of these settings is there."""
        return self._id(settings) in self._done

    def add(self, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Appends a result at once."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._log.write({**settings, **result, **self._identity, "date": date, "id": self._id(settings)})
        self._done.add(self._id(settings))

    def _id(self, settings: dict[str, Any]) -> str:
        # Not the commit: a tree with changes has none of its own. The digest of the sources stands for it.
        identity = {k: v for k, v in self._identity.items() if k not in ("commit", "date", "python")}
        return hashlib.sha256(json.dumps([settings, identity], sort_keys=True).encode()).hexdigest()[:16]
