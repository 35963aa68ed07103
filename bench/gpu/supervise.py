"""Runs a part as a process with a time limit, and starts it again after a task that ended it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from bench.gpu.parts import Run
from bench.log import Log, open_task, read_lines
from bench.provenance import ROOT, sources


def supervise(
    name: str, arguments: list[str], run: Run, *, seconds: float, task_seconds: float | None, text: BinaryIO
) -> str:
    """Runs a part in a process, again after a task that it died of, and returns how it ended.

    Args:
      name: the part's.
      arguments: to Python.
      run: where results go.
      seconds: the time box.
      task_seconds: what one task may take.
      text: where its output goes.
    """
    deadline = time.monotonic() + seconds
    while True:
        text.write(f"\n== {name}: {' '.join(arguments)}\n".encode())
        text.flush()
        ended = _watch(arguments, run, deadline, task_seconds, text, _environment(name))
        task = open_task(read_lines(run.results)) if task_seconds is not None else None
        if ended == "done" or ended.startswith("out of time"):
            return ended  # an open task is left for the next run
        if task is None:
            return ended
        Log(run.results).end(task["key"], {"kind": "error", "part": name, "reason": ended})


def _watch(
    arguments: list[str],
    run: Run,
    deadline: float,
    task_seconds: float | None,
    text: BinaryIO,
    environment: dict[str, str],
) -> str:
    """Runs a process until it ends, its time is over, or a task takes too long; returns which."""
    begin = time.time()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=text,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            if time.monotonic() > deadline:
                return "out of time; the next run continues here"
            if task_seconds is not None:
                task = open_task(read_lines(run.results))
                # A task of an earlier process that was interrupted does not count.
                if task is not None and task["time"] >= begin and time.time() - task["time"] > task_seconds:
                    return f"a task took more than {task_seconds:.0f} s"
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "done" if process.returncode == 0 else f"the process ended with status {process.returncode}"


def _environment(part: str) -> dict[str, str]:
    """Returns the environment of a part, in which JAX takes memory as it needs it, so that peers get some."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "BENCH_SOURCES": sources()}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lserve_jax_bench_cache"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if part == "values":
        environment["JAX_PLATFORMS"] = "cuda,cpu"
    return environment
