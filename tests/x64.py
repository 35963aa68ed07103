"""Programs under ``jax_enable_x64``: the flag as a context, and what a traced program holds of 64 bits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.extend import core

_WIDE = {"int64", "uint64", "float64", "complex128"}
_SCALARS = {"jit", "convert_element_type"}
"""Where a Python number may have 64 bits: on its way to an array, whose dtype it takes."""


@contextmanager
def enabled() -> Iterator[None]:
    """Sets the flag for all threads, as a program or its environment does: the engine compiles in threads."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Returns what a function returns without the flag, and with it."""
    without = run()
    with enabled():
        return without, run()


def traced(function: Callable[..., Any], *arguments: Any) -> core.ClosedJaxpr:
    """Returns the program of a function under the flag."""
    with enabled():
        return jax.make_jaxpr(function)(*arguments)


def wide(program: core.ClosedJaxpr | core.Jaxpr) -> set[str]:
    """Returns one line for each equation, here or in a program within, that takes or gives an array of 64 bits."""
    found = set()
    for equation in getattr(program, "jaxpr", program).eqns:
        avals: set[Any] = {variable.aval for variable in (*equation.invars, *equation.outvars)}
        for aval in avals:
            is_number = getattr(aval, "weak_type", False) and aval.shape == ()
            is_allowed = is_number and equation.primitive.name in _SCALARS
            if str(getattr(aval, "dtype", "")) in _WIDE and not is_allowed:
                found.add(f"{equation.primitive.name} {aval} at {_place(equation)}")
        for inner in _programs(list(equation.params.values())):
            found |= wide(inner)
    return found


def _place(equation: core.JaxprEqn) -> str:
    """Returns the lines of Python that made an equation, the innermost first."""
    traceback = equation.source_info.traceback
    frames = traceback.frames if traceback else ()
    return " < ".join([f"{frame.file_name}:{frame.line_num}" for frame in frames if "/jax/" not in frame.file_name][:3])


def _programs(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _programs(list(value))
