"""Random pools, page tables, queries and weights of a layer, of any size."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables, QuantizedMatrix, Tail, quantize
from pallas_kernels.core.quantization import key_bounds, quantize_keys
from pallas_kernels.core.workloads import Bits, Product, Workload

_DISTINCT_PAGES = 1021
"""Pages of random numbers, which repeat in larger pools; a prime, so that no table has the same period."""
_SMALL = 2**18
"""Most elements of an array that the host makes."""


def _pool(
    w: Workload, heads: int, bits: Bits, pages: int, seed: int, *, has_tokens: bool, has_statistics: bool
) -> PagedKV | None:
    """Returns a pool of sealed pages of random numbers, with the bounds of its keys where they are needed."""
    if not heads:
        return None
    distinct = min(pages, _DISTINCT_PAGES)
    index = jnp.arange(pages, dtype=jnp.int32) % distinct
    shape = (distinct, heads, w.page_size, w.head_dim)
    keys = normal(w, 2 * seed, *shape)

    @jax.jit
    def spread(tree: Any, index: jax.Array) -> Any:
        return tree if distinct == pages else jax.tree.map(lambda x: x[index], tree)

    k_bits, v_bits = bits
    bounds = jax.jit(partial(key_bounds, sub_page_size=w.sub_page_size))(keys)
    k_min, k_max = spread(bounds, index) if has_statistics or k_bits is not None else (None, None)
    if not has_tokens:  # nothing but its shape is used
        blank = jnp.zeros((1, heads, w.page_size, w.head_dim), w.dtype)
        return PagedKV(blank, blank, k_min, k_max)
    values = normal(w, 2 * seed + 1, *shape)
    k = keys if k_bits is None else quantize_keys(keys, bounds[0], bounds[1], k_bits)
    v = values if v_bits is None else quantize(values, v_bits)
    return PagedKV(spread(k, index), spread(v, index), k_min, k_max)


def layer(
    w: Workload, sets: int, first: int, *, has_tokens: bool = True, has_statistics: bool = False
) -> tuple[LayerKV, list[PageTables]]:
    """Returns the pools and the tail of a layer, and page tables that share no page and no slot.

    Args:
      w: the workload.
      sets: page tables.
      first: streaming heads hold the pages of the sink and those from this position on.
      has_tokens: whether keys and values are needed.
      has_statistics: whether key statistics are needed, which quantised keys have anyway.
    """
    rng = np.random.default_rng(0)
    logical = np.arange(w.max_pages)
    is_held = (logical * w.page_size < w.sink) | (logical >= first // w.page_size)

    def tables(held: np.ndarray) -> np.ndarray:
        shape = (sets, w.batch, int(held.sum()))
        found = np.full((sets, w.batch, w.max_pages), NO_PAGE, np.int32)
        found[:, :, held] = rng.permutation(math.prod(shape)).reshape(shape)
        return found

    retrieval, streaming = tables(np.ones_like(is_held)), tables(is_held)
    bits = w.bits_by_class
    tail = (sets * w.batch, w.num_kv_heads, w.page_size, w.head_dim)
    kv = LayerKV(
        _pool(w, w.retrieval, bits[0], retrieval.size, 1, has_tokens=has_tokens, has_statistics=has_statistics),
        _pool(w, w.streaming, bits[1], int((streaming >= 0).sum()), 2, has_tokens=has_tokens, has_statistics=False),
        Tail(*(normal(w, seed, *tail) for seed in (6, 7))),
    )
    slots = np.arange(sets * w.batch, dtype=np.int32).reshape(sets, w.batch)
    return kv, [PageTables(*map(jnp.asarray, each)) for each in zip(retrieval, streaming, slots, strict=True)]


def normal(w: Workload | Product, seed: int, *shape: int) -> jax.Array:
    """Returns normal numbers: small arrays from the host, since JAX would compile a program for each shape."""
    if math.prod(shape) <= _SMALL:
        return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(jnp.dtype(w.dtype)))
    return jax.random.normal(jax.random.key(seed), shape, w.dtype)


def selection(w: Workload, rng: np.random.Generator) -> jax.Array:
    """Returns random pages for each sequence and head, the first and the newest among them."""
    order = rng.random((w.batch, w.retrieval, w.max_pages), np.float32)
    order[..., [0, -1]] = -1
    count = min(w.num_selected, w.max_pages)
    return jnp.asarray(np.sort(np.argpartition(order, count - 1)[..., :count]).astype(np.int32))


def weights(w: Product, seed: int) -> QuantizedMatrix:
    """Returns a matrix of random codes, whose numbers are of size 1."""
    dtype, largest = (jnp.int8, 127) if w.bits == 8 else (jnp.uint8, 8)
    columns, groups = w.inputs * w.bits // 8, w.inputs // w.group if w.group else 1

    @jax.jit
    def random(key: jax.Array) -> QuantizedMatrix:
        codes, scale, low = jax.random.split(key, 3)
        form = (w.outputs, groups), jnp.float16 if w.group else jnp.float32
        return QuantizedMatrix(
            codes=jax.lax.bitcast_convert_type(jax.random.bits(codes, (w.outputs, columns), jnp.uint8), dtype),
            scale=jax.random.uniform(scale, *form, 0.5 / largest, 1 / largest),
            low=jax.random.uniform(low, *form, -1.0, -0.5) if w.has_low else None,
            input_bits=w.input_bits,
        )

    return random(jax.random.key(seed))
