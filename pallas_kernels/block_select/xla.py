"""`block_select` for any device: the products of a tile's queries and the mean keys, some blocks at a time.

Trip counts are data, so that a short history costs little, however long the page table is.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.dtypes import ZERO
from pallas_kernels.core.paging import NO_PAGE, PagedKV, div_down, div_up, take
from pallas_kernels.prefill_attention.blocks import NO_BLOCK, BlockList, BlockMeans

_TOGETHER = 128
"""Blocks whose scores are computed at once, at any length of the table: other shapes may round otherwise."""


class Rule(NamedTuple):
    """The options of `pallas_kernels.block_select`."""

    queries: int
    keys: int
    threshold: float | None
    sink: int
    local: int
    last: int
    least: int


class Sequence(NamedTuple):
    """One sequence: its row of the chunk, start, count, and the end of its prompt; and which blocks are held, [n]."""

    b: jax.Array
    start: jax.Array
    count: jax.Array
    end: jax.Array
    held: jax.Array


@partial(
    jax.jit, static_argnames=("queries", "keys", "threshold", "sink", "local", "last", "least", "has_means")
)  # traced once for all layers alike
def block_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    ends: jax.Array,
    *,
    has_means: bool,
    **options: int | float | None,
) -> BlockList:
    """Returns what `pallas_kernels.block_select` defines."""
    rule = Rule(**options)  # type: ignore[arg-type]
    heads, per_block = pages.num_kv_heads, rule.keys // pages.page_size
    table = jnp.pad(jnp.asarray(table), ((0, 0), (0, -table.shape[1] % per_block)), constant_values=NO_PAGE)
    blocks = table.shape[1] // per_block
    queries = jnp.pad(q, ((0, 0), (0, -q.shape[1] % rule.queries), (0, 0), (0, 0)))
    queries = queries.reshape(q.shape[0], -1, rule.queries, heads, q.shape[2] // heads, q.shape[3])
    needs_means = has_means or rule.threshold is not None

    def of_sequence(b: jax.Array) -> tuple[jax.Array, BlockMeans | None]:
        start, count = take(starts, b), take(counts, b)
        held = jnp.all(take(table, b).reshape(blocks, per_block) >= 0, axis=1)
        sequence = Sequence(b, start, count, take(ends, b), held)
        means = None
        if needs_means:
            filled = div_down(start + count, rule.keys)
            means = _block_means(pages, take(table, b), held, filled, rule.keys, q.dtype)

        def of_tile(tile: jax.Array) -> jax.Array:
            best = jnp.zeros((heads, blocks), bool)
            if rule.threshold is not None:
                assert means is not None
                best = _best(take(queries, b, tile), means.k, sequence, tile, rule)
            return _listed(best, sequence, tile, rule, pages.page_size)

        lists = jax.lax.map(of_tile, jnp.arange(queries.shape[1], dtype=jnp.int32))
        return lists.swapaxes(0, 1), means if has_means else None

    lists, means = jax.lax.map(of_sequence, jnp.arange(q.shape[0], dtype=jnp.int32))
    return BlockList(blocks=lists, means=means, queries=rule.queries, keys=rule.keys)


def _block_means(
    pages: PagedKV, table: jax.Array, held: jax.Array, filled: jax.Array, keys: int, dtype: jnp.dtype
) -> BlockMeans:
    """Returns the means [K, n, H] of the first ``filled`` blocks of a sequence that are held, and zeros for others."""
    per_block, blocks = keys // pages.page_size, held.shape[0]
    assert pages.k_mean is not None and pages.v_mean is not None
    stored = BlockMeans(pages.k_mean, pages.v_mean)
    shape = (-(-blocks // _TOGETHER) * _TOGETHER, *stored.k.shape[1:])
    table = jnp.pad(table, (0, shape[0] * per_block - table.shape[0]), constant_values=NO_PAGE)
    held = jnp.pad(held, (0, shape[0] - blocks)) & (jnp.arange(shape[0], dtype=jnp.int32) < filled)

    def add(group: jax.Array, means: BlockMeans) -> BlockMeans:
        first = group * _TOGETHER
        physical = jax.lax.dynamic_slice_in_dim(table, first * per_block, _TOGETHER * per_block)
        is_held = jax.lax.dynamic_slice_in_dim(held, first, _TOGETHER)[:, None, None]

        def of(mean: jax.Array, target: jax.Array) -> jax.Array:
            rows = take(mean, jnp.maximum(physical, 0)).astype(jnp.float32)
            found = jnp.mean(rows.reshape(_TOGETHER, per_block, *shape[1:]), axis=1)
            found = jnp.where(is_held, found, 0.0).astype(dtype)
            return jax.lax.dynamic_update_slice_in_dim(target, found, first, axis=0)

        return BlockMeans(*map(of, stored, means))

    nothing = BlockMeans(*(jnp.zeros(shape, dtype) for _ in range(2)))
    found = jax.lax.fori_loop(ZERO, div_up(filled, _TOGETHER), add, nothing)
    return BlockMeans(*(x[:blocks].swapaxes(0, 1) for x in found))


def _best(q: jax.Array, k_mean: jax.Array, sequence: Sequence, tile: jax.Array, rule: Rule) -> jax.Array:
    """Returns whether each block is listed by its score, [K, n] bool, for a tile's queries [queries, K, G, H]."""
    assert rule.threshold is not None
    rows, heads, group, head_dim = q.shape
    q = jnp.transpose(q, (1, 0, 2, 3)).reshape(heads, rows * group, head_dim)
    is_row = jnp.repeat(tile * rule.queries + jnp.arange(rows, dtype=jnp.int32) < sequence.count, group)
    blocks = k_mean.shape[1]
    k_mean = jnp.pad(k_mean, ((0, 0), (0, -blocks % _TOGETHER), (0, 0)))
    filled = div_down(sequence.start + tile * rule.queries, rule.keys)
    ranked = jnp.pad(sequence.held, (0, k_mean.shape[1] - blocks))
    ranked &= jnp.arange(k_mean.shape[1], dtype=jnp.int32) < filled

    def add(step: jax.Array, mass: jax.Array) -> jax.Array:
        first = step * _TOGETHER
        keys = jax.lax.dynamic_slice_in_dim(k_mean, first, _TOGETHER, axis=1)
        scores = jnp.einsum("krh,knh->krn", q, keys, precision="highest", preferred_element_type=jnp.float32)
        scores = scores * head_dim**-0.5
        is_ranked = jax.lax.dynamic_slice_in_dim(ranked, first, _TOGETHER)
        scores = jnp.where(is_row[:, None] & is_ranked, scores, -jnp.inf)
        return jax.lax.dynamic_update_slice_in_dim(mass, jax.nn.logsumexp(scores, axis=1), first, axis=1)

    nothing = jnp.full((heads, k_mean.shape[1]), -jnp.inf, jnp.float32)
    mass = jax.lax.fori_loop(ZERO, div_up(filled, _TOGETHER), add, nothing)
    enough = jnp.max(mass, axis=1, keepdims=True) + math.log(rule.threshold)
    return (ranked & (mass >= enough))[:, :blocks]


def _listed(best: jax.Array, sequence: Sequence, tile: jax.Array, rule: Rule, page_size: int) -> jax.Array:
    """Returns the list [K, n] int32 of a tile, from the blocks that are listed by score, ``best`` [K, n] bool."""
    block = jnp.arange(best.shape[1], dtype=jnp.int32)
    begin, end = block * rule.keys, (block + 1) * rule.keys
    first, open_page = sequence.start + tile * rule.queries, div_down(sequence.start, page_size) * page_size
    is_forced = (begin < rule.sink) | (end > jnp.minimum(first - rule.local, open_page))
    chunk_end = sequence.start + sequence.count
    has_last = jnp.minimum(first + rule.queries, chunk_end) > sequence.end - rule.last
    is_forced |= (first < rule.least) | ((chunk_end >= sequence.end) & has_last)
    is_used = (tile * rule.queries < sequence.count) & (begin < sequence.start)
    nowhere = best.shape[1]
    found = jnp.sort(jnp.where((best | is_forced) & is_used, block, nowhere), axis=-1)
    return jnp.where(found < nowhere, found, NO_BLOCK)
