"""Launch configurations that kernels ask for."""

from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp

from bench import tune
from bench.kernels.launches import launches
from bench.kernels.ops import WORKLOADS
from tests.pallas_kernels.hopper import on_h200


def test_configurations_that_kernels_ask_for_are_collected_and_replaced():
    from pallas_kernels import PageTables, decode_attention
    from tests.pallas_kernels.cases import abstract, abstract_pools

    w = WORKLOADS["llama3_8b_8k_int8"]
    arguments = (
        abstract(1, w.num_heads, w.head_dim, dtype=jnp.bfloat16),
        abstract_pools(w, w.max_pages),
        PageTables(abstract(1, w.max_pages), abstract(1, w.max_pages)),
        abstract(1),
    )

    def trace() -> None:
        def call(q: Any, kv: Any, tables: Any, lengths: Any) -> jax.Array:
            return decode_attention(
                q, kv, tables, lengths, None, sink=w.sink, local=w.local, implementation="mosaic_gpu"
            )

        jax.eval_shape(call, *arguments)

    with on_h200():
        with launches() as found:
            trace()
        with launches({"decode_attention": {"splits": 7}}) as changed:
            trace()
        trace()
    assert (len(found), len(changed)) == (1, 1)
    assert found[0].op == "decode_attention" and found[0].chosen == found[0].default
    assert changed[0] == found[0]._replace(chosen=replace(found[0].default, splits=7))
    for change in tune.NEIGHBOURS["decode_attention"](asdict(found[0].default)):
        replace(found[0].default, **change)
