"""The parts of the run on a GPU: each part's command, time limit and tasks."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import tune
from bench.kernels.tasks import tasks as kernel_tasks
from bench.log import newest, read_lines
from bench.peers.tasks import tasks as peer_tasks

RESULTS, TEXT, TARGETS, TABLE = "results.jsonl", "log.txt", "targets.txt", "tuned.json"
_TASK_SECONDS = 75.0
"""Most seconds of a task, since a kernel whose barriers wait for each other would hang for ever."""


class Run(NamedTuple):
    """The settings of a run, and the folder of its results."""

    out: Path
    workload_set: str
    repeats: int

    @property
    def results(self) -> Path:
        """The file of all JSON lines."""
        return self.out / RESULTS


class Part(NamedTuple):
    """A process of the run.

    Attributes:
      minutes: its share of the time, of which it leaves the rest to the parts after it.
      command: returns its arguments to Python, given the minutes that it has; or why it does not run.
      tasks: returns what it would do, with seconds, for a dry run.
      task_seconds: what one of its tasks may take; None where it keeps no tasks in the log.
    """

    minutes: float
    command: Callable[[Run, float], list[str] | str]
    tasks: Callable[[Run], list[tuple[str, float]]]
    task_seconds: float | None = _TASK_SECONDS


def _worker(name: str) -> Callable[[Run, float], list[str] | str]:
    return lambda run, _: ["-m", "bench.gpu", "--worker", name, "--out", str(run.out)]


def _values_command(run: Run, minutes: float) -> list[str] | str:
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    found = newest(read_lines(run.results), kind="environment")
    if found and not found["is_gpu"]:
        return "no GPU: the suite runs these tests interpreted"
    return _worker("values")(run, minutes)


def _kernels_command(run: Run, _: float) -> list[str]:
    probe = newest(read_lines(run.results), kind="cupti")
    options = ["--kernel-times"] if probe and probe["is_working"] else []
    return ["-m", "bench.kernels", *_common(run), *options]


def _common(run: Run) -> list[str]:
    return ["--workload-set", run.workload_set, "--repeats", str(run.repeats), "--out", str(run.results)]


def _e2e_command(run: Run, minutes: float) -> list[str] | str:
    if importlib.util.find_spec("bench.e2e") is None:
        return "bench.e2e is not here"
    return ["-m", "bench.e2e", "--out", str(run.out), "--minutes", f"{minutes:.2f}"]


def _tuned(run: Run) -> list[tuple[str, float]]:
    return [(f"{op} {workload} and its neighbours", 35.0) for op, workload in tune.WORKLOAD_SETS[run.workload_set]]


PARTS: dict[str, Part] = {
    "environment": Part(0.5, _worker("environment"), lambda _: [("device, copy, product, CUPTI", 25.0)]),
    "values": Part(2.0, _values_command, lambda _: [("tests/pallas_kernels -k hopper", 120.0)]),
    "kernels": Part(
        2.75, _kernels_command, lambda run: [(" ".join(task), 5.0) for task in kernel_tasks(run.workload_set)]
    ),
    "peers": Part(
        1.0,
        lambda run, _: ["-m", "bench.peers", *_common(run)],
        lambda run: [(" ".join(task), 4.0) for task in peer_tasks(run.workload_set)],
    ),
    "tuning": Part(1.0, lambda run, _: ["-m", "bench.tune", *_common(run), "--table", str(run.out / TABLE)], _tuned),
    "e2e": Part(1.75, _e2e_command, lambda _: [("bench.e2e", 105.0)], None),
}
