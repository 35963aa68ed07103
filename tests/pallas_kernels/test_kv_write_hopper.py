"""`kv_write` for Hopper: values (interpreted, or native on a Hopper GPU), machine code, and that nothing is copied."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import ArrayLike

from pallas_kernels import NO_PAGE, LayerKV, PageTables
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
from tests.pallas_kernels.hopper import assert_fits, compiled, evaluate, interpreted

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
"""Two tiles a page for no sub-page that is longer than 16; heads of a class that do not fill the warps."""


def _assert_writes(
    cache: Cache,
    k: Any,
    v: Any,
    starts: ArrayLike,
    counts: ArrayLike,
    k_bounded: Any = None,
    *,
    detect_races: bool = False,
) -> LayerKV:
    """Every bit of the pools is what the reference makes of them."""
    arguments: Any = (k, v, cache.kv, cache.tables, np.asarray(starts, np.int32), np.asarray(counts, np.int32))

    def write(k_bounded: Any, *arguments: Any) -> LayerKV:
        return mosaic_gpu.kv_write(*arguments, k_bounded=k_bounded)

    new = evaluate(write, k_bounded, *arguments, detect_races=detect_races)
    assert_same_bits(new, reference.kv_write(*arguments, k_bounded=k_bounded))
    return new


def _used(kv: LayerKV, rng: np.random.Generator) -> LayerKV:
    """Pools full of what they might have held before: random bits, infinities and NaN too; finite statistics."""

    def bits(x: jax.Array) -> jax.Array:
        return jnp.asarray(np.frombuffer(rng.bytes(x.nbytes), x.dtype).reshape(x.shape))

    used = jax.tree.map(bits, kv)
    if kv.retrieval is None or kv.retrieval.k_min is None:
        return used
    statistics = (jnp.asarray(1e3 * rng.normal(size=kv.retrieval.k_min.shape), jnp.bfloat16) for _ in range(2))
    return used._replace(retrieval=used.retrieval._replace(**dict(zip(("k_min", "k_max"), statistics, strict=True))))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="int8-int4"),
        pytest.param({"bits": (None, None), "head_dim": 128, "retrieval": 4, "streaming": 4}, id="bfloat16"),
        pytest.param({"bits": (4, None), "streaming": 0, "retrieval": 3}, id="all_retrieval"),
        pytest.param({"bits": (None, 8), "streaming": 2, "retrieval": 0, "head_dim": 128}, id="all_streaming"),
        pytest.param({"page_size": 16, "sub_page_size": 4}, id="page16"),
        pytest.param({"page_size": 16, "sub_page_size": 2}, id="page16-sub2"),
        pytest.param({"page_size": 64, "sub_page_size": 64, "bits": (8, 8)}, id="flat64"),
    ],
)
def test_writes_what_the_reference_writes(shape: dict[str, Any], tokens: int, rng: np.random.Generator):
    """At starts within, before and after a page's end, some pages not held, into pages that were used before."""
    workload = replace(SMALL, **shape)
    cache = filled_cache(workload, rng, [0] * 3, window=workload.context)
    tables = PageTables(*(np.where(rng.random(x.shape) < 0.2, NO_PAGE, x) for x in cache.tables))
    cache = cache._replace(kv=_used(cache.kv, rng), tables=tables)
    k, v = (random_tokens(workload, rng, tokens) for _ in range(2))
    size = workload.page_size
    for starts in ([0, size - 1, size], [5, size + 1, 2 * size - 7]):
        kv = _assert_writes(cache, k, v, starts, np.minimum(tokens, [40, 17, 39]))
        cache = cache._replace(kv=kv)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "shape", [{"bits": (4, 4), "streaming_bits": (8, 8)}, {"page_size": 64, "sub_page_size": 64, "head_dim": 128}]
)
def test_statistics_may_bound_other_keys_than_pages_hold(shape: dict[str, Any], tokens: int, rng: np.random.Generator):
    workload = replace(SMALL, **shape)
    cache = filled_cache(workload, rng, [0] * 3, window=workload.context)
    k, v, bounded = (random_tokens(workload, rng, tokens) for _ in range(3))
    for starts in ([0, 31, 32], [5, 33, 57]):
        cache = cache._replace(kv=_assert_writes(cache, k, v, starts, np.minimum(tokens, [40, 17, 39]), bounded))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    "shape", [{"bits": (4, 4), "streaming": 0, "retrieval": 3}, {"bits": (4, 4), "streaming_bits": (8, 8)}]
)
def test_a_layer_that_selects_no_pages_has_no_statistics(shape: dict[str, Any], tokens: int, rng: np.random.Generator):
    workload = replace(SMALL, **shape)
    cache = filled_cache(workload, rng, [0] * 3, window=workload.context)
    cache = cache._replace(kv=without_statistics(cache.kv))
    k, v, bounded = (random_tokens(workload, rng, tokens) for _ in range(3))
    _assert_writes(cache, k, v, [5, 33, 57], np.minimum(tokens, [40, 17, 39]), bounded)


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_launch_with_other_keys_for_statistics_compiles(head_dim: int, tokens: int):
    kv, k, *rest = _arguments(replace(SMALL, head_dim=head_dim, bits=(4, 4)), tokens)

    def write(kv: Any, k_bounded: Any, k: Any, *rest: Any) -> LayerKV:
        v, *where = rest
        return mosaic_gpu.kv_write(k, v, kv, *where, k_bounded=k_bounded)

    _, kernels = compiled(write, kv, k, k, *rest)
    assert_fits(kernels, count=1)


