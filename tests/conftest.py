"""What every test runs under: the CPU unless the caller says otherwise, strict promotion, a compilation cache."""

import ctypes
import gc
import hashlib
import importlib.metadata
import logging
import os
import platform
import resource
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _compilation_cache() -> Path:
    """A folder for this jaxlib and processor: programs run nowhere else.

    Workers share it, so that each program is compiled once. JAX takes no lock: an entry that another worker is still
    writing is found to be damaged, and compiled (pyproject.toml ignores the warning).
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    name = f"{importlib.metadata.version('jaxlib')} {platform.machine()} {flags}"
    return ROOT / ".cache" / "tests" / hashlib.sha256(name.encode()).hexdigest()[:12]


# Before jax is imported, and as environment variables, so that the programs that tests start run under the same.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# The interpreter of GPU kernels needs a thread for each warpgroup: with fewer they wait for each other for ever.
os.environ.setdefault("PJRT_NPROC", "8")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

# The compiler for GPUs (tests/pallas_kernels/hopper.py) must be on the path when JAX first looks for its plugins.
sys.path.append(str(Path(sys.prefix) / "gpu-compiler"))

import hypothesis
import jax
import numpy as np
import pytest

assert jax.config.jax_numpy_dtype_promotion == "strict", "a plugin imported jax before tests/conftest.py"

# The same examples on every run: a failure seen once is seen again. No deadline: a first call compiles.
hypothesis.settings.register_profile("lserve_jax", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("lserve_jax")


# --- markers ---------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of Hopper's kernels, which have files of their own."""
    for item in items:
        if "hopper" in item.path.stem:
            item.add_marker(pytest.mark.hopper)


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY_LIMIT = 2 * 2**30
"""Bytes per process that runs tests: `make test` runs two of them, also on machines that do other work."""
_FAILS_ABOVE = 3 * 2**30
"""A run with a larger process fails. The room between is for compilations that happen to run side by side."""
_PEAKS: dict[str, int] = {}
"""The largest resident size of each process that has ended, in bytes, by the name of the worker."""


_GROWTH = 200 * 2**20
"""Bytes by which a process may grow before it gives back what it does not need."""
_kept = sys.maxsize
"""What it needed when it last did, or before its first test."""


def _resident() -> int:
    """Returns the size of this process in memory, in bytes; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def _give_back() -> None:
    """Drops compiled programs and returns freed memory to the system."""
    global _kept  # noqa: PLW0603
    jax.clear_caches()
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)  # of glibc
    _kept = _resident()


@pytest.fixture(scope="module", autouse=True)
def memory_of_other_files_given_back() -> None:
    """Begins a file of tests without what the models of the file before it took: one that needs 1.1 GiB may follow."""
    if _resident() > 2 * _GROWTH:
        _give_back()


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Drops compiled programs and returns freed memory to the system, whenever a process has grown.

    JAX keeps every program that was ever compiled, and the C library keeps freed blocks that lie between others. A
    test that interprets a kernel leaves 110 MiB behind (50 of them programs); a worker grew to 4 GiB over the suite.
    """
    global _kept  # noqa: PLW0603
    _kept = min(_kept, _resident())
    yield
    if _resident() > _kept + _GROWTH:
        _give_back()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run in which a process has used too much memory; a worker only says how much it has used."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak  # type: ignore[attr-defined]
        return
    if not _PEAKS:
        _PEAKS["main"] = peak
    if max(_PEAKS.values()) > _FAILS_ABOVE and os.environ["JAX_PLATFORMS"] == "cpu":  # CUDA maps gigabytes
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Notes the memory of a worker (of pytest-xdist) that has ended."""
    _PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the peak memory of each process."""
    peaks = ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in sorted(_PEAKS.items()))
    verdict = f": MORE THAN {MEMORY_LIMIT / 2**30:.0f} GiB" * (max(_PEAKS.values()) > MEMORY_LIMIT)
    terminalreporter.write_line(f"peak memory of each process: {peaks}{verdict}")


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run and on every worker."""
    return np.random.default_rng(0)


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """The command lines set up logging for a process of their own: the root's handlers, and levels of both loggers."""
    root, package = logging.getLogger(), logging.getLogger("lserve_jax")
    levels, handlers = (root.level, package.level), list(root.handlers)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Each test leaves logging as it found it."""
    with _logging_as_it_was():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """Each fixture that more than one test sees leaves logging as it found it: it may run a command line."""
    with nullcontext() if fixturedef.scope == "function" else _logging_as_it_was():
        return (yield)


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The GGUF file of the embedded model, fetched once; fails where it cannot be had: the README promises it."""
    from lserve_jax.weights import embedded

    try:
        return embedded.path()
    except ValueError as error:
        pytest.fail(f"the embedded model could not be had: {error}")


@pytest.fixture(scope="session")
def shared_patterns() -> Path:
    """The folder of head gates published with DuoAttention, beside the repository."""
    folder = ROOT.parent / "shared" / "data" / "attn_patterns"
    if not folder.is_dir():
        pytest.skip("the published head patterns are not beside this checkout (shared/data/attn_patterns)")
    return folder
