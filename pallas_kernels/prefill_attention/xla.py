"""`prefill_attention` for any device: for each query block over the visible key blocks.

Keys come from the pages, from what is read unquantised (`own_keys`), and from means of what is not listed; one loop
serves all. Products run in the dtype of the queries (bfloat16 uses AMX on CPUs that have it) and accumulate in float32.
Trip counts are data.

Where the history may be long, one head at a time keeps the scores of large blocks in a core's cache. Where few keys are
visible, smaller blocks compute fewer hidden ones, and all heads take each step together: a CPU's threads would
otherwise wait for each other for longer than they compute.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.dtypes import ZERO
from pallas_kernels.core.online_softmax import OnlineSoftmax
from pallas_kernels.core.paging import (
    NO_PAGE,
    LayerKV,
    PagedKV,
    PageTables,
    div_down,
    div_up,
    is_visible,
    pools,
    take,
)
from pallas_kernels.core.quantization import dequantize
from pallas_kernels.core.sealing import keys_of
from pallas_kernels.prefill_attention.blocks import (
    NO_BLOCK,
    BlockList,
    BlockRanges,
    KeyRange,
    Listed,
    Ranges,
    Walk,
    Window,
    visible_blocks,
    visible_history,
)
from pallas_kernels.prefill_attention.own import OwnKeys, own_keys

_BLOCK = 256
"""Tokens per query block, and per block of the chunk's keys, where the history may be long."""
_DENSE_BLOCK = 2 * _BLOCK
"""Keys per block of such a history."""
_MEANS = 128
"""Means of blocks per step, at any number of them: another length of the sums would round otherwise."""
_SMALL_BLOCK = 128
"""Tokens per query block and per block of keys elsewhere; a block of history is at least a page."""

_HEADS = "heads"
"""The axis of heads that take each step together."""


class KeySource(NamedTuple):
    """Keys that a head fetches block by block.

    Attributes:
      keys: their positions.
      together: blocks that one step takes.
      visits: index of a block of queries → the key blocks that it visits.
      fetch: index of a block of queries, indices of key blocks [together] → keys [S, H], values [S, H], and which of
        them exist, [S] bool; for blocks below 0 none.
      window: what a query sees of the keys that exist; None if all, and then the first key of each step exists.
      weight: how many keys each one stands for.
    """

    keys: KeyRange
    together: int
    visits: Callable[[jax.Array], Ranges | Listed]
    fetch: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    window: Window | None
    weight: int = 1


class History(NamedTuple):
    """The pool of a head class, its page table, and which blocks of the history are visited."""

    pool: PagedKV
    table: jax.Array
    walk: BlockRanges | BlockList


class HeadClass(NamedTuple):
    """KV heads ``first … first + count − 1`` of a layer.

    Attributes:
      first, count: the heads.
      window: what the heads see.
      block: queries per block, and keys per block of the chunk.
      history: the tokens before the chunk, if there may be any.
      is_together: whether all heads take each step together.
    """

    first: int
    count: int
    window: Window
    block: int
    history: History | None
    is_together: bool


@partial(jax.jit, static_argnames=("sink", "local", "has_history", "block"))  # traced once for all layers alike
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
    block: int | None = None,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines; ``block`` changes speed and rounding only."""
    batch, tokens = q.shape[:2]
    classes = _head_classes(kv, tables, starts, counts, Window(sink, local), tokens, has_history, walk or Walk(), block)
    own = own_keys(k, v, kv, tables, starts, counts) if has_history else OwnKeys(k, v, starts, counts)
    blocks = math.lcm(*(heads.block for heads in classes))
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % blocks), (0, 0), (0, 0))) for x in (q, own.k, own.v))
    own = own._replace(k=k, v=v)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    outputs = []
    for heads in classes:

        def attend_sequence(b: jax.Array, heads: HeadClass = heads) -> jax.Array:
            start, count = take(starts, b), take(counts, b)

            def attend_head(head: jax.Array) -> jax.Array:
                at = (b, heads.first + head)
                sources = [_own(own, at, start, heads)]
                if heads.history is not None:
                    end = take(own.starts, b)
                    before = [_history(heads, b, head, end, q.dtype), *_means(heads.history, b, head, end)]
                    sources = [*before, *sources]
                return _attend_head(q, at, sources, start, count, heads)

            each = jax.vmap(attend_head, axis_name=_HEADS) if heads.is_together else partial(jax.lax.map, attend_head)
            return each(jnp.arange(heads.count, dtype=jnp.int32))

        outputs.append(jax.lax.map(attend_sequence, jnp.arange(batch, dtype=jnp.int32)))
    out = jnp.concatenate(outputs, axis=1).swapaxes(1, 2)
    return out.reshape(batch, -1, q.shape[2] * q.shape[3], q.shape[4])[:, :tokens]


def _head_classes(
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    window: Window,
    tokens: int,
    has_history: bool,
    walk: Walk,
    block: int | None,
) -> list[HeadClass]:
    """Returns the classes of a layer's heads; a single one if a chunk without history lies inside every window."""
    found = pools(kv, tables)
    assert window.local is not None
    if not has_history and tokens <= window.local:
        heads = sum(pool.num_kv_heads for _, pool, _, _ in found)
        return [HeadClass(0, heads, Window(None, None), min(block or _SMALL_BLOCK, tokens), None, True)]
    classes = []
    for name, pool, table, heads in found:
        seen = window if name == "streaming" else Window(None, None)
        queries = min(block or query_block(seen, has_history), tokens)
        history = None
        if has_history:
            size = history_block(queries, pool.page_size, seen)
            every = (starts, counts, tokens, pool.num_kv_heads, seen, queries, size)
            visited = getattr(walk, name) or visible_history(*every)
            history, queries = History(pool, table, visited), min(visited.queries, tokens)
        is_together = not _may_be_long(seen, has_history)
        classes.append(HeadClass(heads.start, pool.num_kv_heads, seen, queries, history, is_together))
    return classes


