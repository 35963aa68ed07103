"""Compiled programs, each compiled once and ahead of its first call, so that no measurement includes compilation."""

import time
from collections.abc import Callable
from typing import Any


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

    def run(self, name: str, step: Any, *args: Any, **static: Any) -> Any:
        """Returns ``step(*args, **static)`` of a jitted ``step``, compiled under ``name`` at the first call."""
        if name not in self._compiled:
            if self._on_compile is not None:
                self._on_compile(name)
            begin = time.perf_counter()
            self._compiled[name] = step.lower(*args, **static).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._compiled[name](*args)
