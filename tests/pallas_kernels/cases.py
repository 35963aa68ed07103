"""Random paged caches, jitted ops and tolerances that the suites of all ops share.

Whatever an op must not read holds NaN: pages and rows that no token was written to, their scales (with codes of 255)
and their key statistics. Page tables are random permutations. Reference and implementation get the same arrays.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

import pallas_kernels
from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables, QuantizedArray, quantize
from pallas_kernels.core.workloads import Workload
from pallas_kernels.decode_attention import api as decode_attention_api
from pallas_kernels.kv_write import api as kv_write_api
from pallas_kernels.page_select import api as page_select_api
from pallas_kernels.prefill_attention import api as prefill_attention_api

TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "kv_write": kv_write_api.IMPLEMENTATIONS,
    "prefill_attention": prefill_attention_api.IMPLEMENTATIONS,
    "page_select": page_select_api.IMPLEMENTATIONS,
    "decode_attention": decode_attention_api.IMPLEMENTATIONS,
}
OPTIONS = {
    "kv_write": (),
    "prefill_attention": ("sink", "local", "has_history"),
    "page_select": ("num_selected", "interval", "sink_pages", "reduction", "spread", "has_lookahead"),
    "decode_attention": ("sink", "local"),
}
NOT_FOR_JIT = {("kv_write", "reference"), ("page_select", "reference")}

STORAGE: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32-int4": {"bits": (4, 4), "streaming_bits": (8, 8)},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-int8-int4": {"dtype": "bfloat16", "bits": (8, 4)},
}
"""How attention is stored, as fields of a workload: activations, and keys and values of the same or of fewer bits."""

TOLERANCES = {
    # Sums of up to a thousand terms in another order; results are averages of values of size 1.
    "float32": 2e-6,
    # Results are rounded to 8 bits, and prefill rounds softmax weights and dequantised keys to 8 bits as well.
    "bfloat16": 2e-2,
}
"""Greatest |implementation − reference| of attention outputs, by the dtype of the queries."""


def implementations(op: str) -> list[str]:
    """The implementations that these suites test: not the specification, nor Hopper's (test_*_hopper.py)."""
    return [name for name in TABLES[op] if name not in ("reference", "mosaic_gpu")]


def without_statistics(kv: LayerKV) -> LayerKV:
    """The pools of a layer that selects no pages."""
    return kv._replace(retrieval=None if kv.retrieval is None else kv.retrieval._replace(k_min=None, k_max=None))


@cache
def jitted(op: str, implementation: str = "xla") -> Callable[..., Any]:
    """The public op with an implementation, compiled once for each shape and set of options in the whole run."""
    function = partial(getattr(pallas_kernels, op), implementation=implementation)
    return function if (op, implementation) in NOT_FOR_JIT else jax.jit(function, static_argnames=OPTIONS[op])


class Cache(NamedTuple):
    """A paged cache and the tokens in it: k, v [B, max_pages · page_size, K, H], of which ``lengths`` are written."""

    kv: LayerKV
    tables: PageTables
    lengths: NDArray[np.int32]
    k: NDArray[Any]
    v: NDArray[Any]

    def alone(self, b: int) -> "Cache":
        """The same pools with one sequence."""
        rows = slice(b, b + 1)
        tables = PageTables(self.tables.retrieval[rows], self.tables.streaming[rows])
        return Cache(self.kv, tables, self.lengths[rows], self.k[rows], self.v[rows])


def random_tokens(workload: Workload, rng: np.random.Generator, tokens: int, heads: int | None = None) -> NDArray[Any]:
    """Normal numbers [B, tokens, heads, H] in the workload's dtype; KV heads unless told otherwise."""
    shape = (workload.batch, tokens, heads or workload.num_kv_heads, workload.head_dim)
    return rng.normal(size=shape).astype(jnp.dtype(workload.dtype))


def empty_cache(workload: Workload, rng: np.random.Generator) -> Cache:
    """A cache in which every page is held and none written: NaN throughout."""
    return filled_cache(workload, rng, [0] * workload.batch, window=workload.context)


