import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import BACKENDS, Choice, observe_choices
from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.workloads import TINY
from tests.pallas_kernels.cases import TABLES, empty_cache, random_matrix, random_tokens


def answers(text: str) -> Callable[..., str]:
    return lambda *args, **options: f"{text} {args} {options}"


def refuses(reason: str) -> Callable[..., str]:
    def implementation(*args: object, **options: object) -> str:
        raise NotImplementedError(reason)

    return implementation


def breaks(*args: object, **options: object) -> str:
    raise ValueError("a mistake of the caller")


def test_none_takes_the_first_that_accepts_in_the_order_of_names():
    table = {
        "reference": answers("reference"),
        "xla": answers("xla"),
        "triton": refuses("no"),
        "mosaic_gpu": refuses("no"),
    }
    assert dispatch("op", table, None, 1, 2, sink=3) == "xla (1, 2) {'sink': 3}"
    assert dispatch("op", {**table, "triton": answers("triton")}, None) == "triton () {}"


def test_none_never_takes_the_reference():
    with pytest.raises(NotImplementedError, match=r"^no implementation of op accepts these arguments: xla: too odd$"):
        dispatch("op", {"reference": answers("reference"), "xla": refuses("too odd")}, None)


def test_a_name_runs_or_refuses_and_never_falls_back():
    table = {"xla": answers("xla"), "mosaic_gpu": refuses("head_dim=72 must be 64 or 128"), "reference": answers("it")}
    assert dispatch("op", table, "xla") == "xla () {}"
    assert dispatch("op", table, "reference") == "it () {}"
    with pytest.raises(NotImplementedError, match=r"^head_dim=72 must be 64 or 128$"):
        dispatch("op", table, "mosaic_gpu")


def test_an_absent_implementation_is_refused_with_those_that_there_are():
    with pytest.raises(NotImplementedError, match=r"^op has no 'triton' implementation; it has xla$"):
        dispatch("op", {"xla": answers("xla"), "reference": answers("it")}, "triton")


@pytest.mark.parametrize("name", ["cuda", "", "XLA"])
def test_an_unknown_name_is_the_callers_mistake(name: str):
    with pytest.raises(ValueError, match=rf"^implementation='{name}' must be None or one of {', '.join(BACKENDS)}$"):
        dispatch("op", {"xla": answers("xla")}, name)


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
def test_mistakes_of_the_caller_are_no_refusals(implementation: str | None):
    with pytest.raises(ValueError, match="a mistake of the caller"):
        dispatch("op", {"mosaic_gpu": breaks, "xla": answers("xla")}, implementation)


def test_choices_are_recorded_in_order_with_the_refusals_before_them():
    table = {"xla": answers("xla"), "triton": refuses("too old"), "mosaic_gpu": refuses("no Hopper")}
    with observe_choices() as choices:
        dispatch("first", table, None)
        dispatch("second", table, "xla")
        dispatch("third", {**table, "triton": answers("it")}, None)
    assert choices == [
        Choice("first", "xla", (("mosaic_gpu", "no Hopper"), ("triton", "too old"))),
        Choice("second", "xla", ()),
        Choice("third", "triton", (("mosaic_gpu", "no Hopper"),)),
    ]
    dispatch("after", table, None)
    assert len(choices) == 3


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu", "triton", "cuda"])
def test_a_call_that_raises_is_no_choice(implementation: str | None):
    with observe_choices() as choices:
        with pytest.raises((ValueError, NotImplementedError)):
            dispatch("op", {"mosaic_gpu": breaks, "xla": answers("xla")}, implementation)
        with pytest.raises(NotImplementedError):
            dispatch("op", {"mosaic_gpu": refuses("no"), "xla": refuses("no")}, None)
    assert choices == []


def test_observers_nest():
    table = {"xla": answers("xla")}
    with observe_choices() as outer:
        dispatch("before", table, None)
        with observe_choices() as inner:
            dispatch("inside", table, None)
        dispatch("after", table, None)
    assert [choice.op for choice in outer] == ["before", "inside", "after"]
    assert [choice.op for choice in inner] == ["inside"]


