"""The public op `prefill_attention`."""

import jax
import jax.numpy as jnp

from pallas_kernels.core.dispatch import dispatch
from pallas_kernels.core.dtypes import narrowed
from pallas_kernels.core.hopper import on_hopper
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables
from pallas_kernels.prefill_attention import reference, xla
from pallas_kernels.prefill_attention.blocks import BlockList, BlockRanges, Walk, Window, visible_history

IMPLEMENTATIONS = {
    "mosaic_gpu": on_hopper(__name__),
    "xla": xla.prefill_attention,
    "reference": reference.prefill_attention,
}


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
    implementation: str | None = None,
) -> jax.Array:
    """Returns attention outputs [B, T, N, H], in the dtype of ``q``, of a chunk of tokens (LServe 3.2 and 3.4).

    The chunk has been written (`kv_write`), but its own keys and values come from ``k`` and ``v``, unquantised. Those
    before it come from the pages; only a chunk that ends in the page in which it begins has the tokens of that page
    before it from the tail of the sequence's slot, unquantised too. For the query at position ``p = starts[b] + t`` of
    query head n of KV head n // G:

        page    = starts[b] // page_size · page_size
        own[b]  = page if starts[b] + counts[b] <= page + page_size else starts[b]
        visible = {j <= p : retrieval or j > p − local or j < sink}
        seen    = {j in visible : j >= own[b] or j // keys in visited[b, n // G, t // queries]}
        out[b, t, n] = Σ_seen softmax(q[b, t, n] · key[j] / sqrt(H)) value[j]

    A walk says which blocks of ``keys`` history tokens are visited by which blocks of ``queries`` queries, ranges or a
    list; nothing is read from the others, whose pages need not be held. Tokens from own[b] on are always visited:

        visited[b, k, i] = {0 … sinks − 1} ∪ {low … high − 1}          with sinks, low, high = walk's [b, k, i]
        visited[b, k, i] = {block >= 0 in walk's blocks[b, k, i]}

    Without a walk, or for a head class without one, it is every block that holds a visible key (`visible_walk`), so
    that ``seen = visible``. A list may have means of blocks (see `block_select`). Then each block i of the history that
    is not visited, but ends before own[b] and is held, is one more key and value in the sum: the mean key and the mean
    value of the block, with the weight of ``keys`` keys (FlashPrefill V2, arXiv 2608.19758). Rows from ``counts[b]`` on
    are unspecified but finite.

    Args:
      q: [B, T, N, H], query heads of retrieval KV heads first.
      k: [B, T, K, H] keys of the chunk after RoPE.
      v: [B, T, K, H].
      kv: the layer's pools and tail with the chunk, holding at least the tokens before it that are visible from it;
        with rotated values (see `rotate`), ``v`` and the outputs are rotated too.
      tables: page tables [B, max_pages] int32, and slots [B] int32.
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence.
      sink: tokens at the start that streaming heads see.
      local: tokens up to and including the query that streaming heads see.
      has_history: False promises that all ``starts`` are 0, and makes a smaller program where it can.
      walk: the visited blocks of the history, for each head class a `BlockRanges` or `BlockList` [B, K, …] of its KV
        heads, or None. Block sizes are its static fields; ``keys`` must be a multiple of the page size. Entries behind
        the history mean nothing. `mosaic_gpu` takes blocks of 128 queries and 128 keys, the others all sizes.
      implementation: a backend name, or None for the first that accepts.

    Raises:
      ValueError: if the walk does not fit the other arguments.
    """
    if walk is not None:
        walk = narrowed(walk)
        _check(walk, kv, *q.shape[:2])
    return dispatch(
        "prefill_attention",
        IMPLEMENTATIONS,
        implementation,
        *(q, k, v, kv, tables, starts, counts),
        sink=sink,
        local=local,
        has_history=has_history,
        walk=walk,
    )


def visible_walk(
    kv: LayerKV,
    starts: jax.Array,
    counts: jax.Array,
    *,
    tokens: int,
    sink: int,
    local: int,
    queries: int | None = None,
    keys: int | None = None,
) -> Walk:
    """Returns the walk of `prefill_attention` when none is given: every block that holds a visible key, as ranges.

    Args:
      kv: the layer's pools.
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence; query blocks behind them visit nothing.
      tokens: T, rows of the chunk.
      sink: tokens at the start that streaming heads see.
      local: tokens up to and including the query that streaming heads see.
      queries: queries per block; None for as many as `xla` takes without a walk, which differs by head class.
      keys: keys per block of history, a multiple of the page size; None as for ``queries``. With these sizes `xla`
        returns the same bits as without a walk.
    """

    def ranges(pool: PagedKV | None, window: Window) -> BlockRanges | None:
        if pool is None:
            return None
        rows = queries or min(xla.query_block(window), tokens)
        size = keys or xla.history_block(rows, pool.page_size, window)
        return visible_history(starts, counts, tokens, pool.num_kv_heads, window, rows, size)

    return Walk(ranges(kv.retrieval, Window(None, None)), ranges(kv.streaming, Window(sink, local)))


def _check(walk: Walk, kv: LayerKV, batch: int, tokens: int) -> None:
    """Refuses a walk that does not fit the arguments.

    Raises:
      ValueError: with the reason.
    """
    for name, visited, pool in zip(Walk._fields, walk, (kv.retrieval, kv.streaming), strict=True):
        if visited is None:
            continue
        if pool is None:
            raise ValueError(f"walk.{name} must be None: the layer has no {name} heads")
        if visited.queries < 1 or visited.keys < 1 or visited.keys % pool.page_size:
            raise ValueError(
                f"walk.{name}: queries={visited.queries} must be positive, and keys={visited.keys} a multiple of the "
                f"page size {pool.page_size}"
            )
        expected, arrays = (batch, pool.num_kv_heads, -(-tokens // visited.queries)), jax.tree.leaves(visited)
        if isinstance(visited, BlockList):
            arrays = [visited.blocks]
            _check_means(name, visited, batch, pool)
        for array in arrays:
            rank = 4 if isinstance(visited, BlockList) else 3
            if array.shape[:3] != expected or array.ndim != rank or 0 in array.shape[3:] or array.dtype != jnp.int32:
                raise ValueError(
                    f"walk.{name} must be int32 {[*expected, *['n >= 1'] * (rank - 3)]}, got {array.dtype} "
                    f"{[*array.shape]}"
                )


def _check_means(name: str, walk: BlockList, batch: int, pool: PagedKV) -> None:
    """Refuses means that do not fit the arguments.

    Raises:
      ValueError: with the reason.
    """
    head_dim, blocks = pool.k.shape[-1], () if walk.means is None else walk.means.k.shape[2:3]
    for mean in walk.means or ():
        if mean.shape != (batch, pool.num_kv_heads, *blocks, head_dim) or 0 in mean.shape:
            raise ValueError(
                f"walk.{name}: means must be {[batch, pool.num_kv_heads, 'n >= 1', head_dim]}, got {[*mean.shape]}"
            )
