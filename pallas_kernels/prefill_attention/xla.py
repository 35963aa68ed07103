"""`prefill_attention` for any device: head by head, and for each query block over the visible key blocks.

Keys come from two sources, the pages before the chunk and the chunk itself; one loop serves both. Products run in the
dtype of the queries (bfloat16 uses AMX on CPUs that have it) and accumulate in float32. Trip counts are data. One head
at a time keeps the scores of a block in a core's cache.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.dtypes import ZERO, counted_loop
from pallas_kernels.core.online_softmax import OnlineSoftmax, columns_with_ones, with_ones
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, div_up, is_visible, pools, take
from pallas_kernels.core.quantization import QuantizedArray, dequantize
from pallas_kernels.prefill_attention.blocks import (
    BlockList,
    BlockRanges,
    KeyRange,
    Listed,
    Ranges,
    Walk,
    Window,
    visible_blocks,
)

BLOCK = 256
"""Tokens per query block and per block of keys, which is at least a page."""
_DENSE_BLOCK = 2 * BLOCK
"""Keys per block of a history that every query sees completely."""


class KeySource(NamedTuple):
    """Keys that a head fetches block by block."""

    keys: KeyRange
    visits: Callable[[jax.Array], Ranges | Listed]
    """Index of a query block → the key blocks that it visits."""
    fetch: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    """Block index → keys [block, H], values [block, H], and which of them exist, [block] bool; the first one exists."""
    is_all_visible: bool
    """Whether each query sees all keys that exist."""


class HeadClass(NamedTuple):
    """KV heads ``first … first + count − 1`` of a layer.

    Attributes:
      first, count: the heads.
      window: what the heads see.
      block: queries per block, and keys per block of the chunk.
      history: the pool and the page table of the history, if there is any.
      walk: the visited blocks of the history; None for the blocks with a visible key.
    """

    first: int
    count: int
    window: Window
    block: int
    history: tuple[PagedKV, jax.Array] | None
    walk: BlockRanges | BlockList | None


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
    walk: Walk | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines; ``block`` changes speed and rounding only."""
    batch, tokens = q.shape[:2]
    classes = _head_classes(kv, tables, Window(sink, local), tokens, has_history, walk or Walk(), block)
    padding = -tokens % math.lcm(*(heads.block for heads in classes))
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(*k.shape[:3], -1, q.shape[3])
    out = jnp.zeros_like(q)
    for heads in classes:

        def attend_sequence(b: jax.Array, out: jax.Array, heads: HeadClass = heads) -> jax.Array:
            start, count = take(starts, b), take(counts, b)

            def attend_head(head: jax.Array, out: jax.Array) -> jax.Array:
                at = (b, heads.first + head)
                sources = [_chunk(k, v, at, start, count, heads)]
                if heads.history is not None:
                    sources.insert(0, _history(heads, b, head, start, q.dtype))
                return _attend_head(out, q, at, sources, start, count, heads.window, heads.block)

            return counted_loop(heads.count, attend_head, out)

        out = counted_loop(batch, attend_sequence, out)
    return out.reshape(batch, -1, q.shape[2] * q.shape[3], q.shape[4])[:, :tokens]


def _head_classes(
    kv: LayerKV, tables: PageTables, window: Window, tokens: int, has_history: bool, walk: Walk, block: int
) -> list[HeadClass]:
    """Returns the classes of a layer's heads; a single one if a chunk without history lies inside every window."""
    found = pools(kv, tables)
    assert window.local is not None
    if not has_history and tokens <= window.local:
        heads = sum(pool.num_kv_heads for _, pool, _, _ in found)
        return [HeadClass(0, heads, Window(None, None), min(block, tokens), None, None)]
    classes = []
    for name, pool, table, heads in found:
        seen = window if name == "streaming" else Window(None, None)
        visited = getattr(walk, name) if has_history else None
        queries = block if visited is None else visited.queries
        history = (pool, table) if has_history else None
        classes.append(HeadClass(heads.start, pool.num_kv_heads, seen, min(queries, tokens), history, visited))
    return classes


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
    """Returns ``out`` [B, T, K, G, H] with the outputs of one sequence's KV head; T is a multiple of ``block``."""
    b, head = at
    group, head_dim = q.shape[3:]

    def attend_queries(index: jax.Array, out: jax.Array) -> jax.Array:
        corner = (b, index * block, head, ZERO, ZERO)
        queries = jax.lax.dynamic_slice(q, corner, (1, block, 1, group, head_dim)).reshape(block * group, head_dim)
        positions = jnp.repeat(start + index * block + jnp.arange(block, dtype=jnp.int32), group)
        state = OnlineSoftmax.start((block * group,), columns_with_ones(head_dim))
        for source in sources:
            state = _walk(state, queries, positions, source, source.visits(index), window)
        result = state.finish_ones(head_dim).reshape(1, block, 1, group, head_dim).astype(out.dtype)
        return jax.lax.dynamic_update_slice(out, result, corner)

    return jax.lax.fori_loop(0, div_up(count, block), attend_queries, out)


