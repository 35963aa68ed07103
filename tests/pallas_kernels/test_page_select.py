"""Conformance of `page_select`: exact equality with the specification, the bound, forced pages, reuse, ties, memory."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import NO_PAGE, Selection, choose_pages, page_select, selection_width
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
    numpy_selection,
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
    previous: Selection | None = None,
    is_refresh: ArrayLike | None = None,
    sink_pages: int = 1,
    reduction: str = "max",
    spread: float = 1.0,
    memory: float = 0.0,
    budgets: ArrayLike | None = None,
) -> Selection:
    """The selection, of numpy arrays; after none of another unless there is a previous one."""
    width = selection_width(workload.num_selected, workload.interval, workload.page_size)
    batch = len(cache.lengths)
    if previous is None:
        previous = Selection.empty(batch, workload.retrieval, width)
    selected = jitted("page_select", implementation)(
        *(np.asarray(q), cache.kv.retrieval, cache.tables.retrieval, cache.lengths, previous),
        np.full(batch, True) if is_refresh is None else np.asarray(is_refresh),
        None if budgets is None else np.asarray(budgets, np.int32),
        num_selected=workload.num_selected,
        interval=workload.interval,
        sink_pages=sink_pages,
        reduction=reduction,
        spread=spread,
        memory=memory,
    )
    pages, scores = map(np.asarray, selected)
    assert pages.shape == scores.shape == (batch, workload.retrieval, width)
    assert (pages.dtype, scores.dtype) == (np.int32, np.float32)
    return numpy_selection(pages, scores)


def assert_equal(actual: Selection, expected: Selection) -> None:
    """The same pages, for which the same numbers are remembered."""
    np.testing.assert_array_equal(actual.pages, expected.pages)
    np.testing.assert_array_equal(actual.scores, expected.scores)
    assert not np.isnan(actual.scores).any()


def random_selection(workload: Workload, rng: np.random.Generator, lengths: NDArray[np.int_]) -> Selection:
    """What a sequence may remember: pages that it has, with shares in steps that are exact, or none."""
    width = selection_width(workload.num_selected, workload.interval, workload.page_size)
    pages = np.full((len(lengths), workload.retrieval, width), NO_PAGE, np.int32)
    scores = np.full(pages.shape, -np.inf, np.float32)
    for b, length in enumerate(lengths):
        held = -(-int(length) // workload.page_size)
        listed = min(held, width)
        for head in range(workload.retrieval):
            pages[b, head, :listed] = np.sort(rng.permutation(held)[:listed])
            scores[b, head, :listed] = rng.choice([0.0, -0.25, -1.5, -np.inf], listed)
    return numpy_selection(pages, scores)


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
    ("reduction", "sink_pages", "spread", "memory"),
    [("max", 0, 1.0, 0.0), ("max", 1, 0.5, 0.9), ("mean", 3, 0.0, 1.0)],
)
@pytest.mark.parametrize("limit", [1, 100])
def test_equals_the_reference_ties_included(
    implementation: str,
    reduction: str,
    sink_pages: int,
    spread: float,
    memory: float,
    limit: int,
    rng: np.random.Generator,
):
    """With keys and queries of -1, 0 and 1 most scores are equal: the earlier page wins. The longest fill the table."""
    cache, q = integer_cache(LONG, rng, LENGTHS, limit), integer_queries(LONG, rng, len(LENGTHS), limit)
    options: Any = {"sink_pages": sink_pages, "reduction": reduction, "spread": spread, "memory": memory}
    previous = random_selection(LONG, rng, LENGTHS)
    for _ in range(2):
        mine, theirs = (
            select(name, q, cache, LONG, previous=previous, **options) for name in (implementation, "reference")
        )
        assert_equal(mine, theirs)
        previous, q = theirs, -q


@each_implementation
def test_bfloat16_keys_and_queries_are_scored_in_float32(implementation: str, rng: np.random.Generator):
    workload = replace(LONG, dtype="bfloat16")
    cache = integer_cache(workload, rng, LENGTHS, limit=100)
    q = integer_queries(workload, rng, len(LENGTHS), limit=100).astype(cache.k.dtype)
    mine, theirs = (select(name, q, cache, workload, memory=0.6) for name in (implementation, "reference"))
    assert_equal(mine, theirs)


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
    np.testing.assert_array_equal(selected.pages[..., :6], np.broadcast_to(expected, (len(LENGTHS), 2, 6)))


@each_implementation
def test_each_sequence_has_a_budget_of_its_own(implementation: str, rng: np.random.Generator):
    """From the pages that are always selected to as many as the list holds; what comes next follows the chosen ones."""
    cache, q = integer_cache(LONG, rng, LENGTHS), integer_queries(LONG, rng, len(LENGTHS))
    budgets, previous = 3 + np.arange(len(LENGTHS)) % 4, random_selection(LONG, rng, LENGTHS)
    options: Any = {"budgets": budgets, "previous": previous, "memory": 0.5}
    mine, theirs = (select(name, q, cache, LONG, **options) for name in (implementation, "reference"))
    assert_equal(mine, theirs)
    for b, length in enumerate(LENGTHS):
        check_form(mine.pages[b], int(length), replace(LONG, num_selected=int(budgets[b])), sink_pages=1)


@each_implementation
def test_a_table_that_is_shorter_than_the_selection(implementation: str, rng: np.random.Generator):
    workload = replace(TINY["mixed"], num_selected=9)
    cache = integer_cache(workload, rng, np.array([96, 1, 50, 0]))
    q = integer_queries(workload, rng, 4)
    mine, theirs = (select(name, q, cache, workload, memory=0.6) for name in (implementation, "reference"))
    assert_equal(mine, theirs)
    np.testing.assert_array_equal(mine.pages[0, 0], [0, 1, 2, 3, 4, 5, -1, -1, -1, -1])


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
    selected = select(implementation, q, cache, LONG).pages
    assert cache.kv.retrieval is not None
    table = jnp.asarray(cache.tables.retrieval)
    for b, length in enumerate(lengths):
        check_form(selected[b], length, LONG, sink_pages=1)
        for head in range(2):
            products = q[b].reshape(2, 2, 8)[head].astype(np.float64) @ k[b, :, head].T.astype(np.float64)
            largest = np.where(np.arange(1120) < length, products, -np.inf).max(0).reshape(70, 16).max(1)
            # The open page has no score, but is always chosen.
            sealed = max(length - 1, 0) // 16
            scores = page_scores(jnp.asarray(q), cache.kv.retrieval, table, b, head, sealed, "max", 1.0)
            slack = 1e-5 * (np.abs(q[b]).max() * np.abs(k[b, :length, head]).sum(-1).max(initial=0))
            assert (scores >= largest[: scores.size] - slack).all()
            chosen = [page for page in selected[b, head] if 0 <= page < scores.size]
            left_out = sorted(set(range(scores.size)) - set(chosen))
            free = [page for page in chosen if page >= 1 and (page + 1) * 16 <= length - 4]
            if left_out and free:
                assert scores[free].min() >= largest[left_out].max() - slack


def check_form(selected: ArrayLike, length: int, workload: Workload, sink_pages: int) -> None:
    """Page lists [K, width] just chosen: ascending, padded, valid, as many as may be, forced ones among them."""
    page_size, interval = workload.page_size, workload.interval
    held = -(-length // page_size)
    for pages in np.asarray(selected).tolist():
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
        check_form(selected.pages[b], int(length), workload, sink_pages=1)
    for step in range(interval):
        lengths = at_refresh + step
        again = select(
            *(implementation, -q, cache._replace(lengths=lengths.astype(np.int32)), workload),
            previous=selected,
            is_refresh=np.full(30, False),
        )
        assert_same_bits(again, selected)
        for b, length in enumerate(lengths):
            newest = {position // page_size for position in range(max(length - interval - step, 0), length)}
            assert all(newest <= set(row) for row in selected.pages[b].tolist()), (length, step)


@each_implementation
@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_sequences_that_do_not_refresh_keep_what_they_had(implementation: str, memory: float, rng: np.random.Generator):
    cache, q = integer_cache(LONG, rng, LENGTHS), integer_queries(LONG, rng, len(LENGTHS))
    is_refresh = np.arange(len(LENGTHS)) % 3 == 0
    is_kept = ~is_refresh | (LENGTHS == 0)
    assert is_refresh[-1] and is_kept[-1], "an empty slot keeps what it had, too"
    shape, previous = (len(LENGTHS), 2, 7), random_selection(LONG, rng, LENGTHS)
    anything = (rng.integers(-1, 70, shape), rng.choice([0.0, -0.0, -1.3, -np.inf, np.inf, np.nan], shape))
    previous = numpy_selection(
        *(np.where(is_kept[:, None, None], x, y) for x, y in zip(anything, previous, strict=True))
    )
    options: Any = {"previous": previous, "memory": memory}
    selected = select(implementation, q, cache, LONG, is_refresh=is_refresh, **options)
    fresh = select(implementation, q, cache, LONG, **options)
    for mine, old, new in zip(selected, previous, fresh, strict=True):
        assert_same_bits(mine[is_kept], np.asarray(old)[is_kept])
        assert_same_bits(mine[~is_kept], new[~is_kept])


@each_implementation
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_the_bounds_of_the_open_page_mean_nothing(
    implementation: str, storage: str, memory: float, reduction: str, rng: np.random.Generator
):
    """NaN, infinite, or those of a page that was there before; it is selected, and so are the others that were."""
    cache = integer_cache(replace(LONG, dtype=storage), rng, LENGTHS)
    q = integer_queries(LONG, rng, len(LENGTHS))
    pool, newest = cache.kv.retrieval, (np.maximum(LENGTHS, 1) - 1) // 16
    assert pool is not None and pool.k_min is not None and pool.k_max is not None
    open_pages = cache.tables.retrieval[np.arange(len(LENGTHS)), newest]
    options: Any = {
        "previous": random_selection(LONG, rng, LENGTHS),
        "memory": memory,
        "reduction": reduction,
    }
    found = []
    for low, high in ((np.nan, np.nan), (-np.inf, np.inf), (1e6, 1e6), (-1e6, -1e6), (0, 0)):
        bounds = {"k_min": pool.k_min.at[open_pages].set(low), "k_max": pool.k_max.at[open_pages].set(high)}
        one = cache._replace(kv=cache.kv._replace(retrieval=pool._replace(**bounds)))
        found.append(select(implementation, q, one, LONG, **options))
        assert_equal(found[-1], found[0])
    is_newest, is_running = found[0].pages == newest[:, None, None], LENGTHS > 0
    assert is_newest.any(-1)[is_running].all()
    assert (found[0].scores[is_running] == -np.inf)[is_newest[is_running]].all()
    assert_equal(found[0], select("reference", q, cache, LONG, **options))


@each_implementation
def test_a_sequence_of_a_ragged_batch_equals_the_same_sequence_alone(implementation: str, rng: np.random.Generator):
    cache = filled_cache(replace(LONG, batch=len(LENGTHS)), rng, LENGTHS)
    q = rng.normal(size=(len(LENGTHS), 4, 8)).astype(np.float32)
    previous = random_selection(LONG, rng, LENGTHS)
    together = select(implementation, q, cache, LONG, previous=previous, memory=0.6)
    for b in range(len(LENGTHS)):
        row = slice(b, b + 1)
        own = Selection(previous.pages[row], previous.scores[row])
        alone = select(implementation, q[row], cache.alone(b), LONG, previous=own, memory=0.6)
        assert_same_bits(alone, Selection(together.pages[row], together.scores[row]))
    assert_same_bits(together, select(implementation, q, cache, LONG, previous=previous, memory=0.6))


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
    assert (selected.pages == 40).any(-1).all()


@each_implementation
def test_a_needle_in_a_million_tokens_is_found_and_remembered(implementation: str):
    workload, cache = million_tokens()
    q = np.array([[[1.0, 0.5]]], np.float32)
    selected = select(implementation, q, cache, workload, memory=0.95)
    check_form(selected.pages[0], 1_000_000, workload, sink_pages=1)
    products = np.maximum(cache.k[0, :1_000_000, 0] @ q[0, 0], -np.inf)
    is_needle = selected.pages == 12_345
    assert products.argmax() // 64 == 12_345 and selected.scores[is_needle] == 0
    assert 12_345 not in select(implementation, -q, cache, workload, previous=selected, memory=0.0).pages
    again = select(implementation, -q, cache, workload, previous=selected, memory=0.95)
    np.testing.assert_allclose(again.scores[again.pages == 12_345], [4 * np.log(0.95)], rtol=1e-5)


# --- memory ----------------------------------------------------------------------------------------------------------


NEEDLE, RIVAL = 20, 30
"""Pages that score 100 for queries of 1 in channel 1, and 40 for those in channel 0; other pages score 0 and 20."""


def needle_cache(workload: Workload, rng: np.random.Generator, level: float) -> Cache:
    """A sequence that fills its table, with ``level`` as channel 2 of every key."""
    workload = replace(workload, batch=1)
    k = np.zeros((1, workload.context, workload.num_kv_heads, workload.head_dim), np.float32)
    page = np.arange(workload.context) // workload.page_size
    k[..., 0], k[..., 2] = 20, level
    k[:, page == NEEDLE, :, :2] = [0, 100]
    k[:, page == RIVAL, :, 0] = 40
    return filled_cache(workload, rng, [workload.context], k=k)


@each_implementation
@pytest.mark.parametrize(
    ("interval", "memory", "scale", "level"),
    [(1, 0.5, 1, 0), (4, 0.5, 1, 0), (4, 0.9, 1, 0), (1, 1.0, 1, 0), (16, 0.5, 6.4, 2**15)],
)
def test_a_page_is_remembered_until_its_share_has_decayed(
    implementation: str, interval: int, memory: float, scale: float, level: float, rng: np.random.Generator
):
    """Until the pages at the beginning have more. Also where all scores are so large that they hardly differ."""
    workload = replace(LONG, interval=interval)
    cache = needle_cache(workload, rng, level)
    selected = None
    steps_kept = -20 * scale / np.sqrt(workload.head_dim) / np.log(memory) if memory < 1 else np.inf
    for refresh in range(16):
        steps = refresh * interval
        now = cache._replace(lengths=np.array([800 + steps], np.int32))
        q = np.zeros((1, workload.retrieval * workload.group, workload.head_dim), np.float32)
        q[..., 1 if refresh == 0 else 0], q[..., 2] = scale, level
        selected = select(implementation, q, now, workload, previous=selected, memory=memory)
        check_form(selected.pages[0], 800 + steps, workload, sink_pages=1)
        left = [steps * np.log(memory)] * 2 if steps < steps_kept else []
        np.testing.assert_allclose(selected.scores[selected.pages == NEEDLE], left, rtol=1e-6)
        if refresh:
            np.testing.assert_array_equal(selected.scores[selected.pages == RIVAL], [0, 0])
    assert (steps > steps_kept) == (memory == 0.5)


@each_implementation
def test_without_memory_nothing_is_remembered(implementation: str, rng: np.random.Generator):
    """Whatever the last selection says: the lists are those after none."""
    cache, q = integer_cache(LONG, rng, LENGTHS), integer_queries(LONG, rng, len(LENGTHS))
    previous = random_selection(LONG, rng, LENGTHS)
    assert (previous.scores[LENGTHS > 0] > -np.inf).any()
    selected = select(implementation, q, cache, LONG, previous=previous, memory=0.0)
    assert_equal(selected, select(implementation, q, cache, LONG))
    assert (selected.scores == -np.inf).all()
    remembering = select(implementation, q, cache, LONG, previous=previous, memory=0.9)
    assert (remembering.pages != selected.pages).any() and (remembering.scores > -np.inf).any()


@each_implementation
def test_a_sequence_that_is_new_in_its_slot_remembers_nothing_of_the_last_one(
    implementation: str, rng: np.random.Generator
):
    cache, q = integer_cache(LONG, rng, LENGTHS), integer_queries(LONG, rng, len(LENGTHS))
    previous, is_new = random_selection(LONG, rng, LENGTHS), np.arange(len(LENGTHS)) % 2 == 0
    old, fresh, mixed = (
        select(implementation, q, cache, LONG, previous=before, memory=0.9)
        for before in (previous, None, previous.without_memory(jnp.asarray(is_new)))
    )
    for mine, without, within in zip(mixed, fresh, old, strict=True):
        np.testing.assert_array_equal(mine, np.where(is_new[:, None, None], without, within))
    assert (fresh.pages != old.pages)[is_new & (LENGTHS > 0)].any()


@each_implementation
def test_shares_are_relative_to_the_best_page_and_never_more(implementation: str, rng: np.random.Generator):
    """As far as pages are ranked: neither those of the last tokens, nor any while the selection has room for all."""
    cache = filled_cache(replace(LONG, batch=len(LENGTHS)), rng, LENGTHS)
    pool, table, previous = cache.kv.retrieval, jnp.asarray(cache.tables.retrieval), None
    assert pool is not None
    for _ in range(3):
        q = 3 * rng.normal(size=(len(LENGTHS), 4, 8)).astype(np.float32)
        previous = select(implementation, q, cache, LONG, previous=previous, memory=0.6)
        for b, length in enumerate(LENGTHS):
            end = (length - 4) // 16 if length > 6 * 16 else 0
            is_ranked = (previous.pages[b] >= 0) & (previous.pages[b] < end)
            np.testing.assert_array_equal(previous.scores[b] > -np.inf, is_ranked)
            for head in range(2 if end else 0):
                best = page_scores(jnp.asarray(q), pool, table, b, head, end, "max", 1.0).argmax()
                assert previous.scores[b, head].max() == 0
                assert previous.scores[b, head][previous.pages[b, head] == best] == 0


@each_implementation
@pytest.mark.parametrize("memory", [0.01, 0.6, 1.0])
def test_growing_sequences_remember_as_the_reference_does(implementation: str, memory: float, rng: np.random.Generator):
    """Lists made one after the other, from those before: phases, page boundaries, the first ranking, a slot reused."""
    workload = replace(LONG, context=20 * 16)
    lengths = np.array([0, 1, 86, 90, 111, 250])
    cache = integer_cache(workload, rng, lengths + 18, limit=20)
    mine = theirs = Selection.empty(6, 2, 7)
    for step in range(18):
        now = cache._replace(lengths=np.where(lengths > 0, lengths + step, 0).astype(np.int32))
        q, is_new = integer_queries(workload, rng, 6), jnp.asarray((np.arange(6) == 5) & (step == 9))
        options: Any = {"is_refresh": (np.arange(6) + step) % 4 == 0, "memory": memory}
        mine, theirs = (
            select(name, q, now, workload, previous=before.without_memory(is_new), **options)
            for name, before in ((implementation, mine), ("reference", theirs))
        )
        assert_equal(mine, theirs)
    assert ((mine.scores < 0) & (mine.scores > -np.inf)).any(-1)[3:].all()


# --- scores of one's own ---------------------------------------------------------------------------------------------


def choose(scores: ArrayLike, lengths: NDArray[np.int_], previous: Selection, **options: Any) -> Selection:
    sizes = {"interval": LONG.interval, "sink_pages": 1, "page_size": LONG.page_size, "head_dim": LONG.head_dim}
    is_refresh = jnp.asarray(options.pop("is_refresh", np.full(len(lengths), True)))
    arguments = jnp.asarray(scores, jnp.float32), jnp.asarray(lengths, jnp.int32), previous, is_refresh
    return choose_pages(*arguments, num_selected=LONG.num_selected, **sizes, **options)


@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_the_bounds_as_scores_of_ones_own_choose_the_same_pages(memory: float, rng: np.random.Generator):
    """NaN where a page is not ranked."""
    cache, q = integer_cache(LONG, rng, LENGTHS), integer_queries(LONG, rng, len(LENGTHS))
    scores = np.full((len(LENGTHS), 2, LONG.max_pages), np.nan, np.float32)
    assert cache.kv.retrieval is not None
    for b, head in np.ndindex(scores.shape[:2]):
        end = max(int(LENGTHS[b]) - LONG.interval, 0) // LONG.page_size
        arguments = jnp.asarray(q), cache.kv.retrieval, jnp.asarray(cache.tables.retrieval), b, head, end, "max", 1.0
        scores[b, head, :end] = page_scores(*arguments)
    options: Any = {"budgets": np.full(len(LENGTHS), 5, np.int32), "is_refresh": np.arange(len(LENGTHS)) % 5 > 0}
    previous = random_selection(LONG, rng, LENGTHS)
    mine = choose(scores, LENGTHS, previous, memory=memory, **options)
    assert_equal(mine, select("reference", q, cache, LONG, previous=previous, memory=memory, **options))


@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_pages_of_which_a_score_says_nothing_fill_the_list(memory: float):
    """The logarithm of no attention at all: such pages come last, and earlier ones first."""
    scores = np.full((1, 2, LONG.max_pages), -np.inf)
    scores[..., 40] = 7
    chosen = choose(scores, np.array([1119]), Selection.empty(1, 2, 7), memory=memory)
    np.testing.assert_array_equal(chosen.pages, [[[0, 1, 2, 3, 40, 69, -1]] * 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_selected": 2}, r"num_selected=2 must be at least the 3 pages that are always read"),
        ({"num_selected": 3, "sink_pages": 2}, r"num_selected=3 must be at least the 4 pages"),
        ({"interval": 18}, r"num_selected=3 must be at least the 4 pages"),
        ({"reduction": "median"}, r"reduction='median' must be \"max\" or \"mean\""),
        ({"spread": 1.5}, "spread=1.5 must be from 0 to 1"),
        ({"memory": -0.1}, "memory=-0.1 must be from 0 to 1"),
        ({"memory": float("nan")}, "memory=nan must be from 0 to 1"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(options: dict[str, Any], message: str, rng: np.random.Generator):
    cache = integer_cache(TINY["mixed"], rng, np.array([96, 1, 50, 0]))
    settings = {"num_selected": 3, "interval": 4, "sink_pages": 1, **options}
    q = jnp.asarray(integer_queries(TINY["mixed"], rng, 4))
    previous = Selection.empty(4, 2, 9)
    assert cache.kv.retrieval is not None
    arguments = (q, cache.kv.retrieval, jnp.asarray(cache.tables.retrieval), jnp.asarray(cache.lengths))
    with pytest.raises(ValueError, match=message):
        page_select(*arguments, previous, jnp.full(4, True), **settings)


def test_a_pool_without_statistics_cannot_be_selected_from(rng: np.random.Generator):
    cache = integer_cache(TINY["mixed"], rng, np.array([96, 1, 50, 0]))
    pool = without_statistics(cache.kv).retrieval
    assert pool is not None
    q, previous = jnp.asarray(integer_queries(TINY["mixed"], rng, 4)), Selection.empty(4, 2, 9)
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