def _attend_head(
    q: jax.Array,
    at: tuple[jax.Array, jax.Array],
    sources: Sequence[KeySource],
    start: jax.Array,
    count: jax.Array,
    heads: HeadClass,
) -> jax.Array:
    """Returns the outputs [T, G, H] of one sequence's KV head, for q [B, T, K, G, H]; T is whole blocks of queries."""
    (b, head), block = at, heads.block
    tokens, (group, head_dim) = q.shape[1], q.shape[3:]

    def attend_queries(index: jax.Array, out: jax.Array) -> jax.Array:
        corner = (b, index * block, head, ZERO, ZERO)
        queries = jax.lax.dynamic_slice(q, corner, (1, block, 1, group, head_dim)).reshape(block * group, head_dim)
        positions = jnp.repeat(start + index * block + jnp.arange(block, dtype=jnp.int32), group)
        state = OnlineSoftmax.start((block * group,), head_dim)
        for source in sources:
            state = _walk(state, queries, positions, source, index, heads)
        result = state.finish().reshape(block, group, head_dim).astype(out.dtype)
        return jax.lax.dynamic_update_slice(out, result, (index * block, ZERO, ZERO))

    return jax.lax.fori_loop(0, div_up(count, block), attend_queries, jnp.zeros((tokens, group, head_dim), q.dtype))


def _walk(
    state: OnlineSoftmax,
    queries: jax.Array,
    positions: jax.Array,
    source: KeySource,
    index: jax.Array,
    heads: HeadClass,
) -> OnlineSoftmax:
    """Returns the softmax state of a block of queries [rows, H] at positions [rows] after the blocks of a source."""
    visits, scale = source.visits(index), queries.shape[-1] ** -0.5
    # Of heads that take each step together, some may visit fewer blocks than others.
    steps = div_up(jax.lax.pmax(visits.count, _HEADS) if heads.is_together else visits.count, source.together)

    def visit(step: jax.Array, state: OnlineSoftmax) -> OnlineSoftmax:
        places = step * source.together + jnp.arange(source.together, dtype=jnp.int32)
        blocks = jnp.where(places < visits.count, visits.block(places), NO_BLOCK)
        keys, values, exists = source.fetch(index, blocks)
        exists = jax.lax.optimization_barrier(exists)  # else XLA computes it for each query
        values = jnp.where(exists[:, None], values, jnp.zeros((), values.dtype))
        visible = None
        if source.window is not None:
            at = source.keys.first + _members(blocks, source.keys.block)
            visible, exists = exists & is_visible(positions[:, None], at, *source.window), None
        else:
            keys = jnp.where(exists[:, None], keys, keys[:1])  # a key that does not exist must not give the maximum
        scores = jnp.einsum("rh,sh->rs", queries, keys, precision="highest", preferred_element_type=jnp.float32)
        if source.weight > 1:
            scores = scores + math.log(source.weight) / scale
        return state.add(scores, values, scale=scale, visible=visible, exists=exists)

    return jax.lax.fori_loop(0, steps, visit, state)


def _members(blocks: jax.Array, size: int) -> jax.Array:
    """Returns the places [n · size] of the members of blocks [n] of so many."""
    return (blocks[:, None] * size + jnp.arange(size, dtype=jnp.int32)).reshape(-1)


def _may_be_long(window: Window, has_history: bool) -> bool:
    """Returns whether a query may see a history of any length."""
    return has_history and window.local is None


def query_block(window: Window, has_history: bool = True) -> int:
    """Returns the tokens per query block, if no walk is given."""
    return _BLOCK if _may_be_long(window, has_history) else _SMALL_BLOCK


