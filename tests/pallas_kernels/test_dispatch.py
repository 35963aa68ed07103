from collections.abc import Callable

import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.core.dispatch import NAMES, dispatch
from pallas_kernels.core.workloads import TINY
from tests.pallas_kernels.cases import TABLES, empty_cache, random_tokens


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
    with pytest.raises(
        NotImplementedError, match=r"^op has no 'triton' implementation; it has (mosaic_gpu, )?xla, reference$"
    ):
        dispatch("op", {"xla": answers("xla"), "reference": answers("it")}, "triton")


@pytest.mark.parametrize("name", ["cuda", "", "XLA"])
def test_an_unknown_name_is_the_callers_mistake(name: str):
    with pytest.raises(ValueError, match=rf"^implementation='{name}' must be None or one of {', '.join(NAMES)}$"):
        dispatch("op", {"xla": answers("xla")}, name)


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu"])
def test_mistakes_of_the_caller_are_no_refusals(implementation: str | None):
    with pytest.raises(ValueError, match="a mistake of the caller"):
        dispatch("op", {"mosaic_gpu": breaks, "xla": answers("xla")}, implementation)


@pytest.mark.parametrize("op", TABLES)
def test_every_op_has_a_reference_and_names_known_to_dispatch(op: str):
    assert {"reference", "xla"} <= set(TABLES[op]) <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("cuda", ValueError, "implementation='cuda' must be None or one of"),
        ("triton", NotImplementedError, "has no 'triton' implementation; it has (mosaic_gpu, )?xla, reference"),
    ],
)
@pytest.mark.parametrize("op", TABLES)
def test_every_op_refuses_names_that_it_does_not_have(
    op: str, name: str, error: type[Exception], message: str, rng: np.random.Generator
):
    workload = TINY["mixed"]
    cache = empty_cache(workload, rng)
    x = random_tokens(workload, rng, 1)
    calls = {
        "kv_write": ((x, x, cache.kv, cache.tables, cache.lengths, cache.lengths), {}),
        "prefill_attention": (
            (x, x, x, cache.kv, cache.tables, cache.lengths, cache.lengths),
            {"sink": 1, "local": 1},
        ),
        "page_select": (
            (x[:, 0], cache.kv.retrieval, cache.tables.retrieval, cache.lengths, None, None),
            {"num_selected": 4, "interval": 1, "sink_pages": 1},
        ),
        "decode_attention": ((x[:, 0], cache.kv, cache.tables, cache.lengths, None), {"sink": 1, "local": 1}),
    }
    assert set(calls) == set(TABLES)
    arguments, options = calls[op]
    with pytest.raises(error, match=message):
        getattr(pallas_kernels, op)(*arguments, **options, implementation=name)
