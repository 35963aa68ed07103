"""Conformance of `page_select`: exact equality with the specification, the bound, forced pages, reuse, ties."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import NO_PAGE, page_select, selection_width
from pallas_kernels.core.workloads import TINY, Workload
from pallas_kernels.page_select import xla
from pallas_kernels.page_select.reference import page_scores
from tests.pallas_kernels.cases import (
    Cache,
    assert_same_bits,
    filled_cache,
    implementations,
    jitted,
    million_tokens,
    random_tokens,
    without_statistics,
)

each_implementation = pytest.mark.parametrize("implementation", implementations("page_select"))

# 70 pages are more than the 64 that `xla` scores at a time.
LONG = replace(TINY["mixed"], context=70 * 16, num_selected=6)
LENGTHS = np.array([1, 33, 64, 65, 96, 97, 256, 500, 1024, 1040, 1119, 1120, 0])


def select(
    implementation: str,
    q: ArrayLike,
    cache: Cache,
    workload: Workload,
    *,
    previous: NDArray[np.int32] | None = None,
    is_refresh: ArrayLike | None = None,
    sink_pages: int = 1,
    reduction: str = "max",
    spread: float = 1.0,
    has_lookahead: bool = False,
) -> NDArray[np.int32]:
    width = selection_width(workload.num_selected, workload.interval, workload.page_size)
    batch = len(cache.lengths)
    if previous is None:
        previous = np.full((batch, workload.retrieval, width), NO_PAGE, np.int32)
    selected = jitted("page_select", implementation)(
        *(np.asarray(q), cache.kv.retrieval, cache.tables.retrieval, cache.lengths, previous),
        np.full(batch, True) if is_refresh is None else np.asarray(is_refresh),
        num_selected=workload.num_selected,
        interval=workload.interval,
        sink_pages=sink_pages,
        reduction=reduction,
        spread=spread,
        has_lookahead=has_lookahead,
    )
    assert selected.shape == previous.shape and selected.dtype == np.int32
    return np.asarray(selected)


def integers(rng: np.random.Generator, *shape: int, dtype: str = "float32", limit: int = 3) -> NDArray[Any]:
    """Small whole numbers: their products and sums are exact in any order, and many are equal."""
    return rng.integers(-limit, limit + 1, shape).astype(dtype)


def integer_cache(workload: Workload, rng: np.random.Generator, lengths: NDArray[np.int_], limit: int = 3) -> Cache:
    workload = replace(workload, batch=len(lengths))
    slots = workload.max_pages * workload.page_size
    k = integers(rng, len(lengths), slots, workload.num_kv_heads, workload.head_dim, limit=limit)
    return filled_cache(workload, rng, lengths, k=k.astype(workload.dtype))


def integer_queries(workload: Workload, rng: np.random.Generator, batch: int, limit: int = 3) -> NDArray[Any]:
    return integers(rng, batch, workload.retrieval * workload.group, workload.head_dim, limit=limit)


@each_implementation
@pytest.mark.parametrize(
    ("reduction", "sink_pages", "spread", "has_lookahead"),
    [("max", 0, 1.0, False), ("max", 1, 0.5, True), ("mean", 3, 0.0, True)],
)
@pytest.mark.parametrize("limit", [1, 100])
def test_equals_the_reference_ties_included(
    implementation: str,
    reduction: str,
    sink_pages: int,
    spread: float,
    has_lookahead: bool,
    limit: int,
    rng: np.random.Generator,
):
    """With keys and queries of -1, 0 and 1 most scores are equal: the earlier page wins. The longest fill the table."""
    cache, q = integer_cache(LONG, rng, LENGTHS, limit), integer_queries(LONG, rng, len(LENGTHS), limit)
    options: Any = {"sink_pages": sink_pages, "reduction": reduction, "spread": spread, "has_lookahead": has_lookahead}
    mine, theirs = (select(name, q, cache, LONG, **options) for name in (implementation, "reference"))
    np.testing.assert_array_equal(mine, theirs)


@each_implementation
def test_bfloat16_keys_and_queries_are_scored_in_float32(implementation: str, rng: np.random.Generator):
    workload = replace(LONG, dtype="bfloat16")
    cache = integer_cache(workload, rng, LENGTHS, limit=100)
    q = integer_queries(workload, rng, len(LENGTHS), limit=100).astype(cache.k.dtype)
    mine, theirs = (select(name, q, cache, workload) for name in (implementation, "reference"))
    np.testing.assert_array_equal(mine, theirs)


@each_implementation
def test_queries_of_zero_choose_the_earliest_pages(implementation: str, rng: np.random.Generator):
    """Every score is zero of either sign: all are equal, as pages of positive keys and of negative ones show."""
    workload = replace(LONG, batch=len(LENGTHS))
    k = np.abs(rng.normal(size=(len(LENGTHS), 1120, 3, 8))).astype(np.float32)
    k[:, : 35 * 16] *= -1
    cache = filled_cache(workload, rng, np.full(len(LENGTHS), 1120), k=k)
    q = integer_queries(LONG, rng, len(LENGTHS)) * np.float32(0)
    assert np.signbit(q).any()
    expected = [0, 1, 2, 3, 4, 69]
    selected = select(implementation, q, cache, LONG)
    np.testing.assert_array_equal(selected[..., :6], np.broadcast_to(expected, (len(LENGTHS), 2, 6)))


@each_implementation
def test_a_table_that_is_shorter_than_the_selection(implementation: str, rng: np.random.Generator):
    workload = replace(TINY["mixed"], num_selected=9)
    cache = integer_cache(workload, rng, np.array([96, 1, 50, 0]))
    q = integer_queries(workload, rng, 4)
    mine, theirs = (select(name, q, cache, workload) for name in (implementation, "reference"))
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(mine[0, 0], [0, 1, 2, 3, 4, 5, -1, -1, -1, -1])


@each_implementation
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 1120), min_size=13, max_size=13),
    seed=st.integers(0, 2**31),
    ranges=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_the_score_bounds_every_product_from_above(implementation: str, lengths: list[int], seed: int, ranges: float):
    """No page that was left out holds a key whose product with a query exceeds the score of one that was chosen."""
    rng = np.random.default_rng(seed)
    workload = replace(LONG, batch=len(lengths))
    shape = (len(lengths), 1120, 3, 8)
    k = (rng.normal(size=shape) * np.exp(ranges * rng.normal(size=shape))).astype(np.float32)
    cache = filled_cache(workload, rng, lengths, k=k)
    q = rng.normal(size=(len(lengths), 4, 8)).astype(np.float32)
    selected = select(implementation, q, cache, LONG)
    assert cache.kv.retrieval is not None
    table = jnp.asarray(cache.tables.retrieval)
    for b, length in enumerate(lengths):
        check_form(selected[b], length, LONG, sink_pages=1)
        for head in range(2):
            products = q[b].reshape(2, 2, 8)[head].astype(np.float64) @ k[b, :, head].T.astype(np.float64)
            largest = np.where(np.arange(1120) < length, products, -np.inf).max(0).reshape(70, 16).max(1)
            # The open page has no score, but is always chosen.
            sealed = max(length - 1, 0) // 16
            scores = page_scores(jnp.asarray(q), cache.kv.retrieval, table, b, head, sealed, "max", 1.0)[0]
            slack = 1e-5 * (np.abs(q[b]).max() * np.abs(k[b, :length, head]).sum(-1).max(initial=0))
            assert (scores >= largest[: scores.size] - slack).all()
            chosen = [page for page in selected[b, head] if 0 <= page < scores.size]
            left_out = sorted(set(range(scores.size)) - set(chosen))
            free = [page for page in chosen if page >= 1 and (page + 1) * 16 <= length - 4]
            if left_out and free:
                assert scores[free].min() >= largest[left_out].max() - slack


def check_form(selected: NDArray[np.int32], length: int, workload: Workload, sink_pages: int) -> None:
    """Page lists [K, width] just chosen: ascending, padded, valid, as many as may be, forced ones among them."""
    page_size, interval = workload.page_size, workload.interval
    held = -(-length // page_size)
    for pages in selected.tolist():
        listed = [page for page in pages if page != NO_PAGE]
        assert pages == listed + [NO_PAGE] * (len(pages) - len(listed))
        if length == 0:
            assert not listed
            continue
        assert listed == sorted(set(listed)) and listed[0] >= 0
        chosen, reserve = [page for page in listed if page < held], [page for page in listed if page >= held]
        assert len(chosen) == min(workload.num_selected, held)
        assert set(range(min(sink_pages, held))) <= set(chosen)
        assert {position // page_size for position in range(max(length - interval, 0), length)} <= set(chosen)
        coming = {position // page_size for position in range(length, length + interval - 1)}
        assert reserve == sorted(page for page in coming if held <= page < workload.max_pages)


@each_implementation
@pytest.mark.parametrize(("interval", "page_size"), [(1, 64), (2, 64), (4, 64), (8, 64), (8, 4), (9, 4)])
def test_the_page_of_the_current_token_is_listed_at_every_step_of_an_interval(
    implementation: str, interval: int, page_size: int, rng: np.random.Generator
):
    """Lengths around every page boundary × phases: through each reuse, also where an interval spans several pages."""
    workload = replace(
        TINY["all_retrieval"],
        batch=30,
        context=14 * page_size,
        page_size=page_size,
        num_selected=6,
        interval=interval,
    )
    at_refresh = np.array([page_size * m + offset for m in range(1, 11) for offset in (-1, 0, 1)])
    k = random_tokens(workload, rng, workload.context)
    k[np.arange(workload.context) >= at_refresh[:, None] - 8] = (
        0  # never among the best: only the rule lists their pages
    )
    cache = filled_cache(workload, rng, at_refresh, k=k)
    q = rng.normal(size=(30, 4, 8)).astype(np.float32)
    selected = select(implementation, q, cache, workload)
    for b, length in enumerate(at_refresh):
        check_form(selected[b], int(length), workload, sink_pages=1)
    for step in range(interval):
        lengths = at_refresh + step
        again = select(
            *(implementation, -q, cache._replace(lengths=lengths.astype(np.int32)), workload),
            previous=selected,
            is_refresh=np.full(30, False),
        )
        np.testing.assert_array_equal(again, selected)
        for b, length in enumerate(lengths):
            newest = {position // page_size for position in range(max(length - interval - step, 0), length)}
            assert all(newest <= set(row) for row in selected[b].tolist()), (length, step)


@each_implementation
def test_sequences_that_do_not_refresh_keep_what_they_had(implementation: str, rng: np.random.Generator):
    cache, q = integer_cache(LONG, rng, LENGTHS), integer_queries(LONG, rng, len(LENGTHS))
    previous = rng.integers(-1, 70, (len(LENGTHS), 2, 7)).astype(np.int32)
    is_refresh = np.arange(len(LENGTHS)) % 3 == 0
    assert is_refresh[-1] and cache.lengths[-1] == 0, "an empty slot keeps what it had, too"
    selected = select(implementation, q, cache, LONG, previous=previous, is_refresh=is_refresh)
    fresh = select(implementation, q, cache, LONG)
    is_kept = ~is_refresh | (cache.lengths == 0)
    np.testing.assert_array_equal(selected[is_kept], previous[is_kept])
    np.testing.assert_array_equal(selected[~is_kept], fresh[~is_kept])


@each_implementation
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_lookahead", [False, True])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_the_bounds_of_the_open_page_mean_nothing(
    implementation: str, storage: str, has_lookahead: bool, reduction: str, rng: np.random.Generator
):
    """NaN, infinite, or those of a page that was there before; it is selected, and so are the others that were."""
    cache = integer_cache(replace(LONG, dtype=storage), rng, LENGTHS)
    q = integer_queries(LONG, rng, len(LENGTHS))
    pool, newest = cache.kv.retrieval, (np.maximum(LENGTHS, 1) - 1) // 16
    assert pool is not None and pool.k_min is not None and pool.k_max is not None
    open_pages = cache.tables.retrieval[np.arange(len(LENGTHS)), newest]
    found = []
    for low, high in ((np.nan, np.nan), (-np.inf, np.inf), (1e6, 1e6), (-1e6, -1e6), (0, 0)):
        bounds = {"k_min": pool.k_min.at[open_pages].set(low), "k_max": pool.k_max.at[open_pages].set(high)}
        one = cache._replace(kv=cache.kv._replace(retrieval=pool._replace(**bounds)))
        found.append(select(implementation, q, one, LONG, has_lookahead=has_lookahead, reduction=reduction))
        np.testing.assert_array_equal(found[-1], found[0])
    is_running = LENGTHS > 0
    assert (found[0] == newest[:, None, None]).any(-1)[is_running].all()
    expected = select("reference", q, cache, LONG, has_lookahead=has_lookahead, reduction=reduction)
    np.testing.assert_array_equal(found[0], expected)


@each_implementation
def test_a_sequence_of_a_ragged_batch_equals_the_same_sequence_alone(implementation: str, rng: np.random.Generator):
    cache = filled_cache(replace(LONG, batch=len(LENGTHS)), rng, LENGTHS)
    q = rng.normal(size=(len(LENGTHS), 4, 8)).astype(np.float32)
    together = select(implementation, q, cache, LONG)
    for b in range(len(LENGTHS)):
        np.testing.assert_array_equal(select(implementation, q[b : b + 1], cache.alone(b), LONG), together[b : b + 1])
    assert_same_bits(together, select(implementation, q, cache, LONG))


@each_implementation
def test_outliers_do_not_hide_a_page(implementation: str, rng: np.random.Generator):
    """Keys as large as bfloat16 allows products of, in one channel: float16 scores would overflow."""
    workload = replace(LONG, batch=1, dtype="bfloat16")
    k = rng.normal(size=(1, 1120, 3, 8))
    k[:, :, :, 5] = 3e4 + 500 * rng.random((1, 1120, 3))
    k[0, 40 * 16 + 3, :, 5] = 6e4
    cache = filled_cache(workload, rng, [1100], k=k.astype(np.float32).astype(jnp.bfloat16))
    q = np.zeros((1, 4, 8), np.float32)
    q[..., 5] = 3e4
    selected = select(implementation, q.astype(jnp.bfloat16), cache, workload)
    assert (selected == 40).any(-1).all()


@each_implementation
def test_a_needle_in_a_million_tokens_is_found(implementation: str):
    workload, cache = million_tokens()
    q = np.array([[[1.0, 0.5]]], np.float32)
    selected = select(implementation, q, cache, workload)
    check_form(selected[0], 1_000_000, workload, sink_pages=1)
    products = np.maximum(cache.k[0, :1_000_000, 0] @ q[0, 0], -np.inf)
    assert products.argmax() // 64 == 12_345 and 12_345 in selected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_selected": 2}, r"num_selected=2 must be at least the 3 pages that are always read"),
        ({"num_selected": 3, "sink_pages": 2}, r"num_selected=3 must be at least the 4 pages"),
        ({"interval": 18}, r"num_selected=3 must be at least the 4 pages"),
        ({"reduction": "median"}, r"reduction='median' must be \"max\" or \"mean\""),
        ({"spread": 1.5}, "spread=1.5 must be from 0 to 1"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(options: dict[str, Any], message: str, rng: np.random.Generator):
    cache = integer_cache(TINY["mixed"], rng, np.array([96, 1, 50, 0]))
    settings = {"num_selected": 3, "interval": 4, "sink_pages": 1, **options}
    q = jnp.asarray(integer_queries(TINY["mixed"], rng, 4))
    previous = jnp.full((4, 2, 9), -1, np.int32)
    assert cache.kv.retrieval is not None
    arguments = (q, cache.kv.retrieval, jnp.asarray(cache.tables.retrieval), jnp.asarray(cache.lengths))
    with pytest.raises(ValueError, match=message):
        page_select(*arguments, previous, jnp.full(4, True), **settings)


def test_a_pool_without_statistics_cannot_be_selected_from(rng: np.random.Generator):
    cache = integer_cache(TINY["mixed"], rng, np.array([96, 1, 50, 0]))
    pool = without_statistics(cache.kv).retrieval
    assert pool is not None
    q, previous = jnp.asarray(integer_queries(TINY["mixed"], rng, 4)), jnp.full((4, 2, 9), -1, np.int32)
    arguments = (q, pool, jnp.asarray(cache.tables.retrieval), jnp.asarray(cache.lengths), previous)
    with pytest.raises(ValueError, match="the pool has no key statistics"):
        page_select(*arguments, jnp.full(4, True), num_selected=3, interval=4, sink_pages=1)


@pytest.mark.parametrize("is_jitted", [False, True])
def test_products_with_bfloat16_keys_are_nearly_those_of_float32_queries(is_jitted: bool, rng: np.random.Generator):
    queries = jnp.asarray(rng.normal(size=(2, 3, 64)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 5, 4, 64)), jnp.bfloat16)
    product = jax.jit(xla._product) if is_jitted else xla._product
    expected = np.einsum("kgh,kpsh->kgps", np.asarray(queries, np.float64), np.asarray(keys, np.float64))
    np.testing.assert_allclose(np.asarray(product(queries, keys)), expected, atol=64 * 2**-17)
