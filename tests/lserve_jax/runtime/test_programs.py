"""Compiled programs: compiled once, in the background where nobody waits, and again after a failure."""

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lserve_jax.runtime.programs import Call, Programs

GUARD_S = 600.0
"""How long a test waits for what must happen, before it fails; a busy machine takes a while."""
FOREVER_S = threading.TIMEOUT_MAX


def double(x: jax.Array) -> jax.Array:
    return 2 * x


def tracing(event: threading.Event) -> Callable[[jax.Array], jax.Array]:
    """A program that says when it is compiled."""

    def step(x: jax.Array) -> jax.Array:
        event.set()
        return x

    return step


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how long programs wait for each other: for ever, or not at all, so that no test is a race of clocks."""

    def set_to(*, patience: float = FOREVER_S, head_start: float = FOREVER_S) -> None:
        monkeypatch.setattr("lserve_jax.runtime.programs._PATIENCE_S", patience)
        monkeypatch.setattr("lserve_jax.runtime.programs._HEAD_START_S", head_start)

    set_to()
    return set_to


def test_a_program_is_compiled_once_and_its_name_told():
    told: list[str] = []
    programs = Programs(told.append)
    call = Call("double", jax.jit(double), (jnp.arange(3),), {})
    assert programs.run(call).tolist() == programs.run(call).tolist() == [0, 2, 4]
    assert (told, programs.names) == (["double"], ("double",))
    assert programs.compile_seconds > 0


def test_a_program_is_loaded_before_the_next_begins(waits: Callable[..., None]):
    """Two at once would take the interpreter's lock from each other."""
    order: list[str] = []
    begun = threading.Event()

    def first(x: jax.Array) -> jax.Array:
        begun.wait(0.2)  # in vain: long enough for a second one that does not wait to begin
        order.append("first")
        return x

    def second(x: jax.Array) -> jax.Array:
        begun.set()
        order.append("second")
        return x

    x, programs = (np.ones(1, np.float32),), Programs()
    programs.compile([Call("first", jax.jit(first), x, {}), Call("second", jax.jit(second), x, {})])
    assert order == ["first", "second"]


def test_a_started_program_is_waited_for_only_where_it_is_needed(waits: Callable[..., None]):
    waits(patience=0.0)
    entered, leave = threading.Event(), threading.Event()

    def slow(x: jax.Array) -> jax.Array:
        entered.set()
        assert leave.wait(GUARD_S)
        return x + 1

    programs = Programs()
    slow_call = Call("slow", jax.jit(slow), (np.ones(2, np.float32),), {})
    fast_call = Call("double", jax.jit(double), (np.ones(2, np.float32),), {})
    programs.start([slow_call, fast_call])
    assert entered.wait(GUARD_S)
    assert programs.run(fast_call).tolist() == [2, 2]
    leave.set()
    assert programs.run(slow_call).tolist() == [2, 2]


def test_a_program_may_wait_until_another_has_run(waits: Callable[..., None]):
    """The first token's own work is not to share the interpreter's lock with what comes after it."""
    x, programs, traced = (np.ones(1, np.float32),), Programs(), threading.Event()
    first, then = Call("double", jax.jit(double), x, {}), Call("later", jax.jit(tracing(traced)), x, {})
    programs.start([first, then], later=["later"])
    programs.compile([first])
    assert not traced.wait(0.2)
    programs.run(first)
    assert traced.wait(GUARD_S)
    assert programs.run(then).tolist() == [1]


def test_what_is_asked_for_begins_at_once(waits: Callable[..., None]):
    """The program before it never runs, and it would wait for that for ever."""
    x, programs = (np.ones(1, np.float32),), Programs()
    calls = [Call(name, jax.jit(double), x, {}) for name in ("double", "again")]
    programs.start(calls, later=["again"])
    assert programs.run(calls[1]).tolist() == [2]


def test_no_program_waits_long_for_one_that_does_not_run(waits: Callable[..., None]):
    waits(head_start=0.1)
    x, programs, traced = (np.ones(1, np.float32),), Programs(), threading.Event()
    programs.start(
        [Call("double", jax.jit(double), x, {}), Call("again", jax.jit(tracing(traced)), x, {})], later=["again"]
    )
    assert traced.wait(GUARD_S)


def test_a_failed_run_holds_nothing_back(waits: Callable[..., None]):
    x, programs, traced = (np.ones(1, np.float32),), Programs(), threading.Event()
    first = Call("double", jax.jit(double), x, {})
    programs.start([first, Call("again", jax.jit(tracing(traced)), x, {})], later=["again"])
    with pytest.raises(TypeError):
        programs.run(first._replace(args=(np.ones(3, np.float32),)))
    assert traced.wait(GUARD_S)


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
