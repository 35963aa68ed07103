"""Compiled programs: compiled once, in the background where nobody waits, and again after a failure."""

import threading
import time
from concurrent.futures import wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.runtime.programs import Call, Programs


def double(x: jax.Array) -> jax.Array:
    return 2 * x


def test_a_program_is_compiled_once_and_its_name_told():
    told: list[str] = []
    programs = Programs(told.append)
    call = Call("double", jax.jit(double), (jnp.arange(3),), {})
    assert programs.run(call).tolist() == programs.run(call).tolist() == [0, 2, 4]
    assert (told, programs.names) == (["double"], ("double",))
    assert programs.compile_seconds > 0


def test_a_program_is_loaded_before_the_next_begins():
    """Two at once would take the interpreter's lock from each other."""
    order: list[str] = []

    def first(x: jax.Array) -> jax.Array:
        time.sleep(0.2)
        order.append("first")
        return x

    def second(x: jax.Array) -> jax.Array:
        order.append("second")
        return x

    x, programs = (np.ones(1, np.float32),), Programs()
    programs.compile([Call("first", jax.jit(first), x, {}), Call("second", jax.jit(second), x, {})])
    assert order == ["first", "second"]


def test_a_started_program_is_waited_for_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lserve_jax.runtime.programs._PATIENCE_S", 0.1)
    entered, leave = threading.Event(), threading.Event()

    def slow(x: jax.Array) -> jax.Array:
        entered.set()
        assert leave.wait(60)
        return x + 1

    programs = Programs()
    slow_call = Call("slow", jax.jit(slow), (np.ones(2, np.float32),), {})
    fast_call = Call("double", jax.jit(double), (np.ones(2, np.float32),), {})
    programs.start([slow_call, fast_call])
    assert entered.wait(60)
    assert programs.run(fast_call).tolist() == [2, 2]
    leave.set()
    assert programs.run(slow_call).tolist() == [2, 2]


def test_a_program_may_wait_until_another_has_run():
    """The first token's own work is not to share the interpreter's lock with what comes after it."""
    x, programs, traced = (np.ones(1, np.float32),), Programs(), threading.Event()

    def later(x: jax.Array) -> jax.Array:
        traced.set()
        return x

    first, then = Call("double", jax.jit(double), x, {}), Call("later", jax.jit(later), x, {})
    programs.start([first, then], later=["later"])
    programs.compile([first])
    assert not traced.wait(0.2)
    programs.run(first)
    assert traced.wait(2.0)
    assert programs.run(then).tolist() == [1]


def test_no_program_waits_for_one_that_does_not_run(monkeypatch: pytest.MonkeyPatch):
    """What is asked for begins at once, and the rest soon."""
    monkeypatch.setattr("lserve_jax.runtime.programs._HEAD_START_S", 30.0)
    x, programs = (np.ones(1, np.float32),), Programs()
    calls = [Call(name, jax.jit(double), x, {}) for name in ("double", "again")]
    programs.start(calls, later=["again"])
    begin = time.perf_counter()
    assert programs.run(calls[1]).tolist() == [2]
    assert time.perf_counter() - begin < 10
    monkeypatch.setattr("lserve_jax.runtime.programs._HEAD_START_S", 0.1)
    others = [Call(name, jax.jit(double), x, {}) for name in ("third", "fourth")]
    programs.start(others, later=["fourth"])
    wait([program.compiled for program in programs._programs.values()], timeout=10)
    assert all(program.compiled.done() for program in programs._programs.values())


def test_a_failed_run_holds_nothing_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lserve_jax.runtime.programs._HEAD_START_S", 30.0)
    x, programs = (np.ones(1, np.float32),), Programs()
    calls = [Call(name, jax.jit(double), x, {}) for name in ("double", "again")]
    programs.start(calls, later=["again"])
    with pytest.raises(TypeError):
        programs.run(calls[0]._replace(args=(np.ones(3, np.float32),)))
    assert not wait([programs._programs["again"].compiled], timeout=10).not_done


def test_arguments_may_be_gone_while_a_program_compiles():
    x = jnp.arange(4)
    call = Call("double", jax.jit(double), (x,), {})
    programs = Programs()
    programs.start([call])
    x.delete()
    programs.compile([call])
    assert programs.run(Call("double", call.step, (jnp.arange(4),), {})).tolist() == [0, 2, 4, 6]


def test_what_failed_to_compile_is_tried_again():
    failures: list[Any] = [RuntimeError("no memory")]

    def fickle(x: jax.Array) -> jax.Array:
        if failures:
            raise failures.pop()
        return x

    programs = Programs()
    call = Call("fickle", jax.jit(fickle), (np.ones(1, np.float32),), {})
    with pytest.raises(RuntimeError, match="no memory"):
        programs.run(call)
    assert programs.run(call).tolist() == [1]
