from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables, Tail, quantize, quantize_keys
from pallas_kernels.core.paging import (
    is_visible,
    parts_stored_alike,
    pools,
    slots_of,
    streaming_page_count,
    streaming_pages,
)
from pallas_kernels.core.workloads import SERVING, TINY

WINDOWS = [
    *((sink, local, page_size) for sink in (0, 15, 16, 17, 40) for local in (1, 16, 17, 50) for page_size in (16,)),
    *((128, 256, 64), (128, 1, 64), (100, 77, 64), (1000, 64, 64), (3, 5, 1), (0, 1, 1)),
]


@pytest.mark.parametrize(("sink", "local", "page_size"), WINDOWS)
def test_streaming_pages_are_those_with_a_visible_token(sink: int, local: int, page_size: int):
    """For every length, the empty slot included, against every token; and the count is reached by some length."""
    lengths = np.arange(0, 700, dtype=np.int32)
    found = np.asarray(streaming_pages(jnp.asarray(lengths), sink, local, page_size))
    width = streaming_page_count(sink, local, page_size)
    assert found.shape == (700, width) and found.dtype == np.int32
    most = 0
    for length, pages in zip(lengths.tolist(), found.tolist(), strict=True):
        seen = sorted({j // page_size for j in range(length) if j > length - 1 - local or j < sink})
        assert pages == seen + [NO_PAGE] * (width - len(seen))
        most = max(most, len(seen))
    if sink + local + 2 * page_size < 700:
        assert most == width


def test_a_decoding_sequence_reads_seven_streaming_pages_at_the_defaults():
    assert streaming_page_count(128, 256, 64) == 7


def test_streaming_pages_of_the_longest_sequences_do_not_overflow():
    length = 2**31 - 1
    pages = np.asarray(streaming_pages(jnp.asarray([length], jnp.int32), 128, 256, 64))
    first, last = (length - 256) // 64, (length - 1) // 64
    np.testing.assert_array_equal(pages, [[0, 1, *range(first, last + 1), *[NO_PAGE] * (4 - last + first)]])


@pytest.mark.parametrize(("sink", "local"), [(0, 1), (3, 1), (0, 5), (4, 6), (50, 2), (2, 50)])
def test_visibility_is_section_2(sink: int, local: int):
    i, j = np.arange(20)[:, None], np.arange(20)
    causal, streaming = (
        is_visible(jnp.asarray(i), jnp.asarray(j), None, None),
        is_visible(jnp.asarray(i), jnp.asarray(j), sink, local),
    )
    for query in range(20):
        for key in range(20):
            assert causal[query, key] == (key <= query)
            assert streaming[query, key] == (key <= query and (key > query - local or key < sink))


def layer(retrieval: PagedKV | None, streaming: PagedKV | None) -> LayerKV:
    """The pools with a tail of five slots, in which head i holds the number i."""
    heads = sum(0 if pool is None else pool.num_kv_heads for pool in (retrieval, streaming))
    rows = jnp.broadcast_to(jnp.arange(heads)[:, None, None], (5, heads, 16, 8))
    return LayerKV(retrieval, streaming, Tail(rows, rows))


def plain_pool(heads: int) -> PagedKV:
    return PagedKV(*[jnp.zeros((4, heads, 16, 8))] * 2)


def quantized_pool(heads: int, bits: int, subs: int) -> PagedKV:
    x, bounds = jnp.zeros((4, heads, 16, 8)), jnp.zeros((4, heads, subs, 8))
    return PagedKV(quantize_keys(x, bounds, bounds, bits), quantize(x, bits), bounds, bounds)


def test_pools_are_listed_with_their_heads():
    retrieval, streaming = plain_pool(3), plain_pool(2)
    tables = PageTables(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
    both = pools(layer(retrieval, streaming), tables)
    assert [(name, heads) for name, _, _, heads in both] == [("retrieval", slice(0, 3)), ("streaming", slice(3, None))]
    assert both[0][2] is tables.retrieval and both[1][2] is tables.streaming
    assert [(name, heads) for name, _, _, heads in pools(layer(retrieval, None), tables)] == [
        ("retrieval", slice(0, 3))
    ]
    assert [(name, heads) for name, _, _, heads in pools(layer(None, streaming), tables)] == [
        ("streaming", slice(0, None))
    ]
    assert (retrieval.num_kv_heads, retrieval.page_size, layer(None, streaming).num_retrieval) == (3, 16, 0)
    assert layer(None, streaming).page_size == 16


@pytest.mark.parametrize("subs", [1, 2, 8])
def test_the_size_of_a_sub_page_is_that_of_the_bounds(subs: int):
    assert quantized_pool(2, 8, subs).sub_page_size == 16 // subs
    assert plain_pool(2).sub_page_size == 16


def test_tables_of_the_host_become_arrays_that_a_program_can_index():
    tables = PageTables(np.zeros((1, 2), np.int32), np.ones((1, 2), np.int32), np.array([3], np.int32))
    assert all(isinstance(table, jax.Array) for _, _, table, _ in pools(layer(plain_pool(1), plain_pool(1)), tables))
    assert isinstance(slots_of(tables, 1), jax.Array)


def test_the_slot_of_a_sequence_is_its_row_unless_the_tables_say_otherwise():
    tables = PageTables(*[np.zeros((3, 2), np.int32)] * 2)
    for slots, expected in ((None, [0, 1, 2]), (np.array([4, 0, 2], np.int32), [4, 0, 2])):
        found = slots_of(tables._replace(slots=slots), 3)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("retrieval", "streaming"),
    [
        (plain_pool(3), plain_pool(1)),
        (quantized_pool(3, 8, 4), quantized_pool(1, 8, 4)),
        # Attention does not read the bounds of keys that are not quantised.
        (PagedKV(*plain_pool(3)[:2], *[jnp.zeros((4, 3, 2, 8))] * 2), plain_pool(1)),
        (None, quantized_pool(4, 8, 4)),
    ],
)
def test_classes_that_store_alike_stay_together(retrieval: PagedKV | None, streaming: PagedKV):
    whole = layer(retrieval, streaming)
    [(part, heads)] = parts_stored_alike(whole, 8)
    assert part is whole and heads == slice(0, 8)


@pytest.mark.parametrize("streaming", [plain_pool(1), quantized_pool(1, 8, 4), quantized_pool(1, 4, 2)])
def test_classes_that_store_differently_are_taken_apart_with_their_tails(streaming: PagedKV):
    """Other bits, or other sub-pages of quantised keys; by heads of queries or of keys."""
    whole = layer(quantized_pool(3, 4, 4), streaming)
    for heads, expected in ((8, [slice(0, 6), slice(6, 8)]), (4, [slice(0, 3), slice(3, 4)])):
        (first, retrieval), (second, rest) = parts_stored_alike(whole, heads)
        assert [retrieval, rest] == expected
        assert first.retrieval is whole.retrieval and first.streaming is None
        assert second.streaming is whole.streaming and second.retrieval is None
        for part, numbers in ((first, [0, 1, 2]), (second, [3])):
            for rows in part.tail:
                np.testing.assert_array_equal(rows[4, :, 7, 5], numbers)


def test_workloads_are_what_their_names_say():
    assert {workload.head_dim for workload in TINY.values()} == {8}
    for name, workload in SERVING.items():
        model, *_ = name.rsplit("_int", 1)
        assert model.endswith(f"_{workload.context // 1024}k") and workload.max_pages * 64 == workload.context
        bits = int(name[-1]) if "_int" in name else None
        assert workload.bits_by_class == ((bits, bits), (bits and 8, bits and 8))
    assert (SERVING["llama3_8b_8k"].num_heads, SERVING["llama2_7b_4k"].num_kv_heads) == (32, 32)
    assert (SERVING["smollm2_135m_1k"].num_heads, SERVING["smollm2_135m_1k"].num_kv_heads) == (9, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 16, "sub_page_size": 5}, "must be a multiple of self.sub_page_size=5"),
        ({"retrieval": 0, "streaming": 0}, "must be at least 1 together"),
    ],
)
def test_impossible_workloads_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(TINY["mixed"], **fields)
