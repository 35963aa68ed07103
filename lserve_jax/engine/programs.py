"""Compiled programs, each compiled once and ahead of its first call: no time of a call includes its own compilation.

Those that are needed later may still compile on another core while the first one runs.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import jax

_PATIENCE_S = 3.0
"""How long a program waits for the one that is needed before it. One that lies in the persistent cache is loaded by
then, without having to share the interpreter's lock; what must really be compiled had better begin beside it."""


class Call(NamedTuple):
    """A jitted ``step`` with arguments, under the name of the program that their shapes make."""

    name: str
    step: Any
    args: tuple[Any, ...]
    static: dict[str, Any]


class _Program(NamedTuple):
    compiled: Future[Any]
    has_run: threading.Event


class Programs:
    """A table of compiled steps by name; calling a name with other shapes than it was compiled for is an error.

    Attributes:
      compile_seconds: how long callers have waited for programs.
    """

    def __init__(self, on_compile: Callable[[str], None] | None = None) -> None:
        self.compile_seconds = 0.0
        self._programs: dict[str, _Program] = {}
        self._on_compile = on_compile
        self._threads = ThreadPoolExecutor(thread_name_prefix="compile")

    @property
    def names(self) -> tuple[str, ...]:
        """The programs that have been asked for so far."""
        return tuple(self._programs)

    def start(self, calls: Sequence[Call], *, after: Mapping[str, str] | None = None) -> None:
        """Begins to compile the programs of calls that are new, in the order in which they are needed.

        Those that take long are compiled side by side: a compilation uses about one core.

        Args:
          calls: what will be run.
          after: names of programs, and for each that of one which should have run once before it is compiled, if that
            does not take long either.
        """
        missing = [call for call in calls if self._is_missing(call.name)]
        if missing and self._on_compile is not None:
            self._on_compile(", ".join(call.name for call in missing))
        is_due: Callable[[float], Any] | None = None
        for call in missing:
            if (awaited := (after or {}).get(call.name)) is not None:
                is_due = self._programs[awaited].has_run.wait
            compiled = self._threads.submit(_compile, call.step, _abstract(call.args), call.static, is_due)
            self._programs[call.name] = _Program(compiled, threading.Event())
            is_due = partial(wait, [compiled])

    def _is_missing(self, name: str) -> bool:
        """Returns whether a program is new, or failed to compile: what it failed for may have passed."""
        program = self._programs.get(name)
        return program is None or (program.compiled.done() and program.compiled.exception() is not None)

    def compile(self, calls: Sequence[Call]) -> None:
        """Compiles the programs of calls that are not compiled yet."""
        self.start(calls)
        begin, programs = time.perf_counter(), [self._programs[call.name].compiled for call in calls]
        if all(program.done() for program in programs):
            return
        wait(programs)
        self.compile_seconds += time.perf_counter() - begin

    def run(self, call: Call) -> Any:
        """Returns the result of a call, ready; its program is compiled first if it is not."""
        self.compile([call])
        compiled, has_run = self._programs[call.name]
        result = jax.block_until_ready(compiled.result()(*call.args))
        has_run.set()
        return result


def _abstract(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the shapes of arguments: they themselves may be donated to another program while theirs is compiled."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), args)


def _compile(step: Any, args: tuple[Any, ...], static: dict[str, Any], is_due: Callable[[float], Any] | None) -> Any:
    if is_due is not None:
        is_due(_PATIENCE_S)
    return step.lower(*args, **static).compile()
