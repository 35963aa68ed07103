"""Random paged caches, jitted ops and tolerances that the suites of all ops share.

Whatever an op must not read holds NaN: pages that are not sealed, with codes of 255 between NaN scales and bounds, and
rows of the tail after the newest token. Page tables and slots are random permutations. Reference and implementation get
the same arrays.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

import pallas_kernels
from pallas_kernels import (
    NO_PAGE,
    LayerKV,
    PagedKV,
    PageTables,
    QuantizedArray,
    QuantizedKeys,
    QuantizedMatrix,
    Selection,
    Tail,
    dequantize,
)
from pallas_kernels.block_select import api as block_select_api
from pallas_kernels.core.paging import pools, slots_of
from pallas_kernels.core.sealing import keys_of, sealed
from pallas_kernels.core.workloads import Workload
from pallas_kernels.decode_attention import api as decode_attention_api
from pallas_kernels.kv_write import api as kv_write_api
from pallas_kernels.page_select import api as page_select_api
from pallas_kernels.prefill_attention import api as prefill_attention_api
from pallas_kernels.quantized_matmul import api as quantized_matmul_api

TABLES: dict[str, dict[str, Callable[..., Any]]] = {
    "kv_write": kv_write_api.IMPLEMENTATIONS,
    "block_select": block_select_api.IMPLEMENTATIONS,
    "prefill_attention": prefill_attention_api.IMPLEMENTATIONS,
    "page_select": page_select_api.IMPLEMENTATIONS,
    "decode_attention": decode_attention_api.IMPLEMENTATIONS,
    "quantized_matmul": quantized_matmul_api.IMPLEMENTATIONS,
}
OPTIONS = {
    "kv_write": (),
    "block_select": ("queries", "keys", "threshold", "sink", "local", "last", "least", "has_means"),
    "prefill_attention": ("sink", "local", "has_history"),
    "page_select": ("num_selected", "interval", "sink_pages", "reduction", "spread", "memory"),
    "decode_attention": ("sink", "local"),
    "quantized_matmul": ("out_dtype",),
}
NOT_FOR_JIT = {("kv_write", "reference"), ("block_select", "reference"), ("page_select", "reference")}

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


MATRICES: dict[str, dict[str, Any]] = {
    "int8-inputs": {"codes": "int8", "input_bits": 8},
    "int8-wide-inputs": {"codes": "int8", "input_bits": 16},
    "int8-rows": {"codes": "int8"},
    "float8-rows": {"codes": "float8_e4m3fn"},
    "float8-groups": {"codes": "float8_e4m3fn", "group": 128},
    "int8-groups": {"codes": "int8", "group": 32, "scale": "float16"},
    "int8-offsets": {"codes": "int8", "group": 16, "scale": "float32", "has_low": True},
    "int8-nested": {"codes": "int8", "group": 16, "scale": "float16", "nested": 16},
    "int4-rows": {"codes": "uint8"},
    "int4-groups": {"codes": "uint8", "group": 32, "scale": "float16"},
    "int4-offsets": {"codes": "uint8", "group": 128, "scale": "float16", "has_low": True},
    "int4-nested": {"codes": "uint8", "group": 32, "scale": "float16", "has_low": True, "nested": 8},
}
"""How weights are stored, as options of `random_matrix`."""


def implementations(op: str) -> list[str]:
    """The implementations that these suites test: not the specification, nor Hopper's (test_*_hopper.py)."""
    return [name for name in TABLES[op] if name not in ("reference", "mosaic_gpu")]


def without_statistics(kv: LayerKV) -> LayerKV:
    """The pools of a layer that selects no pages: keys that are not quantised have no bounds."""
    if kv.retrieval is None or isinstance(kv.retrieval.k, QuantizedKeys):
        return kv
    return kv._replace(retrieval=kv.retrieval._replace(k_min=None, k_max=None))


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
        tables = PageTables(*(table[rows] for table in self.tables if table is not None))
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
    classes = (
        _pool(workload, retrieval, lengths, k[:, :, :split], v[:, :, :split], 0) if split else None,
        _pool(workload, streaming, lengths, k[:, :, split:], v[:, :, split:], 1) if workload.streaming else None,
    )
    owner = rng.permutation(workload.batch + 1)[: workload.batch].astype(np.int32)
    tail = Tail(*(_tail(workload, owner, lengths, x) for x in (k, v)))
    return Cache(LayerKV(*classes, tail), PageTables(retrieval, streaming, owner), lengths, k, v)


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