@pytest.mark.parametrize("tokens", [1, 24])
def test_no_two_programs_touch_the_same_memory(tokens: int, rng: np.random.Generator):
    cache = filled_cache(SMALL, rng, [0] * 3, window=SMALL.context)
    k, v = (random_tokens(SMALL, rng, tokens) for _ in range(2))
    _assert_writes(cache, k, v, [3, 31, 56], np.minimum(tokens, [24, 9, 24]), detect_races=True)


def test_chunks_and_steps_of_any_size_leave_the_same_pages(rng: np.random.Generator):
    """Statistics are set by a sub-page's first token and merged from then on, however the tokens are cut."""
    lengths = np.array([61, 48, 17], np.int32)
    cache = filled_cache(SMALL, rng, lengths, window=SMALL.context)
    expected = jax.tree.map(np.asarray, cache.kv)
    kv = _used(cache.kv, rng)
    first = 0
    for end in (7, 16, 17, 18, 33, 61):
        tokens = 1 if end - first == 1 else 28
        padding = [(0, 0), (0, tokens - (end - first)), (0, 0), (0, 0)]
        nan = jnp.asarray(np.nan, SMALL.dtype)
        k, v = (np.pad(x[:, first:end], padding, constant_values=nan) for x in (cache.k, cache.v))
        counts = np.clip(lengths - first, 0, end - first)
        kv = evaluate(mosaic_gpu.kv_write, k, v, kv, cache.tables, np.minimum(first, lengths), counts)
        first = end
    for mine, theirs in zip(jax.tree.leaves(kv), jax.tree.leaves(expected), strict=True):
        is_written = theirs != 255 if theirs.dtype == np.uint8 else ~np.isnan(theirs.astype(np.float32))
        np.testing.assert_array_equal(np.asarray(mine)[is_written], theirs[is_written])


@pytest.mark.parametrize("tokens", [1, 8])
def test_empty_slots_and_pages_that_are_not_held_change_nothing(tokens: int, rng: np.random.Generator):
    """Also where an empty slot's start lies behind the table."""
    cache = filled_cache(SMALL, rng, [0] * 3, window=SMALL.context)
    cache = cache._replace(kv=_used(cache.kv, rng))
    for table in cache.tables:
        table[1] = NO_PAGE
    before = jax.tree.map(np.asarray, cache.kv)
    k, v = (random_tokens(SMALL, rng, tokens) for _ in range(2))
    new = _assert_writes(cache, k, v, [0, 40, 10_000], [0, tokens, 0])
    assert_same_bits(new, before)