def _walk(
    state: OnlineSoftmax,
    queries: jax.Array,
    positions: jax.Array,
    source: KeySource,
    visits: Ranges | Listed,
    window: Window,
) -> OnlineSoftmax:
    """Returns the softmax state of queries [rows, H] at positions [rows] after the visited key blocks of a source."""

    def visit(step: jax.Array, state: OnlineSoftmax) -> OnlineSoftmax:
        index = visits.block(step)
        keys, values, exists = source.fetch(index)
        visible = None
        if source.is_all_visible:
            keys = jnp.where(exists[:, None], keys, keys[:1])  # a key that does not exist must not give the maximum
        else:
            at = source.keys.first + index * source.keys.block + jnp.arange(source.keys.block, dtype=jnp.int32)
            visible = exists & is_visible(positions[:, None], at, *window)
        scores = jnp.einsum("rh,sh->rs", queries, keys, precision="highest", preferred_element_type=jnp.float32)
        scale = queries.shape[-1] ** -0.5
        return state.add(scores, with_ones(values, exists), scale=scale, visible=visible, has_ones=True)

    return jax.lax.fori_loop(0, visits.count, visit, state)


def history_block(queries: int, page_size: int, window: Window) -> int:
    """Returns the keys per block of history for the queries per block, if no walk is given."""
    keys = _DENSE_BLOCK if window.local is None and queries == BLOCK else queries
    return max(keys // page_size, 1) * page_size


def _history(heads: HeadClass, b: jax.Array, head: jax.Array, start: jax.Array, dtype: jnp.dtype) -> KeySource:
    """Returns the source of a head's tokens before the chunk, dequantised from their pages."""
    assert heads.history is not None
    pool, tables = heads.history
    walk, window, block = heads.walk, heads.window, heads.block
    size = history_block(block, pool.page_size, window) if walk is None else walk.keys
    pages = size // pool.page_size
    table = take(tables, b)
    table = jnp.pad(table, (0, -table.size % pages), constant_values=-1)

    def visits(index: jax.Array) -> Ranges | Listed:
        if walk is None:
            return visible_blocks(start + index * block, block, KeyRange(0, start, size), window)
        return walk.of(b, head, index, div_up(start, size))

    def fetch(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        physical = jax.lax.dynamic_slice_in_dim(table, index * pages, pages)
        keys, values = (_tokens(x, jnp.maximum(physical, 0), head, dtype) for x in (pool.k, pool.v))
        is_held = jnp.repeat(physical >= 0, pool.page_size)
        return keys, values, is_held & (index * size + jnp.arange(size, dtype=jnp.int32) < start)

    return KeySource(KeyRange(0, start, size), visits, fetch, is_all_visible=window.local is None)


def _tokens(pages: jax.Array | QuantizedArray, physical: jax.Array, head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the tokens [n · page_size, H] of physical pages [n]."""
    rows = dequantize(jax.tree.map(lambda x: take(x, physical, head), pages), dtype)
    return rows.reshape(-1, rows.shape[-1])


def _chunk(
    k: jax.Array,
    v: jax.Array,
    at: tuple[jax.Array, jax.Array],
    start: jax.Array,
    count: jax.Array,
    heads: HeadClass,
) -> KeySource:
    """Returns the source of the chunk's tokens of one sequence's head."""
    b, head = at
    block = heads.block
    positions = KeyRange(start, start + count, block)

    def visits(index: jax.Array) -> Ranges:
        return visible_blocks(start + index * block, block, positions, heads.window)

    def fetch(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        corner, shape = (b, index * block, head, ZERO), (1, block, 1, k.shape[-1])
        keys, values = (jax.lax.dynamic_slice(x, corner, shape).reshape(block, -1) for x in (k, v))
        return keys, values, index * block + jnp.arange(block, dtype=jnp.int32) < count

    return KeySource(positions, visits, fetch, is_all_visible=False)