def blank_pool(workload: Workload, num_pages: int, head_class: int) -> PagedKV:
    """A pool of retrieval (0) or streaming (1) heads in which nothing was ever stored: NaN, and codes of 255."""
    heads, (k_bits, v_bits) = (workload.retrieval, workload.streaming)[head_class], workload.bits_by_class[head_class]
    rows = (num_pages, heads, workload.page_size)

    def blank(dtype: Any, *shape: int) -> Any:
        dtype = jnp.dtype(dtype)
        return np.full(shape, 255 if dtype == np.uint8 else np.nan, dtype)

    def codes(bits: int) -> Any:
        return blank(np.uint8, *rows, workload.head_dim * bits // 8)

    number = blank(workload.dtype, *rows, workload.head_dim)
    k = number if k_bits is None else QuantizedKeys(codes=codes(k_bits), bits=k_bits)
    v = number.copy()
    if v_bits is not None:
        scale, low = (blank(np.float16, *rows) for _ in range(2))
        v = QuantizedArray(codes=codes(v_bits), scale=scale, low=low, bits=v_bits)
    if head_class == 1 and k_bits is None:
        return PagedKV(k, v)
    subs = workload.page_size // workload.sub_page_size
    bounds = (blank(workload.dtype, num_pages, heads, subs, workload.head_dim) for _ in range(2))
    has_means = workload.has_means and head_class == 0
    means = (blank(workload.dtype, num_pages, heads, workload.head_dim) for _ in range(2 * has_means))
    return PagedKV(k, v, *bounds, *means)


_sealed = jax.jit(sealed)


def _pool(
    workload: Workload,
    table: NDArray[np.int32],
    lengths: NDArray[np.int32],
    k: NDArray[Any],
    v: NDArray[Any],
    head_class: int,
) -> PagedKV:
    size, pool = workload.page_size, blank_pool(workload, table.size + 3, head_class)
    is_sealed = (np.arange(1, table.shape[1] + 1) * size <= lengths[:, None]) & (table >= 0)

    def pages(x: NDArray[Any]) -> NDArray[Any]:
        return x.reshape(-1, size, *x.shape[2:]).swapaxes(1, 2)

    new = _sealed(blank_pool(workload, 1, head_class), pages(k), pages(v))
    for target, value in zip(jax.tree.leaves(pool), jax.tree.leaves(new), strict=True):
        target[table[is_sealed]] = np.asarray(value)[is_sealed.reshape(-1)]
    return jax.tree.map(jnp.asarray, pool)


def _tail(workload: Workload, owner: NDArray[np.int32], lengths: NDArray[np.int32], x: NDArray[Any]) -> jax.Array:
    """The tail [slots, K, page_size, H] of tokens [B, tokens, K, H], one more slot than sequences: NaN where unused."""
    size = workload.page_size
    tail = np.full((workload.batch + 1, x.shape[2], size, x.shape[3]), np.nan, x.dtype)
    for b, length in enumerate(lengths):
        first = max(int(length) - 1, 0) // size * size
        tail[owner[b], :, : length - first] = x[b, first:length].swapaxes(0, 1)
    return jnp.asarray(tail)


def readable(kv: LayerKV, tables: PageTables, lengths: ArrayLike) -> LayerKV:
    """The layer with NaN in those rows of the tail, after the newest token of each sequence, that may hold anything."""
    lengths = np.asarray(lengths)
    tail = [np.array(x) for x in kv.tail]
    for slot, length in zip(np.asarray(slots_of(tables, len(lengths))), lengths.tolist(), strict=True):
        for rows in tail:
            rows[slot, :, length - max(length - 1, 0) // kv.page_size * kv.page_size :] = np.nan
    return kv._replace(tail=Tail(*map(jnp.asarray, tail)))


def as_read(cache: Cache, unquantised: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Keys and values [B, tokens, K, H] that attention reads: those of pages up to a position [B], then the cache's.

    Those of pages that are not held, which nobody sees, are zero.
    """
    given, found = (cache.k, cache.v), []
    is_given = (np.arange(cache.k.shape[1]) >= np.asarray(unquantised)[:, None])[..., None, None]
    for tokens, stored in zip(given, (_keys, lambda pool: _values(pool.v)), strict=True):
        classes = []
        for _, pool, table, _ in pools(cache.kv, cache.tables):
            is_held = (np.asarray(table) >= 0)[..., None, None, None]
            rows = np.swapaxes(np.where(is_held, np.asarray(stored(pool))[np.asarray(table)], 0), 2, 3)
            classes.append(rows.reshape(*tokens.shape[:2], *rows.shape[3:]))
        found.append(np.where(is_given, tokens.astype(np.float32), np.concatenate(classes, axis=2)))
    return found[0], found[1]


_keys, _values = (jax.jit(partial(function, dtype=jnp.float32)) for function in (keys_of, dequantize))


def with_nan_behind(x: NDArray[Any], tokens: int) -> NDArray[Any]:
    """The rows of a chunk of ``tokens`` tokens: ``x`` [B, n, …], and NaN after it."""
    padding = [(0, 0), (0, tokens - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return np.pad(x, padding, constant_values=np.asarray(np.nan, x.dtype))


def numpy_selection(pages: Any, scores: Any) -> Selection:
    """A selection of numpy arrays [B, K, width] of the dtypes that it has."""
    return Selection(np.asarray(pages, np.int32), np.asarray(scores, np.float32))  # type: ignore[arg-type]


def random_matrix(
    rng: np.random.Generator,
    outputs: int,
    inputs: int,
    *,
    codes: str,
    group: int | None = None,
    scale: str = "bfloat16",
    has_low: bool = False,
    nested: int | None = None,
    input_bits: int | None = None,
) -> QuantizedMatrix:
    """A matrix [outputs, inputs] of random codes, all of which occur, with numbers of size 1.

    Args:
      rng: source of everything random.
      outputs, inputs: the shape.
      codes: dtype of the codes.
      group: inputs per scale; None for whole rows.
      scale: dtype of the scales.
      has_low: whether there are offsets.
      nested: scales that share a scale of their own; None for ordinary scales.
      input_bits: the field of `QuantizedMatrix`.
    """
    group = group or inputs

    def numbers() -> Any:
        shape = (outputs, inputs // group)
        if nested:
            codes = rng.integers(0, 64, shape).astype(np.int8)
            wide = rng.uniform(0.5, 1, (outputs, shape[1] // nested)) / 64
            return QuantizedMatrix(codes=jnp.asarray(codes), scale=jnp.asarray(wide, scale))
        return jnp.asarray(rng.uniform(0.5, 1, shape), scale)

    if codes == "uint8":
        stored, largest = rng.integers(0, 256, (outputs, inputs // 2)), 8
    elif codes == "int8":
        stored, largest = rng.integers(-127, 128, (outputs, inputs)), 127
    else:
        stored, largest = rng.normal(size=(outputs, inputs)), 1
    steps = jax.tree.map(lambda x: x if x.dtype == jnp.int8 else x * jnp.asarray(1 / largest, x.dtype), numbers())
    low = jax.tree.map(lambda x: x if x.dtype == jnp.int8 else -x, numbers()) if has_low else None
    return QuantizedMatrix(
        codes=jnp.asarray(stored.astype(jnp.dtype(codes))), scale=steps, low=low, input_bits=input_bits
    )


def dense_matrix(w: QuantizedMatrix) -> NDArray[np.float64]:
    """The numbers [outputs, inputs] that a matrix stands for, one column after the other."""

    def numbers(x: Any) -> NDArray[np.float64]:
        return dense_matrix(x) if isinstance(x, QuantizedMatrix) else np.asarray(x).astype(np.float64)

    (_, inputs), codes, scale, group = w.shape, np.asarray(w.codes), numbers(w.scale), w.group
    columns = []
    for i in range(inputs):
        at, place = divmod(i, group)
        if codes.dtype == np.uint8:
            byte = codes[:, at * group // 2 + place % (group // 2)]
            integer = (byte >> 4 if place >= group // 2 else byte & 15).astype(np.float64) - (8 if w.low is None else 0)
        else:
            integer = codes[:, i].astype(np.float64)
        columns.append(integer * scale[:, at] + (0 if w.low is None else numbers(w.low)[:, at]))
    return np.stack(columns, axis=1)


def abstract_pools(workload: Workload, pages: int) -> LayerKV:
    """Shapes of a layer's pools and tail."""
    shape = (workload.batch, workload.num_kv_heads, workload.page_size, workload.head_dim)
    rows = abstract(*shape, dtype=workload.dtype)
    one = (blank_pool(workload, 1, head_class) for head_class in range(2))
    retrieval, streaming = (
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((pages, *x.shape[1:]), x.dtype), x) for x in one
    )
    return LayerKV(retrieval, streaming, Tail(rows, rows))


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
