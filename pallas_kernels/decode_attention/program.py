"""One program of the Hopper kernel of `decode_attention`: a share of the pages of one KV head of one sequence.

A decode step has few queries per key, so products are transposed: scores are Sᵀ = K·qᵀ [keys, G] and outputs
Oᵀ += Vᵀ·pᵀ [H, G], with wgmma's 64 rows on the long side and the query group, padded to 8 or 16, on the other side.
One warpgroup reads page ids and copies pages to shared memory in advance; the others take blocks in turn.

Quantised pages are never dequantised. With w = p · scale_v and codes as `core.mosaic` widens them,

    q · k = scale_k (Σ_d q_d code_kd − zero_k Σ_d q_d)       Σ_j p_j v_j = Σ_j w_j code_vj − Σ_j w_j zero_vj

and all terms that do not depend on the element d of a part are applied after the products.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.mosaic import (
    KEY_PARTS,
    VALUE_PARTS,
    by_part,
    product,
    product_of_registers,
    widened_keys,
    widened_values,
)
from pallas_kernels.core.online_softmax import FLOOR, HIDDEN
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables
from pallas_kernels.core.quantization import QuantizedArray

_LARGEST = 65504.0
"""The largest float16. No query is near it."""
_NOWHERE = 2**30
"""The position of keys that do not exist: past every sequence's end."""
_WGMMA = plgpu.Layout.WGMMA
_BY_KEY, _BY_QUERY = _WGMMA.reduce(1), _WGMMA.reduce(0)
_BY_ROW = plgpu.Layout.TILED(plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""[8 i, 32 j] with each row in 16 lanes of one warp, which sum it without shared memory."""


class Heads(NamedTuple):
    """The static properties of the heads of one class.

    Attributes:
      name: "retrieval" or "streaming".
      pool: shapes of the pages.
      first: the first KV head.
      group: query heads per KV head.
      splits: programs that share the pages of one head.
      pages: most pages that one head reads.
      has_list: whether pages come from a list, not in their natural order.
      window: sink and local window of streaming heads.
    """

    name: str
    pool: PagedKV
    first: int
    group: int
    splits: int
    pages: int
    has_list: bool
    window: tuple[int, int] | None


class _Share(NamedTuple):
    """What a program reads: blocks of runs of ``run`` tokens; a run is a page or a part of a large one.

    ``starts_of`` gives the position of the first token of each run of a block, `_NOWHERE` past the share's end. Keys
    are visible below ``length``; streaming heads see only those above ``lowest`` or in the sink.
    """

    run: int
    blocks: jax.Array
    starts_of: Callable[[jax.Array], list[jax.Array]]
    length: jax.Array
    lowest: jax.Array


def _share(heads: Heads, listed: Any, length: jax.Array, split: jax.Array, block_keys: int) -> _Share:
    """Returns the share of a split: whole blocks, as equal as possible; it depends only on the sequence's length."""
    size = heads.pool.page_size
    run = min(size, block_keys)
    page_runs, block_runs = size // run, block_keys // run
    held = (length + size - 1) // size
    lowest = jnp.int32(-1)
    if heads.window is not None:
        sink, local = heads.window
        sinks = -(-sink // size)
        lowest = length - 1 - local
        oldest = jnp.maximum(jnp.maximum(lowest + 1, 0) // size, sinks)
        total = jnp.minimum(sinks, held) + jnp.maximum(held - oldest, 0)

        def page_of(entry: jax.Array) -> jax.Array:
            return jnp.where(entry < sinks, entry, oldest + entry - sinks)
    else:
        total = jnp.minimum(heads.pages, held)

        def page_of(entry: jax.Array) -> jax.Array:
            return entry if listed is None else listed[jnp.minimum(entry, heads.pages - 1)]

    runs = total * page_runs
    most = (runs + heads.splits * block_runs - 1) // (heads.splits * block_runs) * block_runs
    first = split * most
    end = jnp.minimum(first + most, runs)

    def start_of(entry: jax.Array) -> jax.Array:
        page = page_of(entry // page_runs)
        start = page * size + entry % page_runs * run
        return jnp.where((entry < end) & (page >= 0) & (start < length), start, _NOWHERE)

    def starts_of(block: jax.Array) -> list[jax.Array]:
        return [start_of(first + block * block_runs + i) for i in range(block_runs)]

    blocks = jnp.maximum(end - first + block_runs - 1, 0) // block_runs
    return _Share(run, blocks, starts_of, length, lowest)


def attend(
    heads: Heads,
    stages: int,
    program: jax.Array,
    q_gmem: Any,
    kv_gmem: LayerKV,
    tables_gmem: PageTables,
    lengths_gmem: Any,
    selected_gmem: Any,
    out_gmem: Any,
    part_gmem: Any,
    scale_gmem: Any,
    scratch: dict[str, Any],
) -> None:
    """Runs program ``program`` of a class of heads; `mosaic_gpu._launch` defines the arrays."""
    batch, count = lengths_gmem.shape[0], heads.pool.num_kv_heads
    b, head, split = program % batch, program // batch % count, program // (batch * count)
    listed = selected_gmem.at[b, head] if heads.has_list else None
    warpgroups, _, block_keys = scratch["p"].shape
    share = _share(heads, listed, lengths_gmem[b], split, block_keys)
    role = jax.lax.axis_index("role")
    assert stages % warpgroups == 0, "a slot must belong to one warpgroup: it alone follows the phases of its barriers"

    @pl.when(role == warpgroups)
    def _copy() -> None:
        rows = scratch["q"].at[pl.ds(0, heads.group)]
        plgpu.copy_gmem_to_smem(q_gmem.at[b, heads.first + head], rows, scratch["q_ready"])
        pool, table = getattr(kv_gmem, heads.name), getattr(tables_gmem, heads.name)
        _copy_blocks(heads, share, stages, pool, table.at[b], head, scratch)

    @pl.when(role < warpgroups)
    def _compute() -> None:
        plgpu.barrier_wait(scratch["q_ready"])
        state = _attend_blocks(heads, share, stages, role, scratch)
        store = partial(_store, heads, scratch)
        if heads.splits > 1:
            store = partial(store, out_gmem=part_gmem.at[b, head, split], scale_gmem=scale_gmem.at[b, head, split])
        else:
            store = partial(store, out_gmem=out_gmem.at[b, heads.first + head], scale_gmem=None)
        _join(state, scratch, role, store)


def _copy_blocks(
    heads: Heads, share: _Share, stages: int, pool: PagedKV, table_gmem: Any, head: jax.Array, scratch: dict[str, Any]
) -> None:
    """Copies the blocks of a share to shared memory, as slots become free."""
    size, run = heads.pool.page_size, share.run
    # The first run of the newest page replaces runs that do not exist; its keys are hidden later.
    newest = (share.length - 1) // size * size

    @pl.loop(0, share.blocks)
    def _copy_block(block: jax.Array) -> None:
        slot = block % stages
        starts = [jnp.where(start == _NOWHERE, newest, start) for start in share.starts_of(block)]
        places = [(jnp.maximum(table_gmem[start // size], 0), start % size) for start in starts]
        pl.when(block >= stages)(partial(plgpu.barrier_wait, scratch["free"].at[slot]))
        for name in ("k", "v"):
            ready = scratch[f"{name}_ready"].at[slot]
            arrays = zip(jax.tree.leaves(getattr(pool, name)), jax.tree.leaves(scratch[name]), strict=True)
            for source, target in arrays:
                for i, (page, row) in enumerate(places):
                    rows, place = pl.ds(row, run), pl.ds(i * run, run)
                    plgpu.copy_gmem_to_smem(source.at[page, head, rows], target.at[slot, place], ready)

    @pl.loop(jnp.maximum(share.blocks - stages, 0), share.blocks)
    def _drain(block: jax.Array) -> None:
        plgpu.barrier_wait(scratch["free"].at[block % stages])


def _attend_blocks(heads: Heads, share: _Share, stages: int, role: jax.Array, scratch: dict[str, Any]) -> "_Softmax":
    """Returns the state of warpgroup ``role`` after every ``warpgroups``-th block of a share."""
    warpgroups = scratch["p"].shape[0]
    private = ("q_tile", "p", "by_query", "v_wide")
    own = scratch | {name: scratch[name].at[role] for name in private if scratch[name] is not None}
    sums = _prepare_queries(heads, own)

    def attend_block(turn: jax.Array, state: _Softmax) -> _Softmax:
        block = role + turn * warpgroups
        slot, starts = block % stages, share.starts_of(block)
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        scores = _scores(own, slot, sums)
        visible = _is_visible(scores.shape, starts, heads, share)
        state, weights = state.weigh(scores, visible)
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        _hide_values(own, slot, starts, heads, share)
        state = _add_values(state, own, slot, weights, visible)
        plgpu.barrier_arrive(scratch["free"].at[slot])
        return state

    turns = (share.blocks - role + warpgroups - 1) // warpgroups
    return jax.lax.fori_loop(0, turns, attend_block, _Softmax.start(own)).added_up()


class _Softmax(NamedTuple):
    """Running state to base 2, float32.

    Sums over keys stay separate for each row of a block until the end, since adding them takes shuffles and barriers.

    Attributes:
      maximum: [G padded].
      total: [keys of a block, G padded] sums of exponentials.
      weights, zeros: likewise Σ w and Σ w · zero of quantised values, with the rounded w that multiply the codes.
      values: [H, G padded] weighted values.
    """

    maximum: jax.Array
    total: jax.Array
    weights: jax.Array
    zeros: jax.Array
    values: jax.Array

    @classmethod
    def start(cls, scratch: dict[str, Any]) -> "_Softmax":
        """Returns the state before any key."""
        (padded, keys), head_dim = scratch["p"].shape, scratch["q"].shape[1]
        floor = plgpu.layout_cast(jnp.full((padded,), FLOOR, jnp.float32), _BY_QUERY)
        sums, values = (plgpu.layout_cast(jnp.zeros((n, padded), jnp.float32), _WGMMA) for n in (keys, head_dim))
        return cls(floor, sums, sums, sums, values)

    def weigh(self, scores: jax.Array, visible: jax.Array) -> tuple["_Softmax", jax.Array]:
        """Returns the state before a block's values are added, and the weights [keys, G padded] of its keys."""
        maximum = jnp.maximum(self.maximum, _over_keys(jnp.max, jnp.where(visible, scores, HIDDEN)))
        weights = jnp.where(visible, jnp.exp2(scores - _to_keys(maximum, scores.shape)), 0.0)
        state = self.scaled(jnp.exp2(self.maximum - maximum))
        return state._replace(maximum=maximum, total=state.total + weights), weights

    def scaled(self, factor: jax.Array) -> "_Softmax":
        """Returns the state with all sums times a factor [G padded]."""
        total, weights, zeros, values = (x * _to_keys(factor, x.shape) for x in self[1:])
        return _Softmax(self.maximum, total, weights, zeros, values)

    def added_up(self) -> "_Softmax":
        """Returns the state with ``total``, ``weights`` and ``zeros`` [G padded]."""
        total, weights, zeros = (_over_keys(jnp.sum, x) for x in self[1:-1])
        return _Softmax(self.maximum, total, weights, zeros, self.values)

    def join(self, other: "_Softmax") -> "_Softmax":
        """Returns the added-up state of the keys of both."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        mine, theirs = (jnp.exp2(x.maximum - maximum) for x in (self, other))
        total, weights, zeros = (x * mine + y * theirs for x, y in zip(self[1:-1], other[1:-1], strict=True))
        shape = self.values.shape
        values = self.values * _to_keys(mine, shape) + other.values * _to_keys(theirs, shape)
        return _Softmax(maximum, total, weights, zeros, values)


def _over_keys(reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns the reduction [G padded] of ``x`` [keys, G padded] over keys."""
    return plgpu.layout_cast(reduction(x, axis=0), _BY_QUERY)


def _to_keys(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns ``x`` [G padded], a value per query, broadcast to all rows of ``shape``."""
    return jax.lax.broadcast_in_dim(x, shape, (1,))


def _by_key(vector_smem: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a vector with a value per key, broadcast to all columns of ``shape``."""
    return jax.lax.broadcast_in_dim(plgpu.load(vector_smem, layout=_BY_KEY), shape, (0,))


def _is_visible(shape: tuple[int, ...], starts: list[jax.Array], heads: Heads, share: _Share) -> jax.Array:
    """Returns which keys of a block are visible, in the rows of ``shape``, given the positions where its runs start."""
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA)
    position = key + starts[0]
    for i, start in enumerate(starts[1:], 1):
        first = i * share.run
        position = jnp.where(key >= first, key + (start - first), position)
    visible = position < share.length
    return visible if heads.window is None else visible & ((position > share.lowest) | (position < heads.window[0]))


def _hide_values(
    scratch: dict[str, Any], slot: jax.Array, starts: list[jax.Array], heads: Heads, share: _Share
) -> None:
    """Zeroes hidden rows of values: unwritten memory may be NaN, which a weight of zero does not hide.

    Quantised rows do not need this: their codes are numbers, and their scales are hidden with the weights.
    """
    values, run = scratch["v"], share.run
    if isinstance(values, QuantizedArray):
        return
    is_seen = [start + run <= share.length for start in starts]
    if heads.window is not None:
        in_window = [(start > share.lowest) | (start + run <= heads.window[0]) for start in starts]
        is_seen = [seen & inside for seen, inside in zip(is_seen, in_window, strict=True)]

    @pl.when(~reduce(jnp.logical_and, is_seen))
    def _zero() -> None:
        rows = plgpu.load(values.at[slot], layout=_WGMMA)
        values[slot] = jnp.where(_is_visible(rows.shape, starts, heads, share), rows, jnp.bfloat16(0))


def _prepare_queries(heads: Heads, scratch: dict[str, Any]) -> tuple[jax.Array, jax.Array] | None:
    """Makes a wgmma operand of the queries, and returns Σ_d q_d and Σ_d q_d bias_d [G padded] for quantised keys.

    Rows past the group become zero. Queries are multiplied by the factors of key codes, powers of two, without
    rounding. Key codes are multiplied in float16, which represents bfloat16 numbers between 2**-14 and 2**16 exactly.
    """
    shape = scratch["q"].shape
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_BY_ROW)
    queries = plgpu.load(scratch["q"], layout=_BY_ROW).astype(jnp.float32)
    queries = jnp.where(row < heads.group, jnp.clip(queries, -_LARGEST, _LARGEST), 0.0)
    parts = KEY_PARTS[scratch["k"].bits] if isinstance(scratch["k"], QuantizedArray) else ()
    sums = []
    for numbers in ([1.0] * len(parts), [part.bias for part in parts]) if parts else ():
        scratch["by_query"][...] = jnp.sum(queries * by_part(tuple(numbers), shape, 1, _BY_ROW), axis=1)
        sums.append(plgpu.load(scratch["by_query"], layout=_BY_QUERY))
    factors = tuple(part.factor for part in parts) or (1.0,)
    scratch["q_tile"][...] = (queries * by_part(factors, shape, 1, _BY_ROW)).astype(scratch["q_tile"].dtype)
    plgpu.commit_smem()
    return (sums[0], sums[1]) if parts else None


def _scores(scratch: dict[str, Any], slot: jax.Array, sums: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Returns base-2 logits [keys, G padded] of a block."""
    keys, queries = scratch["k"], scratch["q_tile"]
    (padded, head_dim), rows = queries.shape, scratch["p"].shape[1]
    factor = math.log2(math.e) / math.sqrt(head_dim)
    if sums is None:
        return product(rows, padded, (keys.at[slot], queries.transpose((1, 0)))) * factor
    width = head_dim // len(KEY_PARTS[keys.bits])
    rights = [queries.at[:, pl.ds(i, width)].transpose((1, 0)) for i in range(0, head_dim, width)]

    def left_rows(i: int) -> list[jax.Array]:
        codes = plgpu.load(keys.codes.at[slot, pl.ds(i, 64)], layout=_WGMMA)
        return widened_keys(codes, keys.bits)

    raw = product_of_registers(rows, padded, left_rows, rights)
    total, bias = (_to_keys(x, raw.shape) for x in sums)
    scale, zero = (_by_key(x.at[slot], raw.shape) for x in (keys.scale, keys.zero))
    return (raw + bias - zero * total) * (scale * factor)


def _add_values(
    state: _Softmax, scratch: dict[str, Any], slot: jax.Array, weights: jax.Array, visible: jax.Array
) -> _Softmax:
    """Returns the state with a block's values added."""
    values: Any = scratch["v"]
    p_smem, head_dim = scratch["p"], scratch["q"].shape[1]
    if isinstance(values, QuantizedArray):
        scale, zero = (_by_key(x.at[slot], weights.shape) for x in (values.scale, values.zero))
        rounded = jnp.where(visible, weights * scale, 0.0).astype(jnp.bfloat16)  # a hidden row's scale may be NaN
        exact = rounded.astype(jnp.float32)
        zeros = jnp.where(visible, exact * zero, 0.0)
        state = state._replace(weights=state.weights + exact, zeros=state.zeros + zeros)
        wide: Any = scratch["v_wide"]
        width = head_dim // len(VALUE_PARTS[values.bits])
        for i in range(0, wide.shape[0], 64):
            rows: Any = values.codes.at[slot, pl.ds(i, 64)]
            codes = plgpu.load(rows, layout=plgpu.Layout.WGMMA_UPCAST_4X)
            for part, column in zip(widened_values(codes, values.bits), range(0, head_dim, width), strict=True):
                wide[pl.ds(i, 64), pl.ds(column, width)] = part
    else:
        rounded, wide = weights.astype(jnp.bfloat16), values.at[slot]
    p_smem.transpose((1, 0))[...] = plgpu.layout_cast(rounded, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    added = product(head_dim, weights.shape[1], (wide.transpose((1, 0)), p_smem.transpose((1, 0))))
    return state._replace(values=state.values + added)


def _join(state: _Softmax, scratch: dict[str, Any], role: jax.Array, store: Callable[[_Softmax], None]) -> None:
    """Joins the states of all warpgroups in the first one, which passes the result to ``store``."""
    values_smem, vectors_smem = scratch["values"], scratch["vectors"]
    others = vectors_smem.shape[0]

    @pl.when(role > 0)
    def _hand_over() -> None:
        other = role - 1
        values_smem.at[other].transpose((1, 0))[...] = plgpu.layout_cast(state.values, plgpu.Layout.WGMMA_TRANSPOSED)
        for i, vector in enumerate(state[:-1]):
            vectors_smem[other, i] = vector
        plgpu.barrier_arrive(scratch["joined"])

    @pl.when(role == 0)
    def _take_over() -> None:
        joined = state
        if others:
            plgpu.barrier_wait(scratch["joined"])
        for other in range(others):
            transposed: Any = values_smem.at[other].transpose((1, 0))
            values = plgpu.load(transposed, layout=plgpu.Layout.WGMMA_TRANSPOSED)
            maximum, total, weights, zeros = (plgpu.load(vectors_smem.at[other, i], layout=_BY_QUERY) for i in range(4))
            joined = joined.join(_Softmax(maximum, total, weights, zeros, plgpu.layout_cast(values, _WGMMA)))
        store(joined)


def _store(heads: Heads, scratch: dict[str, Any], state: _Softmax, out_gmem: Any, scale_gmem: Any | None) -> None:
    """Writes the outputs of the real queries (zeros if no key was visible), and a part's scale.

    The scale is the base-2 logarithm of the sum of exponentials: the part's weight among the parts of its head.
    """
    values, shape = state.values, state.values.shape
    if isinstance(scratch["v"], QuantizedArray):
        parts = VALUE_PARTS[scratch["v"].bits]
        factor = by_part(tuple(part.factor for part in parts), shape, 0, _WGMMA)
        bias = by_part(tuple(part.bias for part in parts), shape, 0, _WGMMA)
        values = values * factor + bias * _to_keys(state.weights, shape) - _to_keys(state.zeros, shape)
    total = jnp.where(state.total > 0, state.total, 1.0)
    values = values * _to_keys(1.0 / total, shape)
    staged = scratch["out" if scale_gmem is None else "part"]
    staged.transpose((1, 0))[...] = plgpu.layout_cast(values.astype(staged.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    if scale_gmem is not None:
        scratch["scale"][...] = jnp.where(state.total > 0, state.maximum + jnp.log2(total), HIDDEN)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, heads.group)], out_gmem)
    if scale_gmem is not None:
        plgpu.copy_smem_to_gmem(scratch["scale"], scale_gmem)
    plgpu.wait_smem_to_gmem(0)
