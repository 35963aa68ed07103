"""Conformance of `prefill_attention`: values, chunking, the blocks it visits, memory."""

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import PageTables, prefill_attention
from pallas_kernels.core.workloads import SERVING, TINY, Workload
from pallas_kernels.prefill_attention import xla
from pallas_kernels.prefill_attention.blocks import KeyRange, Window, visible_blocks
from tests.pallas_kernels.cases import (
    STORAGE,
    Cache,
    abstract,
    abstract_pools,
    as_read,
    assert_close,
    assert_same_bits,
    dense_attention,
    empty_cache,
    filled_cache,
    implementations,
    jitted,
    mask,
    million_tokens,
    random_tokens,
    temporary_bytes,
)

each_implementation = pytest.mark.parametrize("implementation", implementations("prefill_attention"))

STARTS, COUNTS = np.array([0, 37, 64, 11], np.int32), np.array([40, 9, 17, 0], np.int32)
TOKENS = 40
"""Rows of a chunk: key blocks of two pages, of which the window may hold one."""
WINDOWS = {
    "sink and window cut pages and blocks": (5, 30),
    "no sink, a window of the query alone": (0, 1),
    "window longer than any history": (5, 1000),
    "sink longer than the prompt": (200, 7),
    "sink of whole pages, window of whole pages": (32, 16),
}


PAGES = {
    "within a page": (5, [3, 37, 64, 17], [5, 4, 5, 1]),
    "to the end of a page": (5, [11, 43, 60, 15], [5, 5, 4, 1]),
    "over the end of a page": (5, [14, 30, 61, 11], [5, 4, 4, 0]),
    "whole pages": (16, [0, 16, 48, 80], [16, 16, 16, 16]),
    "as long as a page": (16, [5, 31, 40, 7], [16, 16, 8, 9]),
    "longer than a page": (40, [5, 37, 56, 50], [11, 40, 40, 3]),
}
"""Rows, starts and counts of chunks, by how they lie in pages of 16 tokens."""


class Chunk:
    """A chunk of every sequence of a batch, written to a cache that holds the tokens before it.

    The pages that it leaves open are not sealed, and the tail holds nothing but the page of the newest token.
    """

    def __init__(
        self,
        workload: Workload,
        rng: np.random.Generator,
        starts: NDArray[np.int32] = STARTS,
        counts: NDArray[np.int32] = COUNTS,
        tokens: int = TOKENS,
    ):
        self.workload, self.starts, self.counts = workload, starts, counts
        before = filled_cache(workload, rng, starts, window=workload.prefill_local)
        self.q = random_tokens(workload, rng, tokens, workload.num_heads)
        at = np.minimum(starts[:, None] + np.arange(tokens), before.k.shape[1] - 1)
        is_new = (np.arange(tokens) < counts[:, None])[..., None, None]
        self.k, self.v = (
            np.where(is_new, x[np.arange(len(starts))[:, None], at], np.asarray(np.nan, x.dtype))
            for x in (before.k, before.v)
        )
        kv = jitted("kv_write")(self.k, self.v, before.kv, before.tables, starts, counts)
        self.cache = before._replace(kv=kv, lengths=starts + counts)

    def attend(self, implementation: str, sink: int | None = None, local: int | None = None) -> NDArray[Any]:
        """Outputs of the real rows, joined; all rows must be finite."""
        out = jitted("prefill_attention", implementation)(
            *(self.q, self.k, self.v, self.cache.kv, self.cache.tables, self.starts, self.counts),
            sink=self.workload.sink if sink is None else sink,
            local=self.workload.prefill_local if local is None else local,
        )
        assert out.dtype == self.q.dtype and out.shape == self.q.shape
        assert np.isfinite(np.asarray(out, np.float32)).all()
        return real_rows(out, self.counts)

    def defined(self) -> NDArray[Any]:
        """The op's definition in float64: neither a chunk is quantised, nor the page in which it begins and ends."""
        page = self.starts // self.workload.page_size * self.workload.page_size
        own = np.where(self.starts + self.counts <= page + self.workload.page_size, page, self.starts)
        k, v = as_read(self.cache, own)
        rows = []
        for b, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            visible = mask(self.workload, start + np.arange(count), start + count, self.workload.prefill_local)
            rows.append(dense_attention(self.q[b, :count], k[b, : start + count], v[b, : start + count], visible))
        return np.concatenate(rows)


