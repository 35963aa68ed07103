"""`kv_write` for any device: reads the tail and writes whole pages in place, one at a time.

A scatter would be shorter, but XLA's CPU backend runs it row by row (one loop step per token and head). Here, a chunk
costs one step per page that it seals, and a decode step (T = 1) one row of the tail per sequence.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.dtypes import ZERO, counted_loop
from pallas_kernels.core.paging import LayerKV, PageTables, Tail, div_down, pools, slots_of, take
from pallas_kernels.core.sealing import sealed


@jax.jit  # traced once for all layers alike
def kv_write(
    k: jax.Array, v: jax.Array, kv: LayerKV, tables: PageTables, starts: jax.Array, counts: jax.Array
) -> LayerKV:
    """Returns what `pallas_kernels.kv_write` defines."""
    slots, write = slots_of(tables, k.shape[0]), _write_token
    new = Tail(k.astype(kv.tail.k.dtype), v.astype(kv.tail.v.dtype))
    if k.shape[1] > 1:
        # So that a page which begins before the chunk, or ends behind it, is a slice of it.
        ends = (0, 0), (kv.page_size - 1, kv.page_size - 1), (0, 0), (0, 0)
        new, write = Tail(*(jnp.pad(x, ends) for x in new)), _write_chunk

    def write_sequence(b: jax.Array, kv: LayerKV) -> LayerKV:
        return write(new, kv, tables, b, take(slots, b), take(starts, b), take(counts, b))

    return counted_loop(k.shape[0], write_sequence, kv)


def _write_token(
    new: Tail, kv: LayerKV, tables: PageTables, b: jax.Array, slot: jax.Array, start: jax.Array, count: jax.Array
) -> LayerKV:
    """Writes one token or none, and seals its page if it is the last one there."""
    index = div_down(start, kv.page_size)
    row = start - index * kv.page_size

    def put(target: jax.Array, rows: jax.Array) -> jax.Array:
        return _put(target, jnp.swapaxes(take(rows, b), 0, 1), count > 0, slot, row)

    def seal(kv: LayerKV) -> LayerKV:
        return _seal(kv, tables, b, index, Tail(*(take(x, slot) for x in kv.tail)))

    is_last = (count > 0) & (row == kv.page_size - 1)
    kv = kv._replace(tail=Tail(*map(put, kv.tail, new)))
    return jax.lax.cond(is_last, seal, lambda kv: kv, kv)


def _write_chunk(
    new: Tail, kv: LayerKV, tables: PageTables, b: jax.Array, slot: jax.Array, start: jax.Array, count: jax.Array
) -> LayerKV:
    """Writes a chunk: seals the pages that it fills, and leaves the page of its last token in the tail."""
    size, end = kv.page_size, start + count
    before = Tail(*(take(x, slot) for x in kv.tail))

    def page(index: jax.Array) -> Tail:
        """Returns the rows [K, page_size, H] of a page: the chunk's tokens, and elsewhere what the tail held."""
        offset = index * size - start
        in_chunk = offset + jnp.arange(size, dtype=jnp.int32)
        is_new = ((in_chunk >= 0) & (in_chunk < count))[:, None]

        def rows(chunk: jax.Array, old: jax.Array) -> jax.Array:
            corner, shape = (b, offset + size - 1, ZERO, ZERO), (1, size, *chunk.shape[2:])
            here = jax.lax.dynamic_slice(chunk, corner, shape)[0]
            return jnp.where(is_new, jnp.swapaxes(here, 0, 1), old)

        # Without the barrier, XLA computes the rows anew wherever they are used.
        return jax.lax.optimization_barrier(Tail(*map(rows, new, before)))

    def seal(index: jax.Array, kv: LayerKV) -> LayerKV:
        return _seal(kv, tables, b, index, page(index))

    kv = jax.lax.fori_loop(div_down(start, size), div_down(end, size), seal, kv)
    newest = page(div_down(jnp.maximum(end - 1, start), size))

    def put(target: jax.Array, rows: jax.Array) -> jax.Array:
        return _put(target, rows, count > 0, slot)

    return kv._replace(tail=Tail(*map(put, kv.tail, newest)))


def _seal(kv: LayerKV, tables: PageTables, b: jax.Array, index: jax.Array, rows: Tail) -> LayerKV:
    """Stores the rows [K, page_size, H] of a page in the pools; not where the sequence holds no page."""
    stored: dict[str, Any] = kv._asdict()
    for name, pool, table, heads in pools(kv, tables):
        page = take(table, b, index)
        put = partial(_put, is_put=page >= 0, index=jnp.maximum(page, 0))
        stored[name] = jax.tree.map(put, pool, sealed(pool, rows.k[heads], rows.v[heads]))
    return LayerKV(**stored)


def _put(
    target: jax.Array, new: jax.Array, is_put: jax.Array, index: jax.Array, row: jax.Array | np.int32 = ZERO
) -> jax.Array:
    """Returns ``target`` with ``new`` [K, rows, …] at ``target[index, :, row]`` and behind, or unchanged."""
    at = (index, ZERO, row, *[ZERO] * (target.ndim - 3))
    old = jax.lax.dynamic_slice(target, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(target, jnp.where(is_put, new[None], old), at)
