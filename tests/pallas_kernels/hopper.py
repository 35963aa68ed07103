"""Mosaic GPU kernels without a GPU: interpreted on the CPU for values, compiled ahead of time for an H200 for the rest.

The compiler is the CUDA plugin of jaxlib. `make test` puts it into a folder of its own in the environment
(``gpu-compiler``), so that programs that are not tests do not look for a GPU; tests/conftest.py adds it to the path.
"""

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.core.hopper import SHARED_MEMORY, require_hopper

TARGET = Path(__file__).parent / "targets" / "nvidia_h200.txtpb"
COMPILER = Path(sys.prefix) / "gpu-compiler"
_DUMPS = tempfile.TemporaryDirectory(prefix="mosaic_gpu_")


class Kernel(NamedTuple):
    """What ptxas says of one kernel: registers a thread, bytes of spills, and its shared memory in bytes."""

    name: str
    registers: int
    spills: int
    shared_memory: int


@contextmanager
def on_h200() -> Iterator[None]:
    """Traces for an H200: kernels that ask for the device find one."""
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


@contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
    """Runs kernels on the CPU. What is jitted inside must be traced inside."""
    assert int(os.environ.get("PJRT_NPROC", "0")) >= 4, "a kernel waits for ever with fewer threads than warpgroups"
    with on_h200(), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
        yield


def has_hopper() -> bool:
    """Whether JAX runs on a Hopper GPU here."""
    try:
        require_hopper()
    except NotImplementedError:
        return False
    return True


def evaluate(function: Callable[..., Any], *arguments: Any, detect_races: bool = False) -> Any:
    """Returns the jitted function's result: run on a Hopper GPU where one is, interpreted elsewhere.

    A race that was asked for is an error: the interpreter only prints it.
    """
    if has_hopper():
        return jax.jit(function)(*arguments)
    with interpreted(detect_races=detect_races), redirect_stdout(io.StringIO()) as said:
        result = jax.block_until_ready(jax.jit(function)(*arguments))
    assert "RACE" not in said.getvalue(), said.getvalue()
    return result


@cache
def _sharding() -> NamedSharding:
    """A placement on an H200 that need not exist."""
    if not COMPILER.is_dir():
        pytest.skip(f"the compiler for GPUs is not installed ({COMPILER}; `make test` does it)")
    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", topology="1x1x1", target_config=TARGET.read_text()
    )
    return NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())


def compiled(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> tuple[Any, list[Kernel]]:
    """Returns the program that a function of abstract (or real) arrays becomes on an H200, and its Mosaic kernels.

    Args:
      function: traced under `on_h200`.
      *arguments: pytrees of anything with shape and dtype.
      donate: positions of arguments that the program may overwrite.
    """
    sharding = _sharding()
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with tempfile.TemporaryDirectory(dir=_DUMPS.name) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOSAIC_GPU_DUMP_TO", folder)
        patch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
        with on_h200(), _no_compilation_cache():  # a program from there would leave no dump
            program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
        return program, [_kernel(Path(folder), file) for file in sorted(Path(folder).glob("*.ptxas"))]


@contextmanager
def _no_compilation_cache() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _kernel(folder: Path, file: Path) -> Kernel:
    text = file.read_text()
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", text))
    resources = (folder / f"{file.stem}.resources.txt").read_text()
    return Kernel(file.stem, registers, spills, int(re.findall(r"(\d+)", resources)[0]))


def assert_fits(kernels: list[Kernel], *, count: int | None = None) -> None:
    """No spills, shared memory within the limit, and as many kernels as said (at least one)."""
    assert kernels
    assert count is None or len(kernels) == count, kernels
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.shared_memory <= SHARED_MEMORY, kernel
