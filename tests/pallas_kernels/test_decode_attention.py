"""Conformance of `decode_attention`: values, selection and its reuse, every length and split, memory."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import (
    NO_PAGE,
    LayerKV,
    PagedKV,
    PageTables,
    Selection,
    Tail,
    decode_attention,
    kv_write,
    selection_width,
)
from pallas_kernels.core.workloads import SERVING, TINY, Workload
from pallas_kernels.decode_attention import xla
from tests.pallas_kernels.cases import (
    STORAGE,
    Cache,
    abstract,
    abstract_pools,
    as_read,
    assert_close,
    assert_same_bits,
    dense_attention,
    filled_cache,
    implementations,
    jitted,
    mask,
    million_tokens,
    random_tokens,
    temporary_bytes,
)

each_implementation = pytest.mark.parametrize("implementation", implementations("decode_attention"))

LENGTHS = [96, 17, 0, 64]
SELECTED = np.array([[0, 2, 3, 5], [0, 1, 2, -1], [-1] * 4, [1, 3, 4, -1]], np.int32)
"""Pages 2 of the second sequence and 4 of the last are reserve: no token of them is written."""
WINDOWS = {
    "sink and window cut pages": (5, 21),
    "no sink, a window of the token alone": (0, 1),
    "window longer than any sequence": (5, 1000),
    "sink longer than any sequence": (200, 7),
    "sink of whole pages, window of whole pages": (32, 16),
}


def decode_cache(workload: Workload, rng: np.random.Generator, lengths: ArrayLike = LENGTHS) -> Cache:
    """A cache in which every other sequence holds no page beyond its last token."""
    cache = filled_cache(workload, rng, lengths)
    page = np.arange(workload.max_pages) * workload.page_size
    is_held = (page < cache.lengths[:, None]) | (np.arange(len(cache.lengths)) % 2 == 0)[:, None]
    retrieval, streaming = (np.where(is_held, table, NO_PAGE).astype(np.int32) for table in cache.tables[:2])
    return cache._replace(tables=PageTables(retrieval, streaming, cache.tables.slots))


def random_queries(workload: Workload, rng: np.random.Generator) -> NDArray[Any]:
    """Queries [B, N, H], of NaN for the empty slot."""
    q = random_tokens(workload, rng, 1, workload.num_heads)[:, 0]
    q[2] = np.nan
    return q


def attend(
    implementation: str, q: NDArray[Any], cache: Cache, selected: NDArray[np.int32] | None, workload: Workload
) -> NDArray[Any]:
    out = jitted("decode_attention", implementation)(
        *(q, cache.kv, cache.tables, cache.lengths, selected), sink=workload.sink, local=workload.local
    )
    assert out.dtype == q.dtype and out.shape == q.shape
    return np.asarray(out)


def selection(workload: Workload) -> NDArray[np.int32]:
    return np.repeat(SELECTED[:, None], workload.retrieval, axis=1)


def dense(
    workload: Workload, q: NDArray[Any], cache: Cache, selected: NDArray[np.int32] | None = None
) -> NDArray[np.float64]:
    """Dense float64 attention of each sequence's last token; retrieval heads see the selected pages, or all."""
    rows = []
    for b, length in enumerate(cache.lengths):
        visible = mask(workload, [length - 1], length, workload.local)
        if selected is not None:
            pages = np.arange(length) // workload.page_size
            visible[: workload.retrieval] &= (pages == selected[b][..., None]).any(1)[:, None]
        rows.append(dense_attention(np.nan_to_num(q[b : b + 1]), cache.k[b, :length], cache.v[b, :length], visible))
    return np.concatenate(rows)


@each_implementation
@pytest.mark.parametrize("storage", STORAGE)
def test_ragged_batches_equal_the_reference(implementation: str, storage: str, rng: np.random.Generator):
    workload = replace(TINY["mixed"], **STORAGE[storage])
    cache, q = decode_cache(workload, rng), random_queries(workload, rng)
    selected = None if storage == "bfloat16" else selection(workload)
    mine, theirs = (attend(name, q, cache, selected, workload) for name in (implementation, "reference"))
    assert_close(mine[[0, 1, 3]], theirs[[0, 1, 3]], workload.dtype)


