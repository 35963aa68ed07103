"""A server under test: a process with a port of its own, ready when it says so, ended with all that it started."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

_POLL, _PATIENCE = 0.2, 5.0
"""Seconds between two questions whether a server is ready, and those that it may take to say."""
_END = 30.0
"""Seconds that a server may take to end by itself."""


class ServerError(Exception):
    """Raised if a server ended, or was not ready in time; one line says why."""


def free_port() -> int:
    """Returns a port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A server's process, which begins to load.

    Args:
      command: what starts it.
      environment: its environment.
      url: where it will answer.
      log: file for what it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> None:
        self.url = url
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._begin = time.perf_counter()
        try:
            with log.open("wb") as file:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
                )
        except OSError as error:
            raise ServerError(f"{command[0]}: {error.strerror}") from None

    def wait(self, timeout: float) -> float:
        """Returns the seconds from the start until `/health` said 200.

        Raises:
          ServerError: if it did not within ``timeout`` seconds, or if the process ended; it has then ended.
        """
        while (passed := time.perf_counter() - self._begin) < timeout:
            if (status := self._process.poll()) is not None:
                self.close()
                raise ServerError(f"ended with status {status}: {self._last_words()}")
            if self._is_well():
                return passed
            time.sleep(_POLL)
        self.close()
        raise ServerError(f"not ready within {timeout:.0f} s: {self._last_words()}")

    @property
    def peak_bytes(self) -> int | None:
        """Returns the most memory that the process has had resident; None where that cannot be read."""
        with suppress(OSError):
            text = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
            fields = dict(line.split(":", 1) for line in text.splitlines())
            return int(fields["VmHWM"].split()[0]) * 1024 if "VmHWM" in fields else None
        return None

    def close(self) -> None:
        """Ends the process and those that it started."""
        for number, seconds in ((signal.SIGTERM, _END), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_well(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=_PATIENCE) as answer:
                return answer.status == 200
        except OSError:  # nobody listens yet, or status 503
            return False

    def _last_words(self) -> str:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return said[-1][:300] if said else "nothing was said"
