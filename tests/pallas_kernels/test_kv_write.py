"""Conformance of `kv_write`: what pages and the tail hold however tokens are split, and that nothing else changes."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import (
    NO_PAGE,
    PageTables,
    Tail,
    dequantize,
    kv_write,
    quantize,
    quantize_keys,
)
from pallas_kernels.core.sealing import keys_of
from pallas_kernels.core.workloads import SERVING, TINY, Workload
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
    readable,
    temporary_bytes,
    without_statistics,
)

STORAGE: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-int4": {"bits": (4, 4), "streaming_bits": (8, 8), "dtype": "bfloat16"},
    "int8-int4": {"bits": (8, 4)},
    "int8 of one sub-page": {"bits": (8, 8), "sub_page_size": 16},
    "int4 of sub-pages of two": {"bits": (4, 8), "sub_page_size": 2},
}
CHUNK = TINY["mixed"].chunk

compiled, compiled_keys = jax.jit(quantize, static_argnums=1), jax.jit(quantize_keys, static_argnums=3)

pytestmark = pytest.mark.parametrize("implementation", implementations("kv_write"))


def write(implementation: str, cache: Cache, k: Any, v: Any, starts: ArrayLike, counts: ArrayLike) -> Any:
    """The pools and the tail, a `LayerKV`, after a write that did not donate them."""
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    return jitted("kv_write", implementation)(k, v, cache.kv, cache.tables, starts, counts)


def write_split(implementation: str, cache: Cache, kv: Any, calls: list[list[int]]) -> Any:
    """The layer after the tokens of a cache were written to it: in calls of so many, and what is left in chunks."""
    starts, batch = np.zeros_like(cache.lengths), np.arange(len(cache.lengths))[:, None]
    for call in [*calls, *[[CHUNK] * len(starts)] * (1 + cache.k.shape[1] // CHUNK)]:
        counts = np.minimum(call, cache.lengths - starts).astype(np.int32)
        at = np.minimum(starts[:, None] + np.arange(1 if max(call) <= 1 else CHUNK), cache.k.shape[1] - 1)
        is_new = (at - starts[:, None] < counts[:, None])[..., None, None]
        k, v = (np.where(is_new, x[batch, at], np.asarray(np.nan, x.dtype)) for x in (cache.k, cache.v))
        kv = write(implementation, cache._replace(kv=kv), k, v, starts, counts)
        starts = starts + counts
    return kv


def sealed_over(cache: Cache, before: Any) -> Any:
    """The pools of ``before`` with the pages that are sealed in a cache; the tail is the cache's."""

    def over(new: Any, old: Any, table: Any) -> Any:
        is_sealed = np.arange(1, table.shape[1] + 1) * cache.kv.page_size <= cache.lengths[:, None]
        pages = table[is_sealed & (table >= 0)]
        return jax.tree.map(lambda new, old: old.at[pages].set(new[pages]), new, old)

    retrieval, streaming = map(over, cache.kv[:2], before[:2], cache.tables[:2])
    return cache.kv._replace(retrieval=retrieval, streaming=streaming)


def tokens_in(pages: jax.Array, table: Any) -> NDArray[np.float32]:
    """Tokens [B, max_pages · page_size, K, H] of pages, through the page table."""
    rows = np.swapaxes(np.asarray(pages)[table], 2, 3)
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:])


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
        starts = starts + np.asarray(counts, np.int32)
        assert_same_bits(*(readable(x.kv, x.tables, starts) for x in (mine, theirs)))