def real_rows(x: Any, counts: NDArray[np.int32] = COUNTS) -> NDArray[Any]:
    return np.concatenate([np.asarray(x[b, :count]) for b, count in enumerate(counts)])


@each_implementation
@pytest.mark.parametrize("storage", STORAGE)
def test_chunks_over_paged_history_equal_the_reference(implementation: str, storage: str, rng: np.random.Generator):
    """Starts inside pages, ragged counts, an empty row, keys of NaN behind the counts."""
    workload = replace(TINY["mixed"], **STORAGE[storage])
    chunk = Chunk(workload, rng)
    assert_close(chunk.attend(implementation), chunk.attend("reference"), workload.dtype)


@pytest.mark.parametrize("implementation", ["reference", *implementations("prefill_attention")])
@pytest.mark.parametrize("storage", [*STORAGE, "one sub-page"])
@pytest.mark.parametrize("pages", PAGES)
def test_chunks_begin_and_end_anywhere_in_a_page(
    implementation: str, pages: str, storage: str, rng: np.random.Generator
):
    """Against the definition: in one page with tokens before the chunk, that page is not read from the pools."""
    tokens, starts, counts = PAGES[pages]
    workload = replace(TINY["mixed"], **STORAGE.get(storage, {"bits": (8, 8), "sub_page_size": 16}))
    chunk = Chunk(workload, rng, np.array(starts, np.int32), np.array(counts, np.int32), tokens)
    assert_close(chunk.attend(implementation), chunk.defined(), workload.dtype)


@each_implementation
@pytest.mark.parametrize("storage", ["float32-int4", "bfloat16-int8-int4"])
def test_a_page_that_is_open_is_read_from_the_tail_alone(implementation: str, storage: str, rng: np.random.Generator):
    """Wherever the chunk ends in it: the pools' pages from the first unquantised token on hold NaN."""
    workload = replace(TINY["mixed"], **STORAGE[storage])
    for tokens, starts, counts in PAGES.values():
        chunk = Chunk(workload, rng, np.array(starts, np.int32), np.array(counts, np.int32), tokens)
        expected, size = chunk.attend(implementation), workload.page_size
        ends = chunk.starts + chunk.counts
        first = np.where(ends <= (chunk.starts // size + 1) * size, chunk.starts // size, -(-chunk.starts // size))
        spoilt = []
        for pool, table in zip(chunk.cache.kv[:2], chunk.cache.tables[:2], strict=True):
            pages = table[(np.arange(table.shape[1]) >= first[:, None]) & (table >= 0)]
            blank = partial(jax.tree.map, lambda x, at=pages: x.at[at].set(255 if x.dtype == jnp.uint8 else jnp.nan))
            spoilt.append(blank(pool))
        kv = chunk.cache.kv._replace(retrieval=spoilt[0], streaming=spoilt[1])
        chunk.cache = chunk.cache._replace(kv=kv)
        assert_same_bits(chunk.attend(implementation), expected)


@each_implementation
@pytest.mark.parametrize("local", [7, TOKENS, 1000])
def test_a_program_without_history_does_the_same_at_the_start(
    implementation: str, local: int, rng: np.random.Generator
):
    """Also where one class of heads is enough; pages then hold NaN, for nothing may be read from them."""
    workload = TINY["mixed"]
    chunk, starts = Chunk(workload, rng), np.zeros_like(STARTS)
    kv = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), chunk.cache.kv)
    arguments = (chunk.q, chunk.k, chunk.v, kv, chunk.cache.tables, starts, COUNTS)
    expected, found = (
        real_rows(jitted("prefill_attention", name)(*arguments, sink=5, local=local, has_history=has_history))
        for name, has_history in (("reference", True), (implementation, False))
    )
    assert_close(found, expected, workload.dtype)