@pytest.mark.parametrize("implementation", [*implementations("decode_attention"), "reference"])
@pytest.mark.parametrize("storage", STORAGE)
def test_the_page_of_the_newest_token_is_read_from_the_tail(
    implementation: str, storage: str, rng: np.random.Generator
):
    """Unquantised, at every length around the ends of pages, by the slots; that page of the pools holds NaN.

    The other pages are read as they are stored.
    """
    workload = replace(TINY["mixed"], **STORAGE[storage])
    for lengths in ([1, 15, 16, 17], [31, 32, 33, 2], [47, 48, 49, 95], [96, 80, 81, 64]):
        cache = filled_cache(workload, rng, lengths)
        newest = (cache.lengths - 1) // workload.page_size
        read = as_read(cache, newest * workload.page_size)
        cache = without_pages(cache, newest)
        q = random_tokens(workload, rng, 1, workload.num_heads)[:, 0]
        # The first page, the newest one and a reserve.
        lists = [[0, page, page + 1] if page else [0, 1, NO_PAGE] for page in newest]
        for selected in (None, np.array([[pages] * 2 for pages in lists], np.int32)):
            out = attend(implementation, q, cache, selected, workload)
            assert_close(out, dense(workload, q, cache._replace(k=read[0], v=read[1]), selected), workload.dtype)


def without_pages(cache: Cache, logical: NDArray[Any]) -> Cache:
    """The cache with NaN, and codes of 255, in one page of each sequence."""

    def spoilt(pool: Any, table: Any) -> Any:
        pages = table[np.arange(len(logical)), logical]
        return jax.tree.map(lambda x: x.at[pages].set(255 if x.dtype == jnp.uint8 else jnp.nan), pool)

    retrieval, streaming = map(spoilt, cache.kv[:2], cache.tables[:2])
    return cache._replace(kv=cache.kv._replace(retrieval=retrieval, streaming=streaming))


@each_implementation
@pytest.mark.parametrize("heads", ["all_retrieval", "all_streaming"])
def test_layers_with_heads_of_one_class_only(implementation: str, heads: str, rng: np.random.Generator):
    cache, q = decode_cache(TINY[heads], rng), random_queries(TINY[heads], rng)
    assert_close(
        attend(implementation, q, cache, None, TINY[heads])[[0, 1, 3]],
        dense(TINY[heads], q, cache)[[0, 1, 3]],
        "float32",
    )


@pytest.mark.parametrize("implementation", [*implementations("decode_attention"), "reference"])
def test_a_selection_is_dense_attention_over_its_pages(implementation: str, rng: np.random.Generator):
    workload = TINY["mixed"]
    cache, q = decode_cache(workload, rng), random_queries(workload, rng)
    selected = selection(workload)
    selected[0, 1] = [1, 2, 4, 5]  # each head has its own list
    out = attend(implementation, q, cache, selected, workload)
    assert_close(out[[0, 1, 3]], dense(workload, q, cache, selected)[[0, 1, 3]], "float32")


@each_implementation
@pytest.mark.parametrize("window", WINDOWS)
def test_streaming_heads_see_the_sink_and_the_window_to_the_token(
    implementation: str, window: str, rng: np.random.Generator
):
    sink, local = WINDOWS[window]
    workload = replace(TINY["mixed"], sink=sink, local=local)
    for lengths in (LENGTHS, [1, 31, 0, 33], [80, 81, 0, 79]):
        cache, q = decode_cache(workload, rng, lengths), random_queries(workload, rng)
        out = attend(implementation, q, cache, None, workload)
        assert_close(out[[0, 1, 3]], dense(workload, q, cache)[[0, 1, 3]], "float32")


@each_implementation
def test_an_empty_slot_gives_zeros_whatever_its_query(implementation: str, rng: np.random.Generator):
    workload = TINY["mixed"]
    cache, q = decode_cache(workload, rng), random_queries(workload, rng)
    for selected in (None, selection(workload)):
        assert not attend(implementation, q, cache, selected, workload)[2].any()


@each_implementation
def test_a_sequence_of_a_ragged_batch_equals_the_same_sequence_alone(implementation: str, rng: np.random.Generator):
    workload = TINY["mixed"]
    cache, q = decode_cache(workload, rng), random_queries(workload, rng)
    selected = selection(workload)
    together = attend(implementation, q, cache, selected, workload)
    assert_same_bits(together, attend(implementation, q, cache, selected, workload))
    for b in range(4):
        row = slice(b, b + 1)
        alone = attend(implementation, q[row], cache.alone(b), selected[row], workload)
        assert_same_bits(alone, together[row])


@each_implementation
def test_outliers_in_keys_leave_the_softmax_finite(implementation: str, rng: np.random.Generator):
    """Scores in the tens of thousands, exact in float32, that exp() of float32 cannot hold."""
    workload = replace(TINY["mixed"], head_dim=4)
    k = rng.integers(-2, 3, (4, 96, 3, 4)).astype(np.float32)
    k[..., 1] = 3000 + rng.integers(0, 2, (4, 96, 3))
    cache = filled_cache(workload, rng, LENGTHS, k=k)
    q = rng.integers(-2, 3, (4, 6, 4)).astype(np.float32)
    q[..., 1] = np.where(np.arange(6) % 2, 20, -20)
    out = attend(implementation, q, cache, None, workload)
    assert_close(out[[0, 1, 3]], dense(workload, q, cache)[[0, 1, 3]], "float32")


