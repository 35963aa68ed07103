"""The specification of `kv_write`: token by token, with numpy. It cannot be jitted."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.paging import LayerKV, PageTables, Tail, pools, slots_of
from pallas_kernels.core.sealing import sealed


def kv_write(
    k: jax.Array, v: jax.Array, kv: LayerKV, tables: PageTables, starts: jax.Array, counts: jax.Array
) -> LayerKV:
    """Returns what `pallas_kernels.kv_write` defines."""
    written = jax.tree.map(np.array, kv)
    slots, size = np.asarray(slots_of(tables, k.shape[0])), kv.page_size
    for b in range(k.shape[0]):
        for t in range(int(counts[b])):
            index, row = divmod(int(starts[b]) + t, size)
            for tail, new in zip(written.tail, (k, v), strict=True):
                tail[slots[b], :, row] = np.asarray(new[b, t]).astype(tail.dtype)
            if row == size - 1:
                _seal(written, tables, b, index, Tail(*(jnp.asarray(x[slots[b]]) for x in written.tail)))
    return jax.tree.map(jnp.asarray, written)


def _seal(written: LayerKV, tables: PageTables, b: int, index: int, rows: Tail) -> None:
    """Stores the rows [K, page_size, H] of a page in the pools; not where the sequence holds no page."""
    for _, pool, table, heads in pools(written, tables):
        page = int(table[b, index])
        if page >= 0:
            new = sealed(pool, rows.k[heads], rows.v[heads])
            for target, value in zip(jax.tree.leaves(pool), jax.tree.leaves(new), strict=True):
                target[page] = np.asarray(value)