@pytest.mark.parametrize("storage", ["bfloat16-int4", "int8-int4"])
@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(0, 96), min_size=4, max_size=4),
    calls=st.lists(
        st.one_of(
            st.lists(st.integers(0, CHUNK), min_size=4, max_size=4),
            st.lists(st.integers(0, 1), min_size=4, max_size=4),
        ),
        max_size=8,
    ),
    is_used=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_however_tokens_are_split_the_same_is_stored(
    implementation: str, storage: str, lengths: list[int], calls: list[list[int]], is_used: bool, seed: int
):
    """Chunks and single tokens of every sequence at its own pace, in pages and slots that hold NaN or were used before.

    A page is what `sealed` makes of all its tokens, and pages that are not full hold what they held.
    """
    rng = np.random.default_rng(seed)
    workload = replace(TINY["mixed"], **STORAGE[storage])
    cache = filled_cache(workload, rng, lengths, window=workload.context)
    before = empty_cache(workload, rng).kv
    if is_used:
        used = filled_cache(workload, rng, [96] * 4, window=workload.context).kv
        before = jax.tree.map(lambda x: x if x.dtype == jnp.uint8 else x * 1000, used)
    kv = write_split(implementation, cache, before, calls)
    expected = sealed_over(cache, before)
    mine = readable(kv, cache.tables, cache.lengths)
    assert_same_bits(mine[:2], expected[:2])
    slots = cache.tables.slots[cache.lengths > 0]  # type: ignore[index]
    assert_same_bits(*(jax.tree.map(lambda x: x[slots], layer.tail) for layer in (mine, expected)))


@pytest.mark.parametrize("first", range(17))
def test_every_cut_of_four_pages_stores_what_one_chunk_stores(
    implementation: str, first: int, rng: np.random.Generator
):
    """64 tokens in one call, and in two that meet at every row of a page; each page is full once."""
    workload = replace(TINY["mixed"], context=64, bits=(8, 4))
    cache = filled_cache(workload, rng, [64] * 4, window=64)
    whole = write(implementation, empty(cache, workload), cache.k, cache.v, [0] * 4, [64] * 4)
    assert_same_bits(whole.retrieval, cache.kv.retrieval)
    cuts = np.array([first, 16 + first, 32 + first, 48 + first], np.int32).clip(0, 64)
    kv = write(implementation, empty(cache, workload), cache.k, cache.v, [0] * 4, cuts)
    at = np.minimum(cuts[:, None] + np.arange(64), 63)[..., None, None]
    k, v = (np.take_along_axis(x, at, axis=1) for x in (cache.k, cache.v))
    kv = write(implementation, cache._replace(kv=kv), k, v, cuts, 64 - cuts)
    assert_same_bits(*(readable(layer, cache.tables, cache.lengths) for layer in (kv, whole)))


def empty(cache: Cache, workload: Workload) -> Cache:
    """The same tables over pools in which nothing is stored."""
    return cache._replace(kv=empty_cache(workload, np.random.default_rng(1)).kv)


@pytest.mark.parametrize("storage", STORAGE)
def test_full_pages_hold_the_tokens_that_were_written(implementation: str, storage: str, rng: np.random.Generator):
    """Their statistics are those of the keys, and codes those within them; the page of the newest token is a tail."""
    workload = replace(TINY["mixed"], **STORAGE[storage])
    size, sub_size = workload.page_size, workload.sub_page_size
    cache = filled_cache(workload, rng, [80, 33, 0, 64], window=workload.context)
    calls = [[24, 24, 0, 24], [16, 9, 0, 16], *[[1, 0, 0, 1]] * 3, [24, 0, 0, 7]]
    kv = write_split(implementation, cache, empty_cache(workload, rng).kv, calls)
    is_sealed = np.arange(cache.k.shape[1]) < cache.lengths[:, None] // size * size
    for name, heads, (k_bits, v_bits) in zip(
        ("retrieval", "streaming"), (slice(0, 2), slice(2, 3)), workload.bits_by_class, strict=True
    ):
        pool, table = getattr(kv, name), getattr(cache.tables, name)
        k, v = (np.swapaxes(x[:, :, heads], 1, 2) for x in (cache.k, cache.v))  # [B, K, tokens, H]
        assert (pool.k_min is None) == (name == "streaming" and k_bits is None)
        if pool.k_min is not None:
            by_sub = k.reshape(*k.shape[:2], -1, sub_size, k.shape[-1])
            bounds = by_sub.min(3), by_sub.max(3)
            for mine, expected in zip((pool.k_min, pool.k_max), bounds, strict=True):
                assert_sealed_rows(mine, expected, table, is_sealed[:, ::sub_size])
            if k_bits is not None:
                codes = compiled_keys(k, *bounds, k_bits).codes
                assert_sealed_rows(pool.k.codes, codes, table, is_sealed)
        if k_bits is None:
            assert_sealed_rows(pool.k, k, table, is_sealed)
        expected = v if v_bits is None else compiled(v, v_bits)
        for mine, leaf in zip(jax.tree.leaves(pool.v), jax.tree.leaves(expected), strict=True):
            assert_sealed_rows(mine, leaf, table, is_sealed)
    for rows, x in zip(kv.tail, (cache.k, cache.v), strict=True):
        for b, (first, length) in enumerate(((64, 80), (32, 33), (0, 0), (48, 64))):
            slot = cache.tables.slots[b]  # type: ignore[index]
            np.testing.assert_array_equal(rows[slot, :, : length - first], x[b, first:length].swapaxes(0, 1))