def filled_cache(
    workload: Workload,
    rng: np.random.Generator,
    lengths: ArrayLike,
    *,
    window: int | None = None,
    k: NDArray[Any] | None = None,
) -> Cache:
    """A cache that holds the first tokens of each sequence; streaming pages only those that the newest token sees.

    Args:
      workload: shapes.
      rng: source of everything random.
      lengths: [B] tokens of each sequence.
      window: local window that decides which streaming pages are held (`Workload.local` unless given).
      k: keys [B, max_pages · page_size, K, H], drawn at random unless given.
    """
    lengths = np.asarray(lengths, np.int32)
    slots = workload.max_pages * workload.page_size
    k = random_tokens(workload, rng, slots) if k is None else k
    v = random_tokens(workload, rng, slots)
    retrieval = random_table(workload, rng)
    streaming = random_table(workload, rng)
    page = np.arange(workload.max_pages) * workload.page_size
    is_seen = (page < workload.sink) | (page + workload.page_size > lengths[:, None] - (window or workload.local))
    streaming = np.where(is_seen, streaming, NO_PAGE).astype(np.int32)
    split = workload.retrieval
    pools = (
        _pool(workload, retrieval, lengths, k[:, :, :split], v[:, :, :split], has_statistics=True) if split else None,
        _pool(workload, streaming, lengths, k[:, :, split:], v[:, :, split:], has_statistics=False)
        if workload.streaming
        else None,
    )
    return Cache(LayerKV(*pools), PageTables(retrieval, streaming), lengths, k, v)


@cache
def million_tokens() -> tuple[Workload, Cache]:
    """One sequence of a million tokens with one head of each class, and one key in it that stands out, in page 12,345.

    The streaming pages that the newest token cannot see are not held.
    """
    workload = Workload(
        context=1_000_064,
        retrieval=1,
        streaming=1,
        group=1,
        head_dim=2,
        dtype="float32",
        sink=100,
        local=200,
        prefill_local=200,
        num_selected=8,
    )
    rng = np.random.default_rng(0)
    k = random_tokens(workload, rng, workload.context)
    k[0, 12_345 * workload.page_size + 17] = 60.0
    return workload, filled_cache(workload, rng, [1_000_000], k=k)


def random_table(workload: Workload, rng: np.random.Generator) -> NDArray[np.int32]:
    """A page table [B, max_pages] of distinct pages in no order; `_pool` has as many and some to spare.

    Nobody holds page 0, which a page number of -1 made harmless would read: it stays NaN.
    """
    pages = 1 + rng.permutation(workload.batch * workload.max_pages + 2)[: workload.batch * workload.max_pages]
    return pages.reshape(workload.batch, workload.max_pages).astype(np.int32)


