"""Pytrees of the paged KV cache of one layer, and the token arithmetic of its pages.

A *page* holds ``page_size`` consecutive tokens of one sequence for all KV heads of a pool. ``page_table[b, i]`` is the
physical page of tokens ``i · page_size …`` of sequence b, or -1. A *sub-page* is the unit of key statistics.

A page is *sealed* when its last token is written: only then are its elements stored, quantised, and its statistics
made, of all its tokens at once. So they do not depend on how the tokens were split into chunks and steps. Until then
it is the sequence's *open page*: its tokens are in the `Tail`, unquantised. The tail of a sequence holds the page of
its newest token, also after that has been sealed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, bits_of

NO_PAGE = -1


class PagedKV(NamedTuple):
    """One pool: keys and values [pages, K, page_size, H], the bounds of keys by sub-page, and means by page.

    ``k_min`` and ``k_max`` [pages, K, subs, H] are the least and the greatest number of each channel of the post-RoPE
    keys of a sub-page. `page_select` and quantised keys need them; pools without either have none. ``k_mean`` and
    ``v_mean`` [pages, K, H] are the means of a page's keys and values, which `block_select` needs; other pools have
    none.
    """

    k: jax.Array | QuantizedKeys
    v: jax.Array | QuantizedArray
    k_min: jax.Array | None = None
    k_max: jax.Array | None = None
    k_mean: jax.Array | None = None
    v_mean: jax.Array | None = None

    @property
    def num_kv_heads(self) -> int:
        """K, the number of KV heads in this pool."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.k.shape[2]

    @property
    def sub_page_size(self) -> int:
        """Tokens per sub-page; those of the page if the pool has no bounds."""
        return self.page_size if self.k_min is None else self.page_size // self.k_min.shape[2]


class Tail(NamedTuple):
    """Keys and values [slots, K, page_size, H] of the page of each slot's newest token, retrieval heads first.

    Row r is the token at position ``r`` of the page. Rows after the newest token's hold anything.
    """

    k: jax.Array
    v: jax.Array


class LayerKV(NamedTuple):
    """The two pools of a layer, and its tail; a class without heads has no pool. Retrieval heads come first."""

    retrieval: PagedKV | None
    streaming: PagedKV | None
    tail: Tail

    @property
    def num_retrieval(self) -> int:
        """Number of retrieval KV heads."""
        return 0 if self.retrieval is None else self.retrieval.num_kv_heads

    @property
    def page_size(self) -> int:
        """Tokens per page, of both pools."""
        return self.tail.k.shape[2]


class PageTables(NamedTuple):
    """Where the tokens of the sequences of a call lie.

    ``retrieval`` and ``streaming`` [B, max_pages] int32 are the page tables of the two pools, indexed by logical page;
    `NO_PAGE` where there is none. ``slots`` [B] int32 are the rows of the tail; None if sequence b has row b.
    """

    retrieval: jax.Array | np.ndarray
    streaming: jax.Array | np.ndarray
    slots: jax.Array | np.ndarray | None = None


def slots_of(tables: PageTables, batch: int) -> jax.Array:
    """Returns the row of the tail of each sequence, [B] int32."""
    return jnp.arange(batch, dtype=jnp.int32) if tables.slots is None else jnp.asarray(tables.slots)


def pools(kv: LayerKV, tables: PageTables) -> list[tuple[str, PagedKV, jax.Array, slice]]:
    """Returns (class, pool, page table, its KV heads) for each head class that the layer has."""
    found = []
    if kv.retrieval is not None:
        found.append(("retrieval", kv.retrieval, jnp.asarray(tables.retrieval), slice(0, kv.num_retrieval)))
    if kv.streaming is not None:
        found.append(("streaming", kv.streaming, jnp.asarray(tables.streaming), slice(kv.num_retrieval, None)))
    return found


def parts_stored_alike(kv: LayerKV, heads: int) -> list[tuple[LayerKV, slice]]:
    """Returns the layer, or its classes one by one if their pages differ, each with its part of ``heads`` heads.

    Args:
      kv: the layer.
      heads: its number of query heads or of KV heads.
    """
    found = [pool for pool in (kv.retrieval, kv.streaming) if pool is not None]
    if len({_stored(pool) for pool in found}) == 1:
        return [(kv, slice(0, heads))]
    first, parts = (
        heads * kv.num_retrieval // kv.tail.k.shape[1],
        (slice(0, kv.num_retrieval), slice(kv.num_retrieval, None)),
    )
    retrieval, streaming = (Tail(*(x[:, part] for x in kv.tail)) for part in parts)
    return [
        (kv._replace(streaming=None, tail=retrieval), slice(0, first)),
        (kv._replace(retrieval=None, tail=streaming), slice(first, heads)),
    ]


def _stored(pool: PagedKV) -> tuple[int, ...]:
    """Returns what attention must know of how a pool is stored: its bits, and the sub-pages of quantised keys."""
    sub_page_size = pool.sub_page_size if isinstance(pool.k, QuantizedKeys) else 0
    return bits_of(pool.k), bits_of(pool.v), sub_page_size


def is_visible(queries: jax.Array, keys: jax.Array, sink: int | None, local: int | jax.Array | None) -> jax.Array:
    """Returns whether the query at one position sees the key at another (LServe section 3.2, token-exact).

    Causal; with ``local``, also ``key > query − local or key < sink``. Positions broadcast against each other.
    """
    causal = keys <= queries
    if local is None or sink is None:
        return causal
    return causal & ((keys > queries - local) | (keys < sink))


def div_down(x: jax.Array, size: jax.Array | int) -> jax.Array:
    """Returns x // size for x >= 0; for x < 0 the result is meaningless.

    It takes one instruction, while the floor of signed numbers takes ten. Programs divide by page sizes everywhere, and
    loading a program from the compilation cache takes time for each instruction.
    """
    if isinstance(size, int) and size & (size - 1) == 0:
        return jax.lax.shift_right_logical(x, jnp.asarray(size.bit_length() - 1, x.dtype))
    return jax.lax.div(x, jnp.asarray(size, x.dtype))


def div_up(x: jax.Array, size: jax.Array | int) -> jax.Array:
    """Returns ceil(x / size) for x >= 0."""
    return div_down(x + (size - 1), size)


def newest_page(lengths: jax.Array, page_size: int) -> jax.Array:
    """Returns the logical page of the last of ``lengths`` tokens, the one that the tail holds; 0 if there is none."""
    return div_down(jnp.maximum(lengths - 1, 0), page_size)


def take(x: jax.Array, *index: jax.Array) -> jax.Array:
    """Returns x[index] for indices inside the array, without wrapping or clamping."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def streaming_page_count(sink: int, local: int, page_size: int) -> int:
    """Returns the most pages that the sink and the window of one query can touch, over all alignments."""
    return -(-sink // page_size) + (local + page_size - 2) // page_size + 1


def streaming_pages(lengths: jax.Array, sink: int, local: int, page_size: int) -> jax.Array:
    """Returns the logical pages [B, `streaming_page_count`] int32 that the last token of each sequence sees.

    Ascending, without repeats, padded at the end with `NO_PAGE`.
    """
    sinks = -(-sink // page_size)
    first = jnp.maximum(div_down(jnp.maximum(lengths - local, 0), page_size), sinks)
    index = jnp.arange(streaming_page_count(sink, local, page_size), dtype=jnp.int32)
    logical = jnp.where(index < sinks, index, first[:, None] + index - sinks)
    return jnp.where(logical * page_size < lengths[:, None], logical, NO_PAGE).astype(jnp.int32)