def assert_sealed_rows(pages: jax.Array, expected: Any, table: Any, is_sealed: NDArray[np.bool_]) -> None:
    """Rows [B, K, tokens, …] lie in pages [pages, K, page_size, …] where their page is sealed."""
    mine = tokens_in(pages, table)
    np.testing.assert_array_equal(mine[is_sealed], np.swapaxes(np.asarray(expected), 1, 2)[is_sealed])


def test_what_the_tail_held_before_does_not_enter_a_page(implementation: str, rng: np.random.Generator):
    """Each row of a page is new when it is sealed: bounds and codes are finite, though the tail held NaN."""
    workload = replace(TINY["mixed"], bits=(8, 4))
    cache = filled_cache(workload, rng, [40, 33, 0, 64], window=workload.context)
    for calls in ([], [[1] * 4] * 33):
        kv = write_split(implementation, cache, empty_cache(workload, rng).kv, calls)
        pages = cache.tables.retrieval[[0, 0, 1, 1, 3], [0, 1, 0, 1, 3]]
        for leaf in jax.tree.leaves(kv.retrieval):
            assert np.isfinite(np.asarray(leaf)[pages].astype(np.float32)).all()


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_pools_without_statistics_take_the_same_tokens(implementation: str, tokens: int, rng: np.random.Generator):
    cache = filled_cache(TINY["mixed"], rng, [5, 30, 16, 15], window=TINY["mixed"].context)
    k, v = (random_tokens(TINY["mixed"], rng, tokens) for _ in range(2))
    counts = np.array([tokens, 1, 0, tokens], np.int32)
    with_statistics, without = (
        jitted("kv_write", implementation)(k, v, kv, cache.tables, cache.lengths, counts)
        for kv in (cache.kv, without_statistics(cache.kv))
    )
    assert without.retrieval.k_min is None
    assert_same_bits(without, without_statistics(with_statistics))


@pytest.mark.parametrize("heads", ["all_retrieval", "all_streaming"])
def test_layers_with_heads_of_one_class_only(implementation: str, heads: str, rng: np.random.Generator):
    cache = filled_cache(TINY[heads], rng, [0, 30, 5, 0], window=TINY[heads].context)
    k, v = (random_tokens(TINY[heads], rng, CHUNK) for _ in range(2))
    counts = np.array([24, 9, 13, 0], np.int32)
    mine, theirs = (write(name, cache, k, v, cache.lengths, counts) for name in (implementation, "reference"))
    assert (mine.retrieval is None) == (heads == "all_streaming")
    assert_same_bits(*(readable(kv, cache.tables, cache.lengths + counts) for kv in (mine, theirs)))


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_slots_are_the_rows_of_the_tail(implementation: str, tokens: int, rng: np.random.Generator):
    """Permuted slots permute the tail and nothing else; without slots, a sequence has the slot of its number."""
    cache = filled_cache(TINY["mixed"], rng, [15, 30, 0, 64], window=TINY["mixed"].context)
    k, v = (random_tokens(TINY["mixed"], rng, tokens) for _ in range(2))
    slots, counts = cache.tables.slots, np.array([tokens, 1, tokens, 0], np.int32)
    assert slots is not None and (slots != np.arange(4)).any()
    mine = write(implementation, cache, k, v, cache.lengths, counts)
    own = cache._replace(
        kv=cache.kv._replace(tail=Tail(*(x[slots] for x in cache.kv.tail))), tables=cache.tables._replace(slots=None)
    )
    other = write(implementation, own, k, v, cache.lengths, counts)
    assert_same_bits(other, mine._replace(tail=Tail(*(x[slots] for x in mine.tail))))