@pytest.mark.parametrize("tokens", [1, 20])
def test_rows_of_one_value_of_outliers_and_of_ties(tokens: int, rng: np.random.Generator):
    """Constant rows divide by nothing; a row of 0 … 255 halves has every second code at a tie, rounded to even."""
    cache = filled_cache(replace(SMALL, head_dim=128), rng, [0] * 3, window=SMALL.context)
    k, v = (random_tokens(replace(SMALL, head_dim=128), rng, tokens) for _ in range(2))
    k[0], v[0] = 3.25, 0.0
    k[1, :, :, 3], v[1] = 6e4, np.arange(128) * 2.0
    k[2, :, 0] = v[2, :, 0] = np.concatenate([np.arange(127) + 0.5, [255.0]])
    k[2, :, 0, 0] = v[2, :, 0, 0] = 0.0
    _assert_writes(cache, k, v, [0, 30, 40], [tokens] * 3)


@pytest.mark.parametrize("tokens", [1, 20])
def test_tokens_after_a_million_go_where_the_table_says(tokens: int, rng: np.random.Generator):
    cache = filled_cache(SMALL, rng, [0] * 3, window=SMALL.context)
    tables = []
    for table in cache.tables:
        long = np.full((3, 1_000_064 // SMALL.page_size), NO_PAGE, np.int32)
        long[:, -2:] = table[:, :2]
        tables.append(long)
    k, v = (random_tokens(SMALL, rng, tokens) for _ in range(2))
    starts = [1_000_000, 1_000_031, 1_000_040]  # 1,000,000 begins a page
    new = _assert_writes(cache._replace(tables=PageTables(*tables)), k, v, starts, [tokens] * 3)
    page = cache.tables.retrieval[0, 0]
    assert new.retrieval is not None and new.retrieval.k_min is not None
    np.testing.assert_array_equal(new.retrieval.k_min[page, :, 0], k[0, :16, :2].min(0))


def _arguments(workload: Workload, tokens: int) -> tuple[Any, ...]:
    new = abstract(workload.batch, tokens, workload.num_kv_heads, workload.head_dim, dtype=workload.dtype)
    kv = abstract_pools(workload, 4 * workload.max_pages)
    kv = LayerKV(kv.retrieval if workload.retrieval else None, kv.streaming if workload.streaming else None)
    table = abstract(workload.batch, workload.max_pages)
    return kv, new, new, PageTables(table, table), abstract(workload.batch), abstract(workload.batch)


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


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("sub_page_size", [0, 1, 4, 8, 16, 32, 64, 128])
def test_tiles_are_whole_sub_pages_and_divide_the_page(page_size: int, sub_page_size: int):
    rows = mosaic_gpu.heuristic(page_size, min(sub_page_size, page_size)).rows
    assert rows in (16, 32, 64, 128) and page_size % rows == 0
    assert sub_page_size == 0 or rows % min(sub_page_size, page_size) == 0


@pytest.mark.parametrize(("head_dim", "bits"), [(64, (4, 8)), (128, (8, None))])
@pytest.mark.parametrize("heads", [(4, 4), (2, 0), (2, 1)])
def test_every_launch_of_a_step_compiles(heads: tuple[int, int], head_dim: int, bits: tuple[int | None, int | None]):
    """With 4, 2 and 1 heads a program."""
    workload = replace(SMALL, retrieval=heads[0], streaming=heads[1], head_dim=head_dim, bits=bits, batch=256)
    _, kernels = compiled(_write, *_arguments(workload, 1))
    assert_fits(kernels, count=1)


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
        ({"page_size": 48}, "the kernel is made for pages of 16, 32, 64 or 128 tokens, alike in both pools, not [48]"),
    ],
)
def test_refuses_what_it_is_not_made_for(shape: dict[str, Any], reason: str):
    arguments = _arguments(replace(SMALL, **shape), 1)
    with interpreted(), pytest.raises(NotImplementedError, match=re.escape(reason)):
        jax.eval_shape(_write, *arguments)


def test_refuses_pages_of_another_dtype():
    arguments = _arguments(replace(SMALL, bits=(None, None)), 1)
    kv = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), arguments[0])
    reason = "pages that are not quantised, and statistics, must be bfloat16"
    with interpreted(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(_write, kv, *arguments[1:])


def test_refuses_a_device_that_is_no_hopper_gpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is a GPU")
    with pytest.raises(NotImplementedError, match="need a Hopper GPU"):
        jax.eval_shape(_write, *_arguments(SMALL, 1))
