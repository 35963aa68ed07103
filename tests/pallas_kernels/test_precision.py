from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import decode_attention, page_select, prefill_attention, selection_width
from pallas_kernels.core.workloads import TINY
from tests.pallas_kernels.cases import filled_cache, random_tokens


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("op", ["prefill_attention", "decode_attention", "page_select"])
def test_products_of_float32_ask_for_float32(op: str, implementation: str, rng: np.random.Generator):
    """JAX's default on a GPU rounds their factors to 11 bits; scores would no longer bound what they must."""
    workload = TINY["mixed"]
    cache = filled_cache(workload, rng, [96, 17, 0, 64])
    q, k = (random_tokens(workload, rng, 1, heads) for heads in (workload.num_heads, workload.num_kv_heads))
    width = selection_width(workload.num_selected, workload.interval, workload.page_size)
    previous = np.full((workload.batch, workload.retrieval, width), -1, np.int32)

    def call(cache: Any) -> Any:
        name = {"implementation": implementation}
        if op == "prefill_attention":
            return prefill_attention(q, k, k, cache.kv, cache.tables, cache.lengths, cache.lengths, sink=5, local=9, **name)
        if op == "decode_attention":
            return decode_attention(q[:, 0], cache.kv, cache.tables, cache.lengths, previous, sink=5, local=9, **name)
        heads = workload.retrieval * workload.group
        return page_select(
            *(q[:, 0, :heads], cache.kv.retrieval, cache.tables.retrieval, cache.lengths, previous, cache.lengths > 0),
            num_selected=4,
            interval=4,
            sink_pages=1,
            **name,
        )

    if (op, implementation) == ("page_select", "reference"):
        pytest.skip("numpy: float32 is float32")
    products = [line for line in jax.jit(call).lower(cache).as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 2
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
