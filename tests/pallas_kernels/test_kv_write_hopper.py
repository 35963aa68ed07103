"""`kv_write` for Hopper: values (interpreted, or native on a Hopper GPU), machine code, and that nothing is copied."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import utils as interpret_utils  # the order of programs has no public name
from numpy.typing import ArrayLike, NDArray

from pallas_kernels import NO_PAGE, LayerKV, PagedKV, PageTables
from pallas_kernels.core.hopper import SHARED_MEMORY
from pallas_kernels.core.workloads import SERVING, Workload
from pallas_kernels.kv_write import mosaic_gpu, reference
from tests.pallas_kernels.cases import (
    Cache,
    abstract,
    abstract_pools,
    assert_same_bits,
    filled_cache,
    random_tokens,
    without_statistics,
)
from tests.pallas_kernels.hopper import assert_fits, compiled, evaluate, has_hopper, interpreted

SMALL = Workload(
    batch=3,
    context=256,
    retrieval=2,
    streaming=1,
    group=1,
    head_dim=64,
    page_size=32,
    sub_page_size=16,
    bits=(8, 4),
)


def _cache(workload: Workload, rng: np.random.Generator, starts: ArrayLike) -> Cache:
    """A tail with the tokens before some starts, NaN in its other rows, and pools of random bits: pages used before."""
    cache = filled_cache(workload, rng, starts, window=workload.context)

    def used(pool: PagedKV | None) -> PagedKV | None:
        return jax.tree.map(lambda x: jnp.asarray(np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape)), pool)

    return cache._replace(kv=LayerKV(used(cache.kv.retrieval), used(cache.kv.streaming), cache.kv.tail))


def _chunk(workload: Workload, rng: np.random.Generator, tokens: int, counts: ArrayLike) -> tuple[Any, Any]:
    """Keys and values of a chunk, NaN behind the counts."""
    is_behind = np.arange(tokens) >= np.asarray(counts)[:, None]
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    k[is_behind] = v[is_behind] = np.nan
    return k, v


def _assert_writes(
    cache: Cache, k: Any, v: Any, starts: ArrayLike, counts: ArrayLike, *, detect_races: bool = False
) -> LayerKV:
    """Every bit of the pools is what the reference makes of them, and of the tail but for rows after a newest token."""
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    arguments: Any = (k, v, cache.kv, cache.tables, starts, counts)
    new = evaluate(mosaic_gpu.kv_write, *arguments, detect_races=detect_races)
    expected = reference.kv_write(*arguments)
    slots = cache.tables.slots
    is_free = _is_after_the_newest(cache.kv, np.arange(len(starts)) if slots is None else slots, starts, counts)
    assert_same_bits(_without(new, is_free), _without(expected, is_free))
    return new


def _is_after_the_newest(
    kv: LayerKV, slots: Any, starts: NDArray[np.int32], counts: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Which rows [slots, page_size] of the tail a chunk may leave as it likes."""
    newest = np.full(kv.tail.k.shape[0], kv.page_size)
    has_tokens = counts > 0
    newest[np.asarray(slots)[has_tokens]] = (starts + counts - 1)[has_tokens] % kv.page_size
    return np.arange(kv.page_size) > newest[:, None]


def _without(kv: LayerKV, rows: NDArray[np.bool_]) -> LayerKV:
    """The layer with zeros in some rows [slots, page_size] of the tail."""
    zeroed = jax.tree.map(lambda x: np.where(rows[:, None, :, None], np.zeros((), x.dtype), x), kv.tail)
    return kv._replace(tail=zeroed)


SHAPES = [
    pytest.param({}, id="int8-int4"),
    pytest.param({"bits": (None, None), "head_dim": 128, "retrieval": 4, "streaming": 4}, id="bfloat16"),
    pytest.param({"bits": (4, None), "streaming": 0, "retrieval": 3}, id="all_retrieval"),
    pytest.param({"bits": (None, 8), "streaming": 2, "retrieval": 0, "head_dim": 128}, id="all_streaming"),
    pytest.param({"bits": (4, 4), "streaming_bits": (8, 8), "head_dim": 128, "sub_page_size": 8}, id="int4-int8"),
    pytest.param({"page_size": 16, "sub_page_size": 2, "bits": (4, 8)}, id="page16-sub2"),
    pytest.param({"page_size": 64, "sub_page_size": 64, "bits": (8, 8)}, id="flat64"),
    pytest.param({"page_size": 128, "sub_page_size": 2, "bits": (8, 4), "retrieval": 1}, id="page128"),
]


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_writes_what_the_reference_writes(shape: dict[str, Any], tokens: int, rng: np.random.Generator):
    """At starts within, before and after a page's end, some pages not held, into pages that were used before."""
    workload = replace(SMALL, **shape)
    size, counts = workload.page_size, np.minimum(tokens, [40, 17, 39])
    for starts in ([0, size - 1, size], [5, size + 1, 2 * size - 7]):
        cache = _cache(workload, rng, starts)
        held = [np.where(rng.random(x.shape) < 0.2, NO_PAGE, x) for x in cache.tables[:2]]
        cache = cache._replace(tables=PageTables(held[0], held[1], cache.tables.slots))
        _assert_writes(cache, *_chunk(workload, rng, tokens, counts), starts, counts)


