"""Programs that are compiled once, ahead of their first call: the time of a call never includes its compilation.

Compiling and loading a program holds the interpreter's lock for much of the time. Programs are therefore compiled in
the order of need: each waits, for a limited time, until the one before it has been compiled or, if required, has run.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax

from lserve_jax.runtime.freed_memory import give_back_freed_memory
from pallas_kernels import Choice, observe_choices

_PATIENCE_S = 3.0
"""How long a program waits for the compilation of the one that is needed before it. By then, a hit in the persistent
cache is loaded. A program that must be compiled takes longer, and the next one is then better compiled beside it."""

_HEAD_START_S = 0.5
"""How long the compilation of a program that is needed later is delayed, so that it does not slow the run of the one
before it. If that has not run by then, it waits for something else, such as weights."""


_CHOICES: dict[Hashable, tuple[Choice, ...]] = {}
"""The implementations that each trace took. JAX keeps traces for the whole process, so this table, which is read when
JAX reuses a trace, also does."""


class Call(NamedTuple):
    """A jitted ``step`` with its arguments, and the name of the program for their shapes."""

    name: str
    step: Any
    args: tuple[Any, ...]
    static: dict[str, Any]


class _Program(NamedTuple):
    """A program; ``is_due`` ends its wait before compilation, ``next_is_due`` (set after its run) that of the next."""

    compiled: Future[Any]
    is_due: threading.Event
    next_is_due: threading.Event


class Programs:
    """A table of compiled steps by name; a call whose shapes differ from those of the compilation is an error.

    Attributes:
      compile_seconds: how long callers have waited for compilations.
    """

    def __init__(self, on_compile: Callable[[str], None] | None = None) -> None:
        self.compile_seconds = 0.0
        self._programs: dict[str, _Program] = {}
        self._ran: dict[str, None] = {}
        self._on_compile = on_compile
        # Each compilation takes a core and hundreds of megabytes.
        self._threads = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="compile")

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the programs that were requested so far."""
        return tuple(self._programs)

    @property
    def choices(self) -> dict[str, tuple[Choice, ...]]:
        """Returns, for each program that has run, which implementation each op took; empty if that is not known."""
        return {name: self._programs[name].compiled.result()[1] for name in self._ran}

    def start(self, calls: Sequence[Call], *, later: Collection[str] = ()) -> None:
        """Starts to compile the new programs among ``calls``, in the order in which they are needed.

        Long compilations run in parallel: each uses about one core.

        Args:
          calls: the calls that will run.
          later: names of programs that are not needed before those in front of them have run: see `_HEAD_START_S`.
        """
        missing = [call for call in calls if self._is_missing(call.name)]
        if missing and self._on_compile is not None:
            self._on_compile(", ".join(call.name for call in missing))
        before: _Program | None = None
        for call in missing:
            is_due = before.next_is_due if before is not None and call.name in later else None
            compiled = self._threads.submit(
                *(_compile, call.step, _abstract(call.args), call.static),
                *(before.compiled if before is not None else None, is_due),
            )
            before = _Program(compiled, is_due or threading.Event(), threading.Event())
            self._programs[call.name] = before

    def _is_missing(self, name: str) -> bool:
        """Returns whether a program is new, or failed to compile: the cause of the failure may have passed."""
        program = self._programs.get(name)
        return program is None or (program.compiled.done() and program.compiled.exception() is not None)

    def compile(self, calls: Sequence[Call]) -> None:
        """Compiles the programs of ``calls`` that are not compiled yet."""
        self.start(calls)
        begin, programs = time.perf_counter(), [self._programs[call.name] for call in calls]
        if all(program.compiled.done() for program in programs):
            return
        for program in programs:
            program.is_due.set()
        wait([program.compiled for program in programs])
        self.compile_seconds += time.perf_counter() - begin

    def run(self, call: Call) -> Any:
        """Returns the finished result of a call; compiles its program first if necessary."""
        self.compile([call])
        program = self._programs[call.name]
        try:
            result = jax.block_until_ready(program.compiled.result()[0](*call.args))
        finally:
            program.next_is_due.set()
        self._ran[call.name] = None
        return result


def _abstract(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the shapes of arguments: during this compilation, another program may take the arguments as donated."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), args)


def _compile(
    step: Any, args: tuple[Any, ...], static: dict[str, Any], before: Future[Any] | None, is_due: threading.Event | None
) -> tuple[Any, tuple[Choice, ...]]:
    """Returns the compiled program, and the implementation that each op took in it."""
    if before is not None and wait([before], timeout=_PATIENCE_S).done and is_due is not None:
        is_due.wait(_HEAD_START_S)
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    trace = (step, structure, shapes, tuple(sorted(static.items())))
    with observe_choices() as choices:
        lowered = step.lower(*args, **static)
    if choices:  # empty if JAX reused this trace
        _CHOICES[trace] = tuple(dict.fromkeys(choices))
    compiled = lowered.compile()
    del lowered
    give_back_freed_memory()
    return compiled, _CHOICES.get(trace, ())
