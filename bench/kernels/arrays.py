"""Random pools, page tables and queries of a layer, of any size."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables, quantize
from pallas_kernels.core.workloads import Bits, Workload

_DISTINCT_PAGES = 1021
"""Pages of random numbers, which repeat in larger pools; a prime, so that no table has the same period."""
_SMALL = 2**18
"""Most elements of an array that the host makes."""


def _pool(
    w: Workload, heads: int, bits: Bits, pages: int, seed: int, *, has_tokens: bool, has_statistics: bool
) -> PagedKV | None:
    """Returns a pool of random numbers, with the statistics of its keys."""
    if not heads:
        return None
    distinct = min(pages, _DISTINCT_PAGES)
    index = jnp.arange(pages, dtype=jnp.int32) % distinct
    shape = (distinct, heads, w.page_size, w.head_dim)
    keys = normal(w, 2 * seed, *shape)

    @jax.jit
    def spread(tree: Any, index: jax.Array) -> Any:
        return tree if distinct == pages else jax.tree.map(lambda x: x[index], tree)

    @jax.jit
    def statistics(keys: jax.Array, index: jax.Array) -> list[jax.Array]:
        subs = keys.reshape(*shape[:2], -1, w.sub_page_size, w.head_dim)
        return spread([jnp.min(subs, axis=3), jnp.max(subs, axis=3)], index)

    bounds = statistics(keys, index) if has_statistics else []
    if not has_tokens:  # nothing but its shape is used
        stored = jnp.zeros((1, heads, w.page_size, w.head_dim), w.dtype)
        return PagedKV(stored, stored, *bounds)
    both = zip((keys, normal(w, 2 * seed + 1, *shape)), bits, strict=True)
    return PagedKV(*(spread(x if bits is None else quantize(x, bits), index) for x, bits in both), *bounds)


def layer(
    w: Workload, sets: int, first: int, *, has_tokens: bool = True, has_statistics: bool = False
) -> tuple[LayerKV, list[PageTables]]:
    """Returns the pools of a layer, and page tables that share no page.

    Args:
      w: the workload.
      sets: page tables.
      first: streaming heads hold the pages of the sink and those from this position on.
      has_tokens: whether keys and values are needed.
      has_statistics: whether key statistics are needed.
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
    kv = LayerKV(
        _pool(w, w.retrieval, bits[0], retrieval.size, 1, has_tokens=has_tokens, has_statistics=has_statistics),
        _pool(w, w.streaming, bits[1], int((streaming >= 0).sum()), 2, has_tokens=has_tokens, has_statistics=False),
    )
    return kv, [PageTables(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(retrieval, streaming, strict=True)]


def normal(w: Workload, seed: int, *shape: int) -> jax.Array:
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
