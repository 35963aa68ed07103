"""The key blocks that a block of queries visits: by default a causal range, or sink blocks and window blocks."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core.dtypes import ZERO
from pallas_kernels.core.paging import div_down, div_up, take

NO_BLOCK = -1


class Window(NamedTuple):
    """The keys up to its position that a query sees: all of them, or the sink and the local window."""

    sink: int | None
    local: int | None


class KeyRange(NamedTuple):
    """Keys at positions ``first … end − 1``, in blocks of ``block`` keys from the first."""

    first: jax.Array | int
    end: jax.Array
    block: int


class Ranges(NamedTuple):
    """Key blocks ``0 … sinks − 1`` and ``low … high − 1``, where ``sinks <= low <= high``."""

    sinks: jax.Array
    low: jax.Array
    high: jax.Array

    @property
    def count(self) -> jax.Array:
        """Number of blocks."""
        return self.sinks + self.high - self.low

    def block(self, step: jax.Array) -> jax.Array:
        """Returns the blocks that are visited at steps."""
        return jnp.where(step < self.sinks, step, self.low + step - self.sinks)


class Listed(NamedTuple):
    """The first ``count`` of ``blocks`` [n]."""

    blocks: jax.Array
    count: jax.Array

    def block(self, step: jax.Array) -> jax.Array:
        """Returns the blocks that are visited at steps."""
        return take(self.blocks, jnp.minimum(step, self.blocks.size - 1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BlockRanges:
    """History blocks ``0 … sinks − 1`` and ``low … high − 1`` of each sequence, KV head and block of queries.

    Attributes:
      sinks, low, high: [B, K, ceil(T / queries)] int32, K of one head class.
      queries: queries per block, counted from the first row of the chunk.
      keys: keys per block, counted from the first token of the sequence; whole pages.
    """

    sinks: jax.Array
    low: jax.Array
    high: jax.Array
    queries: int = field(metadata={"static": True})
    keys: int = field(metadata={"static": True})

    def within(self, end: jax.Array) -> Ranges:
        """Returns the ranges of blocks before ``end``, which broadcasts against [B, K, query blocks], all disjoint."""
        high = jnp.clip(self.high, 0, end)
        sinks = jnp.clip(self.sinks, 0, end)
        low = jnp.maximum(self.low, sinks)
        return Ranges(sinks, low, jnp.maximum(high, low))

    def of(self, b: jax.Array, head: jax.Array, index: jax.Array, end: jax.Array) -> Ranges:
        """Returns what one block of queries of one head visits, of the blocks before ``end``."""
        one = BlockRanges(
            sinks=take(self.sinks, b, head, index),
            low=take(self.low, b, head, index),
            high=take(self.high, b, head, index),
            queries=self.queries,
            keys=self.keys,
        )
        return one.within(end)

    def is_visited(self, blocks: int) -> jax.Array:
        """Returns whether each of the first ``blocks`` blocks is visited, [B, K, query blocks, blocks] bool."""
        block = jnp.arange(blocks, dtype=jnp.int32)
        sinks, low, high = (x[..., None] for x in (self.sinks, self.low, self.high))
        return (block < sinks) | ((block >= low) & (block < high))


class BlockMeans(NamedTuple):
    """The mean key and the mean value [B, K, n, H] of each of n blocks of the history."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A list of history blocks of each sequence, KV head and block of queries.

    Attributes:
      blocks: [B, K, ceil(T / queries), n] int32, K of one head class; ascending without repeats, -1 after the last.
      means: what stands for the whole, held blocks of the history that are not listed; None if nothing does.
      queries: queries per block, counted from the first row of the chunk.
      keys: keys per block, counted from the first token of the sequence; whole pages.
    """

    blocks: jax.Array
    means: BlockMeans | None = None
    queries: int = field(metadata={"static": True})
    keys: int = field(metadata={"static": True})

    def of(self, b: jax.Array, head: jax.Array, index: jax.Array, end: jax.Array) -> Listed:
        """Returns what one block of queries of one head visits, of the blocks before ``end``."""
        one = BlockList(blocks=take(self.blocks, b, head, index), queries=self.queries, keys=self.keys)
        return Listed(one.blocks, one.count(end))

    def count(self, end: jax.Array) -> jax.Array:
        """Returns how many blocks before ``end``, which broadcasts against [B, K, query blocks], are listed, int32."""
        is_before = (self.blocks >= 0) & (self.blocks < jnp.expand_dims(end, -1))
        return jnp.sum(is_before, axis=-1, dtype=jnp.int32)

    def is_visited(self, blocks: int) -> jax.Array:
        """Returns whether each of the first ``blocks`` blocks is visited, [B, K, query blocks, blocks] bool."""
        lists = self.blocks.reshape(-1, self.blocks.shape[-1])
        row = jnp.arange(lists.shape[0], dtype=jnp.int32)[:, None]
        visited = jnp.zeros((lists.shape[0], blocks), jnp.bool_)
        visited = visited.at[row, jnp.where(lists >= 0, lists, blocks)].set(True, mode="drop")
        return visited.reshape(*self.blocks.shape[:-1], blocks)


class Walk(NamedTuple):
    """Which blocks of the history are visited, by head class; None for those that hold a visible key.

    What a block is, each class says for itself: the sizes are fields of `BlockRanges` and `BlockList`.
    """

    retrieval: BlockRanges | BlockList | None = None
    streaming: BlockRanges | BlockList | None = None


def visible_blocks(position: jax.Array, queries: int, keys: KeyRange, window: Window) -> Ranges:
    """Returns the key blocks that ``queries`` queries from ``position`` on see.

    Every block in the ranges holds a key that one of the queries sees, and no other block does.
    """
    end = jnp.minimum(keys.end, position + queries)
    high = div_up(jnp.maximum(end - keys.first, 0), keys.block)
    if window.local is None or window.sink is None:
        return Ranges(jnp.zeros_like(high), jnp.zeros_like(high), high)
    sinks = jnp.minimum(div_up(jnp.maximum(window.sink - keys.first, ZERO), keys.block), high)
    oldest = position - window.local + 1
    low = jnp.where(
        oldest < end, jnp.clip(div_down(jnp.maximum(oldest - keys.first, 0), keys.block), sinks, high), high
    )
    return Ranges(sinks, low, high)


def visible_history(
    starts: jax.Array, counts: jax.Array, tokens: int, heads: int, window: Window, queries: int, keys: int
) -> BlockRanges:
    """Returns the history blocks that hold a key that one of the queries sees; none for queries behind ``counts``.

    Args:
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence.
      tokens: T, rows of the chunk.
      heads: K, KV heads, all alike.
      window: what they see.
      queries: queries per block.
      keys: keys per block.
    """
    row = jnp.arange(-(-tokens // queries), dtype=jnp.int32) * queries
    starts, counts = (jnp.asarray(x, jnp.int32)[:, None, None] for x in (starts, counts))
    shape = (starts.shape[0], heads, row.size)
    found = visible_blocks(starts + row, queries, KeyRange(0, starts, keys), window)
    sinks, low, high = (jnp.broadcast_to(jnp.where(row < counts, x, 0), shape) for x in found)
    return BlockRanges(sinks=sinks, low=low, high=high, queries=queries, keys=keys)