def _pool(
    workload: Workload,
    table: NDArray[np.int32],
    lengths: NDArray[np.int32],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    has_statistics: bool,
) -> PagedKV:
    size, sub_size = workload.page_size, workload.sub_page_size
    num_pages = table.size + 3
    is_written = (np.arange(k.shape[1]) < lengths[:, None]) & (np.repeat(table, size, axis=1) >= 0)
    b, position = np.nonzero(is_written)
    page, row = table[b, position // size], position % size

    def stored(x: NDArray[Any], bits: int | None) -> jax.Array | QuantizedArray:
        encoded = x if bits is None else quantize(jnp.asarray(x), bits)

        def paged(tokens: ArrayLike) -> jax.Array:
            tokens = np.asarray(tokens)
            blank = 255 if tokens.dtype == np.uint8 else np.nan
            target = np.full((num_pages, tokens.shape[2], size, *tokens.shape[3:]), blank, tokens.dtype)
            target[page, :, row] = tokens[b, position]
            return jnp.asarray(target)

        return jax.tree.map(paged, encoded)

    k_bits, v_bits = workload.bits_by_class[0 if has_statistics else 1]
    if not has_statistics:
        return PagedKV(stored(k, k_bits), stored(v, v_bits))
    statistics = [
        page_statistics(k[b, position], page, row // sub_size, (num_pages, k.shape[2], size // sub_size), merge)
        for merge in (np.minimum, np.maximum)
    ]
    return PagedKV(stored(k, k_bits), stored(v, v_bits), *statistics)


def page_statistics(
    keys: NDArray[Any], page: NDArray[Any], sub: NDArray[Any], shape: tuple[int, int, int], merge: np.ufunc
) -> jax.Array:
    """Least or greatest of keys [tokens, K, H] by page and sub-page; NaN where there is none."""
    start = np.inf if merge is np.minimum else -np.inf
    target = np.full((*shape, keys.shape[-1]), start, np.float32)
    at: Any = (page, slice(None), sub)
    merge.at(target, at, keys.astype(np.float32))
    target[np.isinf(target)] = np.nan
    return jnp.asarray(target.astype(keys.dtype))


def abstract_pools(workload: Workload, pages: int) -> LayerKV:
    """Shapes of a layer's pools."""
    subs = workload.page_size // workload.sub_page_size

    def elements(heads: int, bits: int | None) -> Any:
        x = jnp.zeros((pages, heads, workload.page_size, workload.head_dim), workload.dtype)
        return x if bits is None else quantize(x, bits)

    def pools() -> LayerKV:
        statistics = jnp.zeros((pages, workload.retrieval, subs, workload.head_dim), workload.dtype)
        (k, v), (k_streaming, v_streaming) = (
            [elements(heads, bits) for bits in both]
            for heads, both in zip((workload.retrieval, workload.streaming), workload.bits_by_class, strict=True)
        )
        return LayerKV(PagedKV(k, v, statistics, statistics), PagedKV(k_streaming, v_streaming))

    return jax.eval_shape(pools)


def abstract(*shape: int, dtype: Any = np.int32) -> Any:
    """The shape of an array that need not exist."""
    return jax.ShapeDtypeStruct(shape, dtype)


def temporary_bytes(function: Callable[..., Any], *arguments: Any, updated: int | None = None) -> int:
    """Bytes that a compiled program needs besides its arguments and results; argument ``updated`` is used in place."""
    donated = () if updated is None else (updated,)
    memory = jax.jit(function, donate_argnums=donated).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    if updated is not None:
        leaves = jax.tree.leaves(arguments[updated])
        assert memory.alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return memory.temp_size_in_bytes


def dense_attention(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], visible: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Attention [T, N, H] of q over k, v [S, K, H] in float64, with visible [K, T, S]; zeros where none is."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    grouped = q.reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], q.shape[-1])
    scores = np.einsum("tkgh,skh->kgts", grouped, k) / np.sqrt(q.shape[-1])
    scores = np.where(visible[:, None], scores, -np.inf)
    peak = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("kgts,skh->tkgh", weights / np.where(total > 0, total, 1.0), v).reshape(q.shape)


def mask(workload: Workload, queries: ArrayLike, keys: int, local: int) -> NDArray[np.bool_]:
    """Section 2 of the algorithm: which of the first ``keys`` keys the queries at some positions see, [K, T, S]."""
    i, j = np.asarray(queries)[:, None], np.arange(keys)
    causal = j <= i
    streaming = causal & ((j > i - local) | (j < workload.sink))
    return np.stack([causal] * workload.retrieval + [streaming] * workload.streaming)


def assert_close(actual: ArrayLike, expected: ArrayLike, dtype: str) -> None:
    """Finite, and equal within the tolerance of a dtype."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all(), f"{np.isnan(actual).sum()} NaN in {actual.shape}"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCES[dtype])


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Equal throughout two pytrees of one structure; a NaN equals itself or any other, and 0.0 does not equal -0.0."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (actual, expected))
    for mine, theirs in zip(*leaves, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_array_equal(_bits(mine), _bits(theirs))


def _bits(x: NDArray[Any]) -> NDArray[Any]:
    if x.dtype.kind in "iub":
        return x
    return np.where(np.isnan(x.astype(np.float32)), 0xFFFF, x.view(f"u{x.dtype.itemsize}"))
