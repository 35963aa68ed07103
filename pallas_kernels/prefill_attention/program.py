"""One program of the Hopper kernel of `prefill_attention`, in the manner of FlashAttention-3.

A program attends 128 queries of one head. A warpgroup copies key blocks into a ring, from pages, from the sequence's
own keys (`own_keys`) and from means of blocks of the history, which are not quantised; two others take 64 queries each.
Each of them runs the softmax of a block while the tensor cores multiply the values of the previous block, and while the
other warpgroup uses the tensor cores. Only blocks with a hidden key are masked.

A mean stands for 128 keys: the logarithm of their number is added to its scores, or `HIDDEN` where the block itself is
visited, in one array that is made before the launch.
"""

import enum
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.mosaic import is_interpreted
from pallas_kernels.core.online_softmax import FLOOR, HIDDEN
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, bits_of
from pallas_kernels.prefill_attention.blocks import BlockMeans, Ranges, Window
from pallas_kernels.prefill_attention.codes import RowsInRegisters, dequantize_keys, dequantize_values
from pallas_kernels.prefill_attention.own import OwnKeys

QUERIES = 128
"""Queries per program: 64, wgmma's rows, for each compute warpgroup."""
KEYS = 128
"""Keys per block."""
_ROWS = QUERIES // 2
_COMPUTE_REGISTERS, _FEED_REGISTERS = 216, 72
"""Registers per thread of a compute warpgroup and of the copying one; two of the first and the second share 504."""
_WGMMA = plgpu.Layout.WGMMA
_BY_QUERY = _WGMMA.reduce(1)


class Heads(NamedTuple):
    """The query heads ``first … first + count − 1`` of one class, and their static properties."""

    name: str
    first: int
    count: int
    window: Window


class Source(enum.IntEnum):
    """Where a block of keys is."""

    HISTORY = 0
    OWN = 1
    MEANS = 2


class Walks(NamedTuple):
    """What programs visit, by sequence, head and query block: ranges of blocks, or lists of steps.

    Attributes:
      ranges: [B, classes or K, query blocks, 6] int32, see `mosaic_gpu.walks`; None if there are lists.
      counts: [B, K, query blocks] int32 steps; None if there are ranges.
      steps: [B, K, query blocks, n] int32 entries ``4 · block + source``, the block counted from the first one of the
        `Source`; -1 after the last one, of which there is at least one.
      means: by head class, what stands in for blocks of the history, [B, K of the class, m, H] in whole blocks; None if
        nothing does.
      bias: [B, K, query blocks, m] float32, what is added to the products of queries and means: `HIDDEN` where a mean
        does not stand in.
    """

    ranges: Any = None
    counts: Any = None
    steps: Any = None
    means: dict[str, BlockMeans] | None = None
    bias: Any = None


class Visit(NamedTuple):
    """A block of keys: its index in its source, and what that is; ``is_mean`` is None if it never is means."""

    block: jax.Array
    is_history: jax.Array
    is_mean: jax.Array | None = None


class Steps(NamedTuple):
    """The key blocks that a program visits: first of the history, then its own (see `walks`)."""

    history: Ranges
    own: Ranges

    @property
    def count(self) -> jax.Array:
        """Number of blocks."""
        return self.history.count + self.own.count

    def is_history(self, step: jax.Array) -> jax.Array:
        """Returns whether there is a step, and its block is history."""
        return step < self.history.count

    def visit(self, step: jax.Array) -> Visit:
        """Returns the block of a step."""
        after = step - self.history.count
        old, new = self.history.block(step), self.own.block(after)
        return Visit(jnp.where(after < 0, old, new), after < 0)


class ListedSteps(NamedTuple):
    """The same from a list [n] in global memory, and what is added to the scores of means [m], if there are any.

    To keep ranges in registers as well would take more than the copying warpgroup has.
    """

    count: jax.Array
    steps_gmem: Any
    bias_gmem: Any

    def is_history(self, step: jax.Array) -> jax.Array:
        """Returns whether there is a step, and its block is history."""
        return self.visit(step).is_history

    def visit(self, step: jax.Array) -> Visit:
        """Returns the block of a step."""
        # Without the barrier, the compiler would keep an address for each of a step's visits, and spill them.
        entry = self.steps_gmem[jax.lax.optimization_barrier(step)]
        source = entry & 3
        is_mean = None if self.bias_gmem is None else source == Source.MEANS
        return Visit(entry >> 2, source == Source.HISTORY, is_mean)


class Spans(NamedTuple):
    """Positions in a sequence: of the first own key, of the first query, and where both end."""

    own: jax.Array
    start: jax.Array
    end: jax.Array


class Place(NamedTuple):
    """The work of a program: its head's class and number, its sequence, its first row of the chunk, and its window."""

    index: jax.Array
    head: jax.Array
    b: jax.Array
    row: jax.Array
    sink: jax.Array
    local: jax.Array


