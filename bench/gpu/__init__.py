"""Everything that a GPU is good for, in one run: `python -m bench.gpu --out bench/results [--minutes 9]`.

Parts, the most useful first: the environment and the device's limits; the values of the kernels (their tests, native);
times of the ops; times of peers; tuning; whole models (`bench.e2e`). Each is a process of its own with a time box, and
each of its tasks has a limit too: what crashes or hangs costs one task. Results are JSON lines in DIR/results.jsonl,
written at once; a second run with the same DIR does what is not there yet. bench/README.md says more.

The last thing printed, also in DIR/targets.txt, is the table of targets. Other files: log.txt, and the tuned table.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple

from bench import kernels, peers, tune
from bench.measure import (
    ROOT,
    Log,
    copy_bandwidth,
    is_gpu,
    is_outcome,
    kernel_times,
    open_task,
    product_rate,
    provenance,
    read_lines,
    sources,
)

RESULTS, TEXT, TARGETS, TABLE = "results.jsonl", "log.txt", "targets.txt", "tuned.json"
_TASK_SECONDS = 75.0
"""What a task may take: a kernel whose barriers wait for each other would hang for ever."""


class Run(NamedTuple):
    """What was asked for, and where it goes."""

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
    found = _last(read_lines(run.results), kind="environment")
    if found and not found["is_gpu"]:
        return "no GPU: the suite runs these tests interpreted"
    return _worker("values")(run, minutes)


def _kernels_command(run: Run, _: float) -> list[str]:
    probe = _last(read_lines(run.results), kind="cupti")
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
        2.75, _kernels_command, lambda run: [(" ".join(task), 5.0) for task in kernels.tasks(run.workload_set)]
    ),
    "peers": Part(
        1.0,
        lambda run, _: ["-m", "bench.peers", *_common(run)],
        lambda run: [(" ".join(task), 4.0) for task in peers.tasks(run.workload_set)],
    ),
    "tuning": Part(1.0, lambda run, _: ["-m", "bench.tune", *_common(run), "--table", str(run.out / TABLE)], _tuned),
    "e2e": Part(1.75, _e2e_command, lambda _: [("bench.e2e", 105.0)], None),
}


# Supervision.


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
    """Runs a process until it ends, its box is over, or a task takes too long; returns which."""
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
    """Returns the environment of a part: JAX takes memory as it needs it, so that peers get some."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "BENCH_SOURCES": sources()}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "lserve_jax_bench_cache"))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if part == "values":
        environment["JAX_PLATFORMS"] = "cuda,cpu"
    return environment


# Workers.


def measure_environment(out: Path) -> None:
    """Writes what the device is and can do."""
    log = Log(out / RESULTS)
    driver = ""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    log.write({"kind": "environment", "is_gpu": is_gpu(), "nvidia_smi": driver, **provenance()})
    line = {"kind": "limits", "bandwidth": copy_bandwidth(), "product": product_rate(), **provenance()}
    log.write(line)
    print(f"copy {line['bandwidth'] / 1e9:.0f} GB/s, product {line['product'] / 1e12:.1f} TFLOP/s", flush=True)
    if log.begin(["environment", "cupti"]):
        log.end(["environment", "cupti"], {"kind": "cupti", **_probe_cupti()})


def _probe_cupti() -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    if not is_gpu():
        return {"is_working": False, "reason": "no GPU"}
    x, double = jnp.ones(2**20), jax.jit(lambda x: 2 * x)
    try:
        return {"is_working": True, "kernels_us": kernel_times(lambda: double(x), 1)}
    except (ImportError, AttributeError, RuntimeError) as error:
        return {"is_working": False, "reason": f"{type(error).__name__}: {error}"[:200]}


