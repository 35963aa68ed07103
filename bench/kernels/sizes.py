"""The least that one call of an op moves and computes."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.workloads import Product, Workload


class Sizes(NamedTuple):
    """What one call of an op moves and computes at least, and what it may touch.

    Attributes:
      moved: bytes read and written.
      flops: floating-point operations of matrix products.
      pools: bytes of the pools that one set of page tables reaches.
      own: bytes of the arguments that every call has for itself, and of its results.
    """

    moved: int
    flops: int
    pools: int
    own: int


def dense(w: Workload) -> Workload:
    """Returns a workload with retrieval heads only."""
    return replace(w, retrieval=w.num_kv_heads, streaming=0)


def stored_bytes(w: Workload, by_retrieval: int, by_streaming: int) -> int:
    """Returns the bytes of the tokens' keys and values in pages of one KV head, with what their codes need."""

    def per_token(k_bits: int | None, v_bits: int | None) -> int:
        keys, values = (w.head_dim * _width(w) if bits is None else w.head_dim * bits // 8 for bits in (k_bits, v_bits))
        bounds = 0 if k_bits is None else 2 * w.head_dim * _width(w) // w.sub_page_size
        scale_and_low = 0 if v_bits is None else 4
        return keys + bounds + values + scale_and_low

    by_class = zip((by_retrieval, by_streaming), w.bits_by_class, strict=True)
    return sum(tokens * per_token(*bits) for tokens, bits in by_class)


def _plain_bytes(w: Workload, tokens: int) -> int:
    """Returns the bytes of the tokens' keys and values of one KV head where they are not quantised."""
    return tokens * 2 * w.head_dim * _width(w)


def _width(w: Workload) -> int:
    return jnp.dtype(w.dtype).itemsize


def _statistics_bytes(w: Workload, tokens: int) -> int:
    """Returns the bytes of the tokens' key statistics in one KV head."""
    return 2 * -(-tokens // w.sub_page_size) * w.head_dim * _width(w)


def _held(w: Workload, first: int) -> int:
    """Returns the number of pages that streaming heads keep: those of the sink, and all from a position's page on."""
    return min(w.max_pages, -(-w.sink // w.page_size) + w.max_pages - first // w.page_size)


def first_of_window(w: Workload, query: int, local: int) -> int:
    return max(query - local + 1, 0)


def decode_sizes(w: Workload, *, is_dense: bool) -> Sizes:
    w = dense(w) if is_dense else w
    tokens = w.context if is_dense else min(w.num_selected * w.page_size, w.context)
    window = min(w.context, w.sink + w.local)
    by_retrieval, by_streaming = w.batch * w.retrieval * tokens, w.batch * w.streaming * window
    vectors = 2 * w.batch * w.num_heads * w.head_dim * _width(w)
    flops = 4 * (by_retrieval + by_streaming) * w.group * w.head_dim
    newest = (w.context - 1) % w.page_size + 1  # tokens in the newest page, which is read from the tail
    kept = w.batch * w.retrieval * newest, w.batch * w.streaming * min(newest, w.local)
    moved = stored_bytes(w, by_retrieval - kept[0], by_streaming - kept[1]) + _plain_bytes(w, sum(kept)) + vectors
    return Sizes(moved, flops, _pool_bytes(w, first_of_window(w, w.context - 1, w.local)), vectors)


def _pool_bytes(w: Workload, first: int) -> int:
    """Returns the bytes of a layer's pages and tail; streaming heads keep the sink and what follows a position."""
    tokens = w.batch * w.page_size
    pages = stored_bytes(w, tokens * w.retrieval * w.max_pages, tokens * w.streaming * _held(w, first))
    return pages + _plain_bytes(w, tokens * w.num_kv_heads)


def _visible(w: Workload) -> tuple[int, int]:
    """Returns the keys that all queries of a chunk see together, of one retrieval and of one streaming head."""
    keys = np.arange(w.context - w.chunk, w.context, dtype=np.int64) + 1
    return int(keys.sum()), int(np.minimum(keys, w.sink + w.prefill_local).sum())


def prefill_sizes(w: Workload, *, is_dense: bool) -> Sizes:
    w = dense(w) if is_dense else w
    by_retrieval, by_streaming = _visible(w)
    flops = 4 * w.batch * (w.retrieval * by_retrieval + w.streaming * by_streaming) * w.group * w.head_dim
    start = w.context - w.chunk
    windows = w.batch * w.streaming * min(start, w.sink + w.prefill_local)
    history = stored_bytes(w, w.batch * w.retrieval * start, windows)
    rows = w.batch * w.chunk * (2 * w.num_heads + 2 * w.num_kv_heads) * w.head_dim * _width(w)
    return Sizes(rows + history, flops, _pool_bytes(w, first_of_window(w, start, w.prefill_local)), rows)


def select_sizes(w: Workload) -> Sizes:
    moved = w.batch * w.retrieval * _statistics_bytes(w, w.context)
    queries = w.batch * w.retrieval * w.group * w.head_dim * _width(w)
    subs = w.batch * w.retrieval * -(-w.context // w.sub_page_size)
    return Sizes(moved + queries, 4 * subs * w.group * w.head_dim, moved, queries)


def write_sizes(w: Workload, tokens: int) -> Sizes:
    """Returns the sizes of a write of ``tokens`` of each sequence.

    They go to the tail, unless a later page follows, and their pages are sealed. Of a page that is filled token by
    token, the tokens are read from the tail; a call has its share of that, and of sealing.
    """
    heads = w.batch * w.num_kv_heads
    rows, tail = _plain_bytes(w, heads * tokens), _plain_bytes(w, heads * min(tokens, w.page_size))
    from_tail = rows if tokens < w.page_size else 0
    # Bounds of keys that are not quantised are for selection alone.
    statistics = _statistics_bytes(w, 1) // w.sub_page_size if w.bits[0] is None else 0
    sealed = stored_bytes(w, w.retrieval * tokens, w.streaming * tokens) + w.retrieval * tokens * statistics
    held = w.page_size * w.max_pages
    pool = stored_bytes(w, w.retrieval * held, w.streaming * held) + w.retrieval * held * statistics
    pools = w.batch * pool + _plain_bytes(w, heads * w.page_size)
    return Sizes(rows + tail + from_tail + w.batch * sealed, 0, pools, rows)


def product_sizes(w: Product) -> Sizes:
    scales = w.outputs * (w.inputs // w.group * 2 * (1 + w.has_low) if w.group else 4)
    weights = w.outputs * w.inputs * w.bits // 8 + scales
    rows = w.batch * (w.inputs + w.outputs) * jnp.dtype(w.dtype).itemsize
    return Sizes(weights + rows, 2 * w.batch * w.outputs * w.inputs, weights, rows)