def history_block(queries: int, page_size: int, window: Window) -> int:
    """Returns the keys per block of history for the queries per block, if no walk is given."""
    keys = _DENSE_BLOCK if window.local is None and queries == _BLOCK else queries
    return max(keys // page_size, 1) * page_size


def _history(heads: HeadClass, b: jax.Array, head: jax.Array, end: jax.Array, dtype: jnp.dtype) -> KeySource:
    """Returns the source of a head's first ``end`` tokens, dequantised from their pages."""
    assert heads.history is not None
    pool, tables, walk = heads.history
    size = walk.keys
    pages = size // pool.page_size
    table = take(tables, b)
    table = jnp.pad(table, (0, -table.size % pages), constant_values=NO_PAGE)
    together = 1
    if isinstance(walk, BlockList) and not heads.is_together:
        # Short blocks together are as fast as a long one.
        wanted = history_block(walk.queries, pool.page_size, heads.window)
        together = max((_DENSE_BLOCK if walk.queries >= _SMALL_BLOCK else wanted) // size, 1)

    def visits(index: jax.Array) -> Ranges | Listed:
        return walk.of(b, head, index, div_up(end, size))

    def fetch(index: jax.Array, blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del index
        physical = take(table, _members(jnp.maximum(blocks, 0), pages))
        found = jax.tree.map(lambda x: take(x, jnp.maximum(physical, 0), head), pool)
        keys, values = (x.reshape(-1, x.shape[-1]) for x in (keys_of(found, dtype), dequantize(found.v, dtype)))
        is_held = jnp.repeat(physical >= 0, pool.page_size) & jnp.repeat(blocks >= 0, size)
        return keys, values, is_held & (_members(blocks, size) < end)

    window = None if heads.window.local is None else heads.window
    return KeySource(KeyRange(0, end, size), together, visits, fetch, window)


def _means(history: History, b: jax.Array, head: jax.Array, end: jax.Array) -> list[KeySource]:
    """Returns the source of the means of blocks that are not listed, if there is one."""
    walk = history.walk
    if not isinstance(walk, BlockList) or walk.means is None:
        return []
    keys, values = (take(x, b, head) for x in walk.means)
    blocks, together = keys.shape[0], _MEANS
    keys, values = (jnp.pad(x, ((0, -x.shape[0] % together), (0, 0))) for x in (keys, values))
    pages = walk.keys // history.pool.page_size
    held = jnp.pad(take(history.table, b) >= 0, (0, -history.table.shape[1] % pages)).reshape(-1, pages).all(axis=1)
    whole = jnp.minimum(div_down(end, walk.keys), blocks)

    def visits(index: jax.Array) -> Ranges:
        is_all = walk.of(b, head, index, whole).count == whole
        nothing = jnp.zeros_like(whole)
        return Ranges(nothing, nothing, jnp.where(is_all, nothing, div_up(whole, together)))

    def fetch(index: jax.Array, blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first, found = jnp.maximum(blocks[0], 0) * together, walk.of(b, head, index, whole)
        here = first + jnp.arange(together, dtype=jnp.int32)
        k, v = (jax.lax.dynamic_slice_in_dim(x, first, together) for x in (keys, values))
        ascending = jnp.where(jnp.arange(found.blocks.size, dtype=jnp.int32) < found.count, found.blocks, whole)
        place = jnp.searchsorted(ascending, here).astype(jnp.int32)
        is_listed = take(ascending, jnp.minimum(place, found.blocks.size - 1)) == here
        is_held = take(held, jnp.minimum(here, held.size - 1))
        return k, v, (here < whole) & is_held & ~is_listed

    # As positions, the places of means are before every query. A step may have none that exists.
    return [KeySource(KeyRange(0, whole, together), 1, visits, fetch, Window(None, None), weight=walk.keys)]


def _own(own: OwnKeys, at: tuple[jax.Array, jax.Array], start: jax.Array, heads: HeadClass) -> KeySource:
    """Returns the source of what a head reads unquantised; ``start`` is the position of the sequence's first query."""
    b, head = at
    block, first, count = heads.block, take(own.starts, b), take(own.counts, b)
    positions = KeyRange(first, first + count, block)

    def visits(index: jax.Array) -> Ranges:
        return visible_blocks(start + index * block, block, positions, heads.window)

    def fetch(index: jax.Array, blocks: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del index
        place = jnp.maximum(blocks[0], 0) * block
        corner, shape = (b, place, head, ZERO), (1, block, 1, own.k.shape[-1])
        keys, values = (jax.lax.dynamic_slice(x, corner, shape).reshape(block, -1) for x in (own.k, own.v))
        return keys, values, (blocks[0] >= 0) & (place + jnp.arange(block, dtype=jnp.int32) < count)

    return KeySource(positions, 1, visits, fetch, heads.window)