@each_implementation
@pytest.mark.parametrize("heads", ["all_retrieval", "all_streaming"])
def test_layers_with_heads_of_one_class_only(implementation: str, heads: str, rng: np.random.Generator):
    chunk = Chunk(TINY[heads], rng)
    assert_close(chunk.attend(implementation), chunk.attend("reference"), "float32")


@pytest.mark.parametrize(
    ("implementation", "window"),
    [*product(implementations("prefill_attention"), WINDOWS), ("reference", "sink and window cut pages and blocks")],
)
def test_streaming_heads_see_the_sink_and_the_window_to_the_token(
    implementation: str, window: str, rng: np.random.Generator
):
    sink, local = WINDOWS[window]
    chunk = Chunk(replace(TINY["mixed"], sink=sink, prefill_local=local), rng)
    assert_close(chunk.attend(implementation), chunk.defined(), "float32")


@each_implementation
def test_a_sequence_of_a_ragged_batch_equals_the_same_sequence_alone(implementation: str, rng: np.random.Generator):
    chunk = Chunk(TINY["mixed"], rng)
    together = chunk.attend(implementation)
    attend = partial(jitted("prefill_attention", implementation), sink=5, local=30)
    alone = []
    for b in range(4):
        row, cache = slice(b, b + 1), chunk.cache.alone(b)
        out = attend(chunk.q[row], chunk.k[row], chunk.v[row], cache.kv, cache.tables, STARTS[row], COUNTS[row])
        alone.append(np.asarray(out[0, : COUNTS[b]]))
    assert_same_bits(together, np.concatenate(alone))


@each_implementation
def test_two_runs_are_bitwise_equal(implementation: str, rng: np.random.Generator):
    chunk = Chunk(TINY["mixed"], rng)
    assert_same_bits(chunk.attend(implementation), chunk.attend(implementation))


PROMPT = Workload(
    context=1088,
    retrieval=1,
    streaming=1,
    group=2,
    head_dim=8,
    dtype="float32",
    sink=100,
    local=77,
    prefill_local=300,
)


@each_implementation
def test_every_chunk_size_gives_dense_attention(implementation: str, rng: np.random.Generator):
    """Chunks of 37, less than a page, of 128, 512 and one shot: they end inside pages, the last one is not full."""
    prompt = 1050
    q = random_tokens(PROMPT, rng, prompt, PROMPT.num_heads)
    k, v = (random_tokens(PROMPT, rng, prompt) for _ in range(2))
    expected = dense_attention(q[0], k[0], v[0], mask(PROMPT, np.arange(prompt), prompt, PROMPT.prefill_local))
    for size in (37, 128, 512, 1050):
        out = prefill_in_chunks(implementation, empty_cache(PROMPT, rng), (q, k, v), size)
        assert_close(out, expected, "float32")


def prefill_in_chunks(implementation: str, cache: Cache, qkv: tuple[NDArray[Any], ...], size: int) -> NDArray[Any]:
    """Outputs [T, N, H] of a prompt, chunk by chunk: written first, read after, as in a model."""
    out = []
    for start in range(0, qkv[0].shape[1], size):
        count = min(size, qkv[0].shape[1] - start)
        padding = ((0, 0), (0, size - count), (0, 0), (0, 0))
        q, k, v = (np.pad(x[:, start : start + count], padding) for x in qkv)
        at = (np.array([start], np.int32), np.array([count], np.int32))
        kv = jitted("kv_write")(k, v, cache.kv, cache.tables, *at)
        cache = cache._replace(kv=kv)
        attended = jitted("prefill_attention", implementation)(
            q, k, v, kv, cache.tables, *at, sink=PROMPT.sink, local=PROMPT.prefill_local
        )
        out.append(np.asarray(attended[0, :count]))
    return np.concatenate(out)


