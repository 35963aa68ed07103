"""A chain: one program that calls an op many times, one after the other, on different arguments."""

import math
from collections.abc import Callable
from typing import Any

import jax

from bench.kernels.cases import Case
from bench.kernels.sizes import Sizes
from bench.measure import L2_BYTES, is_gpu
from lserve_jax.engine.memory import free_memory

LONGEST_CHAIN = 40
LONGEST_CHAIN_OF_XLA = 4
"""Most calls of a chain; XLA compiles each call separately."""
_CHAIN_SECONDS, _LAUNCH_SECONDS = 1.5e-4, 3e-6
"""Least time of a chain on a GPU, since its start takes Python some 20 µs; and about the time of a launch."""
_SHARE_OF_MEMORY = 0.8


def rotation(sizes: Sizes, *, longest: int = LONGEST_CHAIN, memory: int | None = None) -> tuple[int, int]:
    """Returns the calls of a chain and the sets of page tables that keep the cache of the device cold, if they can.

    Raises:
      MemoryError: if not even one call fits.
    """
    cold = 2 * L2_BYTES if is_gpu() else 0
    busy = math.ceil(_CHAIN_SECONDS / (_LAUNCH_SECONDS + sizes.moved / 4e12 + sizes.flops / 8e14)) if is_gpu() else 0
    room = int((free_memory() if memory is None else memory) * _SHARE_OF_MEMORY)
    if sizes.pools + 2 * sizes.own > room:
        raise MemoryError(f"it needs {sizes.pools + 2 * sizes.own:.3g} bytes, {room:.3g} are free")
    fitting = (room - sizes.pools) // max(2 * sizes.own, 1)
    calls = min(max(2, busy, -(-cold // sizes.moved)), longest, fitting)
    sets = min(calls, -(-cold // sizes.pools), (room - 2 * sizes.own * calls) // sizes.pools)
    return calls, max(1, sets)


def chain(case: Case, implementation: str) -> Callable[[], Any]:
    """Returns a function that starts all calls of a case in one compiled program, and returns their results.

    On a GPU the program is launched kernel by kernel: as a graph, independent calls might run side by side.
    """

    leaves, structure = jax.tree.flatten(case.own)
    distinct = {id(leaf): leaf for leaf in leaves}  # to start a program costs by the argument
    places = [list(distinct).index(id(leaf)) for leaf in leaves]
    values = list(distinct.values())

    def calls(shared: Any, values: list[Any]) -> Any:
        results = []
        for arguments in jax.tree.unflatten(structure, [values[i] for i in places]):
            value = case.call(shared, arguments, implementation=implementation)
            shared = value if case.is_writing else shared
            results.append(value)
        return shared if case.is_writing else results

    lowered = jax.jit(calls, donate_argnums=0 if case.is_writing else ()).lower(case.shared, values)
    program = lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": ""} if is_gpu() else None)
    if not case.is_writing:
        return lambda: program(case.shared, values)
    state = [case.shared]

    def write() -> Any:
        state[0] = program(state[0], values)
        return state[0]

    return write
