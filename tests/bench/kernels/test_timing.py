"""Values are checked before anything is timed."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench.kernels.ops import OPS
from bench.kernels.timing import check
from pallas_kernels import QuantizedArray, Selection
from pallas_kernels.core.workloads import TINY_PRODUCTS, Product, Workload
from tests.bench.kernels.workloads import PRODUCT, SMALL, case


@pytest.mark.parametrize("op", [op for op in OPS if op != "quantized_matmul"])
@pytest.mark.parametrize("workload", SMALL)
def test_the_xla_implementation_has_the_values_that_are_timed(op: str, workload: str):
    assert check(case(op, SMALL[workload]), "xla") == "reference"


@pytest.mark.parametrize("storage", TINY_PRODUCTS)
def test_the_xla_product_has_the_values_that_are_timed(storage: str):
    assert check(case("quantized_matmul", TINY_PRODUCTS[storage]), "xla") == "reference"


def falsified(result: Any) -> Any:
    """An op's result with one thing wrong: a row, pages of a list, a stored number."""
    if isinstance(result, Selection):
        return result._replace(pages=jnp.sort(result.pages.at[0, 0, 1:4].set(jnp.arange(1, 4)), axis=-1))
    if isinstance(result, jax.Array):
        return result.at[(-1,) * (result.ndim - 1)].multiply(jnp.asarray(1.1, result.dtype))
    assert isinstance(result.retrieval.v, QuantizedArray)
    pages = result.retrieval.v
    wrong = replace(pages, codes=pages.codes ^ jnp.uint8(0x24))
    return result._replace(retrieval=result.retrieval._replace(v=wrong))


@pytest.mark.parametrize(
    ("op", "workload"),
    [
        *((op, SMALL["int8"]) for op in ("decode_attention", "page_select", "kv_write_prefill", "prefill_attention")),
        ("quantized_matmul", PRODUCT),
    ],
)
def test_wrong_values_are_not_timed(op: str, workload: Workload | Product):
    right = case(op, workload)

    def wrong(*args: Any, implementation: str) -> Any:
        result = right.call(*args, implementation=implementation)
        return falsified(result) if implementation == "xla" else result

    with pytest.raises(AssertionError):
        check(right._replace(call=wrong), "xla")


def test_a_selection_that_remembers_something_else_is_wrong():
    right = case("page_select", SMALL["int8"])

    def wrong(*args: Any, implementation: str) -> Selection:
        result = right.call(*args, implementation=implementation)
        return result._replace(scores=result.scores * 1.1) if implementation == "xla" else result

    with pytest.raises(AssertionError, match="what is remembered of a page is wrong"):
        check(right._replace(call=wrong), "xla")