class _Recorder:
    """A pytest plugin: a line for each test, and none is run twice."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.outcome, self.reason = "passed", ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        done = [line["key"] for line in self.log.lines() if is_outcome(line)]
        items[:] = [item for item in items if ["test", item.nodeid] not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.reason = "passed", ""
        self.log.begin(["test", nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.passed:
            self.outcome, self.reason = report.outcome, str(report.longrepr).strip().split("\n")[-1][:300]
        if report.when == "teardown":
            line = {"kind": "test", "outcome": self.outcome, "reason": self.reason}
            self.log.end(["test", report.nodeid], line)


def run_tests(out: Path) -> None:
    """Runs the kernels' tests on this device."""
    import pytest

    options = ["-q", "-k", "hopper", "-W", "default", "-p", "no:cacheprovider"]
    pytest.main([str(ROOT / "tests" / "pallas_kernels"), *options], plugins=[_Recorder(Log(out / RESULTS))])


WORKERS = {"environment": measure_environment, "values": run_tests}


# Targets.


class Target(NamedTuple):
    """A row of the table: what is wanted, what was measured, and whether that is it; None where nothing was."""

    name: str
    measured: str
    is_met: bool | None


def _last(lines: list[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    """Returns the newest line that has these fields."""
    found = (line for line in reversed(lines) if all(line.get(name) == value for name, value in fields.items()))
    return next(found, None)


def _times(lines: list[dict[str, Any]], op: str, implementation: str = "mosaic_gpu") -> dict[str, dict[str, Any]]:
    """Returns the newest result of an op by workload."""
    return {
        line["workload"]: line
        for line in lines
        if line["kind"] in ("kernel", "peer") and (line["op"], line["implementation"]) == (op, implementation)
    }


def _worst(name: str, found: dict[str, float], *, least: float | None = None, most: float | None = None) -> Target:
    """Returns the row of a target that holds at least or at most for all workloads, with the one furthest off."""
    if not found:
        return Target(name, "not measured", None)
    worst = min(found, key=lambda workload: found[workload]) if most is None else max(found, key=lambda w: found[w])
    value = found[worst]
    is_met = value >= least if least is not None else most is None or value <= most
    return Target(name, f"{value:.3g} ({worst}; worst of {len(found)})", is_met)


def _kernel_us(line: dict[str, Any]) -> float:
    """Returns the microseconds of a call: what CUPTI says of its kernels, else the timing with its gaps."""
    kernels_us = line.get("kernels_us")
    return sum(kernels_us.values()) if isinstance(kernels_us, dict) else line["median_ms"] * 1e3


def _share(line: dict[str, Any]) -> float:
    """Returns the share of the copy bandwidth that the kernels of a call reach."""
    return line["bytes"] / _kernel_us(line) / (line["limit_gb_per_s"] * 1e3)


def targets(lines: list[dict[str, Any]]) -> Iterator[Target]:
    """Returns what is wanted of an H200, and what the lines say of it."""
    dense, half = _times(lines, "prefill_dense"), _times(lines, "prefill_attention")
    theirs = _times(lines, "prefill_dense", "fa3")
    ratios = {name: theirs[name]["median_ms"] / dense[name]["median_ms"] for name in theirs.keys() & dense.keys()}
    yield _worst("prefill, dense: >= 0.95x of FlashAttention-3's speed", ratios, least=0.95)
    excess = {
        name: half[name]["median_ms"] / dense[name]["median_ms"] / (half[name]["flops"] / dense[name]["flops"])
        for name in half.keys() & dense.keys()
    }
    yield _worst("prefill, half streaming: <= 1.08x of dense x visible share", excess, most=1.08)

    for bits in ("bf16", "int8", "int4"):
        shares = {}
        for op in ("decode_attention", "decode_dense"):
            for name, line in _times(lines, op).items():
                w = kernels.WORKLOADS[name]
                read = w.batch * (w.context if op == "decode_dense" else w.num_selected * w.page_size)
                stored = name.rpartition("_")[2] if "_int" in name else "bf16"
                if w.batch >= 8 and w.context >= 2**15 and read >= 2**15 and stored == bits:
                    shares[f"{op} {name}"] = _share(line)
        yield _worst(f"decode, {bits}, batch >= 8: >= 0.85 of the copy bandwidth", shares, least=0.85)

    select = _times(lines, "page_select")
    shares = {name: _share(select[name]) for name in ("llama3_8b_128k", "llama3_8b_128k_b8") if name in select}
    yield _worst("page selector, 128K: >= 0.70 of the copy bandwidth", shares, least=0.70)
    alone = {name: _kernel_us(line) for name, line in select.items() if name == "llama3_8b_128k"}
    yield _worst("page selector, 128K, batch 1: <= 15 us", alone, most=15.0)

    writes = {
        name: _kernel_us(line)
        for name, line in _times(lines, "kv_write_decode").items()
        if kernels.WORKLOADS[name].batch == 1
    }
    yield _worst("kv write, decode, batch 1: <= 3 us", writes, most=3.0)
    chunks = {
        name: 1 / _share(line)
        for name, line in _times(lines, "kv_write_prefill").items()
        if kernels.WORKLOADS[name].chunk >= 8192
    }
    yield _worst("kv write, prefill of 8K: <= 1.3x of its bytes' time", chunks, most=1.3)

    ours, dense = _times(lines, "decode_attention"), _times(lines, "decode_dense", "fa3")
    ours = {name: line for name, line in ours.items() if name in dense}
    speedups = {name: dense[name]["median_ms"] / line["median_ms"] for name, line in ours.items()}
    yield _worst("(no target) decode, selected pages: times FlashAttention-3 over all of them", speedups)


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table of targets, under a line of what was tested."""
    ended = [line for line in lines if line.get("key", [""])[0] == "test" and line["kind"] != "begin"]
    tests = {line["key"][1]: line.get("outcome", "crashed") for line in ended}
    counts = [f"{list(tests.values()).count(outcome)} {outcome}" for outcome in sorted(set(tests.values()))]
    wrong = sum(line["kind"] == "wrong" for line in lines)
    rows = [f"values: {', '.join(counts) or 'no test was run'}; {wrong} benches had wrong values"]
    verdicts = {True: "met", False: "MISSED", None: ""}
    rows += [f"{row.name:<78} {row.measured:<64} {verdicts[row.is_met]}".rstrip() for row in targets(lines)]
    return "\n".join(rows)


# The run.


def run_parts(run: Run, names: list[str], minutes: float) -> None:
    """Runs parts within the time, and writes the table, also when it is interrupted."""
    run.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + minutes * 60
    try:
        with (run.out / TEXT).open("ab") as text:
            for index, name in enumerate(names):
                left = deadline - time.monotonic()
                share = PARTS[name].minutes / sum(PARTS[other].minutes for other in names[index:])
                seconds = max(left * share, 0.0)
                command = PARTS[name].command(run, seconds / 60)
                begin = time.monotonic()
                if isinstance(command, str):
                    ended = f"not run: {command}"
                else:
                    limit = PARTS[name].task_seconds
                    limit = None if limit is None else min(limit, max(seconds / 2, 1.0))
                    ended = supervise(name, command, run, seconds=seconds, task_seconds=limit, text=text)
                took = time.monotonic() - begin
                Log(run.results).write({"kind": "part", "part": name, "ended": ended, "seconds": round(took, 1)})
                print(f"{name:<12} {took:6.1f} s of {seconds:6.1f}  {ended}", flush=True)
    finally:
        text_of_table = table(read_lines(run.results))
        (run.out / TARGETS).write_text(text_of_table + "\n", encoding="utf-8")
        print(text_of_table, flush=True)


def describe(run: Run, names: list[str], minutes: float) -> None:
    """Prints what would run, and for how long."""
    whole = sum(PARTS[name].minutes for name in names)
    for name in names:
        tasks, box = PARTS[name].tasks(run), minutes * PARTS[name].minutes / whole
        print(
            f"{name}: a box of {box:.1f} minutes; about {sum(seconds for _, seconds in tasks) / 60:.1f} for everything"
        )
        for task, seconds in tasks:
            print(f"    {task}  {seconds / 60:.2f}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--workload-set", choices=tuple(kernels.WORKLOAD_SETS), default="full")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and its minutes")
    parser.add_argument("--worker", choices=tuple(WORKERS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    out = args.out.resolve()
    if args.worker:
        WORKERS[args.worker](out)
        return
    run = Run(out, args.workload_set, args.repeats)
    if args.dry_run:
        describe(run, args.parts, args.minutes)
        return
    signal.signal(signal.SIGTERM, _stop)
    run_parts(run, args.parts, args.minutes)


if __name__ == "__main__":
    main()