@pytest.mark.parametrize("tokens", [1, 150])
@pytest.mark.parametrize("shape", SHAPES)
def test_means_are_those_of_the_reference(shape: dict[str, Any], tokens: int, rng: np.random.Generator):
    """Of whole steps of 1/32, whose sums are exact in any order."""
    workload = replace(SMALL, **shape, context=512, has_means=True)
    size, counts = workload.page_size, np.minimum(tokens, [150, 17, 139])

    def in_steps(x: Any) -> Any:
        return (np.round(np.asarray(x, np.float32) * 32) / 32).astype(jnp.dtype(workload.dtype))

    for starts in ([0, size - 1, size], [5, size + 1, 2 * size - 7]):
        cache = _cache(workload, rng, starts)
        held = [np.where(rng.random(x.shape) < 0.2, NO_PAGE, x) for x in cache.tables[:2]]
        kv = cache.kv._replace(tail=jax.tree.map(lambda x: jnp.asarray(in_steps(x)), cache.kv.tail))
        cache = cache._replace(kv=kv, tables=PageTables(held[0], held[1], cache.tables.slots))
        k, v = (in_steps(x) for x in _chunk(workload, rng, tokens, counts))
        _assert_writes(cache, k, v, starts, counts)


@pytest.mark.parametrize(("page_size", "tokens"), [(16, 1), (16, 90), (64, 40)])
def test_pages_that_end_with_a_chunk_are_sealed_and_stay_in_the_tail(
    page_size: int, tokens: int, rng: np.random.Generator
):
    """With chunks that begin in the page that they end, or in one before it, at its first row or a later one."""
    workload = replace(SMALL, page_size=page_size, bits=(4, 4))
    for end in (page_size, 2 * page_size):
        ends = np.full(3, end)
        counts = np.minimum([tokens, max(tokens // 2, 1), max(tokens - 7, 1)], ends)
        cache = _cache(workload, rng, ends - counts)
        new = _assert_writes(cache, *_chunk(workload, rng, tokens, counts), ends - counts, counts)
        assert new.retrieval is not None
        low, high = new.retrieval.k_min, new.retrieval.k_max
        assert low is not None and high is not None
        keys = new.tail.k[np.asarray(cache.tables.slots)][:, :2].reshape(3, 2, -1, 16, workload.head_dim)
        page = cache.tables.retrieval[:, end // page_size - 1]
        np.testing.assert_array_equal(low[page], keys.min(3))
        np.testing.assert_array_equal(high[page], keys.max(3))


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_layer_that_selects_no_pages_has_no_bounds(tokens: int, rng: np.random.Generator):
    workload, starts, counts = replace(SMALL, bits=(None, 8)), [31, 33, 57], np.minimum(tokens, [40, 17, 39])
    cache = _cache(workload, rng, starts)
    cache = cache._replace(kv=without_statistics(cache.kv))
    assert cache.kv.retrieval is not None and cache.kv.retrieval.k_min is None
    _assert_writes(cache, *_chunk(workload, rng, tokens, counts), starts, counts)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["retrieval", "streaming"])
def test_one_pool_has_bounds_of_whole_pages(name: str, tokens: int, rng: np.random.Generator):
    workload, starts, counts = replace(SMALL, page_size=64), [63, 33, 57], np.minimum(tokens, [40, 17, 39])
    cache = _cache(workload, rng, starts)
    pool: Any = getattr(cache.kv, name)
    pool = pool._replace(k_min=pool.k_min[:, :, :1], k_max=pool.k_max[:, :, :1])
    cache = cache._replace(kv=cache.kv._replace(**{name: pool}))
    _assert_writes(cache, *_chunk(workload, rng, tokens, counts), starts, counts)


@pytest.mark.parametrize("tokens", [1, 40])
def test_sequences_without_slots_have_the_first_rows_of_the_tail(tokens: int, rng: np.random.Generator):
    starts, counts = [31, 33, 57], np.minimum(tokens, [40, 17, 39])
    cache = _cache(SMALL, rng, starts)
    tail = jax.tree.map(lambda x: x[np.append(cache.tables.slots, 0)], cache.kv.tail)
    cache = cache._replace(kv=cache.kv._replace(tail=tail), tables=cache.tables._replace(slots=None))
    _assert_writes(cache, *_chunk(SMALL, rng, tokens, counts), starts, counts)


@pytest.mark.parametrize("tokens", [1, 24, 70])
def test_a_program_waits_for_its_copies(tokens: int, rng: np.random.Generator):
    """Also where it reads rows of the tail that it then overwrites with those of another page."""
    starts, counts = [3, 31, 56], np.minimum(tokens, [70, 9, 24])
    cache = _cache(replace(SMALL, page_size=64), rng, starts)
    _assert_writes(cache, *_chunk(SMALL, rng, tokens, counts), starts, counts, detect_races=True)


@pytest.mark.skipif(has_hopper(), reason="only the interpreter has an order")
@pytest.mark.parametrize("tokens", [1, 70])
def test_no_two_programs_touch_the_same_memory(tokens: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """So they may run in the opposite order; the detector of races looks at one program at a time."""
    ordered = interpret_utils.get_indices

    def backwards(grid: tuple[int, ...], index: Any) -> tuple[Any, ...]:
        return ordered(grid, math.prod(grid) - 1 - index)

    monkeypatch.setattr(interpret_utils, "get_indices", backwards)
    jax.clear_caches()
    starts, counts = [3, 63, 56], np.minimum(tokens, [70, 9, 24])
    cache = _cache(replace(SMALL, page_size=64), rng, starts)
    _assert_writes(cache, *_chunk(SMALL, rng, tokens, counts), starts, counts)
    jax.clear_caches()


def test_chunks_and_steps_of_any_size_leave_the_same_pages(rng: np.random.Generator):
    """What a page holds does not depend on how its tokens were cut."""
    lengths = np.array([61, 64, 17], np.int32)
    cache = filled_cache(SMALL, rng, lengths, window=SMALL.context)
    kv = _cache(SMALL, rng, [0] * 3).kv
    first = 0
    for end in (7, 16, 17, 31, 32, 33, 61, 63, 64):
        tokens = 1 if end - first == 1 else 28
        padding = [(0, 0), (0, tokens - (end - first)), (0, 0), (0, 0)]
        nan = jnp.asarray(np.nan, SMALL.dtype)
        k, v = (np.pad(x[:, first:end], padding, constant_values=nan) for x in (cache.k, cache.v))
        counts = np.clip(lengths - first, 0, end - first)
        kv = evaluate(mosaic_gpu.kv_write, k, v, kv, cache.tables, np.minimum(first, lengths), counts)
        first = end
    for pair in zip(jax.tree.leaves(kv), jax.tree.leaves(cache.kv), strict=True):
        mine, theirs = map(np.asarray, pair)
        is_written = theirs != 255 if theirs.dtype == np.uint8 else ~np.isnan(theirs.astype(np.float32))
        np.testing.assert_array_equal(mine[is_written], theirs[is_written])


@pytest.mark.parametrize("tokens", [1, 8])
def test_empty_slots_change_nothing_and_pages_that_are_not_held_stay(tokens: int, rng: np.random.Generator):
    """Also where an empty slot's start lies behind the table."""
    starts = [0, 64 - tokens, 10_000]
    cache = _cache(SMALL, rng, [0, 64 - tokens, 0])
    for table in cache.tables[:2]:
        np.asarray(table)[1] = NO_PAGE
    before = jax.tree.map(np.asarray, cache.kv)
    k, v = _chunk(SMALL, rng, tokens, [0, tokens, 0])
    new = _assert_writes(cache, k, v, starts, [0, tokens, 0])
    assert_same_bits(new[:2], before[:2])
    slot = np.asarray(cache.tables.slots)[1]
    np.testing.assert_array_equal(new.tail.k[slot, :, -tokens:], k[1].swapaxes(0, 1))
    assert_same_bits(*(jax.tree.map(lambda x: np.delete(x, slot, axis=0), kv.tail) for kv in (new, before)))


@pytest.mark.parametrize("tokens", [1, 32])
def test_rows_and_channels_of_one_value_of_outliers_of_ties_and_of_tiny_numbers(tokens: int, rng: np.random.Generator):
    """What does not vary divides by nothing; whole steps have every second code at a tie, rounded to even."""
    workload = replace(SMALL, head_dim=128)
    cache = _cache(workload, rng, [32 - tokens] * 3)
    k, v = (np.array(random_tokens(workload, rng, 32)) for _ in range(2))
    k[0], v[0] = 3.25, 0.0
    ties = np.concatenate([np.arange(127) + 0.5, [255.0]])
    ties[0] = 0.0
    v[1], v[2, :, 0] = np.arange(128) * 2.0, ties
    v[2, :, 1] = np.linspace(-3e-7, 5e-7, 128)  # float16 rounds the least number, up or down
    v[2, ::2, 2] = 6e4 * np.sign(v[2, ::2, 2].astype(np.float32))
    k[1, :, :, 3], k[1, :, :, 5] = 6e4, 0.0
    k[2, :16, :, :64] = np.append(ties[:15], 255.0)[:, None, None]
    k[2, 16:, :, 7] = 1e-30 * np.arange(16)[:, None]
    tail = [
        jnp.asarray(old).at[cache.tables.slots].set(np.swapaxes(new, 1, 2))
        for old, new in zip(cache.kv.tail, (k, v), strict=True)
    ]
    cache = cache._replace(kv=cache.kv._replace(tail=cache.kv.tail._make(tail)))
    k, v = k[:, 32 - tokens :], v[:, 32 - tokens :]
    _assert_writes(cache, k, v, [32 - tokens] * 3, [tokens] * 3)


@pytest.mark.parametrize("tokens", [1, 20])
def test_tokens_after_a_million_go_where_the_table_says(tokens: int, rng: np.random.Generator):
    cache = _cache(SMALL, rng, [0, 31, 40])
    tables = []
    for table in cache.tables[:2]:
        long = np.full((3, 1_000_064 // SMALL.page_size), NO_PAGE, np.int32)
        long[:, -2:] = np.asarray(table)[:, :2]
        tables.append(long)
    k, v = _chunk(SMALL, rng, tokens, [tokens] * 3)
    starts = [1_000_000, 1_000_031, 1_000_040]  # 1,000,000 begins a page
    new = _assert_writes(
        cache._replace(tables=PageTables(tables[0], tables[1], cache.tables.slots)), k, v, starts, [tokens] * 3
    )
    page, slot = np.asarray(cache.tables.retrieval)[1, 0], np.asarray(cache.tables.slots)[1]
    assert new.retrieval is not None and new.retrieval.k_min is not None
    keys = np.append(np.asarray(cache.kv.tail.k)[slot, :2, 16:31], k[1, :1, :2].swapaxes(0, 1), axis=1)
    np.testing.assert_array_equal(new.retrieval.k_min[page, :, 1], keys.min(1))


def _arguments(workload: Workload, tokens: int) -> tuple[Any, ...]:
    new = abstract(workload.batch, tokens, workload.num_kv_heads, workload.head_dim, dtype=workload.dtype)
    kv = abstract_pools(workload, 4 * workload.max_pages)
    kv = LayerKV(kv.retrieval if workload.retrieval else None, kv.streaming if workload.streaming else None, kv.tail)
    table = abstract(workload.batch, workload.max_pages)
    tables = PageTables(table, table, abstract(workload.batch))
    return kv, new, new, tables, abstract(workload.batch), abstract(workload.batch)


def _write(kv: Any, k: Any, v: Any, tables: Any, starts: Any, counts: Any) -> LayerKV:
    return mosaic_gpu.kv_write(k, v, kv, tables, starts, counts)


@pytest.mark.parametrize(("head_dim", "bits"), [(64, (8, 4)), (128, (4, None))])
@pytest.mark.parametrize(
    ("page_size", "sub_page_size", "rows"), [(16, 2, 16), (16, 4, 16), (64, 16, 32), (64, 64, 64), (128, 128, 128)]
)
def test_every_launch_of_a_chunk_compiles(
    page_size: int, sub_page_size: int, rows: int, head_dim: int, bits: tuple[int | None, int | None]
):
    assert mosaic_gpu.heuristic(page_size, sub_page_size) == mosaic_gpu.Config(rows=rows)
    shape = {"page_size": page_size, "sub_page_size": sub_page_size, "head_dim": head_dim, "bits": bits}
    _, kernels = compiled(_write, *_arguments(replace(SMALL, **shape), 512))
    assert_fits(kernels, count=1)


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize(("head_dim", "bits"), [(64, (4, 4)), (128, (8, 8)), (128, (None, None))])
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_every_launch_with_means_compiles(
    page_size: int, head_dim: int, bits: tuple[int | None, int | None], tokens: int
):
    workload = replace(SMALL, page_size=page_size, head_dim=head_dim, bits=bits, has_means=True)
    _, kernels = compiled(_write, *_arguments(workload, tokens))
    assert_fits(kernels, count=1)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("sub_page_size", [0, 1, 4, 8, 16, 32, 64, 128])
def test_tiles_are_whole_sub_pages_and_divide_the_page(page_size: int, sub_page_size: int):
    rows = mosaic_gpu.heuristic(page_size, min(sub_page_size, page_size)).rows
    assert rows in (16, 32, 64, 128) and page_size % rows == 0
    assert sub_page_size == 0 or rows % min(sub_page_size, page_size) == 0


@pytest.mark.parametrize(("head_dim", "bits"), [(64, (4, 8)), (128, (8, None))])
@pytest.mark.parametrize("heads", [(4, 4), (2, 0), (2, 1)])
def test_every_launch_of_a_step_compiles(heads: tuple[int, int], head_dim: int, bits: tuple[int | None, int | None]):
    workload = replace(SMALL, retrieval=heads[0], streaming=heads[1], head_dim=head_dim, bits=bits, batch=256)
    _, kernels = compiled(_write, *_arguments(workload, 1))
    assert_fits(kernels, count=1)


@pytest.mark.parametrize(("page_size", "sub_page_size"), [(16, 2), (64, 64), (128, 2), (128, 128)])
def test_steps_of_pages_of_any_size_compile(page_size: int, sub_page_size: int):
    """With room for three programs on a multiprocessor: in most steps, most of them only write a row."""
    workload = replace(SMALL, page_size=page_size, sub_page_size=sub_page_size, head_dim=128, bits=(4, 8))
    _, kernels = compiled(_write, *_arguments(workload, 1))
    assert_fits(kernels, count=1)
    assert kernels[0].registers <= 128 and kernels[0].shared_memory <= SHARED_MEMORY // 3


@pytest.mark.parametrize(
    ("name", "tokens", "is_looped"),
    [
        ("llama3_8b_8k_int8", 1, True),
        ("llama3_8b_8k_int8", 512, False),
        ("llama3_8b_8k", 1, False),
        ("smollm2_135m_8k_int4", 1, True),
    ],
)
def test_donated_pools_are_updated_in_place_and_read_again(name: str, tokens: int, is_looped: bool):
    """Also in a loop, as the decode loop of the engine has it: no copy of any pool."""
    arguments = _arguments(SERVING[name], tokens)
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))

    def once(kv: LayerKV, *new: Any) -> tuple[LayerKV, jax.Array]:
        kv = _write(kv, *new)
        pages = (x[new[2].retrieval[:, 0]].astype(jnp.float32) for x in jax.tree.leaves(kv))
        return kv, sum(map(jnp.sum, pages), start=jnp.float32(0))

    def looped(kv: LayerKV, *new: Any) -> tuple[LayerKV, jax.Array]:
        def step(carry: tuple[LayerKV, jax.Array]) -> tuple[LayerKV, jax.Array]:
            kv, result = once(carry[0], *new)
            return kv, carry[1] + result

        return jax.lax.while_loop(lambda carry: carry[1] < 100, step, (kv, jnp.float32(0)))

    executable, _ = compiled(looped if is_looped else once, *arguments, donate=(0,))
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 64 * 1024
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", executable.as_text())
    assert all(math.prod(int(n) for n in shape.split(",") if n) < 1024 for shape in copied), copied


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"dtype": "float32"}, "the kernel writes bfloat16 tokens, not float32, float32"),
        ({"head_dim": 96}, "the kernel is made for a head_dim of 64 or 128, not 96"),
        ({"page_size": 48}, "the kernel is made for pages of 16, 32, 64 or 128 tokens, not 48"),
    ],
)
def test_refuses_what_it_is_not_made_for(shape: dict[str, Any], reason: str):
    arguments = _arguments(replace(SMALL, **shape), 1)
    with interpreted(), pytest.raises(NotImplementedError, match=re.escape(reason)):
        jax.eval_shape(_write, *arguments)


def test_refuses_pages_of_another_dtype():
    arguments = _arguments(replace(SMALL, bits=(None, None)), 1)
    kv = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), arguments[0])
    reason = "the tail, pages that are not quantised, bounds of keys and means must be bfloat16"
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(_write, kv, *arguments[1:])


def test_refuses_a_device_that_is_no_hopper_gpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is a GPU")
    with pytest.raises(NotImplementedError, match="need a Hopper GPU"):
        jax.eval_shape(_write, *_arguments(SMALL, 1))
