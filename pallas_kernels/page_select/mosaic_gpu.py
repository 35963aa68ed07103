"""`page_select` for Hopper: one kernel scores the pages, another one selects by the scores.

Scoring. A program takes every n-th tile of one sequence: the statistics of a few pages and some KV heads, one row of
shared memory per sub-page. With s the spread, a channel scores ``(q + s·|q|)/2 · k_max + (q − s·|q|)/2 · k_min``, so
two products on tensor cores score all rows for the queries of all heads of the tile; each row keeps its head's scores.
Copies begin and end at multiples of eight rows, and include the rows around a page that does not.

Selecting. The list begins and ends with the pages that are always selected; only those between are ranked. These are
sealed, so that their bounds are complete: the open page, whose bounds may hold anything, is always selected. Scores are
stored as integers of the same order. Bisection finds the last selected score, and running counts of selected pages give
the page of each entry of the list. Lists are updated in place (see `kv_write`); those of sequences that do not select
stay unchanged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import Device, refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.mosaic import product, tile
from pallas_kernels.core.paging import NO_PAGE, PagedKV
from pallas_kernels.page_select.selection import Rule, Selection

_ROWS = 64
"""Rows per tile: those of one wgmma."""

_CHUNKS, _CHUNK = 128, 16
"""Ranked pages are counted in blocks of chunks, one chunk per thread."""

_BLOCK = _CHUNKS * _CHUNK

_LEAST = jnp.iinfo(jnp.int32).min
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_COALESCED = plgpu.Layout.TILED(plgpu.Tiling(((512,), (128,), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
"""[block]: neighbouring threads hold neighbouring pages."""

_BY_CHUNK = plgpu.Layout.TILED(plgpu.Tiling(((_CHUNKS, 4), (32, 4))), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
"""[chunks, pages of a chunk]: a thread holds a whole chunk."""


@dataclass(frozen=True)
class Config:
    """A launch of the scoring kernel: the programs per sequence, and the tiles in flight per program."""

    splits: int
    stages: int


class _Shape(NamedTuple):
    """The sizes of the op's arrays and its options, for which both kernels are built."""

    num_heads: int
    group: int
    head_dim: int
    page_size: int
    subs: int
    max_pages: int
    width: int
    num_selected: int
    interval: int
    sink_pages: int
    reduction: str
    spread: float
    memory: float

    @property
    def rule(self) -> Rule:
        """How scores become lists."""
        return Rule(self.num_selected, self.interval, self.sink_pages, self.memory, self.page_size, self.head_dim)

    @property
    def heads(self) -> int:
        """KV heads per tile: as many as read the fewest rows per head, the most of several, up to 64 queries."""
        fitting = [
            n
            for n in range(1, self.num_heads + 1)
            if self.num_heads % n == 0 and _window(n * self.subs) <= _ROWS and (n == 1 or n * self.group <= 64)
        ]
        return min(fitting, key=lambda n: (_window(n * self.subs) / n, -n))

    @property
    def rows(self) -> int:
        """Rows of a tile per page."""
        return _window(self.heads * self.subs)

    @property
    def pages(self) -> int:
        """Pages per tile."""
        return _ROWS // self.rows

    @property
    def columns(self) -> int:
        """Queries per tile, padded because a register layout needs whole tiles for each warp."""
        return _rounded(self.heads * self.group, 32 * 64 // self.head_dim)

    @property
    def blocks(self) -> int:
        """Blocks of scores per head."""
        return -(-self.max_pages // _BLOCK)


def _rounded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _window(count: int) -> int:
    """Returns the size of a window, bounded by multiples of eight, that holds ``count`` rows from any multiple."""
    return _rounded(count + 8 - math.gcd(count, 8), 8)


def _aligned(first: jax.Array, count: int) -> tuple[jax.Array, jax.Array | int]:
    """Returns the first row of the window that holds ``count`` rows from ``first`` on, and their place in it."""
    if count % 8 == 0:
        return pl.multiple_of(first, 8), 0
    offset = first % 8
    return pl.multiple_of(first - offset, 8), offset


def heuristic(batch: int, shape: _Shape, device: Device) -> Config:
    """Returns 64 KB in flight per program, so that three share a multiprocessor, and programs for all multiprocessors.

    Only some sequences of a batch select at a step, so each gets at least 32 programs if it has tiles for them.
    """
    sequences = batch * (shape.num_heads // shape.heads)
    tiles = -(-shape.max_pages // shape.pages)
    splits = min(max(3 * device.multiprocessors // sequences, 32), tiles)
    return Config(splits=splits, stages=2 * 128 // shape.head_dim)


@partial(jax.jit, static_argnames=("num_selected", "interval", "sink_pages", "reduction", "spread", "memory"))
def page_select(
    q: jax.Array,
    pages: PagedKV,
    table: jax.Array,
    lengths: jax.Array,
    previous: Selection,
    is_refresh: jax.Array,
    budgets: jax.Array,
    *,
    num_selected: int,
    interval: int,
    sink_pages: int,
    reduction: str,
    spread: float,
    memory: float,
) -> Selection:
    """Returns what `pallas_kernels.page_select` defines; the queries' factors are rounded to bfloat16.

    It is jitted for the cache: layers of one shape share the kernels, which take a second or two to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for shapes and dtypes that the kernels do not support.
    """
    device = require_hopper()
    k_min, k_max = pages.k_min, pages.k_max
    assert k_min is not None and k_max is not None
    shape = _shape_of(
        *(q, pages, table, previous.pages),
        num_selected=num_selected,
        interval=interval,
        sink_pages=sink_pages,
        reduction=reduction,
        spread=spread,
        memory=memory,
    )
    # Tokens of sequences that select, 0 for others; the same for all layers of a step.
    held = jnp.where(is_refresh, lengths, 0)
    end = jax.vmap(shape.rule.end_of_ranked)(held, budgets)
    batch = q.shape[0]
    size = f"B{batch}_K{shape.num_heads}_G{shape.group}_H{shape.head_dim}_subs{shape.subs}_pages{shape.max_pages}"
    config = configure("page_select", device.kind, size, heuristic(batch, shape, device))
    keys = _score(q, k_min, k_max, table, end, shape, config)
    kept = jnp.full_like(previous.scores, -jnp.inf)
    if memory:
        ranks = jax.vmap(shape.rule.ranks)(_score_of(keys), end, previous)
        keys = _order_key(ranks)
    selected = jax.new_ref(previous.pages)
    _choose(selected, held, end, budgets, keys, shape)
    lists = jax.freeze(selected)
    if memory:
        kept = jax.vmap(shape.rule.remembered)(ranks, lists, end)
    return Selection(lists, jnp.where(held[:, None, None] > 0, kept, previous.scores))


def _shape_of(q: jax.Array, pages: PagedKV, table: jax.Array, previous: jax.Array, **options: Any) -> _Shape:
    """Returns the shape for which the kernels are built, from the op's arrays and options.

    Raises:
      NotImplementedError: for shapes and dtypes that the kernels do not support.
    """
    assert pages.k_min is not None
    num_pages, num_heads, subs, head_dim = pages.k_min.shape
    for name, dtype in (("queries", q.dtype), ("key statistics", pages.k_min.dtype)):
        refuse_unless(dtype == jnp.bfloat16, f"{name} must be bfloat16, not {dtype}")
    shape = _Shape(
        num_heads=num_heads,
        group=q.shape[1] // num_heads,
        head_dim=head_dim,
        page_size=pages.page_size,
        subs=subs,
        max_pages=table.shape[1],
        width=previous.shape[2],
        **options,
    )
    num_selected = shape.num_selected
    refuse_unless(head_dim in (64, 128), f"{head_dim=} must be 64 or 128")
    refuse_unless(_window(subs) <= _ROWS, f"{subs} sub-pages of a page: at most {_ROWS}")
    refuse_unless(shape.group <= 128, f"{shape.group} query heads of a KV head: at most 128")
    refuse_unless(num_selected < 2**15, f"{num_selected=} must be less than {2**15}")
    rows = num_pages * num_heads * subs
    refuse_unless(
        rows % 8 == 0 and rows < 2**31, f"pools must be of 8n sub-pages and heads, less than {2**31}, not {rows}"
    )
    return shape


def _score(
    q: jax.Array,
    k_min: jax.Array,
    k_max: jax.Array,
    table: jax.Array,
    end: jax.Array,
    shape: _Shape,
    config: Config,
) -> jax.Array:
    """Returns the scores of the pages before ``end`` [B] as order keys [B, K, blocks · block] int32.

    Others are not written.
    """
    batch, _, head_dim = q.shape
    groups = shape.num_heads // shape.heads
    q = q.reshape(batch * groups, shape.heads * shape.group, head_dim)
    q = jnp.pad(q, ((0, 0), (0, shape.columns - q.shape[1]), (0, 0)))

    def score(
        end_gmem: Any, table_gmem: Any, q_gmem: Any, low_gmem: Any, high_gmem: Any, keys_gmem: Any, **scratch: Any
    ) -> None:
        b, heads, split = (jax.lax.axis_index(name) for name in ("sequence", "heads", "split"))
        end = end_gmem[b]
        count = pl.cdiv(pl.cdiv(end, shape.pages) - split, config.splits)
        tiles = _Tiles(
            shape, config, table_gmem, low_gmem, high_gmem, b, heads * shape.heads, split, end, count, scratch
        )

        @pl.when(count > 0)
        def _work() -> None:
            first_query = pl.multiple_of((b * groups + heads) * shape.columns, shape.columns)
            tiles.score_all(q_gmem.at[pl.ds(first_query, shape.columns)], keys_gmem)

    rows = [x.reshape(-1, head_dim) for x in (q, k_min, k_max)]
    keys = jax.ShapeDtypeStruct((batch, shape.num_heads, shape.blocks * _BLOCK), jnp.int32)
    return plgpu.kernel(
        score,
        out_type=keys,
        scratch_types=_score_scratch(shape, config, q.dtype, k_min.dtype),
        grid=(config.splits, groups, batch),
        grid_names=("split", "heads", "sequence"),
        compiler_params=plgpu.CompilerParams(reduction_scratch_bytes=0),  # a third program fits
        kernel_name="page_select_score",
    )(end, table, *rows)


def _score_scratch(shape: _Shape, config: Config, q_dtype: Any, statistics_dtype: Any) -> dict[str, Any]:
    """Returns the shared memory of a scoring program: factors of both bounds, a ring of tiles, and their scores."""
    return {
        "on_high": tile((shape.columns, shape.head_dim), q_dtype),
        "on_low": tile((shape.columns, shape.head_dim), q_dtype),
        "low": tile((config.stages, _ROWS, shape.head_dim), statistics_dtype),
        "high": tile((config.stages, _ROWS, shape.head_dim), statistics_dtype),
        "bounds": plgpu.SMEM((2 * _ROWS,), jnp.float32),
        "keys": plgpu.SMEM((_ROWS,), jnp.int32),
        "q_ready": plgpu.Barrier(),
        "ready": plgpu.Barrier(num_arrivals=2 * shape.pages, num_barriers=config.stages),
    }


class _Tiles(NamedTuple):
    """The tiles of one scoring program: the i-th has pages ``(split + i · splits) · pages …`` of a sequence.

    Attributes:
      shape, config: what the kernel is built for.
      table_gmem: page tables [B, max_pages].
      low_gmem, high_gmem: statistics [rows, H].
      b: the sequence.
      first_head: the first KV head of the tiles.
      split: the program's number among those that share the sequence.
      end: the first page after the ranked ones.
      count: number of tiles.
      scratch: see `_score_scratch`.
    """

    shape: _Shape
    config: Config
    table_gmem: Any
    low_gmem: Any
    high_gmem: Any
    b: jax.Array
    first_head: jax.Array
    split: jax.Array
    end: jax.Array
    count: jax.Array
    scratch: dict[str, Any]

    def first_page(self, i: jax.Array) -> jax.Array:
        """Returns the first page of the i-th tile."""
        return (self.split + i * self.config.splits) * self.shape.pages

    def windows(self, i: jax.Array) -> list[tuple[jax.Array, jax.Array | int]]:
        """Returns where the statistics of the i-th tile's pages are. Pages after the last one repeat it."""
        first, shape = self.first_page(i), self.shape
        pages = [self.table_gmem[self.b, jnp.minimum(first + n, self.end - 1)] for n in range(shape.pages)]
        page_rows, rows = shape.num_heads * shape.subs, shape.heads * shape.subs
        return [_aligned(page * page_rows + self.first_head * shape.subs, rows) for page in pages]

    def fetch(self, i: jax.Array) -> None:
        """Starts copying the i-th tile."""
        slot, shape = i % self.config.stages, self.shape
        for n, (start, _) in enumerate(self.windows(i)):
            target = pl.ds(n * shape.rows, shape.rows)
            for statistics_gmem, name in ((self.low_gmem, "low"), (self.high_gmem, "high")):
                source = statistics_gmem.at[pl.ds(start, shape.rows)]
                plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot, target], self.scratch["ready"].at[slot])

    def score_all(self, queries_gmem: Any, keys_gmem: Any) -> None:
        """Scores all tiles for queries [columns, H], with as many tiles in flight as the ring holds."""
        scratch, stages = self.scratch, self.config.stages
        plgpu.copy_gmem_to_smem(queries_gmem, scratch["on_high"], scratch["q_ready"])
        for i in range(stages):
            pl.when(i < self.count)(lambda i=i: self.fetch(jnp.int32(i)))
        plgpu.barrier_wait(scratch["q_ready"])
        _split(scratch["on_high"], scratch["on_low"], self.shape.spread)

        @pl.loop(0, self.count)
        def _score_tile(i: jax.Array) -> None:
            slot = i % stages
            plgpu.barrier_wait(scratch["ready"].at[slot])
            on_high, on_low = (scratch[name].transpose((1, 0)) for name in ("on_high", "on_low"))
            factors = (scratch["high"].at[slot], on_high), (scratch["low"].at[slot], on_low)
            bounds = product(_ROWS, self.shape.columns, *factors)
            first_rows = [n * self.shape.rows + offset for n, (_, offset) in enumerate(self.windows(i))]
            scores = _page_scores(bounds, first_rows, scratch["bounds"], self.shape)
            pl.when(i + stages < self.count)(lambda: self.fetch(i + stages))
            self.store(i, scores, first_rows, keys_gmem)

    def store(self, i: jax.Array, scores: jax.Array, first_rows: list[Any], keys_gmem: Any) -> None:
        """Writes the scores [rows] of the i-th tile as order keys."""
        first, shape = self.first_page(i), self.shape
        self.scratch["keys"][...] = _order_key(scores)
        for n, row in enumerate(first_rows):
            for head in range(shape.heads):
                keys_gmem[self.b, self.first_head + head, first + n] = self.scratch["keys"][row + head * shape.subs]


def _split(q_smem: Any, on_low_smem: Any, spread: float) -> None:
    """Replaces q by the factor of the upper bounds, and writes the factor of the lower ones to ``on_low_smem``."""
    q = plgpu.load(q_smem, layout=plgpu.Layout.SMEM_GMEM_COPY(q_smem.shape, q_smem.dtype, 128))
    zero = jnp.zeros((), q.dtype)
    rising, falling = (part.astype(jnp.float32) for part in (jnp.maximum(q, zero), jnp.minimum(q, zero)))
    more, less = jnp.float32((1 + spread) / 2), jnp.float32((1 - spread) / 2)
    q_smem[...] = (more * rising + less * falling).astype(q.dtype)
    on_low_smem[...] = (less * rising + more * falling).astype(q.dtype)
    plgpu.commit_smem()


def _page_scores(bounds: jax.Array, first_rows: list[Any], bounds_smem: Any, shape: _Shape) -> jax.Array:
    """Returns scores [rows], which are valid in the first row of each page and head; other rows may hold anything.

    Args:
      bounds: [rows, queries] in the WGMMA layout.
      first_rows: first row of each page.
      bounds_smem: [2 · rows] float32.
      shape: the sizes.
    """
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, bounds.shape, axis, layout=plgpu.Layout.WGMMA) for axis in range(2)
    )
    local = row - first_rows[0]
    for n, first_row in enumerate(first_rows[1:], 1):
        local = jnp.where(row >= n * shape.rows, row - first_row, local)
    member = column - jax.lax.div(local, jnp.int32(shape.subs)) * shape.group
    if shape.reduction == "max":
        return _max_over_subs(jnp.where((member >= 0) & (member < shape.group), bounds, -jnp.inf), bounds_smem, shape)
    best = [
        _max_over_subs(jnp.where(member == query, bounds, -jnp.inf), bounds_smem, shape) for query in range(shape.group)
    ]
    return sum(best[1:], start=best[0]) * (1 / shape.group)


def _max_over_subs(bounds: jax.Array, bounds_smem: Any, shape: _Shape) -> jax.Array:
    """Returns for each row the maximum [rows] over as many rows, from this one on, as a page has sub-pages."""
    best = plgpu.layout_cast(jnp.max(bounds, axis=1), _BY_ROW)
    bounds_smem[pl.ds(0, _ROWS)] = best
    for sub in range(1, shape.subs):
        best = jnp.maximum(best, plgpu.load(bounds_smem.at[pl.ds(sub, _ROWS)], layout=_BY_ROW))
    return best


def _order_key(scores: jax.Array) -> jax.Array:
    """Returns integers in the order of the scores; zeros of either sign are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _score_of(keys: jax.Array) -> jax.Array:
    """Returns the scores of order keys."""
    bits = jnp.where(keys < 0, keys ^ jnp.int32(0x7FFFFFFF), keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _choose(
    selected_gmem: Any, held: jax.Array, end: jax.Array, budgets: jax.Array, keys: jax.Array, shape: _Shape
) -> None:
    """Writes the page lists [B, K, width] of the sequences that select; tokens, ends and budgets are [B]."""
    batch = held.shape[0]
    chunks = keys.reshape(batch, shape.num_heads, shape.blocks, _CHUNKS, _CHUNK)
    slots = _rounded(shape.width, 128)

    def choose(
        held_gmem: Any, end_gmem: Any, budgets_gmem: Any, keys_gmem: Any, chunks_gmem: Any, **scratch: Any
    ) -> None:
        b, head = (jax.lax.axis_index(name) for name in ("sequence", "head"))
        tokens, end = held_gmem[b], end_gmem[b]
        slot = plgpu.broadcasted_iota(jnp.int32, (slots,), 0, layout=plgpu.Layout.WG_STRIDED((slots,), vec_size=1))

        def write(pages: jax.Array) -> None:
            """Writes a list. After the last page, it has those that tokens until the next selection will begin."""
            is_reached = (pages * shape.page_size < tokens + (shape.interval - 1)) & (pages < shape.max_pages)
            scratch["pages"][...] = jnp.where(is_reached, pages, NO_PAGE)

            @pl.loop(0, shape.width)
            def _copy(i: jax.Array) -> None:
                selected_gmem[b, head, i] = scratch["pages"][i]

        @pl.when((tokens > 0) & (end == 0))
        def _every_page() -> None:
            write(slot)

        @pl.when(end > 0)
        def _best_pages() -> None:
            free = budgets_gmem[b] - shape.sink_pages - (pl.cdiv(tokens, shape.page_size) - end)
            keys, chunks = (view_gmem.at[b, head] for view_gmem in (keys_gmem, chunks_gmem))
            ranked = _Ranked(keys, chunks, jnp.int32(shape.sink_pages), end)
            entry = slot - shape.sink_pages
            best = _best(ranked, free, entry, scratch["counts"], scratch["chunks"])
            write(jnp.where(entry < 0, slot, jnp.where(entry < free, best, end + entry - free)))

    plgpu.kernel(
        choose,
        out_type=(),
        scratch_types={
            "counts": plgpu.SMEM((_CHUNKS,), jnp.int32),
            "chunks": plgpu.SMEM((_CHUNKS,), jnp.int32),
            "pages": plgpu.SMEM((slots,), jnp.int32),
        },
        grid=(shape.num_heads, batch),
        grid_names=("head", "sequence"),
        kernel_name="page_select_choose",
    )(held, end, budgets, keys, chunks)


class _Ranked(NamedTuple):
    """The keys [blocks · block] of one head, also as [blocks, chunks, chunk]; pages ``first … end − 1`` count."""

    keys_gmem: Any
    chunks_gmem: Any
    first: jax.Array
    end: jax.Array

    @property
    def blocks(self) -> jax.Array:
        """Blocks that hold ranked pages."""
        return pl.cdiv(self.end, _BLOCK)

    def in_chunks(self, block: jax.Array) -> jax.Array:
        """Returns the keys [chunks, chunk] of a block; pages that are not ranked have the least number."""
        keys = plgpu.load(self.chunks_gmem.at[block], layout=_BY_CHUNK, optimized=False)
        chunk, offset = (plgpu.broadcasted_iota(jnp.int32, keys.shape, axis, layout=_BY_CHUNK) for axis in range(2))
        return self._ranked(keys, block * _BLOCK + chunk * _CHUNK + offset)

    def fold(self) -> Callable[[Callable[[jax.Array, Any], Any], Any], Any]:
        """Returns a fold over the keys [block] of blocks; it takes a step (keys, state) and the first state.

        A single block stays in registers from one fold to the next.
        """

        def load(block: jax.Array) -> jax.Array:
            keys = plgpu.load(self.keys_gmem.at[pl.ds(block * _BLOCK, _BLOCK)], layout=_COALESCED, optimized=False)
            offset = plgpu.broadcasted_iota(jnp.int32, keys.shape, 0, layout=_COALESCED)
            return self._ranked(keys, block * _BLOCK + offset)

        if self.chunks_gmem.shape[0] == 1:
            keys = load(jnp.int32(0))
            return lambda step, state: step(keys, state)
        return lambda step, state: jax.lax.fori_loop(
            0, self.blocks, lambda block, state: step(load(block), state), state
        )

    def _ranked(self, keys: jax.Array, page: jax.Array) -> jax.Array:
        return jnp.where((page >= self.first) & (page < self.end), keys, _LEAST)


def _best(ranked: _Ranked, free: jax.Array, entry: jax.Array, counts_smem: Any, chunks_smem: Any) -> jax.Array:
    """Returns the ``entry``-th page, in ascending order, of the ``free`` pages with the largest keys."""
    last, ties = _threshold(ranked, free)
    chunk_index = plgpu.broadcasted_iota(jnp.int32, (_CHUNKS,), 0, layout=_BY_CHUNK.reduce(1))
    limit = (entry + 1) << 16

    def place(
        block: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Counts the selected pages before each chunk, and finds for each entry the last chunk with no more of them."""
        above, level, found, found_chunk = state
        keys = ranked.in_chunks(block)
        is_above, is_level = keys > last, keys == last
        bit = jnp.int32(1) << plgpu.broadcasted_iota(jnp.int32, keys.shape, 1, layout=_BY_CHUNK)
        above_bits, level_bits = (jnp.sum(jnp.where(x, bit, 0), axis=1) for x in (is_above, is_level))
        counts = jnp.sum(jnp.where(is_above, jnp.int32(1), jnp.where(is_level, jnp.int32(1 << 16), 0)), axis=1)
        counts_smem[...] = counts

        def add(i: jax.Array, before: jax.Array) -> jax.Array:
            return before + jnp.where(chunk_index > i, counts_smem[i], 0)

        before = jax.lax.fori_loop(0, _CHUNKS, add, jnp.zeros_like(counts))
        total = jnp.sum(counts)
        level_before = level + (before >> 16)
        start = above + (before & 0xFFFF) + jnp.minimum(level_before, ties)
        bits = above_bits | _lowest_bits(level_bits, ties - level_before)
        chunks_smem[...] = (start << 16) | bits

        def find(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            packed = chunks_smem[i]
            is_before = packed < limit
            return jnp.where(is_before, packed, state[0]), jnp.where(is_before, block * _CHUNKS + i, state[1])

        found, found_chunk = jax.lax.fori_loop(0, _CHUNKS, find, (found, found_chunk))
        return above + (total & 0xFFFF), level + (total >> 16), found, found_chunk

    none = jnp.zeros_like(entry)
    *_, found, chunk = jax.lax.fori_loop(0, ranked.blocks, place, (jnp.int32(0), jnp.int32(0), none, none))
    return chunk * _CHUNK + _place_of_bit(found & 0xFFFF, entry - (found >> 16))


def _threshold(ranked: _Ranked, free: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the key above which pages are selected, and how many of the pages with exactly this key are selected."""
    fold = ranked.fold()

    def everywhere(value: int) -> jax.Array:
        return plgpu.layout_cast(jnp.full((_BLOCK,), value, jnp.int32), _COALESCED)

    def extend(keys: jax.Array, extremes: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns the new extremes. The least number is no key, so its complement is no key either."""
        complements = jnp.where(keys == _LEAST, _LEAST, ~keys)
        return jnp.maximum(extremes[0], keys), jnp.maximum(extremes[1], complements)

    def count(least: jax.Array) -> jax.Array:
        """Returns how many keys are at least ``least``."""

        def add(keys: jax.Array, total: jax.Array) -> jax.Array:
            return total + jnp.where(keys >= least, jnp.int32(1), jnp.int32(0))

        return jnp.sum(fold(add, everywhere(0)))

    largest, smallest = (jnp.max(x) for x in fold(extend, (everywhere(_LEAST), everywhere(_LEAST))))
    smallest = ~smallest

    def is_open(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, at_low, _ = state
        return (at_low != free) & (low + 1 < high)

    def bisect(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Halves [low, high): enough pages have a key of at least low, and too few a key of at least high."""
        low, high, at_low, at_high = state
        middle = (low & high) + ((low ^ high) >> 1)
        at_middle = count(middle)
        is_enough = at_middle >= free
        return (
            jnp.where(is_enough, middle, low),
            jnp.where(is_enough, high, middle),
            jnp.where(is_enough, at_middle, at_low),
            jnp.where(is_enough, at_high, at_middle),
        )

    everything = ranked.end - ranked.first
    low, _, at_low, at_high = jax.lax.while_loop(is_open, bisect, (smallest, largest + 1, everything, jnp.int32(0)))
    is_exact = at_low == free
    return jnp.where(is_exact, low - 1, low), jnp.where(is_exact, 0, free - at_high)


def _lowest_bits(bits: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the lowest ``count`` set bits."""

    def keep(place: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, count = state
        bit = bits & (jnp.int32(1) << place)
        is_kept = (bit != 0) & (count > 0)
        return jnp.where(is_kept, kept | bit, kept), jnp.where(is_kept, count - 1, count)

    kept, _ = jax.lax.fori_loop(0, _CHUNK, keep, (jnp.zeros_like(bits), count))
    return kept


def _place_of_bit(bits: jax.Array, rank: jax.Array) -> jax.Array:
    """Returns the place of the set bit that has ``rank`` set bits below it."""

    def look(place: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, rank = state
        is_set = (bits & (jnp.int32(1) << place)) != 0
        return jnp.where(is_set & (rank == 0), place, found), jnp.where(is_set, rank - 1, rank)

    found, _ = jax.lax.fori_loop(0, _CHUNK, look, (jnp.zeros_like(bits), rank))
    return found
