"""Compiled programs, each compiled once and ahead of its first call, so that no measurement includes compilation."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Call(NamedTuple):
    """A jitted ``step`` with arguments, under the name of the program that their shapes make."""

    name: str
    step: Any
    args: tuple[Any, ...]
    static: dict[str, Any]


class Programs:
    """A table of compiled steps by name; calling a name with other shapes than it was compiled for is an error."""

    def __init__(self, on_compile: Callable[[str], None] | None = None) -> None:
        self.compile_seconds = 0.0
        self._compiled: dict[str, Any] = {}
        self._on_compile = on_compile

    @property
    def names(self) -> tuple[str, ...]:
        """The programs compiled so far."""
        return tuple(self._compiled)

    def compile(self, calls: Sequence[Call]) -> None:
        """Compiles the programs of calls that are not compiled yet, side by side: a compilation uses about one core."""
        missing = [call for call in calls if call.name not in self._compiled]
        if not missing:
            return
        if self._on_compile is not None:
            self._on_compile(", ".join(call.name for call in missing))
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(missing)) as threads:
            compiled = threads.map(lambda call: call.step.lower(*call.args, **call.static).compile(), missing)
            self._compiled |= {call.name: program for call, program in zip(missing, compiled, strict=True)}
        self.compile_seconds += time.perf_counter() - begin

    def run(self, call: Call) -> Any:
        """Returns the result of a call, whose program is compiled first if it is not."""
        self.compile([call])
        return self._compiled[call.name](*call.args)