@pytest.mark.parametrize("tokens", [1, CHUNK])
@pytest.mark.parametrize("storage", ["float32", "int8-int4"])
def test_everything_else_stays_untouched(implementation: str, storage: str, tokens: int, rng: np.random.Generator):
    """Pages that are not filled, of other sequences, or not held; slots without new tokens; rows before them."""
    workload = replace(TINY["mixed"], **STORAGE[storage])
    cache = empty_cache(workload, rng)
    kv: Any = jax.tree.map(lambda x: _random_bits(x, rng), cache.kv)
    tables = PageTables(*(table.copy() for table in cache.tables))  # type: ignore[union-attr]
    for table in tables[:2]:
        table[[0, 3], [2, 4]] = NO_PAGE  # where the first sequence goes on, and what the last one fills
    starts, counts = np.array([15, 31, 63, 79]), np.minimum(tokens, [24, 13, 0, 2])
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    new = write(implementation, cache._replace(kv=kv, tables=tables), k, v, starts, counts)
    for before, after, table in zip(kv[:2], new[:2], tables[:2], strict=True):
        filled = [table[0, 0], *([table[0, 1]] if tokens > 1 else []), table[1, 1]]
        is_filled = np.isin(np.arange(jax.tree.leaves(before)[0].shape[0]), filled)
        assert is_filled.sum() == len(filled)
        kept = (jax.tree.map(lambda x, kept=~is_filled: np.asarray(x)[kept], pool) for pool in (before, after))
        assert_same_bits(*kept)
        for old, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert all((np.asarray(old)[page] != np.asarray(now)[page]).any() for page in filled)
    slots = tables.slots
    for old, now in zip(kv.tail, new.tail, strict=True):
        others = np.setdiff1d(np.arange(5), slots[np.array([0, 1, 3])])  # type: ignore[index]
        assert_same_bits(np.asarray(now)[others], np.asarray(old)[others])
        if tokens == 1:
            for b in (0, 1, 3):
                assert_same_bits(np.asarray(now)[slots[b], :, :15], np.asarray(old)[slots[b], :, :15])  # type: ignore[index]


def _random_bits(x: jax.Array, rng: np.random.Generator) -> NDArray[Any]:
    return np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape)


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_sequences_without_new_tokens_change_nothing(implementation: str, tokens: int, rng: np.random.Generator):
    """Wherever they would begin, and though a page would be full there; not a bit of any pool or of the tail."""
    cache = empty_cache(replace(TINY["mixed"], bits=(8, 4)), rng)
    kv: Any = jax.tree.map(lambda x: _random_bits(x, rng), cache.kv)
    k, v = (random_tokens(TINY["mixed"], rng, tokens) for _ in range(2))
    assert_same_bits(write(implementation, cache._replace(kv=kv), k, v, [0, 15, 16, 95], [0] * 4), kv)


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


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_rows_without_new_tokens_may_have_the_slot_of_another(
    implementation: str, tokens: int, rng: np.random.Generator
):
    """As the rows of a prefill call have that stand for no sequence."""
    cache = filled_cache(replace(TINY["mixed"], bits=(8, 4)), rng, [15, 30, 0, 64], window=96)
    k, v = (random_tokens(TINY["mixed"], rng, tokens) for _ in range(2))
    counts, slots = np.array([tokens, 0, 0, tokens], np.int32), cache.tables.slots
    assert slots is not None
    expected = write(implementation, cache, k, v, cache.lengths, counts)
    tables = cache.tables._replace(slots=slots[[0, 0, 3, 3]])
    assert_same_bits(write(implementation, cache._replace(tables=tables), k, v, cache.lengths, counts), expected)


