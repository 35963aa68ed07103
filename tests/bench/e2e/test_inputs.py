"""Random pages and page tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.e2e.decode import Decode
from bench.e2e.inputs import page_tables, random_cache
from bench.e2e.models import inference_config
from bench.e2e.points import Point
from lserve_jax.config.sizes import PoolSizes
from pallas_kernels import dequantize
from pallas_kernels.core.sealing import keys_of


@pytest.mark.parametrize("slots", [1, 3])
def test_streaming_pages_stay_where_they_are_while_successive_chunks_see_them(slots: int):
    config, context, chunk = inference_config("tiny", "lserve", "auto"), 1000, 48
    window = config.attention.prefill_local
    pools = PoolSizes(retrieval=slots * 63, streaming=slots * 12)
    before = None
    for start in range(0, context - chunk, chunk):
        span = range(start, start + chunk)
        tables = page_tables(config, pools, slots=slots, context=context, span=span, window=window)
        assert sorted(np.asarray(tables.retrieval).ravel()) == list(range(slots * 63))
        streaming = np.asarray(tables.streaming)
        held = streaming[streaming >= 0]
        assert len(set(held.tolist())) == held.size, "two pages in one place"
        assert held.max() < pools.streaming
        if before is not None:
            both = (before >= 0) & (streaming >= 0)
            assert both.any()
            assert (before[both] == streaming[both]).all()
        before = streaming


def test_random_pages_are_finite_and_their_statistics_ordered():
    config = inference_config("tiny", "lserve:int4", "auto")
    subject = Decode(Point("decode", "lserve:int4", 256), config, chunk=64, steps=4)
    filled = random_cache(subject.template)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (filled, subject.template))
    assert shapes[0] == shapes[1]
    kv = filled[0].kv
    pool = kv.retrieval
    assert pool is not None
    assert bool(jnp.all(jnp.asarray(pool.k_min) <= jnp.asarray(pool.k_max)))
    for numbers in (keys_of(pool, jnp.float32), dequantize(pool.v, jnp.dtype(jnp.float32)), *kv.tail):
        assert bool(jnp.all(jnp.isfinite(numbers))) and 0.5 < float(jnp.std(numbers.astype(jnp.float32))) < 2
