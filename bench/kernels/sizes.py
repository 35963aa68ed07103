"""The least that one call of an op moves and computes."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.workloads import Workload


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
    """Returns the bytes of the tokens' keys and values in one KV head, scales and zeros included."""
    return sum(
        tokens * sum(w.head_dim * _width(w) if bits is None else w.head_dim * bits // 8 + 8 for bits in both)
        for tokens, both in zip((by_retrieval, by_streaming), w.bits_by_class, strict=True)
    )


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
    pool = _pool_bytes(w, first_of_window(w, w.context - 1, w.local))
    return Sizes(stored_bytes(w, by_retrieval, by_streaming) + vectors, flops, pool, vectors)


def _pool_bytes(w: Workload, first: int) -> int:
    """Returns the bytes of a layer's keys and values; streaming heads keep the sink and what follows a position."""
    tokens = w.batch * w.page_size
    return stored_bytes(w, tokens * w.retrieval * w.max_pages, tokens * w.streaming * _held(w, first))


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


def is_rotated(w: Workload) -> bool:
    return w.bits[0] == 4


def write_sizes(w: Workload, tokens: int) -> Sizes:
    rows = w.batch * tokens * (2 * w.num_kv_heads + is_rotated(w) * w.retrieval) * w.head_dim * _width(w)
    written = w.batch * tokens * stored_bytes(w, w.retrieval, w.streaming)
    statistics = w.batch * w.retrieval * _statistics_bytes(w, tokens)
    merged = statistics if tokens == 1 else 0  # a token merges into what its sub-page has
    held = stored_bytes(w, w.retrieval * w.context, w.streaming * w.max_pages * w.page_size)
    pool = w.batch * (held + w.retrieval * _statistics_bytes(w, w.context))
    return Sizes(rows + written + statistics + merged, 0, pool, rows)
