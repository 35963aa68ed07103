"""`kv_write` for any device: reads, merges and writes whole pages in place, one at a time.

A scatter would be shorter, but XLA's CPU backend runs it row by row (one loop step per token and head). Here, a chunk
costs one step per page that it touches, and a decode step (T = 1) one step of a single row per sequence.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.dtypes import ZERO, counted_loop
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, div_down, div_up, pools, take
from pallas_kernels.core.quantization import QuantizedArray, quantize


@jax.jit  # traced once for all layers alike
def kv_write(
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    k_bounded: jax.Array | None = None,
) -> LayerKV:
    """Returns what `pallas_kernels.kv_write` defines."""
    written = kv._asdict()
    for name, pool, table, heads in pools(kv, tables):
        keys, values, bounded = (x[:, :, heads] for x in (k, v, k if k_bounded is None else k_bounded))
        written[name] = _write_pool(pool, table, keys, values, bounded, starts, counts)
    return LayerKV(**written)


def _write_pool(
    pool: PagedKV,
    table: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_bounded: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
) -> PagedKV:
    tile = 1 if k.shape[1] == 1 else pool.page_size
    encoded = (_encode(k, pool.k), _encode(v, pool.v))
    encoded = jax.tree.map(lambda x: _tileable(x, tile), encoded)
    keys = _tileable(k_bounded, tile) if pool.k_min is not None else None

    def write_tile(b: jax.Array, index: jax.Array, pool: PagedKV) -> PagedKV:
        """Writes the rows of sequence b that fall into tile ``index`` of its whole token range."""
        position = index * tile
        index_of_page = div_down(position, pool.page_size)
        page, row = take(table, b, index_of_page), position - index_of_page * pool.page_size
        offset = position - take(starts, b)
        in_chunk = jnp.arange(tile, dtype=jnp.int32) + offset
        is_new = (in_chunk >= 0) & (in_chunk < take(counts, b)) & (page >= 0)

        def put(target: jax.Array, chunk: jax.Array) -> jax.Array:
            return _merge(target, _rows(chunk, b, offset, tile), is_new, (jnp.maximum(page, 0), ZERO, row))

        k_new, v_new = jax.tree.map(put, (pool.k, pool.v), encoded)
        if keys is None:
            return PagedKV(k_new, v_new)
        new = _rows(keys, b, offset, tile)
        return PagedKV(k_new, v_new, *_merge_statistics(pool, new, is_new, jnp.maximum(page, 0), row))

    def write_sequence(b: jax.Array, pool: PagedKV) -> PagedKV:
        start = take(starts, b)
        first, end = div_down(start, tile), div_up(start + take(counts, b), tile)
        return jax.lax.fori_loop(first, end, lambda index, pool: write_tile(b, index, pool), pool)

    return counted_loop(k.shape[0], write_sequence, pool)


def _encode(x: jax.Array, stored: jax.Array | QuantizedArray) -> Any:
    return quantize(x, stored.bits) if isinstance(stored, QuantizedArray) else x.astype(stored.dtype)


def _tileable(x: jax.Array, tile: int) -> jax.Array:
    """Returns ``x`` [B, T, K, …] padded by a tile on both ends of T, so that a tile's slice never leaves the array."""
    return jnp.pad(x, [(0, 0), (tile - 1, tile - 1)] + [(0, 0)] * (x.ndim - 2))


def _rows(chunk: jax.Array, b: jax.Array, offset: jax.Array, tile: int) -> jax.Array:
    """Returns rows ``offset … offset + tile`` of sequence b of a padded chunk, heads first: [K, tile, …]."""
    start = (b, offset + tile - 1) + (ZERO,) * (chunk.ndim - 2)
    rows = jax.lax.dynamic_slice(chunk, start, (1, tile, *chunk.shape[2:]))
    return jnp.swapaxes(rows[0], 0, 1)


def _merge(target: jax.Array, rows: jax.Array, is_new: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """Returns ``target`` with the new ones of ``rows`` [K, tile, …] written at ``start``, (page, 0, row)."""
    start = start + (ZERO,) * (target.ndim - 3)
    old = jax.lax.dynamic_slice(target, start, (1, *rows.shape))
    is_new = is_new.reshape(1, 1, -1, *(1,) * (rows.ndim - 2))
    return jax.lax.dynamic_update_slice(target, jnp.where(is_new, rows[None], old), start)


def _merge_statistics(
    pool: PagedKV, keys: jax.Array, is_new: jax.Array, page: jax.Array, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns ``k_min`` and ``k_max`` merged with the new keys among ``keys`` [K, tile, H], by ``is_new`` [tile]."""
    assert pool.k_min is not None and pool.k_max is not None
    sub_size = pool.page_size // pool.k_min.shape[2]
    heads, tile, head_dim = keys.shape
    subs = max(tile // sub_size, 1)
    keys = keys.astype(pool.k_min.dtype).reshape(heads, subs, -1, head_dim)
    is_new = is_new.reshape(1, subs, -1, 1)
    first_row = row + jnp.arange(subs, dtype=jnp.int32)[None, :, None, None] * sub_size
    first_new = first_row + jax.lax.argmax(is_new, 2, jnp.int32)[:, :, None]
    # If the sub-page's first token is new, the old statistics do not count.
    is_merge = div_down(first_new, sub_size) * sub_size != first_new
    is_touched = jnp.any(is_new, axis=2, keepdims=True)
    start = (page, ZERO, div_down(row, sub_size), ZERO)

    def merged(target: jax.Array, reduce: Any, combine: Any, neutral: float) -> jax.Array:
        old = jax.lax.dynamic_slice(target, start, (1, heads, subs, head_dim))
        new = reduce(jnp.where(is_new, keys, jnp.asarray(neutral, keys.dtype)), axis=2)[None]
        new = jnp.where(is_merge[:, :, 0], combine(new, old), new)
        return jax.lax.dynamic_update_slice(target, jnp.where(is_touched[:, :, 0], new, old), start)

    return merged(pool.k_min, jnp.min, jnp.minimum, jnp.inf), merged(pool.k_max, jnp.max, jnp.maximum, -jnp.inf)
