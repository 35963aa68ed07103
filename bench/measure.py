"""How a bench measures: repeated timings, limits of the device taken in the same run, and a log that loses nothing."""

import dataclasses
import datetime
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
L2_BYTES = 60 * 2**20
"""Of an H200; inputs that rotate among twice as much are cold."""
_SAMPLE_SECONDS = 2e-3
"""What one sample on a GPU lasts at least: waiting for the device costs some 20 µs."""

KERNEL_MODULES = tuple(
    f"pallas_kernels.{op}.mosaic_gpu" for op in ("decode_attention", "kv_write", "page_select", "prefill_attention")
)


def is_gpu() -> bool:
    """Whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


def free_memory() -> int:
    """Returns the bytes that the device can still give."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def timings(call: Callable[[], Any], repeats: int, inner: int = 1) -> np.ndarray:
    """Returns the seconds of a call in each of ``repeats`` samples after one that does not count.

    Args:
      call: starts work on the device and returns its results.
      repeats: samples.
      inner: calls of a sample, started one after another and waited for together.
    """
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(inner - 1):
            call()
        jax.block_until_ready(call())
        seconds.append((time.perf_counter() - begin) / inner)
    return np.array(seconds)


def starting_seconds(call: Callable[[], Any]) -> float:
    """Returns the least time in which a call starts its work: where that is what a call takes, the device waits."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        started = call()
        seconds.append(time.perf_counter() - begin)
        jax.block_until_ready(started)
    return min(seconds)


def sampled(call: Callable[[], Any], repeats: int, most_seconds: float = 4.0) -> np.ndarray:
    """Returns `timings` with samples as long as the device needs, and fewer of them (at least 5) if they are slow."""
    estimate = float(np.min(timings(call, 2)))
    inner = max(1, int(np.ceil(_SAMPLE_SECONDS / estimate))) if is_gpu() else 1
    return timings(call, max(min(repeats, 5), min(repeats, int(most_seconds / (estimate * inner)))), inner)


@cache
def copy_bandwidth() -> float:
    """Returns the bytes a second, read and written, of a large copy (4 GiB on a GPU, 128 MiB elsewhere)."""
    size = 2**30 if is_gpu() else 2**25
    x, copy = jnp.arange(size, dtype=jnp.float32), jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / float(np.median(sampled(lambda: copy(x), 15)))


@cache
def product_rate() -> float:
    """Returns the FLOP/s of a bfloat16 matrix product of random numbers (zeros and ones run faster)."""
    size = 8192 if is_gpu() else 1024
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / float(np.median(sampled(lambda: product(x, y), 15)))


class Limits(NamedTuple):
    """What the device can do at most: bytes a second, read and written, and FLOP a second of bfloat16 products."""

    bandwidth: float
    product: float


def device_limits(lines: list[dict[str, Any]]) -> Limits:
    """Returns the limits that a run has written into its log, else measures them."""
    for line in reversed(lines):
        if line["kind"] == "limits" and line["device"] == jax.devices()[0].device_kind:
            return Limits(line["bandwidth"], line["product"])
    return Limits(copy_bandwidth(), product_rate())


def kernel_times(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """Returns the microseconds a call of each GPU kernel that ``run`` launches, by name, as CUPTI sees them.

    No gap between kernels counts, which is what differs from the timings. Uses what Mosaic's profiler is made of
    (`jax.experimental.mosaic.gpu.profiler`), which would run a donating program twice on the same arrays.

    Raises:
      RuntimeError: if CUPTI cannot be used, or saw nothing.
    """
    from jax._src.lib import mosaic_gpu as library

    extension = getattr(library, "_mosaic_gpu_ext", None)
    if extension is None:
        raise RuntimeError("this jaxlib has no CUPTI")
    jax.block_until_ready(run())
    extension._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        launches = extension._cupti_get_timings(True)
    if not launches:
        raise RuntimeError("CUPTI saw no kernel")
    times: dict[str, float] = {}
    for name, milliseconds in launches:
        times[name] = times.get(name, 0.0) + milliseconds * 1e3 / calls
    return {name: round(time, 3) for name, time in times.items()}


class Launch(NamedTuple):
    """A launch configuration that a kernel asked for: its op, the shape it is tuned by, what was chosen."""

    op: str
    shape: str
    default: Any
    chosen: Any


@contextmanager
def launches(overrides: Mapping[str, Mapping[str, int]] | None = None) -> Iterator[list[Launch]]:
    """Collects the launch configurations of kernels traced inside, and may change them.

    Args:
      overrides: fields to replace in the heuristic's choice, by op; what was tuned before does not count then.
    """
    from pallas_kernels.core.launch import configure

    found: list[Launch] = []

    def collect(op: str, device: str, shape: str, default: Any) -> Any:
        # Of an op's launches (streaming heads beside 4-bit pages have their own) the first is changed.
        first = next((launch.shape for launch in found if launch.op == op), shape)
        changed = (overrides or {}).get(op) if shape == first else None
        chosen = configure(op, device, shape, default) if changed is None else dataclasses.replace(default, **changed)
        found.append(Launch(op, shape, default, chosen))
        return chosen

    modules = [importlib.import_module(name) for name in KERNEL_MODULES]
    modules = [module for module in modules if hasattr(module, "configure")]
    for module in modules:
        setattr(module, "configure", collect)  # noqa: B010
    _forget_traces(modules)
    try:
        yield found
    finally:
        for module in modules:
            setattr(module, "configure", configure)  # noqa: B010
        _forget_traces(modules)


def _forget_traces(modules: list[Any]) -> None:
    """Kernels may be jitted: one that was traced before would not ask for its configuration again."""
    for function in [value for module in modules for value in vars(module).values()]:
        if hasattr(function, "clear_cache"):
            function.clear_cache()


@cache
def provenance() -> dict[str, str]:
    """Returns device, versions, commit and date: what a number needs to mean anything."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.client.platform_version.split("\n")[0][:80],
        "jax": importlib.metadata.version("jax"),
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@cache
def sources() -> str:
    """Returns a short digest of the Python sources: results of other sources count as not there.

    A run that starts processes gives them its own, so that an edit in between divides no run.
    """
    if given := os.environ.get("BENCH_SOURCES"):
        return given
    files = sorted(
        file for folder in ("bench", "lserve_jax", "pallas_kernels") for file in (ROOT / folder).rglob("*.py")
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@cache
def commit() -> str:
    """Returns the commit of this checkout, with a plus where files differ from it; "unknown" without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "unknown"


def result(seconds: np.ndarray, limits: Limits, *, bytes_moved: int, flops: int, **labels: Any) -> dict[str, Any]:
    """Returns one result: median and spread in ms, and the achieved share of the nearer of the device's two limits."""
    median = float(np.median(seconds))
    low, high = np.percentile(seconds, [25, 75])
    shares = {"bandwidth": bytes_moved / median / limits.bandwidth, "product": flops / median / limits.product}
    nearer = max(shares, key=lambda name: shares[name])
    return {
        **labels,
        "median_ms": round(median * 1e3, 6),
        "quartiles_ms": [round(float(low) * 1e3, 6), round(float(high) * 1e3, 6)],
        "samples": len(seconds),
        "bytes": bytes_moved,
        "flops": flops,
        "gb_per_s": round(bytes_moved / median / 1e9, 2),
        "tflop_per_s": round(flops / median / 1e12, 4),
        "limit": nearer,
        "share_of_limit": round(shares[nearer], 4),
        "limit_gb_per_s": round(limits.bandwidth / 1e9, 1),
        "limit_tflop_per_s": round(limits.product / 1e12, 2),
        **provenance(),
    }


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
        """Whether the log has the outcome of a task, from these sources."""
        return any(is_outcome(line) and line["key"] == key for line in self.lines())

    def begin(self, key: Key) -> bool:
        """Returns whether a task is to be done now: not if the log has its outcome."""
        if self.has(key):
            return False
        self.write({"kind": "begin", "key": key, "sources": sources(), "time": time.time()})
        return True

    def end(self, key: Key, line: Mapping[str, Any]) -> None:
        """Appends the outcome of a task."""
        self.write({**line, "key": key, "sources": sources()})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a log; an interrupted one is none."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def is_outcome(line: Mapping[str, Any]) -> bool:
    """Whether a line is the outcome of a task, from these sources."""
    return "key" in line and line["kind"] != "begin" and line["sources"] == sources()


def open_task(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the last begun task if it has no outcome."""
    tasks = [line for line in lines if "key" in line]
    return tasks[-1] if tasks and tasks[-1]["kind"] == "begin" else None


def show(line: Mapping[str, Any]) -> None:
    """Prints a short form of a result, a refusal or an error."""
    name = f"{line['op']:<17} {line['implementation']:<15} {line['workload']:<26}"
    if "median_ms" in line:
        spread = (line["quartiles_ms"][1] - line["quartiles_ms"][0]) / line["median_ms"]
        print(
            f"{name} {line['median_ms']:>10.4f} ms ±{spread:<5.1%} {line['share_of_limit']:>6.1%} of {line['limit']}",
            flush=True,
        )
    else:
        print(f"{name} {line['kind']}: {line['reason']}", flush=True)
