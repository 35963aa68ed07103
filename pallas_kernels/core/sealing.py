"""How a page is sealed: what its pool stores of all its tokens."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.paging import PagedKV
from pallas_kernels.core.quantization import (
    QuantizedArray,
    QuantizedKeys,
    dequantize_keys,
    key_bounds,
    quantize,
    quantize_keys,
)


def sealed(pool: PagedKV, k: jax.Array, v: jax.Array) -> PagedKV:
    """Returns what ``pool`` stores of pages with keys and values [..., K, page_size, H], with their leading axes."""
    bounds = (None, None)
    if pool.k_min is not None:
        bounds = tuple(x.astype(pool.k_min.dtype) for x in key_bounds(k, pool.sub_page_size))
    if isinstance(pool.k, QuantizedKeys):
        assert bounds[0] is not None and bounds[1] is not None
        keys = quantize_keys(k, bounds[0], bounds[1], pool.k.bits)
    else:
        keys = k.astype(pool.k.dtype)
    values = quantize(v, pool.v.bits) if isinstance(pool.v, QuantizedArray) else v.astype(pool.v.dtype)
    means = [
        None if mean is None else jnp.mean(x.astype(jnp.float32), axis=-2).astype(mean.dtype)
        for mean, x in ((pool.k_mean, k), (pool.v_mean, v))
    ]
    return PagedKV(keys, values, *bounds, *means)


def keys_of(pages: PagedKV, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the keys [..., page_size, H] of some pages of a pool as ``dtype``."""
    return dequantize_keys(pages.k, pages.k_min, pages.k_max, dtype)
