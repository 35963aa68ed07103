"""Conformance of `kv_write`: values, statistics, what stays untouched, and that nothing is copied."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import NO_PAGE, LayerKV, PageTables, QuantizedArray, dequantize, kv_write, quantize
from pallas_kernels.core.workloads import SERVING, TINY
from tests.pallas_kernels.cases import (
    Cache,
    abstract,
    abstract_pools,
    assert_same_bits,
    empty_cache,
    filled_cache,
    implementations,
    jitted,
    million_tokens,
    random_tokens,
    temporary_bytes,
    without_statistics,
)

STORAGE = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-int4": {"bits": (4, 4), "streaming_bits": (8, 8), "dtype": "bfloat16"},
    "int8-int4": {"bits": (8, 4)},
}
CHUNK = TINY["mixed"].chunk

pytestmark = pytest.mark.parametrize("implementation", implementations("kv_write"))


def write(implementation: str, cache: Cache, k: Any, v: Any, starts: ArrayLike, counts: ArrayLike) -> Any:
    """The pools, a `LayerKV`, after a write that did not donate them."""
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    return jitted("kv_write", implementation)(k, v, cache.kv, cache.tables, starts, counts)


def write_tokens(implementation: str, cache: Cache, cuts: list[int]) -> Any:
    """The pools after the cache's own tokens were written in calls that end at ``cuts``, then token by token."""
    kv, lengths = cache.kv, cache.lengths
    bounds = [0, *cuts, *range(max(cuts, default=0) + 1, int(lengths.max()) + 1)]
    for first, end in pairwise(bounds):
        tokens = 1 if end - first == 1 else CHUNK
        counts = np.clip(lengths - first, 0, end - first)
        k, v = (with_nan_behind(x[:, first:end], tokens) for x in (cache.k, cache.v))
        kv = write(implementation, cache._replace(kv=kv), k, v, np.minimum(first, lengths), counts)
    return kv


def with_nan_behind(x: NDArray[Any], tokens: int) -> NDArray[Any]:
    padding = [(0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)]
    return np.pad(x, padding, constant_values=np.asarray(np.nan, x.dtype))


def tokens_in(pages: jax.Array | QuantizedArray, table: Any) -> NDArray[np.float32]:
    """Tokens [B, max_pages · page_size, K, H] of pages, through the page table."""
    rows = np.swapaxes(np.asarray(dequantize(pages, jnp.float32))[table], 2, 3)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])


def stored(tokens: NDArray[Any], bits: int | None) -> NDArray[np.float32]:
    """What pages make of tokens."""
    return np.asarray(
        dequantize(jnp.asarray(tokens) if bits is None else quantize(jnp.asarray(tokens), bits), jnp.float32)
    )


@pytest.mark.parametrize("storage", STORAGE)
def test_ragged_chunks_and_single_tokens_equal_the_reference(
    implementation: str, storage: str, rng: np.random.Generator
):
    workload = replace(TINY["mixed"], **STORAGE[storage])
    mine = theirs = empty_cache(workload, rng)
    starts = np.zeros(4, np.int32)
    calls = ((24, [24, 7, 0, 16]), (24, [17, 24, 0, 16]), (1, [1, 1, 0, 1]), (1, [0, 1, 1, 1]), (24, [3, 24, 24, 1]))
    for tokens, counts in calls:
        k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
        mine = mine._replace(kv=write(implementation, mine, k, v, starts, counts))
        theirs = theirs._replace(kv=write("reference", theirs, k, v, starts, counts))
        assert_same_bits(mine.kv, theirs.kv)
        starts = starts + np.asarray(counts, np.int32)


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_statistics_may_bound_other_keys_than_pages_hold(implementation: str, tokens: int, rng: np.random.Generator):
    cache = filled_cache(TINY["mixed"], rng, [5, 30, 16, 0], window=TINY["mixed"].context)
    k, v, bounded = (random_tokens(TINY["mixed"], rng, tokens) for _ in range(3))
    arguments: Any = (v, cache.kv, cache.tables, cache.lengths, np.array([tokens, 1, 0, tokens], np.int32))
    both, of_k, of_bounded = (
        jitted("kv_write", implementation)(keys, *arguments, **options)
        for keys, options in ((k, {"k_bounded": bounded}), (k, {}), (bounded, {}))
    )
    statistics = {name: getattr(of_bounded.retrieval, name) for name in ("k_min", "k_max")}
    assert_same_bits(both, of_k._replace(retrieval=of_k.retrieval._replace(**statistics)))
    assert not np.array_equal(of_k.retrieval.k_min, of_bounded.retrieval.k_min)


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_pools_without_statistics_take_the_same_tokens(implementation: str, tokens: int, rng: np.random.Generator):
    cache = filled_cache(TINY["mixed"], rng, [5, 30, 16, 0], window=TINY["mixed"].context)
    k, v, bounded = (random_tokens(TINY["mixed"], rng, tokens) for _ in range(3))
    with_statistics, without = (
        jitted("kv_write", implementation)(
            *(k, v, kv, cache.tables, cache.lengths, np.array([tokens, 1, 0, tokens], np.int32)), k_bounded=bounded
        )
        for kv in (cache.kv, without_statistics(cache.kv))
    )
    assert without.retrieval.k_min is None
    assert_same_bits(without, without_statistics(with_statistics))


