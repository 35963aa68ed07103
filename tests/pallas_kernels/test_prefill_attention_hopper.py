"""The Hopper kernel of `prefill_attention`: values against the reference, its walks, and machine code for an H200.

Values are interpreted on the CPU, or computed on a Hopper GPU where one is.
"""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from pallas_kernels import BlockList, BlockMeans, BlockRanges, PageTables, Walk, prefill_attention, visible_walk
from pallas_kernels.core.paging import LayerKV
from pallas_kernels.core.workloads import SERVING, Workload
from pallas_kernels.kv_write import reference as kv_write_reference
from pallas_kernels.prefill_attention import mosaic_gpu, reference
from pallas_kernels.prefill_attention.blocks import Ranges, Window
from pallas_kernels.prefill_attention.codes import RowsInRegisters
from pallas_kernels.prefill_attention.program import KEYS, QUERIES, Heads, Steps, place_of
from tests.pallas_kernels import hopper
from tests.pallas_kernels.cases import (
    Cache,
    abstract,
    abstract_pools,
    assert_close,
    assert_same_bits,
    filled_cache,
    random_tokens,
)
from tests.pallas_kernels.hopper import compiled, evaluate, interpreted
from tests.pallas_kernels.test_prefill_walk import as_list, poison

SMALL = Workload(
    batch=1,
    context=448,
    chunk=150,
    retrieval=1,
    streaming=1,
    group=1,
    head_dim=64,
    sub_page_size=16,
    sink=20,
    prefill_local=101,
)
"""Two query blocks; neither sink nor window is a multiple of the page."""


def _chunk(workload: Workload, starts: list[int], counts: list[int]) -> tuple[Cache, tuple[Any, ...]]:
    """A chunk after random histories, which has been written: NaN in every token that does not exist."""
    rng = np.random.default_rng(1)
    cache = filled_cache(workload, rng, starts, window=workload.prefill_local)
    q = random_tokens(workload, rng, workload.chunk, workload.num_heads)
    k, v = (random_tokens(workload, rng, workload.chunk) for _ in range(2))
    for b, count in enumerate(counts):
        q[b, count:] = k[b, count:] = v[b, count:] = np.nan
    at = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    write: Any = kv_write_reference.kv_write
    cache = cache._replace(kv=write(k, v, cache.kv, cache.tables, *at))
    return cache, (q, k, v, cache.kv, cache.tables, *at)


def _attend(workload: Workload) -> Any:
    return partial(mosaic_gpu.prefill_attention, sink=workload.sink, local=workload.prefill_local)


def _check(workload: Workload, starts: list[int], counts: list[int], *, detect_races: bool = False) -> None:
    """Real rows are as the reference has them, all others zero."""
    _, arguments = _chunk(workload, starts, counts)
    _assert_attends(workload, arguments, counts, detect_races=detect_races)


def _assert_attends(
    workload: Workload,
    arguments: tuple[Any, ...],
    counts: list[int],
    walk: Walk | None = None,
    *,
    detect_races: bool = False,
) -> None:
    """Real rows are as the reference has them, all others zero."""
    out = np.asarray(evaluate(partial(_attend(workload), walk=walk), *arguments, detect_races=detect_races), np.float32)
    window = {"sink": workload.sink, "local": workload.prefill_local}
    expected = np.asarray(jax.jit(partial(reference.prefill_attention, walk=walk, **window))(*arguments), np.float32)
    for b, count in enumerate(counts):
        assert_close(out[b, :count], expected[b, :count], "bfloat16")
        np.testing.assert_array_equal(out[b, count:], 0.0)


