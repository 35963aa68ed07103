from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables, quantize
from pallas_kernels.core.paging import is_visible, parts_stored_alike, pools, streaming_page_count, streaming_pages
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


def test_pools_are_listed_with_their_heads():
    retrieval, streaming = (PagedKV(*[jnp.zeros((4, heads, 16, 8))] * 2) for heads in (3, 2))
    tables = PageTables(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
    both = pools(LayerKV(retrieval, streaming), tables)
    assert [(name, heads) for name, _, _, heads in both] == [("retrieval", slice(0, 3)), ("streaming", slice(3, None))]
    assert both[0][2] is tables.retrieval and both[1][2] is tables.streaming
    assert [(name, heads) for name, _, _, heads in pools(LayerKV(retrieval, None), tables)] == [
        ("retrieval", slice(0, 3))
    ]
    assert [(name, heads) for name, _, _, heads in pools(LayerKV(None, streaming), tables)] == [
        ("streaming", slice(0, None))
    ]
    assert (retrieval.num_kv_heads, retrieval.page_size, LayerKV(None, streaming).num_retrieval) == (3, 16, 0)


def test_tables_of_the_host_become_arrays_that_a_program_can_index():
    pool = PagedKV(*[jnp.zeros((4, 1, 16, 8))] * 2)
    tables = PageTables(np.zeros((1, 2), np.int32), np.ones((1, 2), np.int32))
    assert all(isinstance(table, jax.Array) for _, _, table, _ in pools(LayerKV(pool, pool), tables))


def test_classes_are_taken_apart_only_where_they_store_differently():
    plain, codes = (jnp.zeros((4, heads, 16, 8)) for heads in (3, 1))
    eight, four = (PagedKV(quantize(x, bits), quantize(x, bits)) for x, bits in ((codes, 8), (plain, 4)))
    alike = LayerKV(PagedKV(plain, plain), PagedKV(codes, codes))
    assert parts_stored_alike(alike, 8) == [(alike, slice(0, 8))]
    assert parts_stored_alike(LayerKV(None, eight), 2) == [(LayerKV(None, eight), slice(0, 2))]
    apart = parts_stored_alike(LayerKV(four, eight), 8)
    assert apart == [(LayerKV(four, None), slice(0, 6)), (LayerKV(None, eight), slice(6, 8))]


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
