"""A worker process: it starts with its settings, answers JSON lines, and has a time limit for every answer."""

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self


class WorkerError(Exception):
    """Raised if a worker ended, hung, or did not start; one line says why."""


class Worker:
    """A process that measures one system when it is asked to (see `bench.cpu.workers.protocol`).

    Attributes:
      begin: when it was started, by `time.perf_counter`.
    """

    def __init__(self, command: Sequence[str], settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.begin = time.perf_counter()
        self._facts: dict[str, Any] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [*command, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{command[0]}: {error.strerror}") from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def is_running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def ready(self, timeout: float) -> dict[str, Any]:
        """Returns the worker's description of itself after loading, and its memory then."""
        if self._facts is None:
            self._facts = self._answer(timeout)
        return self._facts

    def measure(self, timeout: float, **request: Any) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
          WorkerError: if there is none; the process has then ended.
        """
        assert self._process.stdin is not None
        deadline = time.monotonic() + timeout
        self.ready(timeout)  # before a request that a pipe may not hold
        with suppress(BrokenPipeError):  # it has ended: why is said below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(deadline - time.monotonic())

    def close(self) -> None:
        """Ends the process."""
        if self.is_running:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):  # what it was last asked has not been read
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed meanwhile
            for line in self._process.stdout:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=max(timeout, 0))
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer within {timeout:.0f} s") from None
        if line is None:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise WorkerError(f"ended with status {status}: {said[-1][:300] if said else 'nothing was said'}")
        return json.loads(line)
