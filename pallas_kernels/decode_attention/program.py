"""One program of the Hopper kernel of `decode_attention`: a share of the pages of one KV head of one sequence.

A decode step has few queries per key, so products are transposed: scores are Sᵀ = K·qᵀ [keys, G] and outputs
Oᵀ += Vᵀ·pᵀ [H, G], with wgmma's 64 rows on the long side and the query group, padded to 8 or 16, on the other side.
One warpgroup reads page ids and copies pages to shared memory in advance; the others take blocks in turn.

The tokens of the open page, in the tail, are one more block (two of a large page), which a warpgroup takes before its
first turn, while pages are on their way. The last of a head's programs has it; no other has fewer pages.

Quantised keys are dequantised on their way to the tensor cores, k = code · step + k_min, by one instruction for two
float16 numbers, with codes as `core.operands` widens them. float16 has eight times the precision of the bfloat16 keys
that were stored, within 65504. The warpgroup that takes a block makes steps of its bounds once, in their place in
shared memory: each thread needs those of 32 channels, and computing them there would take more than what is saved.
Folding steps into the queries would need queries of its own for each sub-page.

Quantised values are never dequantised. With w = p · scale_v and a code m in the middle,

    Σ_j p_j v_j = Σ_j w_j (code_vj − m) + Σ_j p_j (low_vj + m scale_vj)

where only the first sum depends on the channel, and only its w are rounded.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.mosaic import by_part, product, product_of_registers
from pallas_kernels.core.online_softmax import FLOOR, HIDDEN
from pallas_kernels.core.operands import (
    KEY_PARTS,
    QUARTETS,
    VALUE_PARTS,
    by_quartets,
    quartets_of_rows,
    repeated_rows,
    rows_by_quartets,
    rows_to_repeat,
    widened_keys,
    widened_values,
)
from pallas_kernels.core.paging import LayerKV, PagedKV, PageTables
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys

_LARGEST = 65504.0
"""The largest float16. No query is near it."""
_IN_BOUNDS = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
"""Copies short rows without the tensor copy engine, whose targets must be aligned to 128 bytes."""
_NOWHERE = 2**30
"""The position of keys that do not exist: past every sequence's end."""
_WGMMA = plgpu.Layout.WGMMA
_BY_KEY, _BY_QUERY = _WGMMA.reduce(1), _WGMMA.reduce(0)
_BY_ROW = plgpu.Layout.TILED(plgpu.Tiling(((8, 32), (2, 32), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""[8 i, 32 j] with each row in 16 lanes of one warp."""


class Heads(NamedTuple):
    """The static properties of the heads of one class.

    Attributes:
      name: "retrieval" or "streaming".
      pool: shapes of the pages.
      first: the first KV head.
      tail_first: the first head in the tail.
      group: query heads per KV head.
      splits: programs that share the pages of one head.
      pages: most pages that one head reads.
      has_list: whether pages come from a list, not in their natural order.
      window: sink and local window of streaming heads.
    """

    name: str
    pool: PagedKV
    first: int
    tail_first: int
    group: int
    splits: int
    pages: int
    has_list: bool
    window: tuple[int, int] | None


class _Share(NamedTuple):
    """What a program reads: blocks of runs of ``run`` tokens; a run is a page or a part of a large one.

    ``starts_of`` gives the position of the first token of each run of a block, `_NOWHERE` past the share's end. Keys
    are visible below ``length``; streaming heads see only those above ``lowest`` or in the sink. ``tails`` runs, from
    position ``open_start`` on, are in the tail.
    """

    run: int
    blocks: jax.Array
    starts_of: Callable[[jax.Array], list[jax.Array]]
    length: jax.Array
    lowest: jax.Array
    open_start: jax.Array
    tails: jax.Array


def _share(heads: Heads, listed: Any, length: jax.Array, split: jax.Array, block_keys: int) -> _Share:
    """Returns the share of a split: whole blocks, as equal as possible; it depends only on the sequence's length.

    Pages come before the open one, in a list too. The last split has the tail.
    """
    size = heads.pool.page_size
    run = min(size, block_keys)
    page_runs, block_runs = size // run, block_keys // run
    sealed = jnp.maximum(length - 1, 0) // size
    open_start = sealed * size
    lowest = jnp.int32(-1)
    if heads.window is not None:
        sink, local = heads.window
        sinks = -(-sink // size)
        lowest = length - 1 - local
        oldest = jnp.maximum(jnp.maximum(lowest + 1, 0) // size, sinks)
        total = jnp.minimum(sinks, sealed) + jnp.maximum(sealed - oldest, 0)

        def page_of(entry: jax.Array) -> jax.Array:
            return jnp.where(entry < sinks, entry, oldest + entry - sinks)
    else:
        total = sealed if listed is None else jnp.minimum(heads.pages - 1, sealed)

        def page_of(entry: jax.Array) -> jax.Array:
            return entry if listed is None else listed[jnp.minimum(entry, heads.pages - 1)]

    runs = total * page_runs
    most = (runs + heads.splits * block_runs - 1) // (heads.splits * block_runs) * block_runs
    first = split * most
    end = jnp.minimum(first + most, runs)

    def start_of(entry: jax.Array) -> jax.Array:
        page = page_of(entry // page_runs)
        start = page * size + entry % page_runs * run
        return jnp.where((entry < end) & (page >= 0) & (start < open_start), start, _NOWHERE)

    def starts_of(block: jax.Array) -> list[jax.Array]:
        return [start_of(first + block * block_runs + i) for i in range(block_runs)]

    blocks = jnp.maximum(end - first + block_runs - 1, 0) // block_runs
    tails = jnp.where(split == heads.splits - 1, (length - open_start + run - 1) // run, 0)
    return _Share(run, blocks, starts_of, length, lowest, open_start, tails)


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
        slots: Any = tables_gmem.slots
        tail: list[Any] = [x.at[slots[b], heads.tail_first + head] for x in kv_gmem.tail]
        _copy_tail(share, tail, scratch)
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


def _copy_tail(share: _Share, tail_gmem: list[Any], scratch: dict[str, Any]) -> None:
    """Copies the runs of the tail; their values go where the warpgroup that takes them widens values later."""
    k_gmem, v_gmem = tail_gmem
    warpgroups, most = scratch["v_wide"].shape[0], scratch["tail_k"].shape[0]
    assert most <= warpgroups, "a warpgroup takes one run of the tail"
    for i in range(most):

        @pl.when(i < share.tails)
        def _copy_run(i: int = i) -> None:
            rows, place, ready = pl.ds(i * share.run, share.run), pl.ds(0, share.run), scratch["tail_ready"].at[i]
            owner = (share.blocks + i) % warpgroups
            plgpu.copy_gmem_to_smem(k_gmem.at[rows], scratch["tail_k"].at[i, place], ready)
            plgpu.copy_gmem_to_smem(v_gmem.at[rows], scratch["v_wide"].at[owner, place], ready)


def _copy_blocks(
    heads: Heads, share: _Share, stages: int, pool: PagedKV, table_gmem: Any, head: jax.Array, scratch: dict[str, Any]
) -> None:
    """Copies the blocks of a share to shared memory, as slots become free."""
    size, run = heads.pool.page_size, share.run
    arrays = {name: [(*both, 1) for both in _leaves(getattr(pool, name), scratch[name])] for name in ("k", "v")}
    if scratch["bounds"]:
        bounds = zip((pool.k_min, pool.k_max), scratch["bounds"], strict=True)
        arrays["k"] += [(*both, heads.pool.sub_page_size) for both in bounds]

    @pl.loop(0, share.blocks)
    def _copy_block(block: jax.Array) -> None:
        slot = block % stages
        # The open page, unwritten, replaces runs that do not exist; its keys are hidden later.
        starts = [jnp.where(start == _NOWHERE, share.open_start, start) for start in share.starts_of(block)]
        places = [(jnp.maximum(table_gmem[start // size], 0), start % size) for start in starts]
        pl.when(block >= stages)(partial(plgpu.barrier_wait, scratch["free"].at[slot]))
        for name in ("k", "v"):
            ready = scratch[f"{name}_ready"].at[slot]
            for source, target, unit in arrays[name]:
                count = max(run // unit, 1)
                for i, (page, row) in enumerate(places):
                    rows, place = pl.ds(row // unit, count), pl.ds(i * count, count)
                    plgpu.copy_gmem_to_smem(
                        source.at[page, head, rows], target.at[slot, place], ready, oob_mode=_IN_BOUNDS
                    )

    @pl.loop(jnp.maximum(share.blocks - stages, 0), share.blocks)
    def _drain(block: jax.Array) -> None:
        plgpu.barrier_wait(scratch["free"].at[block % stages])


def _leaves(*trees: Any) -> list[tuple[Any, ...]]:
    """Returns the leaves of trees of one structure side by side."""
    return list(zip(*map(jax.tree.leaves, trees), strict=True))


def _attend_blocks(heads: Heads, share: _Share, stages: int, role: jax.Array, scratch: dict[str, Any]) -> "_Softmax":
    """Returns the state of warpgroup ``role`` after its run of the tail and its blocks, every ``warpgroups``-th."""
    warpgroups = scratch["p"].shape[0]
    own = scratch | {name: scratch[name].at[role] for name in ("q_tile", "p", "v_wide")}
    _prepare_queries(heads, own)

    def attend_tail(_: jax.Array, state: _Softmax) -> _Softmax:
        plgpu.barrier_wait(scratch["tail_ready"].at[tail])
        starts = [share.open_start + tail * share.run, *[jnp.int32(_NOWHERE)] * (own["p"].shape[1] // share.run - 1)]
        scores = _scores(heads, own, own["tail_k"].at[tail])
        state, weights = state.weigh(scores, _is_visible(scores.shape, starts, heads, share))
        _hide_values(own["v_wide"], starts, heads, share)
        added = _weighted_values(own, weights.astype(jnp.bfloat16), own["v_wide"])
        if isinstance(own["v"], QuantizedArray):  # `_store` expects sums of codes
            factors = tuple(1 / part.factor for part in VALUE_PARTS[own["v"].bits])
            added = added * by_part(factors, added.shape, 0, _WGMMA)
        return state._replace(values=state.values + added)

    def attend_block(turn: jax.Array, state: _Softmax) -> _Softmax:
        block = role + turn * warpgroups
        slot, starts = block % stages, share.starts_of(block)
        k, bounds, v = jax.tree.map(lambda x: x.at[slot], [own[name] for name in ("k", "bounds", "v")])
        plgpu.barrier_wait(scratch["k_ready"].at[slot])
        scores = _scores(heads, own, k, bounds)
        visible = _is_visible(scores.shape, starts, heads, share)
        state, weights = state.weigh(scores, visible)
        plgpu.barrier_wait(scratch["v_ready"].at[slot])
        if isinstance(v, QuantizedArray):
            state, weights = _scaled_weights(state, v, weights, visible)
            _widen_values(v, own["v_wide"])
            v = own["v_wide"]
        else:
            _hide_values(v, starts, heads, share)
        added = _weighted_values(own, weights.astype(jnp.bfloat16), v)
        plgpu.barrier_arrive(scratch["free"].at[slot])
        return state._replace(values=state.values + added)

    tail = (role - share.blocks % warpgroups + warpgroups) % warpgroups
    turns = (share.blocks - role + warpgroups - 1) // warpgroups
    state = jax.lax.fori_loop(0, jnp.where(tail < share.tails, 1, 0), attend_tail, _Softmax.start(own))
    return jax.lax.fori_loop(0, turns, attend_block, state).added_up()


class _Softmax(NamedTuple):
    """Running state to base 2, float32.

    Sums over keys stay separate for each row of a block until the end, since adding them takes shuffles and barriers.

    Attributes:
      maximum: [G padded].
      sums: of exponentials, [keys of a block, G padded]; of quantised values likewise Σ p · (low + m scale); and of
        those in 4 bits Σ w, with the rounded w that multiply codes.
      values: [H, G padded] weighted values.
    """

    maximum: jax.Array
    sums: tuple[jax.Array, ...]
    values: jax.Array

    @classmethod
    def start(cls, scratch: dict[str, Any]) -> "_Softmax":
        """Returns the state before any key."""
        (padded, keys), head_dim = scratch["p"].shape, scratch["q"].shape[1]
        bits = scratch["v"].bits if isinstance(scratch["v"], QuantizedArray) else 16
        floor = plgpu.layout_cast(jnp.full((padded,), FLOOR, jnp.float32), _BY_QUERY)
        zero, values = (plgpu.layout_cast(jnp.zeros((n, padded), jnp.float32), _WGMMA) for n in (keys, head_dim))
        return cls(floor, (zero,) * {16: 1, 8: 2, 4: 3}[bits], values)

    def weigh(self, scores: jax.Array, visible: jax.Array) -> tuple["_Softmax", jax.Array]:
        """Returns the state before a block's values are added, and the weights [keys, G padded] of its keys."""
        maximum = jnp.maximum(self.maximum, _over_keys(jnp.max, jnp.where(visible, scores, HIDDEN)))
        weights = jnp.where(visible, jnp.exp2(scores - _to_keys(maximum, scores.shape)), 0.0)
        factor = jnp.exp2(self.maximum - maximum)
        sums, values = jax.tree.map(lambda x: x * _to_keys(factor, x.shape), (self.sums, self.values))
        return _Softmax(maximum, sums, values).add(weights), weights

    def add(self, *terms: jax.Array, first: int = 0) -> "_Softmax":
        """Returns the state with terms added to its sums, from number ``first`` on."""
        sums = list(self.sums)
        for i, term in enumerate(terms, first):
            sums[i] += term
        return self._replace(sums=tuple(sums))

    def added_up(self) -> "_Softmax":
        """Returns the state with ``sums`` [G padded]."""
        return self._replace(sums=tuple(_over_keys(jnp.sum, x) for x in self.sums))

    def join(self, other: "_Softmax") -> "_Softmax":
        """Returns the added-up state of the keys of both."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        mine, theirs = (jnp.exp2(x.maximum - maximum) for x in (self, other))
        sums = tuple(x * mine + y * theirs for x, y in zip(self.sums, other.sums, strict=True))
        shape = self.values.shape
        values = self.values * _to_keys(mine, shape) + other.values * _to_keys(theirs, shape)
        return _Softmax(maximum, sums, values)


def _over_keys(reduction: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns the reduction [G padded] of ``x`` [keys, G padded] over keys."""
    return plgpu.layout_cast(reduction(x, axis=0), _BY_QUERY)


def _to_keys(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns ``x`` [G padded], a value per query, broadcast to all rows of ``shape``."""
    return jax.lax.broadcast_in_dim(x, shape, (1,))


def _by_key(vector_smem: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a vector with a value per key as float32, broadcast to all columns of ``shape``."""
    return jax.lax.broadcast_in_dim(plgpu.load(vector_smem, layout=_BY_KEY).astype(jnp.float32), shape, (0,))


def _is_visible(shape: tuple[int, ...], starts: list[jax.Array], heads: Heads, share: _Share) -> jax.Array:
    """Returns which keys of a block are visible, in the rows of ``shape``, given the positions where its runs start."""
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_WGMMA)
    position = key + starts[0]
    for i, start in enumerate(starts[1:], 1):
        first = i * share.run
        position = jnp.where(key >= first, key + (start - first), position)
    visible = position < share.length
    return visible if heads.window is None else visible & ((position > share.lowest) | (position < heads.window[0]))


def _hide_values(values_smem: Any, starts: list[jax.Array], heads: Heads, share: _Share) -> None:
    """Zeroes hidden rows of values: unwritten memory may be NaN, which a weight of zero does not hide.

    Quantised rows do not need this: their codes are numbers, and their scales are hidden with the weights.
    """
    run = share.run
    is_seen = [start + run <= share.length for start in starts]
    if heads.window is not None:
        in_window = [(start > share.lowest) | (start + run <= heads.window[0]) for start in starts]
        is_seen = [seen & inside for seen, inside in zip(is_seen, in_window, strict=True)]

    @pl.when(~reduce(jnp.logical_and, is_seen))
    def _zero() -> None:
        rows = plgpu.load(values_smem, layout=_WGMMA)
        values_smem[...] = jnp.where(_is_visible(rows.shape, starts, heads, share), rows, jnp.bfloat16(0))


def _prepare_queries(heads: Heads, scratch: dict[str, Any]) -> None:
    """Makes a wgmma operand of the queries; rows past the group become zero.

    Quantised keys are multiplied in float16, which represents bfloat16 numbers between 2**-14 and 2**16 exactly, and by
    quartets (see `core.operands`).
    """
    is_quantised, shape = isinstance(heads.pool.k, QuantizedKeys), scratch["q"].shape
    layout = quartets_of_rows(shape) if is_quantised else _BY_ROW
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    queries = jnp.where(row < heads.group, plgpu.load(scratch["q"], layout=layout), jnp.bfloat16(0))
    if is_quantised:
        queries = jnp.clip(queries.astype(jnp.float32), -_LARGEST, _LARGEST).astype(jnp.float16)
        queries = rows_by_quartets(queries)
    scratch["q_tile"][...] = queries
    plgpu.commit_smem()


def _scores(heads: Heads, scratch: dict[str, Any], keys: Any, bounds: list[Any] | None = None) -> jax.Array:
    """Returns base-2 logits [keys, G padded] of a block: of quantised keys with their bounds, or of bfloat16 keys."""
    queries = scratch["q_tile"]
    (padded, head_dim), rows = queries.shape, scratch["p"].shape[1]
    factor = math.log2(math.e) / math.sqrt(head_dim)
    if not isinstance(heads.pool.k, QuantizedKeys):
        return product(rows, padded, (keys, queries.transpose((1, 0)))) * factor
    if bounds is not None:
        _make_steps(bounds, heads.pool.k.bits)
        left_rows = partial(_sealed_rows, heads, keys, bounds)
    else:
        left_rows = partial(_open_rows, heads, keys)
    channels, width = _columns(heads)
    rights = [queries.at[:, pl.ds(j, width)].transpose((1, 0)) for j in channels]
    return product_of_registers(rows, padded, left_rows, rights) * factor


def _columns(heads: Heads) -> tuple[list[int], int]:
    """Returns where the slices of channels begin that one wgmma after the other multiplies, and their width.

    A slice has one part of codes, and at most 64 channels, so that registers suffice for what is loaded in advance.
    """
    keys: Any = heads.pool.k
    columns, parts = keys.codes.shape[-1], len(KEY_PARTS[keys.bits])
    return [part * columns + i for i in range(0, columns, 64) for part in range(parts)], min(columns, 64)


def _open_rows(heads: Heads, keys_smem: Any, first: int) -> Iterator[jax.Array]:
    """Yields the slices of channels of bfloat16 keys ``first … first + 63`` as float16, by quartets."""
    channels, width = _columns(heads)
    for channel in channels:
        rows = plgpu.load(keys_smem.at[pl.ds(first, 64), pl.ds(channel, width)], layout=QUARTETS)
        yield by_quartets(rows.astype(jnp.float32).astype(jnp.float16))


def _sealed_rows(heads: Heads, keys: QuantizedKeys, bounds: list[Any], first: int) -> Iterator[jax.Array]:
    """Yields the slices of channels of keys ``first … first + 63``, dequantised to float16, by quartets."""
    codes_smem: Any = keys.codes
    channels, width = _columns(heads)
    for i, channel in enumerate(channels):
        if i % len(KEY_PARTS[keys.bits]) == 0:  # the column of the first part
            codes = plgpu.load(codes_smem.at[pl.ds(first, 64), pl.ds(channel, width)], layout=QUARTETS)
            parts = iter(widened_keys(codes, keys.bits))
        low, step = (_by_sub(x, first, channel, width, heads.pool.sub_page_size) for x in bounds)
        yield next(parts) * step + low


def _make_steps(bounds: list[Any], bits: int) -> None:
    """Replaces bounds [subs, H] of keys by float16 numbers: the least ones, and the factors of `widened_keys`."""
    shape = bounds[0].shape
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=min(math.prod(shape) // 128, 8))
    low, high = (plgpu.load(x, layout=layout).astype(jnp.float32) for x in bounds)
    factors = by_part(tuple(part.factor / (2**bits - 1) for part in KEY_PARTS[bits]), shape, 1, layout)
    for smem, numbers in zip(bounds, (low, (high - low) * factors), strict=True):
        smem[...] = jax.lax.bitcast_convert_type(numbers.astype(jnp.float16), jnp.bfloat16)
    plgpu.commit_smem()


def _by_sub(rows_smem: Any, first: int, column: int, width: int, sub_page_size: int) -> jax.Array:
    """Returns the float16 numbers [64, width] of the sub-pages of keys ``first … first + 63``, by quartets.

    Args:
      rows_smem: [subs, H], a row for each sub-page of a block; float16, called bfloat16.
      first: the first key.
      column: the first channel.
      width: channels.
      sub_page_size: keys that share a row.
    """
    count = max(64 // sub_page_size, 1)
    part = rows_smem.at[pl.ds(first // sub_page_size, count), pl.ds(column, width)]
    rows = plgpu.load(part, layout=rows_to_repeat(count), optimized=False)
    return repeated_rows(jax.lax.bitcast_convert_type(rows, jnp.float16))


def _scaled_weights(
    state: _Softmax, values: QuantizedArray, weights: jax.Array, visible: jax.Array
) -> tuple[_Softmax, jax.Array]:
    """Returns the state with what does not depend on the codes of a block's values, and the weights of the codes."""
    scale, low = (_by_key(x, weights.shape) for x in (values.scale, values.low))
    rounded = jnp.where(visible, weights * scale, 0.0).astype(jnp.bfloat16)  # a hidden row's scale may be NaN
    lows = jnp.where(visible, weights * (low + _middle(values.bits) * scale), 0.0)
    terms = (lows, rounded.astype(jnp.float32))[: len(state.sums) - 1]
    return state.add(*terms, first=1), rounded


def _middle(bits: int) -> float:
    """Returns the code that rounded weights are relative to: their errors are smaller where codes are on both sides."""
    return 2.0 ** (bits - 1)


def _widen_values(values: QuantizedArray, wide_smem: Any) -> None:
    """Makes a wgmma operand of the codes of a block's values."""
    width = wide_smem.shape[1] // len(VALUE_PARTS[values.bits])
    codes_smem: Any = values.codes
    for i in range(0, wide_smem.shape[0], 64):
        codes = plgpu.load(codes_smem.at[pl.ds(i, 64)], layout=plgpu.Layout.WGMMA_UPCAST_4X)
        for part, column in zip(widened_values(codes, values.bits), range(0, wide_smem.shape[1], width), strict=True):
            wide_smem[pl.ds(i, 64), pl.ds(column, width)] = part


def _weighted_values(scratch: dict[str, Any], weights: jax.Array, values_smem: Any) -> jax.Array:
    """Returns [H, G padded] the sum of values [keys, H] with bfloat16 weights [keys, G padded]."""
    weights_smem = scratch["p"].transpose((1, 0))
    weights_smem[...] = plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    return product(values_smem.shape[1], weights.shape[1], (values_smem.transpose((1, 0)), weights_smem))


def _join(state: _Softmax, scratch: dict[str, Any], role: jax.Array, store: Callable[[_Softmax], None]) -> None:
    """Joins the states of all warpgroups in the first one, which passes the result to ``store``."""
    values_smem, vectors_smem = scratch["values"], scratch["vectors"]
    others = vectors_smem.shape[0]

    @pl.when(role > 0)
    def _hand_over() -> None:
        other = role - 1
        values_smem.at[other].transpose((1, 0))[...] = plgpu.layout_cast(state.values, plgpu.Layout.WGMMA_TRANSPOSED)
        for i, vector in enumerate((state.maximum, *state.sums)):
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
            count = 1 + len(state.sums)
            maximum, *sums = (plgpu.load(vectors_smem.at[other, i], layout=_BY_QUERY) for i in range(count))
            joined = joined.join(_Softmax(maximum, tuple(sums), plgpu.layout_cast(values, _WGMMA)))
        store(joined)


def _store(heads: Heads, scratch: dict[str, Any], state: _Softmax, out_gmem: Any, scale_gmem: Any | None) -> None:
    """Writes the outputs of the real queries (zeros if no key was visible), and a part's scale.

    The scale is the base-2 logarithm of the sum of exponentials: the part's weight among the parts of its head.
    """
    values, shape = state.values, state.values.shape
    if isinstance(scratch["v"], QuantizedArray):
        bits = scratch["v"].bits
        values = values * by_part(tuple(part.factor for part in VALUE_PARTS[bits]), shape, 0, _WGMMA)
        values = values + _to_keys(state.sums[1], shape)
        if bits == 4:
            bias = by_part(tuple(part.bias - _middle(bits) for part in VALUE_PARTS[bits]), shape, 0, _WGMMA)
            values = values + bias * _to_keys(state.sums[2], shape)
    total = jnp.where(state.sums[0] > 0, state.sums[0], 1.0)
    values = values * _to_keys(1.0 / total, shape)
    staged = scratch["out" if scale_gmem is None else "part"]
    staged.transpose((1, 0))[...] = plgpu.layout_cast(values.astype(staged.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    if scale_gmem is not None:
        scratch["scale"][...] = jnp.where(state.sums[0] > 0, state.maximum + jnp.log2(total), HIDDEN)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, heads.group)], out_gmem)
    if scale_gmem is not None:
        plgpu.copy_smem_to_gmem(scratch["scale"], scale_gmem)
    plgpu.wait_smem_to_gmem(0)