def place_of(program: jax.Array, classes: list[Heads], batch: int, blocks: int) -> Place:
    """Returns the place of a program: classes in order, late rows first, then sequences, then heads."""
    places, first = [], 0
    for index, heads in enumerate(classes):
        order = program - first
        rest = order // heads.count
        row = (blocks - 1 - rest // batch) * QUERIES
        window = (jnp.int32(x) for x in heads.window)
        places.append(Place(jnp.int32(index), heads.first + order % heads.count, rest % batch, row, *window))
        first += batch * blocks * heads.count
    if len(places) == 1:
        return places[0]
    is_first = program < batch * blocks * classes[0].count
    return jax.tree.map(partial(jnp.where, is_first), *places)


def attend(
    classes: list[Heads],
    has_walk_per_head: bool,
    stages: int,
    q_gmem: Any,
    own_gmem: OwnKeys,
    kv_gmem: LayerKV,
    tables_gmem: PageTables,
    starts_gmem: Any,
    counts_gmem: Any,
    walks_gmem: Walks,
    out_gmem: Any,
    *,
    scratch: dict[str, Any],
) -> None:
    """Runs one program: one block of queries of one head over its key blocks."""
    batch, tokens, num_heads, head_dim = q_gmem.shape
    group = num_heads // own_gmem.k.shape[2]
    place = place_of(jax.lax.axis_index("program"), classes, batch, tokens // QUERIES)
    b, row, head = place.b, place.row, place.head
    role = jax.lax.axis_index("role")

    def read() -> tuple[Spans, Steps | ListedSteps]:
        """Returns spans and steps. Each role reads them, since shared registers would be spilled."""
        start = starts_gmem[b]
        index = head // group if has_walk_per_head else place.index
        at = b, index, row // QUERIES
        if walks_gmem.steps is None:
            ranges = [walks_gmem.ranges[(*at, i)] for i in range(6)]
            steps = Steps(Ranges(*ranges[:3]), Ranges(*ranges[3:]))
        else:
            bias = None if walks_gmem.bias is None else walks_gmem.bias.at[at]
            steps = ListedSteps(walks_gmem.counts[at], walks_gmem.steps.at[at], bias)
        return Spans(own_gmem.starts[b], start, start + counts_gmem[b]), steps

    def feed_walk(heads: Heads) -> None:
        spans, steps = read()
        pool, table = getattr(kv_gmem, heads.name), getattr(tables_gmem, heads.name)
        own = {name: x.at[b, :, head // group] for name, x in (("k", own_gmem.k), ("v", own_gmem.v))}
        index = (head - heads.first) // group
        means: Any = (walks_gmem.means or {}).get(heads.name)
        if means is not None:
            means = BlockMeans(*(x.at[b, index] for x in means))
        _Feed(pool, own, means, index, table.at[b], spans, steps, stages, scratch).run()

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
            values = _softmax_of_walk(steps, spans, place, stages, first, role, scratch)
            rows = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=_WGMMA)
            _store(jnp.where(rows < spans.end - spans.start - first, values, 0.0).astype(jnp.bfloat16), queries, out)


def _store(values: jax.Array, staging_smem: Any, out_gmem: Any) -> None:
    """Writes the outputs [64, H] of a warpgroup."""
    staging_smem[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging_smem, out_gmem)
    plgpu.wait_smem_to_gmem(0)


def tile_width(pool: PagedKV, head_dim: int) -> int:
    """Returns the columns of a swizzled tile; the two halves of a row of 4-bit codes are written separately."""
    return min(head_dim // 2, 64) if 4 in (bits_of(pool.k), bits_of(pool.v)) else 64


class _Feed(NamedTuple):
    """The arguments of the copying warpgroup: a pool, one of its heads, a sequence's pages and spans, and the steps.

    ``own`` are the sequence's own keys and values [S, H] of the head, ``means`` those that stand in [m, H], if any do.

    In the ring, rows of tokens that do not exist are numbers, whatever the arrays contain there. (Hidden keys have
    weight zero, but zero times NaN is NaN.) Pages of the history are sealed, also where it ends inside of one. The copy
    engine writes zeros for what is past the end of an array, so pages that are not held, and whole parts of a block
    without tokens, are requested there; parts with a few own keys go through registers.
    """

    pool: PagedKV
    own: dict[str, Any]
    means: Any
    head: jax.Array
    table: Any
    spans: Spans
    steps: Steps | ListedSteps
    stages: int
    scratch: dict[str, Any]

    def run(self) -> None:
        """Copies the blocks in the order of their use: values one step after keys."""
        for name in "kv":
            if self._is_quantized(name):
                pl.when(self.steps.is_history(jnp.int32(0)))(partial(self._request, name, jnp.int32(0)))

        @pl.loop(jnp.int32(0), self.steps.count + 1)
        def _feed_step(step: jax.Array) -> None:
            pl.when(step < self.steps.count)(partial(self._feed, "k", step))
            pl.when((step > 0) & (self.steps.count > 0))(partial(self._feed, "v", step - 1))

        @pl.loop(jnp.maximum(self.steps.count - self.stages, 0), self.steps.count)
        def _drain(step: jax.Array) -> None:
            for name in "kv":
                plgpu.barrier_wait(self.scratch[f"{name}_free"].at[step % self.stages])

    def _feed(self, name: str, step: jax.Array) -> None:
        """Copies a block of keys or of values into its ring."""
        block, is_history, is_mean = self.steps.visit(step)
        slot = step % self.stages
        pl.when(step >= self.stages)(partial(plgpu.barrier_wait, self.scratch[f"{name}_free"].at[slot]))
        target, ready = self.scratch[name].at[slot], self.scratch[f"{name}_ready"].at[slot]
        old = self._convert if self._is_quantized(name) else self._copy_pages
        pl.when(is_history)(partial(old, name, step, block, target, ready))
        is_own = jnp.logical_not(is_history)
        if is_mean is not None and self.means is not None:
            is_own &= jnp.logical_not(is_mean)
            pl.when(is_mean)(partial(self._copy_means, name, block, target, ready))
        pl.when(is_own)(partial(self._copy_own, name, block, target, ready))

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

    def _copy_means(self, name: str, block: jax.Array, target: Any, ready: Any) -> None:
        """Copies a block of means, in as many parts as all blocks have."""
        size, source = self.pool.page_size, getattr(self.means, name)

        @pl.loop(0, KEYS // size)
        def _copy_part(i: jax.Array) -> None:
            rows = source.at[pl.ds(block * KEYS + i * size, size)]
            plgpu.copy_gmem_to_smem(rows, target.at[pl.ds(i * size, size)], ready)

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
        size, block, targets = self.pool.page_size, self.steps.visit(step).block, self.scratch[f"{name}_codes"]
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
        width = tile_width(self.pool, target.shape[-1])
        if name == "k":
            dequantize_keys(stored, bits, width, target)
        else:
            dequantize_values(stored, bits, width, self.pool.page_size, target)
        plgpu.commit_smem()
        for _ in range(KEYS // self.pool.page_size):
            plgpu.barrier_arrive(ready)
        pl.when(self.steps.is_history(step + 1))(partial(self._request, name, step + 1))

    def _copy_rows(self, source_gmem: Any, rows: jax.Array, target_smem: Any, ready: Any) -> None:
        """Copies a part of a block, of which ``rows`` rows exist, and arrives at ``ready``."""
        size, columns = target_smem.shape
        layout = RowsInRegisters(16, columns, tile_width(self.pool, columns)).layout
        pl.when((rows >= size) | (rows == 0))(partial(plgpu.copy_gmem_to_smem, source_gmem, target_smem, ready))

        @pl.when((rows < size) & (rows > 0))
        def _through_registers() -> None:
            def copy(row: Any) -> None:
                values = plgpu.load(source_gmem.at[pl.ds(row, 16)], layout=layout, optimized=False)
                index = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout)
                target_smem[pl.ds(row, 16)] = jnp.where(index < rows - row, values, jnp.zeros((), values.dtype))

            if isinstance(self.steps, ListedSteps):  # they leave fewer registers
                pl.loop(0, size, step=16)(copy)
            else:
                for row in range(0, size, 16):
                    copy(row)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready)


def _softmax_of_walk(
    steps: Steps | ListedSteps,
    spans: Spans,
    place: Place,
    stages: int,
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
        block, is_history, is_mean = steps.visit(step)
        key = block * KEYS + jnp.where(is_history, 0, spans.own)
        hidden = partial(
            _hide, key=key, end=jnp.where(is_history, spans.own, spans.end), query=spans.start + first, place=place
        )
        if is_mean is None:
            scores = hidden(scores)
        else:
            assert isinstance(steps, ListedSteps)
            stand_in = partial(_stand_in, bias_gmem=steps.bias_gmem.at[pl.ds(block * KEYS, KEYS)])
            scores = jax.lax.cond(is_mean, stand_in, hidden, scores)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1) * scale)
        weights = jnp.exp2(scores * scale - jax.lax.broadcast_in_dim(new, scores.shape, (0,)))
        decay = jnp.exp2(maximum - new)
        return new, total * decay + jnp.sum(weights, axis=1), decay, weights

    def wait_for_keys(step: jax.Array) -> None:
        pl.when(step < steps.count)(partial(plgpu.barrier_wait, scratch["k_ready"].at[step % stages]))

    def attend_block(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, weights, values = carry
        slot, before = step % stages, (step - 1) % stages

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
    last = (steps.count - 1) % stages
    plgpu.barrier_wait(scratch["v_ready"].at[last])
    values = _accumulate(weights, scratch["v"].at[last], values)
    plgpu.barrier_arrive(scratch["v_free"].at[last])
    pl.when(role == 0)(partial(plgpu.barrier_wait, my_turn))
    return values / jax.lax.broadcast_in_dim(jnp.where(total > 0, total, 1.0), values.shape, (0,))


def _hide(scores: jax.Array, key: jax.Array, end: jax.Array, query: jax.Array, place: Place) -> jax.Array:
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


def _stand_in(scores: jax.Array, bias_gmem: Any) -> jax.Array:
    """Returns scores [64, `KEYS`] of means with their weight, and `HIDDEN` for those that do not stand in."""
    bias = plgpu.load(bias_gmem, layout=_WGMMA.reduce(0), optimized=False)
    return scores + jax.lax.broadcast_in_dim(bias, scores.shape, (1,))


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