def test_an_observer_closes_when_an_error_leaves_it():
    seen = []

    def fail() -> None:
        with observe_choices() as choices:
            seen.append(choices)
            dispatch("op", {"xla": breaks}, None)

    with pytest.raises(ValueError, match="a mistake of the caller"):
        fail()
    dispatch("after", {"xla": answers("xla")}, None)
    assert seen == [[]]


def test_threads_do_not_see_each_others_choices():
    """Two threads, open at the same time, beside an observer in the thread that started them."""
    barrier, found = threading.Barrier(2, timeout=600), {}

    def run(op: str) -> None:
        with observe_choices() as choices:
            barrier.wait()
            for _ in range(100):
                dispatch(op, {"xla": answers("xla")}, None)
            barrier.wait()
        found[op] = choices

    with observe_choices() as choices:
        threads = [threading.Thread(target=run, args=(op,)) for op in ("left", "right")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert choices == []
    assert found == {op: [Choice(op, "xla", ())] * 100 for op in ("left", "right")}


def test_an_op_of_the_package_says_what_it_ran(rng: np.random.Generator):
    """Where there is no Hopper GPU: `xla`, and why not the kernel; traced once, however often it is run."""
    workload = TINY["mixed"]
    cache = empty_cache(workload, rng)
    x = jnp.asarray(random_tokens(workload, rng, 1))
    starts = counts = jnp.asarray(cache.lengths)
    write = jax.jit(lambda kv: pallas_kernels.kv_write(x, x, kv, cache.tables, starts, counts))
    with observe_choices() as choices:
        write(cache.kv)
        write(cache.kv)
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is a GPU")
    [(op, implementation, [(refused, reason)])] = choices
    assert (op, implementation, refused) == ("kv_write", "xla", "mosaic_gpu")
    assert "need a Hopper GPU" in reason


@pytest.mark.parametrize("op", TABLES)
def test_every_op_has_a_reference_and_names_known_to_dispatch(op: str):
    assert {"reference", "xla"} <= set(TABLES[op]) <= set(BACKENDS)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cuda", ValueError, "implementation='cuda' must be None or one of"),
        ("triton", NotImplementedError, "has no 'triton' implementation; it has (mosaic_gpu, )?xla$"),
    ],
)
@pytest.mark.parametrize("op", TABLES)
def test_every_op_refuses_names_that_it_does_not_have(
    op: str, name: str, error: type[Exception], message: str, rng: np.random.Generator
):
    workload = TINY["mixed"]
    cache = empty_cache(workload, rng)
    x = random_tokens(workload, rng, 1)
    no_means = {"has_means": False}
    calls = {
        "kv_write": ((x, x, cache.kv, cache.tables, cache.lengths, cache.lengths), {}),
        "prefill_attention": (
            (x, x, x, cache.kv, cache.tables, cache.lengths, cache.lengths),
            {"sink": 1, "local": 1},
        ),
        "block_select": (
            (x, cache.kv.retrieval, cache.tables.retrieval, cache.lengths, cache.lengths, cache.lengths),
            {**no_means, "queries": 16, "keys": 16, "threshold": None, "sink": 0, "local": 0, "last": 0, "least": 0},
        ),
        "page_select": (
            (x[:, 0], cache.kv.retrieval, cache.tables.retrieval, cache.lengths, None, None),
            {"num_selected": 4, "interval": 1, "sink_pages": 1},
        ),
        "decode_attention": ((x[:, 0], cache.kv, cache.tables, cache.lengths, None), {"sink": 1, "local": 1}),
        "quantized_matmul": ((x[0, 0], random_matrix(rng, 3, x.shape[-1], codes="int8")), {}),
    }
    assert set(calls) == set(TABLES)
    arguments, options = calls[op]
    with pytest.raises(error, match=message):
        getattr(pallas_kernels, op)(*arguments, **options, implementation=name)
