"""The specification of `kv_write`: token by token, with numpy. It cannot be jitted."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, pools
from pallas_kernels.core.quantization import QuantizedArray, quantize


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
        written[name] = _write_pool(pool, np.asarray(table), keys, values, bounded, starts, counts)
    return LayerKV(**written)


def _write_pool(
    pool: PagedKV,
    table: np.ndarray,
    k: jax.Array,
    v: jax.Array,
    k_bounded: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
) -> PagedKV:
    pool = jax.tree.map(np.array, pool)
    for b in range(k.shape[0]):
        for t in range(int(counts[b])):
            position = int(starts[b]) + t
            page, row = table[b, position // pool.page_size], position % pool.page_size
            if page < 0:
                continue
            for stored, new in ((pool.k, k[b, t]), (pool.v, v[b, t])):
                encoded = quantize(new, stored.bits) if isinstance(stored, QuantizedArray) else new
                for target, value in zip(jax.tree.leaves(stored), jax.tree.leaves(encoded), strict=True):
                    target[page, :, row] = np.asarray(value).astype(target.dtype)
            if pool.k_min is not None and pool.k_max is not None:
                sub, is_first = divmod(row, pool.page_size // pool.k_min.shape[2])
                key = np.asarray(k_bounded[b, t]).astype(pool.k_min.dtype)
                for target, merge in ((pool.k_min, np.minimum), (pool.k_max, np.maximum)):
                    target[page, :, sub] = key if is_first == 0 else merge(target[page, :, sub], key)
    return jax.tree.map(jnp.asarray, pool)