class Sweep(NamedTuple):
    """One row for every length from 1 to the longest: the same query, keys and values, cut there."""

    cache: Cache
    q: NDArray[np.float32]
    expected: NDArray[np.float64]


SWEEP = Workload(
    batch=4200,
    context=4200,
    retrieval=1,
    streaming=1,
    group=1,
    head_dim=4,
    dtype="float32",
    sink=100,
    local=200,
    num_selected=66,
)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    """Pages are shared by all rows, but for the newest of each: that is in the tail and ends in NaN, as does the pool.

    Nothing else is held, and the table has a page of NaN for the newest.
    """
    rng = np.random.default_rng(0)
    length, size = np.arange(1, SWEEP.context + 1), SWEEP.page_size
    k, v = rng.normal(size=(2, SWEEP.max_pages * size, 2, SWEEP.head_dim)).astype(np.float32)
    last = (length - 1) // size
    is_written = np.arange(size) < (length - last * size)[:, None]
    pools, order = [], rng.permutation(SWEEP.max_pages + 1).astype(np.int32)
    slots = rng.permutation(len(length)).astype(np.int32)
    by_page = [np.swapaxes(x.reshape(-1, size, 2, SWEEP.head_dim), 1, 2) for x in (k, v)]
    tail = [np.where(is_written[:, None, :, None], x[last], np.float32(np.nan))[np.argsort(slots)] for x in by_page]
    blank = np.full((1, 2, size, SWEEP.head_dim), np.nan, np.float32)
    for head in range(2):
        joined = [np.concatenate([x, blank])[np.argsort(order), head : head + 1] for x in by_page]
        pools.append(PagedKV(*map(jnp.asarray, joined)))
    statistics = np.zeros((len(order), 1, size // SWEEP.sub_page_size, SWEEP.head_dim), np.float32)
    statistics[order[-1]] = np.nan
    pools[0] = pools[0]._replace(k_min=jnp.asarray(statistics), k_max=jnp.asarray(statistics))
    page = np.arange(SWEEP.max_pages)
    table = np.where(page < last[:, None], order[page], NO_PAGE)
    table[np.arange(len(length)), last] = order[-1]
    q = rng.normal(size=(1, 2, SWEEP.head_dim)).astype(np.float32)
    weights = np.exp(np.einsum("kh,skh->sk", *(x.astype(np.float64) for x in (q[0], k))) / 2)[..., None]
    sums = np.concatenate([np.zeros((1, 2, SWEEP.head_dim + 1)), np.concatenate([weights, weights * v], -1).cumsum(0)])
    sink, first = np.minimum(SWEEP.sink, length), np.maximum(length - SWEEP.local, np.minimum(SWEEP.sink, length))
    seen = np.stack([sums[length, 0], sums[length, 1] - sums[first, 1] + sums[sink, 1]], axis=1)
    tables = PageTables(table.astype(np.int32), table.astype(np.int32), slots)
    cache = Cache(LayerKV(pools[0], pools[1], Tail(*map(jnp.asarray, tail))), tables, length.astype(np.int32), k, v)
    return Sweep(cache, np.repeat(q, len(length), axis=0), seen[..., 1:] / seen[..., :1])


@each_implementation
def test_a_budget_that_covers_the_length_is_dense_for_every_length(implementation: str, sweep: Sweep):
    """Lengths 1 … 4200: no empty page in the softmax, no token lost."""
    cache = sweep.cache
    out = attend(implementation, sweep.q, cache, None, SWEEP)
    assert_close(out, sweep.expected, "float32")
    width = selection_width(SWEEP.num_selected, SWEEP.interval, SWEEP.page_size)
    for select in implementations("page_select"):
        selected = jitted("page_select", select)(
            *(sweep.q[:, :1], cache.kv.retrieval, cache.tables.retrieval, cache.lengths),
            Selection.empty(SWEEP.batch, 1, width),
            np.full(SWEEP.batch, True),
            num_selected=SWEEP.num_selected,
            interval=SWEEP.interval,
            sink_pages=2,
            reduction="max",
        )
        assert_same_bits(attend(implementation, sweep.q, cache, np.asarray(selected.pages), SWEEP), out)


@pytest.mark.parametrize("pages_per_block", [1, 2, 4, 8, 16])
def test_every_split_keeps_the_current_token_at_every_length(pages_per_block: int, sweep: Sweep):
    out = jax.jit(partial(xla.decode_attention, sink=100, local=200, pages_per_block=pages_per_block))(
        *(sweep.q, sweep.cache.kv, sweep.cache.tables, sweep.cache.lengths, None)
    )
    assert_close(out, sweep.expected, "float32")


REUSE = replace(
    TINY["all_retrieval"],
    batch=30,
    context=14 * 64,
    page_size=64,
    num_selected=6,
)


@each_implementation
@pytest.mark.parametrize("interval", [1, 2, 4, 8])
def test_the_current_token_is_read_at_every_length_through_every_reuse(
    implementation: str, interval: int, rng: np.random.Generator
):
    """Prompts of 64 m − 1, 64 m and 64 m + 1, beginning one after another, so that phases differ within the batch."""
    prompts = np.array([64 * m + offset for m in range(1, 11) for offset in (-1, 0, 1)], np.int32)
    workload = replace(REUSE, interval=interval)
    k = random_tokens(workload, rng, workload.context)
    k[np.arange(workload.context) >= prompts[:, None] - 8] = 0  # never among the best: only the rule lists their pages
    cache = filled_cache(workload, rng, prompts, k=k)
    width = selection_width(workload.num_selected, interval, workload.page_size)
    selected = Selection.empty(30, 2, width)
    decode_steps = -(np.arange(30) % interval)
    for _ in range(2 * interval + 2):
        lengths = np.where(decode_steps >= 0, prompts + decode_steps + 1, 0).astype(np.int32)
        q = rng.normal(size=(30, 4, 8)).astype(np.float32)
        cache, selected = _decode_step(workload, cache, q, lengths, decode_steps, selected)
        out = attend(implementation, q, cache, np.asarray(selected.pages), workload)
        current = np.broadcast_to((lengths[:, None, None] - 1) // 64, (30, 2, 1))
        with_current = np.concatenate([selected.pages, current], axis=-1)
        is_running = lengths > 0
        assert_close(out[is_running], dense(workload, q, cache, with_current)[is_running], "float32")
        decode_steps += 1


def _decode_step(
    workload: Workload, cache: Cache, q: Any, lengths: NDArray[np.int32], decode_steps: Any, selected: Selection
) -> tuple[Cache, Selection]:
    """The cache with one token more, and the selection of that step: what `lserve_jax.runtime.attend` does."""
    is_running = (lengths > 0).astype(np.int32)
    at = np.arange(30), np.maximum(lengths - 1, 0)
    kv = jitted("kv_write")(
        cache.k[at][:, None], cache.v[at][:, None], cache.kv, cache.tables, lengths - is_running, is_running
    )
    selected = jitted("page_select")(
        *(q, kv.retrieval, cache.tables.retrieval, lengths),
        selected.without_memory(decode_steps == 0),
        decode_steps % workload.interval == 0,
        num_selected=workload.num_selected,
        interval=workload.interval,
        sink_pages=1,
        memory=0.6,
    )
    return cache._replace(kv=kv, lengths=lengths), selected


@each_implementation
def test_a_million_tokens(implementation: str, rng: np.random.Generator):
    """The retrieval head finds the one key that stands out; the streaming head reads its few pages."""
    workload, cache = million_tokens()
    q = np.array([[[1.0, 0.5], [0.3, -0.2]]], np.float32)
    expected = dense(workload, q, cache)
    assert_close(attend(implementation, q, cache, None, workload), expected, "float32")
    selected = np.array([[[0, 12_345, 15_624, -1]]], np.int32)
    assert_close(attend(implementation, q, cache, selected, workload), expected, "float32")


@each_implementation
@pytest.mark.parametrize(("storage", "has_selection"), [("", False), ("_int8", True), ("_int4", True)])
def test_memory_does_not_grow_with_the_context(implementation: str, storage: str, has_selection: bool):
    """Write and read in one program: in place, and less than two float32 numbers for each of a million tokens.

    The write may seal a page, so that the program has both.
    """
    workload, pages = SERVING[f"llama3_8b_8k{storage}"], 15_625

    def step(kv: LayerKV, q: Any, k: Any, tables: PageTables, lengths: Any, selected: Any) -> tuple[Any, LayerKV]:
        kv = kv_write(k[:, None], k[:, None], kv, tables, lengths - 1, lengths)
        out = decode_attention(q, kv, tables, lengths, selected, sink=128, local=256, implementation=implementation)
        return out, kv

    q, k = (
        abstract(1, heads, workload.head_dim, dtype=workload.dtype)
        for heads in (workload.num_heads, workload.num_kv_heads)
    )
    tables = PageTables(abstract(1, pages), abstract(1, pages))
    selected = abstract(1, workload.retrieval, 65) if has_selection else None
    used = temporary_bytes(step, abstract_pools(workload, pages), q, k, tables, abstract(1), selected, updated=0)
    assert used < 8 * 2**20