@pytest.mark.parametrize("heads", ["all_retrieval", "all_streaming"])
def test_layers_with_heads_of_one_class_only(implementation: str, heads: str, rng: np.random.Generator):
    cache = empty_cache(TINY[heads], rng)
    k, v = (random_tokens(TINY[heads], rng, CHUNK) for _ in range(2))
    mine, theirs = (write(name, cache, k, v, [0, 30, 5, 0], [24, 9, 13, 0]) for name in (implementation, "reference"))
    assert (mine.retrieval is None) == (heads == "all_streaming")
    assert_same_bits(mine, theirs)


@pytest.mark.parametrize("storage", STORAGE)
def test_pages_hold_the_tokens_that_were_written(implementation: str, storage: str, rng: np.random.Generator):
    workload = replace(TINY["mixed"], **STORAGE[storage])
    cache = filled_cache(workload, rng, [80, 33, 0, 64], window=workload.context)
    kv = write_tokens(implementation, cache._replace(kv=empty_cache(workload, rng).kv), [24, 40, 64, 71])
    assert kv.retrieval is not None and kv.streaming is not None
    is_written = np.arange(cache.k.shape[1]) < cache.lengths[:, None]
    classes = (
        (kv.retrieval, cache.tables.retrieval, slice(0, 2)),
        (kv.streaming, cache.tables.streaming, slice(2, 3)),
    )
    for (pool, table, heads), both in zip(classes, workload.bits_by_class, strict=True):
        for pages, tokens, bits in zip((pool.k, pool.v), (cache.k, cache.v), both, strict=True):
            expected = stored(tokens[:, :, heads], bits)
            np.testing.assert_array_equal(tokens_in(pages, table)[is_written], expected[is_written])


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 96), min_size=4, max_size=4),
    steps=st.lists(st.integers(1, CHUNK), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_statistics_after_prefill_chunks_and_decode_steps_are_those_of_the_keys(
    implementation: str, lengths: list[int], steps: list[int], seed: int
):
    """One-shot prefill, any chunks and token by token give the same pages, in pages that were used before."""
    rng = np.random.default_rng(seed)
    cache = filled_cache(TINY["mixed"], rng, lengths, window=TINY["mixed"].context)
    used = filled_cache(TINY["mixed"], rng, [96] * 4, window=TINY["mixed"].context).kv
    used = jax.tree.map(lambda x: x * 1000, used)
    cuts = np.cumsum(steps).clip(0, 96).tolist()
    kv = write_tokens(implementation, cache._replace(kv=used), cuts)
    assert kv.retrieval is not None and cache.kv.retrieval is not None
    for mine, expected in (
        (kv.retrieval.k_min, cache.kv.retrieval.k_min),
        (kv.retrieval.k_max, cache.kv.retrieval.k_max),
        (kv.retrieval.k, cache.kv.retrieval.k),
    ):
        assert mine is not None
        is_written = ~np.isnan(np.asarray(expected))
        np.testing.assert_array_equal(np.asarray(mine)[is_written], np.asarray(expected)[is_written])


@pytest.mark.parametrize("tokens", [1, CHUNK])
@pytest.mark.parametrize("storage", ["float32", "int8-int4"])
def test_everything_else_stays_untouched(implementation: str, storage: str, tokens: int, rng: np.random.Generator):
    """Rows behind the counts, rows of other sequences, pages that are not held: every bit of them."""
    workload = replace(TINY["mixed"], **STORAGE[storage])
    cache = empty_cache(workload, rng)
    kv: Any = jax.tree.map(lambda x: _random_bits(x, rng), cache.kv)
    tables = PageTables(*(table.copy() for table in cache.tables))
    for table in tables:
        table[[0, 3], [2, 4]] = NO_PAGE  # of the first sequence's later tokens, and of all of the last one's
    starts, counts = np.array([17, 0, 63, 70]), np.minimum(tokens, [24, 13, 0, 2])
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    new = write(implementation, cache._replace(kv=kv, tables=tables), k, v, starts, counts)
    for before, after, table in ((kv.retrieval, new.retrieval, tables[0]), (kv.streaming, new.streaming, tables[1])):
        rows, subs = _written(table, starts, counts, workload.page_size, workload.sub_page_size, kv)
        assert rows.any() and subs.any()
        pairs = ((before.k, after.k, rows), (before.v, after.v, rows))
        for old, now, is_written in (*pairs, (before[2:], after[2:], subs)):
            hidden = (jax.tree.map(lambda x, w=is_written: np.moveaxis(np.asarray(x), 2, 1)[~w], x) for x in (now, old))
            assert_same_bits(*hidden)


def _random_bits(x: jax.Array, rng: np.random.Generator) -> NDArray[Any]:
    return np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape)


