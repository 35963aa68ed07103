"""The specification of `block_select`: one tile and head after the other, with numpy. It cannot be jitted."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pallas_kernels.core.paging import PagedKV
from pallas_kernels.prefill_attention.blocks import NO_BLOCK, BlockList, BlockMeans


def block_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    ends: jax.Array,
    *,
    queries: int,
    keys: int,
    threshold: float | None,
    sink: int,
    local: int,
    last: int,
    least: int,
    has_means: bool,
) -> BlockList:
    """Returns what `pallas_kernels.block_select` defines."""
    batch, tokens, _, head_dim = q.shape
    heads, size = pages.num_kv_heads, pages.page_size
    grouped = np.asarray(q, np.float32).reshape(batch, tokens, heads, -1, head_dim)
    blocks, tiles = -(-table.shape[1] * size // keys), -(-tokens // queries)
    lists = np.full((batch, heads, tiles, blocks), NO_BLOCK, np.int32)
    means = np.zeros((2, batch, heads, blocks, head_dim), np.float32)
    for b in range(batch):
        start, count, end = int(starts[b]), int(counts[b]), int(ends[b])
        ranked = _ranked(np.asarray(table[b]), start + count, size, keys)
        for kind, stored in enumerate((pages.k_mean, pages.v_mean)):
            for block in ranked if stored is not None else ():
                held = np.asarray(table[b])[block * keys // size : (block + 1) * keys // size]
                mean = np.asarray(stored, np.float32)[held].mean(axis=0)
                means[kind, b, :, block] = mean.astype(q.dtype).astype(np.float32)
        for tile in range(-(-count // queries)):
            first = start + tile * queries
            rows = slice(tile * queries, min((tile + 1) * queries, count))
            has_last = start + count >= end and min(first + queries, start + count) > end - last
            reads_all = first < least or has_last
            here = [block for block in ranked if (block + 1) * keys <= first]
            for head in range(heads):
                listed = _best(grouped[b, rows, head], means[0, b, head, here], here, threshold)
                for block in range(-(-start // keys)):
                    is_new = (block + 1) * keys > min(first - local, start // size * size)
                    if reads_all or is_new or block * keys < sink:
                        listed.add(block)
                kept = sorted(block for block in listed if block * keys < start)
                lists[b, head, tile, : len(kept)] = kept
    stand_in = BlockMeans(*(jnp.asarray(x, q.dtype) for x in means)) if has_means else None
    return BlockList(blocks=jnp.asarray(lists), means=stand_in, queries=queries, keys=keys)


def _ranked(table: NDArray[np.int32], tokens: int, size: int, keys: int) -> list[int]:
    """Returns the blocks that the first ``tokens`` tokens fill, and whose pages are held."""
    per_block = keys // size
    return [block for block in range(tokens // keys) if (table[block * per_block : (block + 1) * per_block] >= 0).all()]


def _best(q: NDArray[np.float32], k_mean: NDArray[np.float32], blocks: list[int], threshold: float | None) -> set[int]:
    """Returns those of some blocks that queries [rows, G, H] list by their score."""
    if threshold is None or not blocks:
        return set()
    scores = np.einsum("rgh,nh->rgn", q, k_mean) * np.float32(q.shape[-1] ** -0.5)
    mass = np.exp(scores - scores.max()).sum(axis=(0, 1))
    return {block for block, found in zip(blocks, mass, strict=True) if found >= threshold * mass.max()}
