"""`prefill_attention` for Hopper: one launch for all heads with the same storage, in the manner of FlashAttention-3.

A program attends 128 queries of one head. A warpgroup copies key blocks into a ring, from pages and from the sequence's
own keys, which are not quantised (`own_keys`); two others take 64 queries each. Each of them runs the softmax of a
block while the tensor cores multiply the values of the previous block, and while the other warpgroup uses the tensor
cores.

The ranges of key blocks that a program visits are computed before the launch: per head class and query block (`walks`),
or per KV head if the caller gives a walk. Only blocks with a hidden key are masked. The multiprocessors take programs
in order: retrieval heads first, and late queries before early ones. Without a walk, this order is longest first, so
that short programs fill the gaps at the end.
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

from pallas_kernels.core.hopper import refuse_pools, refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.mosaic import is_interpreted, tile
from pallas_kernels.core.online_softmax import FLOOR, HIDDEN
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables, div_up, parts_stored_alike, pools
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, bits_of
from pallas_kernels.prefill_attention.blocks import (
    BlockList,
    BlockRanges,
    KeyRange,
    Ranges,
    Walk,
    Window,
    visible_blocks,
)
from pallas_kernels.prefill_attention.codes import RowsInRegisters, dequantize_keys, dequantize_values
from pallas_kernels.prefill_attention.own import OwnKeys, own_keys

QUERIES = 128
"""Queries per program: 64, wgmma's rows, for each compute warpgroup."""
KEYS = 128
"""Keys per block."""
_ROWS = QUERIES // 2
_EVERYTHING = 2**30
"""The local window of retrieval heads."""
_COMPUTE_REGISTERS, _FEED_REGISTERS = 216, 72
"""Registers per thread of a compute warpgroup and of the copying one; two of the first and the second share 504."""
_WGMMA = plgpu.Layout.WGMMA
_BY_QUERY = _WGMMA.reduce(1)


@dataclass(frozen=True)
class Config:
    """A launch: the blocks of keys and of values in flight."""

    stages: int


class _Heads(NamedTuple):
    """The query heads ``first … first + count − 1`` of one class, and their static properties."""

    name: str
    first: int
    count: int
    window: Window


