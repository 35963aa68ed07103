"""Compiled programs that move pages, and the state of a slot, out of the KV cache and back in: every bit of them.

A page moves as it is stored (codes, scales, statistics), so nothing is lost on the way, and what unused pages hold does
not matter. Each call moves up to `BLOCK` pages of one pool: one shape, and so one program for any number of pages.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lserve_jax.runtime.cache import KVCache, LayerCache
from pallas_kernels import NO_PAGE, PagedKV, Selection, Tail
from pallas_kernels.core.dtypes import narrowed

BLOCK = 32
"""Pages per call. On a CPU, a call of one page of the embedded model takes 1 ms, and one of 32 pages 3 to 6 ms: larger
blocks would save little. For an 8B model, 32 pages are 0.3 GB, which a device must hold beside the cache for a call."""

type PoolName = Literal["retrieval", "streaming"]

type Pages = tuple[PagedKV | None, ...]
"""Pages of one pool of every layer, [n, …] per leaf: what lies at n indices of the pool's. None: no such pool."""


class SlotRow(NamedTuple):
    """What a layer holds of one slot beside pages: its open page, and its last page selection if the layer selects.

    ``tail`` has arrays [K, page_size, H]; ``selected`` has arrays [K_retrieval, width], or is None.
    """

    tail: Tail
    selected: Selection | None


type SlotRows = tuple[SlotRow, ...]
"""The row of one slot in every layer."""


def pools_of(cache: KVCache, pool: PoolName) -> Pages:
    """Returns one pool of every layer."""
    return tuple(getattr(layer.kv, pool) for layer in cache)


@partial(jax.jit, static_argnames="pool")
def read_pages(cache: KVCache, ids: jax.Array, *, pool: PoolName) -> Pages:
    """Returns copies of the pages ``ids`` [n] int32 of a pool; where an id is `NO_PAGE`, any page."""
    ids = narrowed(ids)
    return jax.tree.map(lambda x: x.at[ids].get(mode="clip", wrap_negative_indices=False), pools_of(cache, pool))


@partial(jax.jit, static_argnames="pool", donate_argnames="cache")
def write_pages(cache: KVCache, pages: Pages, ids: jax.Array, *, pool: PoolName) -> KVCache:
    """Returns the cache with ``pages`` [n, …] at ``ids`` [n] int32 of a pool.

    Args:
      cache: donated.
      pages: from `read_pages`, of a cache with the same configuration.
      ids: distinct pages of the pool, and `NO_PAGE` for each of ``pages`` that is not written.
      pool: which pool.
    """
    ids = narrowed(ids)

    def put(x: jax.Array, new: jax.Array) -> jax.Array:
        beyond = jnp.where(ids == NO_PAGE, x.shape[0], ids)
        return x.at[beyond].set(new, mode="drop", wrap_negative_indices=False)

    written = jax.tree.map(put, pools_of(cache, pool), pages)
    return tuple(layer._replace(kv=layer.kv._replace(**{pool: new})) for layer, new in zip(cache, written, strict=True))


@jax.jit
def read_slot(cache: KVCache, slot: jax.Array) -> SlotRows:
    """Returns a slot (scalar int32): its state beside pages and lengths."""
    at = narrowed(slot)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, at, keepdims=False), slots_in(cache))


@partial(jax.jit, donate_argnames="cache")
def write_slot(cache: KVCache, rows: SlotRows, slot: jax.Array) -> KVCache:
    """Returns the cache with ``rows`` at a slot (scalar int32). The cache is donated."""
    at = narrowed(slot)
    written = jax.tree.map(
        lambda x, row: jax.lax.dynamic_update_index_in_dim(x, row, at, 0), slots_in(cache), tuple(rows)
    )
    return tuple(
        LayerCache(layer.kv._replace(tail=new.tail), new.selected) for layer, new in zip(cache, written, strict=True)
    )


def slots_in(cache: KVCache) -> SlotRows:
    """Returns the rows of all slots, along the first axis of every array."""
    return tuple(SlotRow(layer.kv.tail, layer.selected) for layer in cache)
