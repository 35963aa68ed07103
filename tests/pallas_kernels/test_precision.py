from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import Selection
from pallas_kernels.core.workloads import TINY
from tests.pallas_kernels.cases import MATRICES, filled_cache, random_matrix, random_tokens


@pytest.mark.parametrize(
    ("op", "implementation"),
    [
        ("prefill_attention", "xla"),
        ("prefill_attention", "reference"),
        ("decode_attention", "xla"),
        ("decode_attention", "reference"),
        ("page_select", "xla"),
        ("quantized_matmul", "xla"),
        ("quantized_matmul", "reference"),
    ],
)
def test_products_of_float32_ask_for_float32(op: str, implementation: str, rng: np.random.Generator):
    """JAX's default on a GPU rounds their factors to 11 bits: scores would no longer bound what they must."""
    workload = TINY["mixed"]
    cache = filled_cache(workload, rng, [96, 17, 0, 64])
    q, k = (random_tokens(workload, rng, 1, heads) for heads in (workload.num_heads, workload.num_kv_heads))
    previous = Selection.empty(workload.batch, workload.retrieval, 5)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, int]]] = {
        "prefill_attention": ((q, k, k, cache.kv, cache.tables, cache.lengths, cache.lengths), {"sink": 5, "local": 9}),
        "decode_attention": ((q[:, 0], cache.kv, cache.tables, cache.lengths, None), {"sink": 5, "local": 9}),
        "page_select": (
            (q[:, 0, :4], cache.kv.retrieval, cache.tables.retrieval, cache.lengths, previous, cache.lengths > 0),
            {"num_selected": 4, "interval": 4, "sink_pages": 1},
        ),
        "quantized_matmul": ((q[:, 0].reshape(-1, 32), random_matrix(rng, 9, 32, **MATRICES["int4-groups"])), {}),
    }
    arguments, options = calls[op]
    program = jax.jit(partial(getattr(pallas_kernels, op), implementation=implementation, **options))
    products = [line for line in program.lower(*arguments).as_text().splitlines() if "dot_general" in line]
    assert len(products) >= (1 if op == "quantized_matmul" else 2)
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