def test_constant_rows_and_outliers_are_written(implementation: str, rng: np.random.Generator):
    """What is constant over a sub-page, or a row, divides by nothing; one huge channel leaves the others finite."""
    workload = replace(TINY["mixed"], bits=(8, 4))
    cache = empty_cache(workload, rng)
    k, v = (random_tokens(workload, rng, CHUNK) for _ in range(2))
    k[:, :8], v[:, :8] = 3.25, 0.0
    k[:, 8:, :, 3] = 6e4
    kv = write(implementation, cache, k, v, [0] * 4, [CHUNK] * 4)
    assert kv.retrieval is not None
    for pages, tokens in ((keys_of(kv.retrieval, jnp.float32), k), (dequantize(kv.retrieval.v, jnp.float32), v)):
        back = tokens_in(pages, cache.tables.retrieval)[:, :16]
        np.testing.assert_array_equal(back[:, :8], tokens[:, :8, :2])
        assert np.isfinite(back).all()


def test_two_runs_are_bitwise_equal(implementation: str, rng: np.random.Generator):
    cache = filled_cache(replace(TINY["mixed"], bits=(8, 4)), rng, [24, 7, 0, 64])
    k, v = (random_tokens(TINY["mixed"], rng, CHUNK) for _ in range(2))
    assert_same_bits(*(write(implementation, cache, k, v, cache.lengths, [24, 3, 9, 24]) for _ in range(2)))


@pytest.mark.parametrize("tokens", [1, 64])
def test_tokens_after_a_million_go_where_the_table_says(implementation: str, tokens: int, rng: np.random.Generator):
    workload, cache = million_tokens()
    assert cache.tables.slots is not None
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    kv = write(implementation, cache, k, v, [1_000_000], [tokens])
    np.testing.assert_array_equal(kv.tail.k[cache.tables.slots[0], :, :tokens], k[0].swapaxes(0, 1))
    page = cache.tables.retrieval[0, 15_625], cache.tables.streaming[0, 15_625]
    assert kv.retrieval is not None and kv.retrieval.k_max is not None and kv.streaming is not None
    if tokens == 1:
        assert np.isnan(kv.retrieval.k[page[0]]).all() and np.isnan(kv.streaming.v[page[1]]).all()
        return
    np.testing.assert_array_equal(kv.retrieval.k[page[0], 0], k[0, :, 0])
    np.testing.assert_array_equal(kv.retrieval.k_max[page[0], 0, 0], k[0, :16, 0].max(0))
    np.testing.assert_array_equal(kv.streaming.v[page[1], 0], v[0, :, 1])


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("llama3_8b_32k", 1), ("llama3_8b_32k", 512), ("llama3_8b_32k_int8", 512), ("llama3_8b_32k_int4", 1)],
)
def test_donated_pools_are_updated_in_place(implementation: str, name: str, tokens: int):
    """No copy of pools or tail: the result aliases them. The program needs a page besides, and twice the chunk."""
    workload = SERVING[name]
    new = abstract(1, tokens, workload.num_kv_heads, workload.head_dim, dtype=workload.dtype)
    tables = PageTables(abstract(1, workload.max_pages), abstract(1, workload.max_pages))
    used = temporary_bytes(
        *(partial(kv_write, implementation=implementation), new, new),
        *(abstract_pools(workload, workload.max_pages), tables, abstract(1), abstract(1)),
        updated=2,
    )
    page = workload.num_kv_heads * workload.page_size * workload.head_dim * 4
    assert used < 2 * page + 2 * new.size * 4
