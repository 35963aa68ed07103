"""`prefill_attention` for any device: head by head, query block by query block over the visible key blocks.

Keys come from two sources, the pages before the chunk and the chunk itself, walked alike. Products run in the dtype of
the queries (bfloat16 uses AMX on CPUs that have it) and accumulate in float32. Trip counts are data. One head at a time
keeps the scores of a block in a core's cache.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.online_softmax import OnlineSoftmax, columns_with_ones, with_ones
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, div_up, is_visible, pools, take
from pallas_kernels.core.quantization import QuantizedArray, dequantize
from pallas_kernels.prefill_attention.blocks import KeyRange, Window, visible_blocks

BLOCK = 256
"""Tokens of a query block, and of a block of keys (of which a page is the least)."""
_DENSE_BLOCK = 2 * BLOCK
"""Keys of a block of history that every query sees whole."""


class KeySource(NamedTuple):
    """Keys that are fetched block by block."""

    keys: KeyRange
    fetch: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    """Block index → keys [block, H], values [block, H], and which of them exist [block] bool; the first one does."""
    is_all_visible: bool
    """Whether each query sees all keys that exist."""


class HeadClass(NamedTuple):
    """KV heads ``first … first + count − 1`` of a layer, what they see, and where their history lies, if any."""

    first: int
    count: int
    window: Window
    history: tuple[PagedKV, jax.Array] | None


@partial(jax.jit, static_argnames=("sink", "local", "has_history", "block"))  # traced once for all layers alike
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
    has_history: bool = True,
    block: int = BLOCK,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines; ``block`` changes speed and rounding only."""
    batch, tokens = q.shape[:2]
    block = min(block, tokens)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -tokens % block), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(*k.shape[:3], -1, q.shape[3])
    out = jnp.zeros_like(q)
    for heads in _head_classes(kv, tables, Window(sink, local), tokens, has_history):

        def attend_sequence(b: jax.Array, out: jax.Array, heads: HeadClass = heads) -> jax.Array:
            start, count = take(starts, b), take(counts, b)

            def attend_head(head: jax.Array, out: jax.Array) -> jax.Array:
                at = (b, heads.first + head)
                sources = [_chunk(k, v, at, start, count, block)]
                if heads.history is not None:
                    pool, table = heads.history
                    sources.insert(0, _history(pool, take(table, b), head, start, heads.window, block, q.dtype))
                return _attend_head(out, q, at, sources, start, count, heads.window, block)

            return jax.lax.fori_loop(0, heads.count, attend_head, out)

        out = jax.lax.fori_loop(0, batch, attend_sequence, out)
    return out.reshape(batch, -1, q.shape[2] * q.shape[3], q.shape[4])[:, :tokens]


def _head_classes(kv: LayerKV, tables: PageTables, window: Window, tokens: int, has_history: bool) -> list[HeadClass]:
    """Returns the classes of a layer's heads; one, where a chunk without history lies inside every window."""
    found = pools(kv, tables)
    assert window.local is not None
    if not has_history and tokens <= window.local:
        return [HeadClass(0, sum(pool.num_kv_heads for _, pool, _, _ in found), Window(None, None), None)]
    return [
        HeadClass(
            heads.start,
            pool.num_kv_heads,
            window if name == "streaming" else Window(None, None),
            (pool, table) if has_history else None,
        )
        for name, pool, table, heads in found
    ]


def _attend_head(
    out: jax.Array,
    q: jax.Array,
    at: tuple[jax.Array, jax.Array],
    sources: Sequence[KeySource],
    start: jax.Array,
    count: jax.Array,
    window: Window,
    block: int,
) -> jax.Array:
    """Returns ``out`` [B, T, K, G, H] with the outputs of one sequence's KV head in it; T a multiple of ``block``."""
    b, head = at
    group, head_dim = q.shape[3:]

    def attend_queries(index: jax.Array, out: jax.Array) -> jax.Array:
        corner = (b, index * block, head, 0, 0)
        queries = jax.lax.dynamic_slice(q, corner, (1, block, 1, group, head_dim)).reshape(block * group, head_dim)
        state = OnlineSoftmax.start((block * group,), columns_with_ones(head_dim))
        for source in sources:
            state = _walk(state, queries, start + index * block, source, window, block)
        result = state.finish_ones(head_dim).reshape(1, block, 1, group, head_dim).astype(out.dtype)
        return jax.lax.dynamic_update_slice(out, result, corner)

    return jax.lax.fori_loop(0, div_up(count, block), attend_queries, out)


def _walk(
    state: OnlineSoftmax, queries: jax.Array, position: jax.Array, source: KeySource, window: Window, block: int
) -> OnlineSoftmax:
    """Returns the softmax state of queries [block · G, H] from ``position`` on after a source's visible keys."""
    positions = jnp.repeat(position + jnp.arange(block), queries.shape[0] // block)
    sinks, low, high = visible_blocks(position, block, source.keys, window)

    def visit(step: jax.Array, state: OnlineSoftmax) -> OnlineSoftmax:
        index = jnp.where(step < sinks, step, low + step - sinks)
        keys, values, exists = source.fetch(index)
        visible = None
        if source.is_all_visible:
            keys = jnp.where(exists[:, None], keys, keys[:1])  # a key that does not count may not be the largest
        else:
            at = source.keys.first + index * source.keys.block + jnp.arange(source.keys.block)
            visible = exists & is_visible(positions[:, None], at, *window)
        scores = jnp.einsum("rh,sh->rs", queries, keys, precision="highest", preferred_element_type=jnp.float32)
        scale = queries.shape[-1] ** -0.5
        return state.add(scores, with_ones(values, exists), scale=scale, visible=visible, has_ones=True)

    return jax.lax.fori_loop(0, sinks + high - low, visit, state)


def _history(
    pool: PagedKV,
    table: jax.Array,
    head: jax.Array,
    start: jax.Array,
    window: Window,
    block: int,
    dtype: jnp.dtype,
) -> KeySource:
    """Returns a head's tokens before the chunk, dequantised from their pages."""
    is_dense = window.local is None
    pages = max((_DENSE_BLOCK if is_dense and block == BLOCK else block) // pool.page_size, 1)
    table = jnp.pad(table, (0, -table.size % pages), constant_values=-1)
    size = pages * pool.page_size

    def fetch(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        physical = jax.lax.dynamic_slice_in_dim(table, index * pages, pages)
        keys, values = (_tokens(x, jnp.maximum(physical, 0), head, dtype) for x in (pool.k, pool.v))
        is_held = jnp.repeat(physical >= 0, pool.page_size)
        return keys, values, is_held & (index * size + jnp.arange(size) < start)

    return KeySource(KeyRange(0, start, size), fetch, is_dense)


def _tokens(pages: jax.Array | QuantizedArray, physical: jax.Array, head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the tokens [n · page_size, H] of physical pages [n]."""
    rows = dequantize(jax.tree.map(lambda x: take(x, physical, head), pages), dtype)
    return rows.reshape(-1, rows.shape[-1])


def _chunk(
    k: jax.Array, v: jax.Array, at: tuple[jax.Array, jax.Array], start: jax.Array, count: jax.Array, block: int
) -> KeySource:
    """Returns the chunk's own tokens of one sequence's head."""
    b, head = at

    def fetch(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        corner, shape = (b, index * block, head, 0), (1, block, 1, k.shape[-1])
        keys, values = (jax.lax.dynamic_slice(x, corner, shape).reshape(block, -1) for x in (k, v))
        return keys, values, index * block + jnp.arange(block) < count

    return KeySource(KeyRange(start, start + count, block), fetch, is_all_visible=False)