@pytest.mark.parametrize(
    ("fields", "starts", "counts"),
    [
        pytest.param({"group": 3}, [200], [140], id="embedded"),
        pytest.param({"head_dim": 128, "page_size": 16, "bits": (8, 8)}, [211], [150], id="int8"),
        pytest.param({"page_size": 16, "bits": (8, 8), "sub_page_size": 2}, [211], [40], id="int8-sub-pages-of-2"),
        pytest.param({"head_dim": 128, "bits": (8, None), "sub_page_size": 4}, [211], [40], id="int8-sub-pages-of-4"),
        pytest.param({"bits": (8, 4), "sub_page_size": 64}, [211], [40], id="int8-whole-pages"),
        pytest.param({"page_size": 16, "bits": (4, 4), "sub_page_size": 8}, [211], [40], id="int4-sub-pages-of-8"),
        pytest.param(
            {"head_dim": 128, "page_size": 128, "bits": (4, 8), "sub_page_size": 128},
            [131],
            [128],
            id="int4-whole-pages",
        ),
        pytest.param({"sink": 300, "prefill_local": 1000, "bits": (None, 8)}, [192], [70], id="window-of-everything"),
        pytest.param({"page_size": 32, "bits": (4, 4)}, [289], [129], id="int4-halves-of-32"),
        pytest.param({"head_dim": 128, "page_size": 128, "bits": (8, 4)}, [130], [64], id="int8-int4"),
        pytest.param({"bits": (4, None), "streaming": 0}, [192], [128], id="all_retrieval"),
        pytest.param({"bits": (8, None), "retrieval": 0, "group": 2}, [290], [150], id="all_streaming"),
        pytest.param({"sink": 0, "prefill_local": 1}, [70], [130], id="window-of-one"),
        pytest.param({"bits": (4, 4), "streaming_bits": (8, 8), "retrieval": 2}, [200], [140], id="int4-beside-int8"),
    ],
)
def test_values(fields: dict[str, Any], starts: list[int], counts: list[int]):
    _check(replace(SMALL, **fields), starts, counts)


def test_ragged_batches_about_page_and_block_boundaries():
    starts, counts = [0, 63, 64, 65, 127, 128, 129, 300, 191], [1, 40, 64, 63, 65, 0, 1, 40, 64]
    _check(replace(SMALL, batch=len(starts), chunk=65), starts, counts)


@pytest.mark.parametrize("fields", [{}, {"bits": (8, 4), "page_size": 128, "group": 2}], ids=str)
def test_chunks_that_end_in_the_page_in_which_they_begin(fields: dict[str, Any]):
    """They read the page's tokens before them in the tail, which is longer than the chunk."""
    workload = replace(SMALL, chunk=10, batch=6, sink=140, prefill_local=5, **fields)
    size = workload.page_size
    starts = [0, size - 10, size + 1, 2 * size, 3 * size - 1, 3 * size - 3]
    _check(workload, starts, [10, 10, 9, 3, 1, 0])


def test_a_program_without_history_reads_no_page_and_no_tail():
    """Pages and tail hold NaN."""
    workload = replace(SMALL, batch=2)
    starts, counts = [0, 0], [150, 30]
    _, arguments = _chunk(workload, starts, counts)
    blank = list(arguments)
    blank[3] = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), blank[3])
    out = evaluate(partial(_attend(workload), has_history=False), *blank)
    assert_same_bits(out, evaluate(_attend(workload), *arguments))


def test_a_sequence_is_the_same_in_any_batch():
    workload = replace(SMALL, batch=3, chunk=40)
    cache, arguments = _chunk(workload, [200, 77, 0], [40, 33, 17])
    together = evaluate(_attend(workload), *arguments)
    rows, one = slice(1, 2), cache.alone(1)
    alone = [x[rows] for x in arguments[:3]], [x[rows] for x in arguments[5:]]
    assert_same_bits(together[rows], evaluate(_attend(workload), *alone[0], one.kv, one.tables, *alone[1]))


