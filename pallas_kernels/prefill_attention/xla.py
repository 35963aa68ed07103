"""`prefill_attention` for any device: query block by query block over the visible key blocks, online softmax.

Keys come from two sources, the pages before the chunk and the chunk itself, walked alike. Products run in the dtype of
the queries (bfloat16 uses AMX on CPUs that have it) and accumulate in float32. Trip counts are data.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.online_softmax import OnlineSoftmax
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, is_visible, pools
from pallas_kernels.core.quantization import QuantizedArray, dequantize
from pallas_kernels.prefill_attention.blocks import KeyRange, Window, visible_blocks

BLOCK = 256
"""Tokens of a query block and of a key block (of which a page is the least)."""


class KeySource(NamedTuple):
    """Keys that are fetched block by block."""

    keys: KeyRange
    fetch: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    """Block index → keys [K, block, H], values [K, block, H], and which of them exist [block] bool."""


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    sink: int,
    local: int,
    block: int = BLOCK,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines; ``block`` changes speed and rounding only."""
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    block = min(block, tokens)
    padding = ((0, 0), (0, -tokens % block), (0, 0), (0, 0))
    q, k, v = (jnp.swapaxes(jnp.pad(x, padding), 1, 2) for x in (q, k, v))
    q = q.reshape(q.shape[0], k.shape[1], group, *q.shape[2:])
    outputs = []
    for name, pool, table, heads in pools(kv, tables):
        window = Window(sink, local) if name == "streaming" else Window(None, None)
        attend = partial(_attend_sequence, pool=pool, window=window, block=block)
        arguments = (q[:, heads], k[:, heads], v[:, heads], table, starts, counts)
        outputs.append(jax.lax.map(lambda args, attend=attend: attend(*args), arguments))
    merged = jnp.concatenate(outputs, axis=1)
    return jnp.swapaxes(merged.reshape(q.shape[0], -1, *q.shape[3:]), 1, 2)[:, :tokens]


def _attend_sequence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    start: jax.Array,
    count: jax.Array,
    *,
    pool: PagedKV,
    window: Window,
    block: int,
) -> jax.Array:
    """Returns [K, G, T, H] for q of that shape and k, v [K, T, H]; T a multiple of ``block``."""
    heads, group, _, head_dim = q.shape
    sources = (_history(pool, table, start, block, q.dtype), _chunk(k, v, start, count, block))

    def attend_queries(index: jax.Array, out: jax.Array) -> jax.Array:
        queries = jax.lax.dynamic_slice_in_dim(q, index * block, block, axis=2)
        queries = queries.reshape(heads, group * block, head_dim)
        state = OnlineSoftmax.start(queries.shape[:2], head_dim)
        for source in sources:
            state = _walk(state, queries, start + index * block, source, window, block)
        result = state.finish().reshape(heads, group, block, head_dim).astype(out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, result, index * block, axis=2)

    return jax.lax.fori_loop(0, -(-count // block), attend_queries, jnp.zeros_like(q))


def _walk(
    state: OnlineSoftmax, queries: jax.Array, position: jax.Array, source: KeySource, window: Window, block: int
) -> OnlineSoftmax:
    """Returns the softmax state of queries [K, G · block, H] from ``position`` on after a source's visible keys."""
    positions = jnp.tile(position + jnp.arange(block), queries.shape[1] // block)
    sinks, low, high = visible_blocks(position, block, source.keys, window)

    def visit(step: jax.Array, state: OnlineSoftmax) -> OnlineSoftmax:
        index = jnp.where(step < sinks, step, low + step - sinks)
        keys, values, exists = source.fetch(index)
        at = source.keys.first + index * source.keys.block + jnp.arange(source.keys.block)
        scores = jnp.einsum("krh,ksh->krs", queries, keys, precision="highest", preferred_element_type=jnp.float32)
        visible = exists & is_visible(positions[:, None], at, *window)
        values = jnp.where(exists[:, None], values, jnp.zeros((), values.dtype))
        return state.add(scores * queries.shape[-1] ** -0.5, visible, values)

    return jax.lax.fori_loop(0, sinks + high - low, visit, state)


def _history(pool: PagedKV, table: jax.Array, start: jax.Array, block: int, dtype: jnp.dtype) -> KeySource:
    """Returns the tokens before the chunk, dequantised from their pages."""
    pages = max(block // pool.page_size, 1)
    table = jnp.pad(table, (0, -table.size % pages), constant_values=-1)
    size = pages * pool.page_size

    def fetch(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        physical = jax.lax.dynamic_slice_in_dim(table, index * pages, pages)
        keys, values = (_tokens(x, jnp.maximum(physical, 0), dtype) for x in (pool.k, pool.v))
        is_held = jnp.repeat(physical >= 0, pool.page_size)
        return keys, values, is_held & (index * size + jnp.arange(size) < start)

    return KeySource(KeyRange(0, start, size), fetch)


def _tokens(pages: jax.Array | QuantizedArray, physical: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the tokens [K, n · page_size, H] of physical pages [n]."""
    rows = jnp.swapaxes(dequantize(jax.tree.map(lambda x: x[physical], pages), dtype), 0, 1)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _chunk(k: jax.Array, v: jax.Array, start: jax.Array, count: jax.Array, block: int) -> KeySource:
    """Returns the chunk's own tokens."""

    def fetch(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys, values = (jax.lax.dynamic_slice_in_dim(x, index * block, block, axis=1) for x in (k, v))
        return keys, values, index * block + jnp.arange(block) < count

    return KeySource(KeyRange(start, start + count, block), fetch)
