"""Compiles programs in parallel, and measures their compilation."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

type Jobs = dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""Programs by name: a jitted function, its arguments (which may be abstract) and its static arguments."""


class Program(NamedTuple):
    """A compiled program, its seconds, its bytes without arguments, and how many of its calls are Mosaic kernels."""

    call: Any
    seconds: float
    temporary_bytes: int | None
    mosaic_kernels: int


def _compiled(job: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Program | Exception:
    step, args, static = job
    begin = time.perf_counter()
    try:
        program = step.lower(*args, **static).compile()
    except Exception as error:  # noqa: BLE001 - one program that does not compile must not end the run
        return error
    seconds = time.perf_counter() - begin
    memory = program.memory_analysis()
    kernels = sum("custom-call(" in line and "mosaic_gpu" in line for line in program.as_text().splitlines())
    return Program(program, seconds, getattr(memory, "temp_size_in_bytes", None), kernels)


def compiled(jobs: Jobs) -> dict[str, Program | Exception]:
    """Returns each job's program, or its error; compiles in parallel, with about one core per program."""
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as threads:
        return dict(zip(jobs, threads.map(_compiled, jobs.values()), strict=True))


def raise_failure(programs: Mapping[str, Any]) -> Any:
    """Raises the error of the first program that failed."""
    for program in programs.values():
        if isinstance(program, Exception):
            raise program


@contextmanager
def fresh_compilation_cache() -> Iterator[None]:
    """Enters a context with an empty persistent cache, which stores all compilations, however short."""
    names = ("dir", "min_compile_time_secs", "min_entry_size_bytes")
    options = ["jax_compilation_cache_dir", *(f"jax_persistent_cache_{name}" for name in names[1:])]
    before = [getattr(jax.config, option) for option in options]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for option, value in zip(options, (folder, 0.0, -1), strict=True):
                jax.config.update(option, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for option, value in zip(options, before, strict=True):
                jax.config.update(option, value)
            compilation_cache.reset_cache()