@each_implementation
def test_a_chunk_after_a_million_tokens(implementation: str, rng: np.random.Generator):
    """The retrieval head finds the one key that stands out; the streaming head reads its few pages."""
    workload, cache = million_tokens()
    start, window = 1_000_000, {"sink": workload.sink, "local": workload.prefill_local}
    q, k, v = (random_tokens(workload, rng, 24, heads) for heads in (2, 2, 2))
    q[..., :1, :] = [1.0, 0.5]
    kv, before = cache.kv, (cache.k[0, :start], cache.v[0, :start])
    for count in (3, 20):  # within the open page, twice
        at = (np.array([start], np.int32), np.array([count], np.int32))
        kv = jitted("kv_write")(k, v, kv, cache.tables, *at)
        out = jitted("prefill_attention", implementation)(q, k, v, kv, cache.tables, *at, **window)
        keys, values = (np.concatenate([old, new[0, :count]]) for old, new in zip(before, (k, v), strict=True))
        visible = mask(workload, np.arange(start, start + count), start + count, workload.prefill_local)
        assert_close(out[0, :count], dense_attention(q[0, :count], keys, values, visible), "float32")
        start, before = start + count, (keys, values)


@pytest.mark.parametrize("block", [1, 24])
def test_blocks_of_any_size_give_the_same_result(block: int, rng: np.random.Generator):
    """Query blocks that do not divide the chunk, key blocks smaller and larger than a page."""
    chunk = Chunk(TINY["mixed"], rng)
    out = jax.jit(partial(xla.prefill_attention, sink=5, local=30, block=block))(
        *(chunk.q, chunk.k, chunk.v, chunk.cache.kv, chunk.cache.tables, STARTS, COUNTS)
    )
    assert_close(real_rows(out), chunk.attend("reference"), "float32")


def test_exactly_the_blocks_with_a_visible_key_are_visited(rng: np.random.Generator):
    """Against every key of 10,000 random chunks, histories, block sizes and windows."""
    n = 10_000
    block, key_block, count, local = rng.integers(1, [[10], [10], [31], [71]], size=(4, n))
    start, sink, is_history = rng.integers(0, [[61], [71], [2]], size=(3, n))
    query = start + rng.integers(0, -(-count // block)) * block
    first, end = np.where(is_history, 0, start), np.where(is_history, start, start + count)
    arrays: Any = [jnp.asarray(x, jnp.int32) for x in (first, end, key_block, sink, local, query, block)]
    source, at = KeyRange(*arrays[:3]), arrays[5:]
    for is_streaming in (False, True):
        window = Window(*arrays[3:5]) if is_streaming else Window(None, None)
        found = np.stack(visible_blocks(at[0], at[1], source, window), axis=1)
        for i in range(n):
            queries = np.arange(query[i], min(query[i] + block[i], start[i] + count[i]))[:, None]
            keys = np.arange(first[i], end[i])
            visible = keys <= queries
            if is_streaming:
                visible &= (keys > queries - local[i]) | (keys < sink[i])
            sinks, low, high = found[i].tolist()
            expected = sorted({(key - first[i]) // key_block[i] for key in keys[visible.any(0)]})
            assert [*range(sinks), *range(low, high)] == expected, (start[i], count[i], query[i], sink[i], local[i])


@pytest.mark.parametrize("storage", ["", "_int8", "_int4"])
@each_implementation
def test_memory_does_not_grow_with_the_prompt(implementation: str, storage: str):
    """With a million tokens in 15,625 pages: less than a float32 number for each of them and its KV heads."""
    workload, pages = SERVING[f"llama3_8b_8k{storage}"], 15_625
    q, k = (
        abstract(1, workload.chunk, heads, workload.head_dim, dtype=workload.dtype)
        for heads in (workload.num_heads, workload.num_kv_heads)
    )
    tables = PageTables(abstract(1, pages), abstract(1, pages))
    attend = partial(prefill_attention, sink=128, local=4096, implementation=implementation)
    used = temporary_bytes(attend, q, k, k, abstract_pools(workload, pages), tables, abstract(1), abstract(1))
    assert used < 24 * 2**20