def _written(
    table: Any, starts: Any, counts: Any, page_size: int, sub_size: int, kv: LayerKV
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows [pages, page_size] and sub-pages [pages, subs] a write touches."""
    pages = jax.tree.leaves(kv)[0].shape[0]
    rows, subs = np.zeros((pages, page_size), bool), np.zeros((pages, page_size // sub_size), bool)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for position in range(start, start + count):
            page, row = table[b, position // page_size], position % page_size
            if page >= 0:
                rows[page, row] = subs[page, row // sub_size] = True
    return rows, subs


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_a_sequence_of_a_ragged_batch_equals_the_same_sequence_alone(
    implementation: str, tokens: int, rng: np.random.Generator
):
    workload = replace(TINY["mixed"], bits=(8, 4))
    cache = empty_cache(workload, rng)
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    starts, counts = np.array([0, 13, 40, 63], np.int32), np.minimum(tokens, [24, 11, 0, 20]).astype(np.int32)
    together = cache._replace(kv=write(implementation, cache, k, v, starts, counts))
    alone = cache
    for b in range(4):
        row = slice(b, b + 1)
        kv = write(implementation, alone.alone(b), k[row], v[row], starts[row], counts[row])
        alone = alone._replace(kv=kv)
    assert_same_bits(together.kv, alone.kv)


def test_constant_rows_and_outliers_are_written(implementation: str, rng: np.random.Generator):
    """A row with max == min divides by nothing, and one huge channel leaves the others finite."""
    workload = replace(TINY["mixed"], bits=(8, 4))
    cache = empty_cache(workload, rng)
    k, v = (random_tokens(workload, rng, CHUNK) for _ in range(2))
    k[:, :8], v[:, :8] = 3.25, 0.0
    k[:, 8:, :, 3] = 6e4
    kv = write(implementation, cache, k, v, [0] * 4, [CHUNK] * 4)
    assert kv.retrieval is not None
    for pages, tokens in ((kv.retrieval.k, k), (kv.retrieval.v, v)):
        back = tokens_in(pages, cache.tables.retrieval)[:, :CHUNK]
        np.testing.assert_array_equal(back[:, :8], tokens[:, :8, :2])
        assert np.isfinite(back).all()


def test_two_runs_are_bitwise_equal(implementation: str, rng: np.random.Generator):
    cache = filled_cache(replace(TINY["mixed"], bits=(8, 4)), rng, [24, 7, 0, 64])
    k, v = (random_tokens(TINY["mixed"], rng, CHUNK) for _ in range(2))
    assert_same_bits(*(write(implementation, cache, k, v, cache.lengths, [24, 3, 9, 24]) for _ in range(2)))


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_tokens_after_a_million_go_where_the_table_says(implementation: str, tokens: int, rng: np.random.Generator):
    workload, cache = million_tokens()
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    kv = write(implementation, cache, k, v, [1_000_000], [tokens])
    assert kv.retrieval is not None and kv.retrieval.k_max is not None and kv.streaming is not None
    page = cache.tables.retrieval[0, 15_625]
    np.testing.assert_array_equal(kv.retrieval.k[page, 0, :tokens], k[0, :, 0])
    np.testing.assert_array_equal(kv.retrieval.k_max[page, 0, 0], k[0, :16, 0].max(0))
    np.testing.assert_array_equal(kv.streaming.v[cache.tables.streaming[0, 15_625], 0, :tokens], v[0, :, 1])


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama3_8b_32k", 1), ("llama3_8b_32k", 512), ("llama3_8b_32k_int8", 512), ("llama3_8b_32k_int4", 1)],
)
def test_donated_pools_are_updated_in_place(implementation: str, name: str, tokens: int):
    """No copy of the cache: the result aliases it, and what the program needs besides is of the size of the chunk."""
    workload = SERVING[name]
    new = abstract(1, tokens, workload.num_kv_heads, workload.head_dim, dtype=workload.dtype)
    tables = PageTables(abstract(1, workload.max_pages), abstract(1, workload.max_pages))
    used = temporary_bytes(
        *(partial(kv_write, implementation=implementation), new, new),
        *(abstract_pools(workload, workload.max_pages), tables, abstract(1), abstract(1)),
        updated=2,
    )
    page = workload.num_kv_heads * workload.page_size * workload.head_dim * 4
    assert used < 8 * page + 8 * new.size * 4
