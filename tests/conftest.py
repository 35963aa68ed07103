"""What every test runs under: the CPU unless the caller says otherwise, strict promotion, a compilation cache."""

import hashlib
import importlib.metadata
import logging
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _compilation_cache() -> Path:
    """A folder for this jaxlib and processor (programs run nowhere else) and this worker (JAX takes no lock)."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    key = hashlib.sha256(f"{importlib.metadata.version('jaxlib')} {platform.machine()} {flags}".encode()).hexdigest()[
        :12
    ]
    return ROOT / ".cache" / "tests" / key / os.environ.get("PYTEST_XDIST_WORKER", "main")


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


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run and on every worker."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command lines set up logging for a process of their own."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


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