@partial(jax.jit, static_argnames=("sink", "local", "has_history"))
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    sink: int,
    local: int,
    has_history: bool = True,
    walk: Walk | None = None,
) -> jax.Array:
    """Returns what `pallas_kernels.prefill_attention` defines; rows from ``counts`` on are zeros.

    It is jitted for the cache: layers of one shape share one kernel, which takes seconds to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for arguments that the kernel does not support.
    """
    device = require_hopper()
    alike = parts_stored_alike(kv, q.shape[2])
    if len(alike) > 1:
        kv_heads = [heads for _, heads in parts_stored_alike(kv, k.shape[2])]
        call = partial(prefill_attention, sink=sink, local=local, has_history=has_history, walk=walk)
        each = [
            call(q[:, :, heads], k[:, :, new], v[:, :, new], part, tables, starts, counts)
            for (part, heads), new in zip(alike, kv_heads, strict=True)
        ]
        return jnp.concatenate(each, axis=2)
    found = pools(kv, tables)
    (_, tokens, _, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    _refuse(q, k, v, [pool for _, pool, _, _ in found], walk)
    pool = found[0][1]
    shape = f"dim{head_dim}_page{pool.page_size}_k{bits_of(pool.k)}v{bits_of(pool.v)}"
    config = configure("prefill_attention", device.kind, shape, heuristic(head_dim))
    classes = [
        _Heads(name, heads.start * group, pool.num_kv_heads * group, Window(0, _EVERYTHING))
        if name == "retrieval"
        else _Heads(name, heads.start * group, pool.num_kv_heads * group, Window(sink, local))
        for name, pool, _, heads in found
    ]
    starts, counts = jnp.asarray(starts, jnp.int32), jnp.asarray(counts, jnp.int32)
    own = own_keys(k, v, kv, tables, starts, counts) if has_history else OwnKeys(k, v, starts, counts)
    q, k, v = (_whole_blocks(x, size) for x, size in ((q, QUERIES), (own.k, KEYS), (own.v, KEYS)))
    own = own._replace(k=k, v=v)
    return _launch(q, own, kv, tables, starts, counts, classes, config, pool, walk)[:, :tokens]


def _whole_blocks(x: jax.Array, size: int) -> jax.Array:
    """Returns ``x`` [B, tokens, …] with zeros after its tokens, up to whole blocks of ``size``."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def heuristic(head_dim: int) -> Config:
    """Returns the launch for a head dimension: at least two stages, in rings of 128 KiB, which leave room for codes."""
    return Config(stages=2 if head_dim == 128 else 4)


def walks(starts: jax.Array, counts: jax.Array, own_starts: jax.Array, tokens: int, windows: list[Window]) -> jax.Array:
    """Returns the key blocks that each query block visits, as ranges [B, classes, query blocks, 6] int32.

    The ranges are (s, low, high) of the history, then of the own keys: blocks ``0 … s − 1`` and ``low … high − 1`` of
    `KEYS` keys, counted from the first key of the source. Each of them contains a key that one of the queries sees, and
    no other block does. A query block after ``counts`` visits nothing.

    Args:
      starts: [B] int32 position of each sequence's first query.
      counts: [B] int32 queries of each sequence.
      own_starts: [B] int32 position of the first own key, where the history ends.
      tokens: T, rows of the chunk.
      windows: what each class sees.
    """
    row = jnp.arange(-(-tokens // QUERIES), dtype=jnp.int32) * QUERIES
    starts, counts, own_starts = (x[:, None] for x in (starts, counts, own_starts))
    sources = (KeyRange(0, own_starts, KEYS), KeyRange(own_starts, starts + counts, KEYS))
    ranges = [
        jnp.stack([jnp.broadcast_to(x, (starts.shape[0], row.size)) for source in sources for x in found(source)], -1)
        for window in windows
        for found in [partial(visible_blocks, starts + row, QUERIES, window=window)]
    ]
    return jnp.where((row < counts)[:, None, :, None], jnp.stack(ranges, axis=1), 0)


def _walks_per_head(
    ranges: jax.Array, walk: Walk, classes: list[_Heads], group: int, own_starts: jax.Array
) -> jax.Array:
    """Returns the ranges [B, K, query blocks, 6] of each KV head: `walks`, with the history's ranges from a walk.

    Args:
      ranges: `walks` of the classes.
      walk: the layer's walk.
      classes: the heads.
      group: query heads per KV head.
      own_starts: [B] int32 position at which the history ends.
    """
    batch, _, blocks, _ = ranges.shape
    is_empty = jnp.all(ranges == 0, axis=-1, keepdims=True)
    found = []
    for index, heads in enumerate(classes):
        every = jnp.broadcast_to(ranges[:, index, None], (batch, heads.count // group, blocks, 6))
        visited = getattr(walk, heads.name)
        if isinstance(visited, BlockRanges):
            history = jnp.stack(visited.within(div_up(own_starts, KEYS)[:, None, None]), axis=-1)
            history = jnp.where(is_empty[:, index, None], 0, history)
            every = jnp.concatenate([history, every[..., 3:]], axis=-1)
        found.append(every)
    return jnp.concatenate(found, axis=1)


def _refuse(q: jax.Array, k: jax.Array, v: jax.Array, found: list[PagedKV], walk: Walk | None) -> None:
    """Refuses arguments that the kernel does not support."""
    for x in (q, k, v):
        refuse_unless(x.dtype == jnp.bfloat16, f"queries, keys and values must be bfloat16, not {x.dtype}")
    refuse_unless(q.shape[-1] in (64, 128), f"head_dim must be 64 or 128, not {q.shape[-1]}")
    refuse_pools(found)
    for pool in found:
        if isinstance(pool.k, QuantizedKeys):
            assert pool.k_min is not None
            refuse_unless(pool.k_min.dtype == jnp.bfloat16, f"bounds of keys must be bfloat16, not {pool.k_min.dtype}")
            # Shared memory holds the bounds of a block beside its codes.
            least = 4 if (q.shape[-1], bits_of(pool.k), bits_of(pool.v)) == (128, 8, 8) else 2
            refuse_unless(
                pool.sub_page_size >= least,
                f"sub-pages of quantised keys must have {least} tokens or more, not {pool.sub_page_size}",
            )
    for visited in walk or ():
        refuse_unless(not isinstance(visited, BlockList), "the walk must be ranges, not block lists")
        sizes = None if visited is None else (visited.queries, visited.keys)
        refuse_unless(
            sizes in (None, (QUERIES, KEYS)),
            f"blocks of the walk must be {QUERIES} queries and {KEYS} keys, not {sizes}",
        )


def _launch(
    q: jax.Array,
    own: OwnKeys,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    classes: list[_Heads],
    config: Config,
    pool: PagedKV,
    walk: Walk | None,
) -> jax.Array:
    """Runs the kernel on a chunk of whole query blocks, and on whole blocks of own keys."""
    batch, tokens, num_heads, head_dim = q.shape

    def prefill_attention(*refs: Any) -> None:
        *arrays, scratch = refs
        _attend(classes, walk is not None, config, *arrays, scratch=scratch)

    kernel = plgpu.kernel(
        prefill_attention,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(batch * num_heads * (tokens // QUERIES),),
        grid_names=("program",),
        num_threads=3,
        thread_name="role",
        scratch_types=[_scratch(config, pool, head_dim)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    ranges = walks(starts, counts, own.starts, tokens, [heads.window for heads in classes])
    if walk is not None:
        ranges = _walks_per_head(ranges, walk, classes, num_heads // own.k.shape[2], own.starts)
    return kernel(q, own, kv, tables, starts, counts, ranges)


def _scratch(config: Config, pool: PagedKV, head_dim: int) -> dict[str, Any]:
    """Returns the shared memory of a program: queries, rings of keys and values, and codes before their conversion."""
    columns = _tile_width(pool, head_dim)  # for all operands: those of a product need the same swizzle
    parts = KEYS // pool.page_size
    scratch = {
        "q": tile((2, _ROWS, head_dim), jnp.bfloat16, columns),
        "q_ready": plgpu.Barrier(num_barriers=2),
        "turn": plgpu.Barrier(num_barriers=2),
    }
    bounds: Any = plgpu.SMEM((KEYS // pool.sub_page_size, head_dim), jnp.bfloat16)
    # The copy engine writes to multiples of 128 bytes, so that a page's 16 or 32 numbers have a row of their own.
    vectors: Any = plgpu.SMEM((parts, max(pool.page_size, 64)), jnp.float16)
    for name, stored, numbers in (("k", pool.k, bounds), ("v", pool.v, vectors)):
        scratch[name] = tile((config.stages, KEYS, head_dim), jnp.bfloat16, columns)
        scratch[f"{name}_ready"] = plgpu.Barrier(num_arrivals=parts, num_barriers=config.stages)
        scratch[f"{name}_free"] = plgpu.Barrier(num_arrivals=2, num_barriers=config.stages)
        if isinstance(stored, QuantizedKeys | QuantizedArray):
            codes: Any = plgpu.SMEM((KEYS, head_dim * bits_of(stored) // 8), jnp.uint8)
            scratch[f"{name}_codes"] = (codes, numbers, numbers)
            scratch[f"{name}_landed"] = plgpu.Barrier(num_arrivals=parts * 3)
    return scratch


class _Steps(NamedTuple):
    """The key blocks that a program visits: first of the history, then its own (see `walks`)."""

    history: Ranges
    own: Ranges

    @property
    def count(self) -> jax.Array:
        """Number of blocks."""
        return self.history.count + self.own.count

    def block(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns whether a step's block is history, and its index there or among the own keys."""
        after = step - self.history.count
        old, new = self.history.block(step), self.own.block(after)
        return after < 0, jnp.where(after < 0, old, new)


class _Spans(NamedTuple):
    """Positions in a sequence: of the first own key, of the first query, and where both end."""

    own: jax.Array
    start: jax.Array
    end: jax.Array


class _Place(NamedTuple):
    """The work of a program: its head's class and number, its sequence, its first row of the chunk, and its window."""

    index: jax.Array
    head: jax.Array
    b: jax.Array
    row: jax.Array
    sink: jax.Array
    local: jax.Array


def _place(program: jax.Array, classes: list[_Heads], batch: int, blocks: int) -> _Place:
    """Returns the place of a program: classes in order, late rows first, then sequences, then heads."""
    places, first = [], 0
    for index, heads in enumerate(classes):
        order = program - first
        rest = order // heads.count
        row = (blocks - 1 - rest // batch) * QUERIES
        window = (jnp.int32(x) for x in heads.window)
        places.append(_Place(jnp.int32(index), heads.first + order % heads.count, rest % batch, row, *window))
        first += batch * blocks * heads.count
    if len(places) == 1:
        return places[0]
    is_first = program < batch * blocks * classes[0].count
    return jax.tree.map(partial(jnp.where, is_first), *places)


def _attend(
    classes: list[_Heads],
    has_walk_per_head: bool,
    config: Config,
    q_gmem: Any,
    own_gmem: OwnKeys,
    kv_gmem: LayerKV,
    tables_gmem: PageTables,
    starts_gmem: Any,
    counts_gmem: Any,
    walks_gmem: Any,
    out_gmem: Any,
    *,
    scratch: dict[str, Any],
) -> None:
    """Runs one program: one block of queries of one head over its key blocks."""
    batch, tokens, num_heads, head_dim = q_gmem.shape
    group = num_heads // own_gmem.k.shape[2]
    place = _place(jax.lax.axis_index("program"), classes, batch, tokens // QUERIES)
    b, row, head = place.b, place.row, place.head
    role = jax.lax.axis_index("role")

    def read() -> tuple[_Spans, _Steps]:
        """Returns spans and steps. Each role reads them, since shared registers would be spilled."""
        start = starts_gmem[b]
        index = head // group if has_walk_per_head else place.index
        ranges = [walks_gmem[b, index, row // QUERIES, i] for i in range(6)]
        spans = _Spans(own_gmem.starts[b], start, start + counts_gmem[b])
        return spans, _Steps(Ranges(*ranges[:3]), Ranges(*ranges[3:]))

    def feed_walk(heads: _Heads) -> None:
        spans, steps = read()
        pool, table = getattr(kv_gmem, heads.name), getattr(tables_gmem, heads.name)
        own = {name: x.at[b, :, head // group] for name, x in (("k", own_gmem.k), ("v", own_gmem.v))}
        _Feed(pool, own, (head - heads.first) // group, table.at[b], spans, steps, config, scratch).run()

    @pl.when(role == 2)
    def _feed() -> None:
        plgpu.set_max_registers(_FEED_REGISTERS, action="decrease")
        for index, heads in enumerate(classes):
            pl.when(place.index == index)(partial(feed_walk, heads))

    @pl.when(role < 2)
    def _compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        spans, steps = read()
        first = row + role * _ROWS
        out = out_gmem.at[b, pl.ds(first, _ROWS), head]

        @pl.when(steps.count == 0)
        def _blank() -> None:
            _store(jnp.zeros((_ROWS, head_dim), jnp.bfloat16), scratch["q"].at[role], out)

        @pl.when(steps.count > 0)
        def _run() -> None:
            queries = scratch["q"].at[role]
            plgpu.copy_gmem_to_smem(q_gmem.at[b, pl.ds(first, _ROWS), head], queries, scratch["q_ready"].at[role])
            plgpu.barrier_wait(scratch["q_ready"].at[role])
            values = _softmax_of_walk(steps, spans, place, config, first, role, scratch)
            rows = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=_WGMMA)
            _store(jnp.where(rows < spans.end - spans.start - first, values, 0.0).astype(jnp.bfloat16), queries, out)


def _store(values: jax.Array, staging_smem: Any, out_gmem: Any) -> None:
    """Writes the outputs [64, H] of a warpgroup."""
    staging_smem[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging_smem, out_gmem)
    plgpu.wait_smem_to_gmem(0)


def _tile_width(pool: PagedKV, head_dim: int) -> int:
    """Returns the columns of a swizzled tile; the two halves of a row of 4-bit codes are written separately."""
    return min(head_dim // 2, 64) if 4 in (bits_of(pool.k), bits_of(pool.v)) else 64


class _Feed(NamedTuple):
    """The arguments of the copying warpgroup: a pool, one of its heads, a sequence's pages and spans, and the steps.

    In the ring, rows of tokens that do not exist are numbers, whatever the arrays contain there. (Hidden keys have
    weight zero, but zero times NaN is NaN.) Pages of the history are sealed, also where it ends inside of one. The copy
    engine writes zeros for what is past the end of an array, so pages that are not held, and whole parts of a block
    without tokens, are requested there; parts with a few own keys go through registers.
    """

    pool: PagedKV
    own: dict[str, Any]
    head: jax.Array
    table: Any
    spans: _Spans
    steps: _Steps
    config: Config
    scratch: dict[str, Any]

    def run(self) -> None:
        """Copies the blocks in the order of their use: values one step after keys."""
        for name in "kv":
            if self._is_quantized(name):
                pl.when(self.steps.history.count > 0)(partial(self._request, name, jnp.int32(0)))

        @pl.loop(jnp.int32(0), self.steps.count + 1)
        def _feed_step(step: jax.Array) -> None:
            pl.when(step < self.steps.count)(partial(self._feed, "k", step))
            pl.when((step > 0) & (self.steps.count > 0))(partial(self._feed, "v", step - 1))

        @pl.loop(jnp.maximum(self.steps.count - self.config.stages, 0), self.steps.count)
        def _drain(step: jax.Array) -> None:
            for name in "kv":
                plgpu.barrier_wait(self.scratch[f"{name}_free"].at[step % self.config.stages])

    def _feed(self, name: str, step: jax.Array) -> None:
        """Copies a block of keys or of values into its ring."""
        is_history, block = self.steps.block(step)
        slot = step % self.config.stages
        pl.when(step >= self.config.stages)(partial(plgpu.barrier_wait, self.scratch[f"{name}_free"].at[slot]))
        target, ready = self.scratch[name].at[slot], self.scratch[f"{name}_ready"].at[slot]
        old = self._convert if self._is_quantized(name) else self._copy_pages
        pl.when(is_history)(partial(old, name, step, block, target, ready))
        pl.when(jnp.logical_not(is_history))(partial(self._copy_own, name, block, target, ready))

    def _is_quantized(self, name: str) -> bool:
        return isinstance(getattr(self.pool, name), QuantizedKeys | QuantizedArray)

    def _copy_own(self, name: str, block: jax.Array, target: Any, ready: Any) -> None:
        """Copies a block of own keys or values in parts of the size of a page."""
        size, source = self.pool.page_size, self.own[name]

        @pl.loop(0, KEYS // size)
        def _copy_part(i: jax.Array) -> None:
            first = block * KEYS + i * size
            rows = jnp.maximum(self.spans.end - self.spans.own - first, 0)
            first = jnp.where(rows > 0, first, source.shape[0])
            self._copy_rows(source.at[pl.ds(first, size)], rows, target.at[pl.ds(i * size, size)], ready)

    def _page(self, block: jax.Array, i: jax.Array) -> jax.Array:
        """Returns a page of a block, or one past the end if it has none."""
        size, num_pages = self.pool.page_size, jax.tree.leaves(self.pool.k)[0].shape[0]
        entry = block * (KEYS // size) + i
        page = self.table[jnp.minimum(entry, self.table.shape[0] - 1)]
        return jnp.where((entry * size < self.spans.own) & (page >= 0), page, num_pages)

    def _copy_pages(self, name: str, step: jax.Array, block: jax.Array, target: Any, ready: Any) -> None:
        """Copies a block of pages that are not quantised."""
        del step
        size, source = self.pool.page_size, getattr(self.pool, name)

        @pl.loop(0, KEYS // size)
        def _copy_page(i: jax.Array) -> None:
            part = target.at[pl.ds(i * size, size)]
            plgpu.copy_gmem_to_smem(source.at[self._page(block, i), self.head], part, ready)

    def _request(self, name: str, step: jax.Array) -> None:
        """Starts the copy of a block of codes, and of what their dequantisation takes."""
        size, block, targets = self.pool.page_size, self.steps.block(step)[1], self.scratch[f"{name}_codes"]
        pool: Any = self.pool
        sources = (pool.k.codes, pool.k_min, pool.k_max) if name == "k" else (pool.v.codes, pool.v.scale, pool.v.low)

        @pl.loop(0, KEYS // size)
        def _copy_page(i: jax.Array) -> None:
            page = self._page(block, i)
            for source, target in zip(sources, targets, strict=True):
                rows = source.shape[2]
                part = target.at[i, pl.ds(0, rows)] if source.ndim == 3 else target.at[pl.ds(i * rows, rows)]
                plgpu.copy_gmem_to_smem(source.at[page, self.head], part, self.scratch[f"{name}_landed"])

    def _convert(self, name: str, step: jax.Array, block: jax.Array, target: Any, ready: Any) -> None:
        """Converts a block of codes, and starts the copy of the next one."""
        del block
        plgpu.barrier_wait(self.scratch[f"{name}_landed"])
        stored, bits = self.scratch[f"{name}_codes"], bits_of(getattr(self.pool, name))
        width = _tile_width(self.pool, target.shape[-1])
        if name == "k":
            dequantize_keys(stored, bits, width, target)
        else:
            dequantize_values(stored, bits, width, self.pool.page_size, target)
        plgpu.commit_smem()
        for _ in range(KEYS // self.pool.page_size):
            plgpu.barrier_arrive(ready)
        pl.when(step + 1 < self.steps.history.count)(partial(self._request, name, step + 1))

    def _copy_rows(self, source_gmem: Any, rows: jax.Array, target_smem: Any, ready: Any) -> None:
        """Copies a part of a block, of which ``rows`` rows exist, and arrives at ``ready``."""
        size, columns = target_smem.shape
        layout = RowsInRegisters(16, columns, _tile_width(self.pool, columns)).layout
        pl.when((rows >= size) | (rows == 0))(partial(plgpu.copy_gmem_to_smem, source_gmem, target_smem, ready))

        @pl.when((rows < size) & (rows > 0))
        def _through_registers() -> None:
            for row in range(0, size, 16):
                values = plgpu.load(source_gmem.at[pl.ds(row, 16)], layout=layout, optimized=False)
                index = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout)
                target_smem[pl.ds(row, 16)] = jnp.where(index < rows - row, values, jnp.zeros((), values.dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)


def _softmax_of_walk(
    steps: _Steps,
    spans: _Spans,
    place: _Place,
    config: Config,
    first: jax.Array,
    role: jax.Array,
    scratch: dict[str, Any],
) -> jax.Array:
    """Returns the attention [64, H] float32 of a compute warpgroup's queries, which start at row ``first``."""
    # The compiler would compute addresses for indices with a known value in advance, and spill them.
    zero, mine, other = jax.lax.optimization_barrier((jnp.int32(0), role, 1 - role))
    q_smem, my_turn, other_turn = (scratch["q"].at[mine], *(scratch["turn"].at[i] for i in (mine, other)))
    head_dim = q_smem.shape[-1]
    scale = math.log2(math.e) / math.sqrt(head_dim)

    def weigh(step: jax.Array, maximum: jax.Array, total: jax.Array, scores: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the new maximum and total, the decay of the previous sums, and the weights of a block."""
        is_history, block = steps.block(step)
        key = block * KEYS + jnp.where(is_history, 0, spans.own)
        scores = _hide(scores, key, jnp.where(is_history, spans.own, spans.end), spans.start + first, place)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1) * scale)
        weights = jnp.exp2(scores * scale - jax.lax.broadcast_in_dim(new, scores.shape, (0,)))
        decay = jnp.exp2(maximum - new)
        return new, total * decay + jnp.sum(weights, axis=1), decay, weights

    def wait_for_keys(step: jax.Array) -> None:
        pl.when(step < steps.count)(partial(plgpu.barrier_wait, scratch["k_ready"].at[step % config.stages]))

    def attend_block(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, weights, values = carry
        slot, before = step % config.stages, (step - 1) % config.stages

        def wait_for_values() -> None:
            plgpu.barrier_wait(scratch["v_ready"].at[before])

        def yield_turn() -> None:
            plgpu.barrier_arrive(other_turn)

        def weigh_scores(scores: jax.Array) -> tuple[jax.Array, ...]:
            plgpu.barrier_arrive(scratch["k_free"].at[slot])
            return weigh(step, maximum, total, scores)

        plgpu.barrier_wait(my_turn)
        (new, total, decay, new_weights), values = _overlap(
            (q_smem, scratch["k"].at[slot]),
            (weights, scratch["v"].at[before], values),
            wait_for_values,
            yield_turn,
            weigh_scores,
            partial(wait_for_keys, step + 1),
        )
        plgpu.barrier_arrive(scratch["v_free"].at[before])
        return (
            new,
            total,
            new_weights.astype(jnp.bfloat16),
            values * jax.lax.broadcast_in_dim(decay, values.shape, (0,)),
        )

    pl.when(role == 1)(partial(plgpu.barrier_arrive, other_turn))
    maximum, total = (plgpu.layout_cast(jnp.full((_ROWS,), x, jnp.float32), _BY_QUERY) for x in (FLOOR, 0.0))
    wait_for_keys(zero)
    scores = _product(q_smem, scratch["k"].at[zero])
    plgpu.barrier_arrive(scratch["k_free"].at[zero])
    maximum, total, _, weights = weigh(zero, maximum, total, scores)
    values = plgpu.layout_cast(jnp.zeros((_ROWS, head_dim), jnp.float32), _WGMMA)
    wait_for_keys(zero + 1)
    carry = (maximum, total, weights.astype(jnp.bfloat16), values)
    maximum, total, weights, values = jax.lax.fori_loop(zero + 1, steps.count, attend_block, carry)
    last = (steps.count - 1) % config.stages
    plgpu.barrier_wait(scratch["v_ready"].at[last])
    values = _accumulate(weights, scratch["v"].at[last], values)
    plgpu.barrier_arrive(scratch["v_free"].at[last])
    pl.when(role == 0)(partial(plgpu.barrier_wait, my_turn))
    return values / jax.lax.broadcast_in_dim(jnp.where(total > 0, total, 1.0), values.shape, (0,))


def _hide(scores: jax.Array, key: jax.Array, end: jax.Array, query: jax.Array, place: _Place) -> jax.Array:
    """Returns scores [64, `KEYS`] with `HIDDEN` for the keys that are not seen, if the block has any.

    Args:
      scores: scores of queries from position ``query`` on, by keys from position ``key`` on.
      key: position of the first key.
      end: position at which the keys of this source end.
      query: position of the first query.
      place: the program's place, for the window.
    """
    is_whole = (key + KEYS <= end) & (key + KEYS - 1 <= query)
    is_whole &= (key > query + _ROWS - 1 - place.local) | (key + KEYS <= place.sink)

    def replace(scores: jax.Array) -> jax.Array:
        rows, columns = (plgpu.broadcasted_iota(jnp.int32, scores.shape, i, layout=_WGMMA) for i in (0, 1))
        # The columns of a thread agree in these bits. Without them, the columns are constants, and a row's bound is one
        # register. As plain positions, the columns would occupy 32 registers in the whole loop.
        columns, offset = columns & ~6, columns & 6
        newest = jnp.minimum(query + rows + 1, end) - key - offset
        oldest = query + rows - place.local - key - offset
        visible = (columns < newest) & ((columns > oldest) | (columns < place.sink - key - offset))
        return jnp.where(visible, scores, HIDDEN)

    return jax.lax.cond(is_whole, lambda scores: scores, replace, scores)


def _product(left_smem: Any, right_smem: Any) -> jax.Array:
    """Returns ``left @ rightᵀ`` float32."""

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, left_smem, right_smem.transpose((1, 0)))
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((left_smem.shape[0], right_smem.shape[0]), jnp.float32))


def _accumulate(left: jax.Array, right_smem: Any, sums: jax.Array) -> jax.Array:
    """Returns ``sums + left @ right`` float32, with ``left`` in registers."""
    if is_interpreted():  # it supports no left operand in registers, and only accumulators that start with zeros
        right = right_smem[...]
        plgpu.commit_smem()  # an ordinary read, unlike wgmma's: the next copy to this memory must come after it
        return sums + jnp.dot(left, right, preferred_element_type=jnp.float32)

    def multiply(sums_ref: Any) -> jax.Array:
        sums_ref[...] = sums
        plgpu.wgmma(sums_ref, left, right_smem)
        return sums_ref[...]

    rows, columns = sums.shape
    return pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))


def _overlap(
    scores_of: tuple[Any, Any],
    values_of: tuple[jax.Array, Any, jax.Array],
    wait_for_values: Callable[[], None],
    yield_turn: Callable[[], None],
    weigh: Callable[[jax.Array], tuple[jax.Array, ...]],
    wait_for_keys: Callable[[], None],
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns ``weigh(left @ rightᵀ)``, computed while the tensor cores work on the second result, ``sums + w @ v``.

    Args:
      scores_of: left and right, in shared memory.
      values_of: w in registers, v in shared memory, sums in registers.
      wait_for_values: called before v is read.
      yield_turn: called after both products have started.
      weigh: called with the first product.
      wait_for_keys: called before waiting for the second product. It ends a basic block, without which the compiler
        would wait for both products before ``weigh``.
    """
    weights, values_smem, sums = values_of
    if is_interpreted():
        scores = _product(*scores_of)
        wait_for_values()
        sums = _accumulate(weights, values_smem, sums)
        yield_turn()
        weighed = weigh(scores)
        wait_for_keys()
        return weighed, sums

    def overlapped(scores_ref: Any, sums_ref: Any) -> tuple[tuple[jax.Array, ...], jax.Array]:
        sums_ref[...] = sums
        plgpu.wgmma(scores_ref, scores_of[0], scores_of[1].transpose((1, 0)))
        wait_for_values()
        plgpu.wgmma(sums_ref, weights, values_smem)
        yield_turn()
        weighed = weigh(plgpu.wgmma_accumulator_load(scores_ref, wait_n=1))
        weighed = jax.lax.optimization_barrier(weighed)
        wait_for_keys()
        sums_now = sums_ref[...]
        return jax.lax.optimization_barrier((weighed, sums_now))

    rows, columns = sums.shape
    keys = values_smem.shape[0]
    return pl.run_scoped(overlapped, plgpu.ACC((rows, keys), jnp.float32), plgpu.ACC((rows, columns), jnp.float32))