def _ranges(rng: np.random.Generator, starts: list[int], heads: int, tokens: int) -> BlockRanges:
    """Random ranges of history blocks, that differ by head and query block; some reach behind the history."""
    blocks = max(starts) // KEYS + 2
    shape = (3, len(starts), heads, -(-tokens // QUERIES))
    sinks, low, high = (jnp.asarray(x, jnp.int32) for x in np.sort(rng.integers(0, blocks + 1, shape), axis=0))
    return BlockRanges(sinks=sinks, low=low, high=high, queries=QUERIES, keys=KEYS)


@pytest.mark.parametrize(
    ("fields", "starts", "counts"),
    [
        pytest.param({"retrieval": 2, "group": 2}, [500], [140], id="two-query-blocks"),
        pytest.param({"retrieval": 2, "bits": (8, 8)}, [640], [129], id="int8"),
        pytest.param({"bits": (4, 4), "streaming_bits": (8, 8)}, [300], [40], id="stored-apart"),
        pytest.param({"chunk": 40, "batch": 3}, [0, 390, 257], [40, 0, 33], id="ragged"),
    ],
)
def test_ranges_per_head(fields: dict[str, Any], starts: list[int], counts: list[int]):
    """Where classes are stored apart, one of them without a walk."""
    rng, workload = np.random.default_rng(2), replace(SMALL, context=704, **fields)
    _, arguments = _chunk(workload, starts, counts)
    walk = Walk(*(_ranges(rng, starts, heads, workload.chunk) for heads in (workload.retrieval, workload.streaming)))
    if workload.streaming_bits is not None:
        walk = walk._replace(streaming=None)
    _assert_attends(workload, arguments, counts, walk)


def _list(rng: np.random.Generator, starts: list[int], heads: int, tokens: int, share: float = 0.5) -> BlockList:
    """Random lists of history blocks, that differ by head and query block; some reach behind the history."""
    shape = (len(starts), heads, -(-tokens // QUERIES), max(starts) // KEYS + 2)
    return as_list(rng.random(shape) < share, QUERIES, KEYS)


def _poisoned(workload: Workload, kv: LayerKV, tables: PageTables, walk: Walk) -> LayerKV:
    """The layer with NaN in all pages that a head's list has not, of any query block."""
    for name, visited in walk._asdict().items():
        if isinstance(visited, BlockList):
            blocks = visited.is_visited(-(-workload.max_pages * workload.page_size // KEYS))
            pages = (
                np.asarray(blocks).any(axis=2).repeat(KEYS // workload.page_size, axis=-1)[..., : workload.max_pages]
            )
            kv = kv._replace(**{name: poison(getattr(kv, name), getattr(tables, name), pages)[0]})
    return kv


def _with_means(
    rng: np.random.Generator, walk: Walk, workload: Workload, tables: PageTables, starts: list[int], counts: list[int]
) -> Walk:
    """The walk with random means in its lists, NaN where they stand in for nothing: they replace what is not listed."""
    size, start = workload.page_size, np.asarray(starts)
    page = start // size * size
    own = np.where(start + np.asarray(counts) <= page + size, page, start)
    for name, visited in walk._asdict().items():
        if not isinstance(visited, BlockList):
            continue
        blocks = workload.max_pages * size // KEYS
        table = np.asarray(getattr(tables, name))[:, : blocks * KEYS // size]
        held = (table >= 0).reshape(len(starts), blocks, -1).all(axis=-1)
        stands_in = held & ((np.arange(blocks) + 1) * KEYS <= own[:, None])
        stands_in = (stands_in[:, None, None] & ~np.asarray(visited.is_visited(blocks))).any(axis=2)
        means = rng.normal(size=(2, *stands_in.shape, workload.head_dim))
        means = np.where(stands_in[..., None], means, np.nan).astype(jnp.bfloat16)
        walk = walk._replace(**{name: replace(visited, means=BlockMeans(*map(jnp.asarray, means)))})
    return walk


LISTS = [
    pytest.param({"retrieval": 2, "group": 2}, [500], [140], id="two-query-blocks"),
    pytest.param({"retrieval": 2, "bits": (8, 8), "head_dim": 128}, [640], [129], id="int8"),
    pytest.param({"bits": (4, 4), "page_size": 16}, [611], [40], id="int4"),
    pytest.param({"bits": (8, 4), "page_size": 128, "streaming": 0}, [390], [150], id="all_retrieval"),
    pytest.param({"bits": (4, 4), "streaming_bits": (8, 8)}, [300], [40], id="stored-apart"),
    pytest.param({"chunk": 40, "batch": 3}, [0, 390, 257], [40, 0, 33], id="ragged"),
    pytest.param({"chunk": 10, "batch": 2, "page_size": 128}, [516, 385], [10, 9], id="in-the-page-of-the-tail"),
]
"""Shapes, starts and counts."""


@pytest.mark.parametrize("has_means", [False, True], ids=["alone", "with-means"])
@pytest.mark.parametrize(("fields", "starts", "counts"), LISTS)
def test_lists_per_head(fields: dict[str, Any], starts: list[int], counts: list[int], has_means: bool):
    """NaN in what no query block lists, and in means that stand in for nothing; streaming heads have ranges."""
    rng, workload = np.random.default_rng(3), replace(SMALL, context=704, **fields)
    cache, arguments = _chunk(workload, starts, counts)
    ranges = _ranges(rng, starts, workload.streaming, workload.chunk) if workload.streaming else None
    walk = Walk(_list(rng, starts, workload.retrieval, workload.chunk), ranges)
    kv = _poisoned(workload, arguments[3], cache.tables, walk)
    if has_means:
        walk = _with_means(rng, walk, workload, cache.tables, starts, counts)
    _assert_attends(workload, (*arguments[:3], kv, *arguments[4:]), counts, walk)


@pytest.mark.parametrize("means_of", ["retrieval", "streaming", "both"])
def test_lists_of_both_classes(means_of: str):
    """One is longer than the other, and has more means."""
    rng, starts, counts = np.random.default_rng(4), [560], [140]
    workload = replace(SMALL, context=704, prefill_local=400)
    cache, arguments = _chunk(workload, starts, counts)
    walk = Walk(*(_list(rng, starts, 1, workload.chunk) for _ in range(2)))
    found = _with_means(rng, walk, workload, cache.tables, starts, counts)
    assert isinstance(found.streaming, BlockList) and isinstance(walk.streaming, BlockList)
    short = replace(found.streaming, blocks=found.streaming.blocks[..., :4])
    if short.means is not None:
        short = replace(short, means=BlockMeans(*(x[:, :, :3] for x in short.means)))
    found = found._replace(streaming=short)
    if means_of == "retrieval":
        found = found._replace(streaming=replace(short, means=None))
    elif means_of == "streaming":
        found = found._replace(retrieval=walk.retrieval)
    _assert_attends(workload, arguments, counts, found)


def test_more_means_than_a_block_has():
    """132 of a history of 17,000 tokens: one query block lists few of those blocks, the other one all but 20."""
    rng, starts, counts = np.random.default_rng(5), [17_000], [140]
    workload = replace(SMALL, context=17_152, streaming=0)
    cache, arguments = _chunk(workload, starts, counts)
    visited = rng.random((1, 1, 2, 134)) < 0.03
    visited[:, :, 1, 20:] = True  # so that it reads one block of means
    walk = Walk(as_list(visited, QUERIES, KEYS))
    kv = _poisoned(workload, arguments[3], cache.tables, walk)
    walk = _with_means(rng, walk, workload, cache.tables, starts, counts)
    _assert_attends(workload, (*arguments[:3], kv, *arguments[4:]), counts, walk)


@pytest.mark.parametrize("bits", [(None, None), (8, 4)], ids=str)
def test_a_list_of_all_blocks_gives_the_same_bits_as_no_walk(bits: tuple[int | None, int | None]):
    """With spare room, and with means, of which none stands in."""
    rng, starts, counts = np.random.default_rng(6), [300], [140]
    workload = replace(SMALL, bits=bits)
    cache, arguments = _chunk(workload, starts, counts)
    every = Walk(as_list(np.ones((1, 1, 2, 4), bool), QUERIES, KEYS, width=6))
    expected = evaluate(_attend(workload), *arguments)
    for walk in (every, _with_means(rng, every, workload, cache.tables, starts, counts)):
        assert_same_bits(evaluate(partial(_attend(workload), walk=walk), *arguments), expected)


def test_the_default_walk_gives_the_same_bits():
    starts, counts = [300], [140]
    _, arguments = _chunk(SMALL, starts, counts)
    walk = visible_walk(
        arguments[3],
        *(jnp.asarray(x, jnp.int32) for x in (starts, counts)),
        tokens=SMALL.chunk,
        sink=SMALL.sink,
        local=SMALL.prefill_local,
        queries=QUERIES,
        keys=KEYS,
    )
    out, expected = (evaluate(partial(_attend(SMALL), walk=given), *arguments) for given in (walk, None))
    assert_same_bits(out, expected)


def _held(layout: Any, shape: tuple[int, int]) -> NDArray[np.int64]:
    """The numbers of the elements that each thread has of an array, [warps, lanes, registers, elements]."""
    layout = layout.to_mgpu()
    tiled = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead = tiled.ndim - len(tile)
        counts = [whole // size for whole, size in zip(tiled.shape[lead:], tile, strict=True)]
        split = tiled.reshape(*tiled.shape[:lead], *np.ravel(np.column_stack([counts, tile])))
        tiled = split.transpose(*range(lead), *range(lead, split.ndim, 2), *range(lead + 1, split.ndim, 2))
    held = np.empty((4, 32, np.prod(layout.registers_shape(shape)), tiled.shape[-1]), np.int64)
    for thread in np.ndindex(4, 32):
        index: list[Any] = [slice(None)] * tiled.ndim
        for number, dims in zip(thread, (layout.warp_dims, layout.lane_dims), strict=True):
            sizes = [tiled.shape[dim] if isinstance(dim, int) else dim.times for dim in dims]
            for dim, i in zip(dims, np.unravel_index(number, sizes), strict=True):
                if isinstance(dim, int):
                    index[dim] = i
        held[thread] = tiled[tuple(index)].reshape(held.shape[2:])
    return held


@pytest.mark.parametrize(
    ("columns", "width"), [(128, 64), (64, 64), (64, 32), (32, 32)], ids=["int8", "int4", "int8-of-64", "int4-of-64"]
)
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64])
def test_each_thread_has_the_bounds_of_its_keys(columns: int, width: int, size: int):
    """Register by register, the same channels of the sub-page. The interpreter knows no layouts."""
    rows = min(max(4 * size, 16), 64)
    through, size = RowsInRegisters(rows, columns, width), min(size, rows)
    keys, bounds = _held(through.layout, (rows, columns)), _held(through.by_sub(size), (rows // size, columns))
    assert sorted(keys.ravel()) == list(range(rows * columns))
    for warp, lane in np.ndindex(4, 32):
        mine = np.empty(bounds.shape[2], object)
        mine[:] = [*bounds[warp, lane]]
        repeated = np.stack([*through.repeated(mine).ravel()])
        row, column = np.divmod(keys[warp, lane], columns)
        np.testing.assert_array_equal(repeated, row // size * columns + column)


@pytest.mark.parametrize("bits", [(None, None), (8, 8)], ids=str)
def test_races(bits: tuple[int | None, int | None]):
    """Every slot of the rings is used again."""
    _check(replace(SMALL, head_dim=128, bits=bits, chunk=140), [300], [135], detect_races=True)


@pytest.mark.parametrize("bits", [(None, None), (8, 8)], ids=str)
def test_races_with_means(bits: tuple[int | None, int | None]):
    rng, starts, counts = np.random.default_rng(7), [600], [135]
    workload = replace(SMALL, context=768, head_dim=128, bits=bits, chunk=140)
    cache, arguments = _chunk(workload, starts, counts)
    walk = Walk(_list(rng, starts, 1, workload.chunk))
    walk = _with_means(rng, walk, workload, cache.tables, starts, counts)
    _assert_attends(workload, arguments, counts, walk, detect_races=True)


def test_exactly_the_blocks_with_a_visible_key_are_visited():
    """Against every key of random chunks, histories and windows; a query block without queries visits nothing.

    The own keys begin with the chunk, or up to 63 tokens before it.
    """
    rng = np.random.default_rng(0)
    n, tokens = 100, 3 * QUERIES
    for sink, local in ((0, 1), (5, 77), (128, 256), (300, 128), (130, 385), (1000, 2000)):
        starts, counts = rng.integers(0, 1000, n), rng.integers(0, tokens + 1, n)
        starts[::3] -= starts[::3] % 64
        own = starts.copy()
        own[::2] -= own[::2] % 64
        windows = [Window(0, 2**30), Window(sink, local)]
        first, many, before = (jnp.asarray(x, jnp.int32) for x in (starts, counts, own))
        found = np.asarray(mosaic_gpu.walks(first, many, before, tokens, windows))
        assert found.shape == (n, 2, 3, 6) and found.dtype == np.int32
        for (b, index, block), walk in zip(np.ndindex(n, 2, 3), found.reshape(-1, 6), strict=True):
            queries = starts[b] + np.arange(block * QUERIES, min((block + 1) * QUERIES, int(counts[b])))[:, None]
            keys = np.arange(int(starts[b] + counts[b]))
            visible = keys <= queries
            if index == 1:
                visible &= (keys > queries - local) | (keys < sink)
            seen = keys[visible.any(0)]
            old, new = seen[seen < own[b]], seen[seen >= own[b]] - own[b]
            expected = [("old", i) for i in sorted({*(old // KEYS)})] + [("new", i) for i in sorted({*(new // KEYS)})]
            steps = Steps(Ranges(*walk[:3]), Ranges(*walk[3:]))
            visited = [steps.visit(jnp.int32(step)) for step in range(int(steps.count))]
            names = [("old" if visit.is_history else "new", int(visit.block)) for visit in visited]
            assert names == expected, (sink, local, b, block)


@pytest.mark.parametrize("counts", [(8, 8), (0, 6), (6, 0)], ids=str)
def test_every_query_block_has_one_program_and_long_walks_come_first(counts: tuple[int, int]):
    batch, blocks = 2, 4
    names = ("retrieval", "streaming")
    heads = [Heads("retrieval", 0, counts[0], Window(0, 2**30))] if counts[0] else []
    heads += [Heads("streaming", counts[0], counts[1], Window(5, 7))] if counts[1] else []
    programs = jnp.arange(batch * blocks * sum(counts))
    places = place_of(programs, heads, batch, blocks)
    index, head, b, row = (np.broadcast_to(x, programs.shape) for x in places[:4])
    assert len({*zip(head.tolist(), b.tolist(), row.tolist(), strict=True)}) == programs.size
    assert {*row.tolist()} == {i * QUERIES for i in range(blocks)}
    is_streaming = np.array([heads[i].name == names[1] for i in index])
    np.testing.assert_array_equal(is_streaming, head >= counts[0])
    length = np.where(is_streaming, 0, 1 + row)
    assert (np.diff(length) <= 0).all()
    assert (np.diff(row[is_streaming]) <= 0).all()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": "float32"}, "queries, keys and values must be bfloat16, not float32"),
        ({"head_dim": 32}, "head_dim must be 64 or 128, not 32"),
        ({"page_size": 48}, "page_size must be 16, 32, 64 or 128, not 48"),
        ({"bits": (4, 4), "sub_page_size": 1}, "sub-pages of quantised keys must have 2 tokens or more, not 1"),
        (
            {"bits": (8, 8), "sub_page_size": 2, "head_dim": 128},
            "sub-pages of quantised keys must have 4 tokens or more, not 2",
        ),
    ],
)
def test_refusals(fields: dict[str, Any], reason: str):
    arguments = _arguments(replace(SMALL, **fields))
    with interpreted(), pytest.raises(NotImplementedError, match=re.escape(reason)):
        jax.eval_shape(_attend(SMALL), *arguments)


def test_refuses_walks_that_it_does_not_take():
    blocks, means = jnp.zeros((1, 1, 2, 1), jnp.int32), jnp.zeros((1, 1, 1, 64))
    lists = BlockList(blocks=blocks, means=BlockMeans(means, means), queries=QUERIES, keys=KEYS)
    for walk, reason in (
        (Walk(lists), "means of blocks must be bfloat16, not float32"),
        (
            Walk(replace(lists, means=None, queries=64)),
            "blocks of the walk must be 128 queries and 128 keys, not (64, 128)",
        ),
        (
            Walk(None, BlockRanges(sinks=blocks, low=blocks, high=blocks, queries=QUERIES, keys=64)),
            "blocks of the walk must be 128 queries and 128 keys, not (128, 64)",
        ),
    ):
        with interpreted(), pytest.raises(NotImplementedError, match=re.escape(reason)):
            jax.eval_shape(partial(_attend(SMALL), walk=walk), *_arguments(SMALL))


def test_refuses_pages_of_another_dtype():
    q, k, v, kv, *rest = _arguments(SMALL)
    kv = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), kv)
    with interpreted(), pytest.raises(NotImplementedError, match="pages must be bfloat16, int8 or int4, not float32"):
        jax.eval_shape(_attend(SMALL), q, k, v, kv, *rest)


def test_refuses_bounds_of_another_dtype():
    q, k, v, kv, *rest = _arguments(replace(SMALL, bits=(8, 8)))
    bounds = jax.ShapeDtypeStruct(kv.retrieval.k_min.shape, jnp.float32)
    kv = kv._replace(retrieval=kv.retrieval._replace(k_min=bounds, k_max=bounds))
    with interpreted(), pytest.raises(NotImplementedError, match="bounds of keys must be bfloat16, not float32"):
        jax.eval_shape(_attend(SMALL), q, k, v, kv, *rest)


def test_refuses_a_device_that_is_no_hopper_gpu():
    if jax.default_backend() != "cpu":
        pytest.skip("the default device is a GPU")
    with pytest.raises(NotImplementedError, match="need a Hopper GPU"):
        jax.eval_shape(_attend(SMALL), *_arguments(SMALL))


def _arguments(workload: Workload, pages: int = 9) -> tuple[Any, ...]:
    q, k = (
        abstract(1, workload.chunk, heads, workload.head_dim, dtype=workload.dtype)
        for heads in (workload.num_heads, workload.num_kv_heads)
    )
    kv = abstract_pools(workload, pages)
    kv = LayerKV(
        retrieval=kv.retrieval if workload.retrieval else None,
        streaming=kv.streaming if workload.streaming else None,
        tail=kv.tail,
    )
    tables = PageTables(abstract(1, pages), abstract(1, pages), abstract(1))
    return q, k, k, kv, tables, abstract(1), abstract(1)


def _bytes(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


FEW: list[dict[str, Any]] = [
    {},
    {"bits": (8, 8)},
    {"bits": (4, 4)},
    {"head_dim": 64},
    {"head_dim": 64, "bits": (4, 4), "page_size": 128},
    {"bits": (4, 4), "page_size": 32, "streaming": 0},
    {"head_dim": 64, "bits": (8, 4), "page_size": 16, "retrieval": 0},
    {"bits": (8, 8), "page_size": 16, "sub_page_size": 4},
    {"bits": (4, 4), "page_size": 32, "sub_page_size": 8},
]
ALL = [
    {"head_dim": head_dim, "bits": bits, "page_size": page_size}
    for head_dim in (64, 128)
    for bits in ((None, None), (8, 8), (4, 4), (8, 4), (None, 8), (4, None))
    for page_size in (16, 32, 64, 128)
] + [
    {"head_dim": head_dim, "bits": bits, "page_size": page_size, "sub_page_size": sub_page_size}
    for head_dim in (64, 128)
    for bits in ((8, 8), (4, 4), (8, 4), (4, 8), (8, None))
    for page_size, sub_page_size in ((16, 2), (64, 4), (128, 8), (64, 64))
    if (head_dim, bits, sub_page_size) != (128, (8, 8), 2)
]


@pytest.mark.parametrize("fields", [*FEW, *(pytest.param(fields, marks=pytest.mark.sweep) for fields in ALL)], ids=str)
def test_machine_code(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """One kernel without spills, whose products overlap; a prompt of 10⁶ tokens takes memory for the own keys alone."""
    said, read = [], hopper._kernel
    monkeypatch.setattr(hopper, "_kernel", lambda folder, file: said.append(file.read_text()) or read(folder, file))
    workload = replace(SERVING["llama3_8b_8k"], chunk=2048, **fields)
    arguments = _arguments(workload, 1_000_000 // workload.page_size)
    program, kernels = compiled(_attend(workload), *arguments)
    hopper.assert_fits(kernels, count=1)
    assert len(said) == 1 and "serialized" not in said[0], said  # ptxas: "wgmma.mma_async instructions are serialized"
    assert program.memory_analysis().temp_size_in_bytes < _bytes(arguments[1:3]) + 64 * 1024


def test_machine_code_without_history():
    """No copy of the chunk."""
    workload = replace(SERVING["llama3_8b_8k"], chunk=2048, bits=(8, 8))
    program, kernels = compiled(partial(_attend(workload), has_history=False), *_arguments(workload))
    hopper.assert_fits(kernels, count=1)
    assert program.memory_analysis().temp_size_in_bytes < 64 * 1024


def test_machine_code_with_a_walk():
    workload = replace(SERVING["llama3_8b_8k"], chunk=2048)
    ranges = abstract(1, workload.retrieval, 2048 // QUERIES)
    walk = Walk(BlockRanges(sinks=ranges, low=ranges, high=ranges, queries=QUERIES, keys=KEYS))

    def attend(walk: Walk, *arguments: Any) -> jax.Array:
        return _attend(workload)(*arguments, walk=walk)

    arguments = _arguments(workload, 15_625)
    program, kernels = compiled(attend, walk, *arguments)
    hopper.assert_fits(kernels, count=1)
    assert program.memory_analysis().temp_size_in_bytes < _bytes(arguments[1:3]) + 64 * 1024


@pytest.mark.parametrize(
    ("fields", "has_means"),
    [
        *((fields, True) for fields in FEW),
        *((fields, False) for fields in ({}, {"bits": (8, 8)}, {"bits": (8, 8), "page_size": 128}, {"bits": (4, 4)})),
        *(pytest.param(fields, has_means, marks=pytest.mark.sweep) for fields in ALL for has_means in (False, True)),
    ],
    ids=str,
)
def test_machine_code_with_a_list(fields: dict[str, Any], has_means: bool, monkeypatch: pytest.MonkeyPatch):
    """Of a history of a million tokens: lists of 8192 blocks for each of 16 query blocks take memory, not pages."""
    said, read = [], hopper._kernel
    monkeypatch.setattr(hopper, "_kernel", lambda folder, file: said.append(file.read_text()) or read(folder, file))
    workload = replace(SERVING["llama3_8b_8k"], chunk=2048, **fields)
    name = "retrieval" if workload.retrieval else "streaming"
    heads = getattr(workload, name)
    means = abstract(1, heads, 8192, workload.head_dim, dtype="bfloat16")
    lists = BlockList(
        blocks=abstract(1, heads, 16, 8192),
        means=BlockMeans(means, means) if has_means else None,
        queries=QUERIES,
        keys=KEYS,
    )

    def attend(walk: Walk, *arguments: Any) -> jax.Array:
        return _attend(workload)(*arguments, walk=walk)

    arguments = _arguments(workload, 1_000_000 // workload.page_size)
    program, kernels = compiled(attend, Walk(**{name: lists}), *arguments)
    hopper.assert_fits(kernels, count=1)
    assert len(said) == 1 and "serialized" not in said[0], said
    numbers = workload.num_kv_heads * 16 * 8448  # entries of steps, and of biases
    used = _bytes(arguments[1:3]) + 4 * numbers * (4 if has_means else 2) + _bytes(lists.means or ())
    assert program.memory_analysis().temp_size_in_bytes < used


def test_dispatch_chooses_the_kernel():
    with interpreted():
        jaxpr = jax.make_jaxpr(partial(prefill_attention, sink=1, local=2))(*_arguments(SMALL))
    assert "copy_gmem_to_smem" in str(jaxpr)
