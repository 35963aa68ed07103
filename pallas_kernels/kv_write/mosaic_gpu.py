"""`kv_write` for Hopper: one launch quantises, writes and updates the statistics of both head classes of a layer.

The pools are updated in place: they become Refs (`jax.new_ref`) that the kernel closes over, and arrays again
afterwards (`jax.freeze`). JAX turns this into a custom call whose results alias its operands. So a program that donates
the pools copies nothing, also in loops; a program that keeps them makes one copy first.

A decode step has one program per sequence and up to four heads, one head per warp, directly from memory to memory. A
chunk has one program per head and tile of rows in one page. Tiles consist of whole sub-pages, so that no other program
touches their statistics. If a chunk begins or ends within a tile, the tile's other rows are written back unchanged.

Channels are processed in two halves, since a byte of 4-bit codes has one channel of each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.mosaic import channel_per_thread, is_interpreted
from pallas_kernels.core.paging import LayerKV, PageTables, pools
from pallas_kernels.core.quantization import SMALLEST_RELATIVE_SCALE, QuantizedArray

_WARPS, _LANES = 4, 32
_PARAMETERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
"""No barriers around stores: threads read old values only where they write new ones (warps that repeat a row may read
another's result, which a second merge does not change), and they wait for what the copy engine copies."""

type _Rows = tuple[jax.Array, jax.Array]
"""Rows of a tile: the first, and the one after the last."""


@dataclass(frozen=True)
class Config:
    """A launch for a chunk: rows per tile, which are whole sub-pages and divide the page."""

    rows: int


def heuristic(page_size: int, sub_page_size: int) -> Config:
    """Returns 32 rows if page and sub-page allow it, so that a multiprocessor runs four to seven programs."""
    return Config(rows=min(page_size, max(sub_page_size, 32)))


class _Pool(NamedTuple):
    """One head class: its `PagedKV` of Refs, its page table, and its heads."""

    pages: Any
    table: jax.Array
    heads: range

    @property
    def sub_page_size(self) -> int:
        """Rows of a sub-page; 0 without statistics."""
        return 0 if self.pages.k_min is None else self.pages.page_size // self.pages.k_min.shape[2]


class _Encoded(NamedTuple):
    """Rows ready to be stored.

    Attributes:
      parts: numbers or 8-bit codes in two halves, or packed 4-bit codes. Codes are the low bytes of int32.
      scale, zero: [rows] float32 of quantised rows.
    """

    parts: list[jax.Array]
    scale: Any = None
    zero: Any = None


@jax.jit
def kv_write(
    k: jax.Array,
    v: jax.Array,
    kv: LayerKV,
    tables: PageTables,
    starts: jax.Array,
    counts: jax.Array,
    *,
    k_bounded: jax.Array | None = None,
) -> LayerKV:
    """Returns what `pallas_kernels.kv_write` defines.

    It is jitted for the cache: layers of one shape share one kernel, which takes a second or two to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for shapes and dtypes that the kernel does not support.
    """
    device = require_hopper()
    has_statistics = kv.retrieval is not None and kv.retrieval.k_min is not None
    new = (k, v, k_bounded) if has_statistics and k_bounded is not None else (k, v)
    _check(new, kv)
    refs = jax.tree.map(jax.new_ref, kv)
    classes = [
        _Pool(getattr(refs, name), table, range(k.shape[2])[heads]) for name, _, table, heads in pools(kv, tables)
    ]
    if k.shape[1] == 1:
        _write_token(new, classes, starts, counts)
    else:
        page_size, sub_page_size = classes[0].pages.page_size, max(pool.sub_page_size for pool in classes)
        shape = f"page{page_size}_sub{sub_page_size}_H{k.shape[3]}" + ("_bounded" if len(new) > 2 else "")
        config = configure("kv_write", device.kind, shape, heuristic(page_size, sub_page_size))
        _write_chunk(new, classes, starts, counts, config)
    return jax.tree.map(jax.freeze, refs)


def _check(new: tuple[jax.Array, ...], kv: LayerKV) -> None:
    stored = [pool for pool in kv if pool is not None]
    sizes = {pool.page_size for pool in stored}
    plain = [x for pool in stored for x in pool if isinstance(x, jax.Array)]
    dtypes = ", ".join(str(x.dtype) for x in new)
    refuse_unless(all(x.dtype == jnp.bfloat16 for x in new), f"the kernel writes bfloat16 tokens, not {dtypes}")
    refuse_unless(
        all(x.dtype == jnp.bfloat16 for x in plain), "pages that are not quantised, and statistics, must be bfloat16"
    )
    head_dim = new[0].shape[3]
    refuse_unless(head_dim in (64, 128), f"the kernel is made for a head_dim of 64 or 128, not {head_dim}")
    refuse_unless(
        len(sizes) == 1 and sizes <= {16, 32, 64, 128},
        f"the kernel is made for pages of 16, 32, 64 or 128 tokens, alike in both pools, not {sorted(sizes)}",
    )


def _write_token(new: tuple[jax.Array, ...], classes: list[_Pool], starts: jax.Array, counts: jax.Array) -> None:
    """Writes one token of each sequence: one program per sequence and up to four heads of a class, one head per warp.

    ``new`` has keys, values and, optionally, the keys that statistics bound.
    """
    batch, _, num_heads, head_dim = new[0].shape
    rows = math.gcd(_WARPS, *(len(pool.heads) for pool in classes))
    layout = _row_a_warp(rows, head_dim // 2)

    def kernel(*refs: Any) -> None:
        new_gmem, (starts_gmem, counts_gmem), tables_gmem = _split(refs, len(new))
        b, head = jax.lax.axis_index("b"), jax.lax.axis_index("group") * rows
        start, is_new = starts_gmem[b], counts_gmem[b] > 0
        loaded = [_halves(x.at[b, 0, pl.ds(head, rows)], layout) for x in new_gmem]
        keys, values = loaded[:2]
        bounded = keys if len(new) == 2 else loaded[2]

        def write(pool: _Pool, table_gmem: Any) -> None:
            page_size = pool.pages.page_size
            page = table_gmem[b, jnp.minimum(start // page_size, table_gmem.shape[1] - 1)]
            encoded_k, encoded_v = _encode(pool.pages.k, keys), _encode(pool.pages.v, values)  # during the copy

            @pl.when(is_new & (page >= 0))
            def _() -> None:
                heads, row = pl.ds(head - pool.heads.start, rows), start % page_size
                if pool.sub_page_size:
                    sub, is_first = row // pool.sub_page_size, row % pool.sub_page_size == 0
                    _merge(pool.pages, (page, heads, sub), bounded, bounded, is_first, layout)
                _put(pool.pages.k, (page, heads, row), encoded_k, layout)
                _put(pool.pages.v, (page, heads, row), encoded_v, layout)

        _in_class_of(head, classes, tables_gmem, write)

    plgpu.kernel(kernel, grid=(batch, num_heads // rows), grid_names=("b", "group"), compiler_params=_PARAMETERS)(
        *new, starts, counts, *(pool.table for pool in classes)
    )


def _write_chunk(
    new: tuple[jax.Array, ...], classes: list[_Pool], starts: jax.Array, counts: jax.Array, config: Config
) -> None:
    """Writes chunks: one program per head of a sequence and tile of the rows that the chunk touches."""
    batch, tokens, num_heads, head_dim = new[0].shape
    rows, copied = config.rows, min(config.rows, tokens)
    step = min(rows, 32)  # rows in registers at a time
    layout, by_channel = _rows_a_warp(step, head_dim // 2), channel_per_thread(head_dim)

    def kernel(*refs: Any, new_smem: list[Any], ready: Any) -> None:
        new_gmem, (starts_gmem, counts_gmem), tables_gmem = _split(refs, len(new))
        b, head = jax.lax.axis_index("b"), jax.lax.axis_index("head")
        start = starts_gmem[b]
        position = (start // rows + jax.lax.axis_index("tile")) * rows
        token = position - start  # the token of the tile's first row; negative if the chunk begins within the tile
        here = (jnp.maximum(-token, 0), jnp.minimum(counts_gmem[b] - token, rows))
        is_whole = here[1] - here[0] == rows

        def write(pool: _Pool, table_gmem: Any) -> None:
            page = table_gmem[b, position // pool.pages.page_size]
            at = (page, head - pool.heads.start, position % pool.pages.page_size)
            plgpu.barrier_wait(ready)

            @pl.when(page >= 0)
            def _() -> None:
                write_tokens(pool.pages.k, at, new_smem[0])
                write_tokens(pool.pages.v, at, new_smem[1])
                if pool.sub_page_size:
                    pl.when(is_whole)(lambda: write_statistics(pool, at, None))
                    pl.when(~is_whole)(lambda: write_statistics(pool, at, here))

        def write_tokens(stored: Any, at: tuple[Any, Any, Any], smem: Any) -> None:
            page, head, row = at

            @pl.loop(0, rows, step=step)
            def _(first: jax.Array) -> None:
                encoded = _encode(stored, _halves(smem.at[pl.ds(first, step)], layout))
                at = (page, head, pl.ds(row + first, step))
                pl.when(is_whole)(lambda: _put(stored, at, encoded, layout))
                pl.when(~is_whole)(lambda: _put(stored, at, encoded, layout, _behind(first, here)))

        def write_statistics(pool: _Pool, at: tuple[Any, Any, Any], here: _Rows | None) -> None:
            page, head, row = at
            size = pool.sub_page_size

            @pl.loop(0, rows, step=size)
            def _(first: jax.Array) -> None:
                at = (page, head, (row + first) // size)
                keys = plgpu.load(
                    (new_smem[2:] or new_smem)[0].at[pl.ds(first, size)], layout=by_channel, optimized=False
                )
                if here is None:
                    _set(pool.pages, at, [jnp.min(keys, axis=0)], [jnp.max(keys, axis=0)])
                    return
                new_here = _behind(first, here)
                is_new = _is_in(new_here, keys.shape, by_channel)
                low = [jnp.min(jnp.where(is_new, keys, jnp.inf), axis=0)]
                high = [jnp.max(jnp.where(is_new, keys, -jnp.inf), axis=0)]
                is_touched = (new_here[0] < size) & (new_here[1] > 0)
                pl.when(is_touched)(lambda: _merge(pool.pages, at, low, high, new_here[0] <= 0, by_channel))

        @pl.when(here[0] < here[1])
        def _() -> None:
            for gmem, smem in zip(new_gmem, new_smem, strict=True):  # rows after the chunk arrive as zeros
                source = gmem.at[b, pl.ds(jnp.maximum(token, 0), copied), head]
                plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(here[0], copied)], ready)
            _in_class_of(head, classes, tables_gmem, write)

    # The second half has the rows that a late start moves out of the first.
    tile = plgpu.SMEM((2 * rows, head_dim), jnp.bfloat16)
    plgpu.kernel(
        kernel,
        grid=(batch, (tokens + rows - 2) // rows + 1, num_heads),
        grid_names=("b", "tile", "head"),
        scratch_types={"new_smem": [tile] * len(new), "ready": plgpu.Barrier(num_arrivals=len(new))},
        compiler_params=_PARAMETERS,
    )(*new, starts, counts, *(pool.table for pool in classes))


def _split(refs: tuple[Any, ...], count: int) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Returns a kernel's new tokens, starts and counts, and page tables."""
    return refs[:count], refs[count : count + 2], refs[count + 2 :]


def _in_class_of(
    head: jax.Array, classes: list[_Pool], tables_gmem: tuple[Any, ...], write: Callable[[_Pool, Any], None]
) -> None:
    """Calls ``write`` with the pool and the page table of a head's class."""
    for pool, table_gmem in zip(classes, tables_gmem, strict=True):
        is_here = (head >= pool.heads.start) & (head < pool.heads.stop) if len(classes) > 1 else True
        pl.when(is_here)(lambda pool=pool, table_gmem=table_gmem: write(pool, table_gmem))


def _row_a_warp(rows: int, columns: int) -> Any:
    """Returns the layout of 1, 2 or 4 rows, each in the lanes of one warp, or repeated in several warps."""
    repeats = () if rows == _WARPS else (plgpu.Replicated(_WARPS // rows),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((rows, columns), (columns // _LANES,))),
        warp_dims=repeats if rows == 1 else (-3, *repeats),
        lane_dims=(-2,),
        vector_dim=-1,
    )


def _rows_a_warp(rows: int, columns: int) -> Any:
    """Returns the layout of many rows, each in a few lanes of one warp, with up to 16 bytes of bfloat16 per lane."""
    vector = 8 if rows * columns >= 8 * _WARPS * _LANES else 4
    rows_a_warp = _LANES * vector // columns
    return plgpu.Layout.TILED(
        plgpu.Tiling(((_WARPS * rows_a_warp, columns), (rows_a_warp, columns), (vector,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def _halves(ref: Any, layout: Any) -> list[jax.Array]:
    """Returns the two halves of the channels of rows."""
    half = ref.shape[-1] // 2
    return [plgpu.load(ref.at[:, pl.ds(i * half, half)], layout=layout, optimized=False) for i in range(2)]


def _behind(first: jax.Array, rows: _Rows) -> _Rows:
    """Returns rows counted from another first row."""
    return rows[0] - first, rows[1] - first


def _is_in(rows: _Rows, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """Returns which elements of an array are in some of its rows."""
    index = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return (index >= rows[0]) & (index < rows[1])


def _encode(stored: Any, halves: list[jax.Array]) -> _Encoded:
    """Returns rows as their pages store them: unchanged, or quantised with the same roundings as `quantize`."""
    if not isinstance(stored, QuantizedArray):
        return _Encoded(halves)
    largest_code = 2**stored.bits - 1
    halves = [x.astype(jnp.float32) for x in halves]
    low = jnp.min(jnp.minimum(*halves), axis=1)
    high = jnp.max(jnp.maximum(*halves), axis=1)
    largest = jnp.maximum(jnp.maximum(high, -low), jnp.finfo(jnp.float32).tiny / SMALLEST_RELATIVE_SCALE)
    scale = jnp.maximum((high - low) * (1 / largest_code), largest * SMALLEST_RELATIVE_SCALE)
    codes = [_round(_over(x - low[:, None], scale), largest_code) for x in halves]
    return _Encoded([codes[0] | (codes[1] << 4)] if stored.bits == 4 else codes, scale, -low / scale)


def _put(stored: Any, at: tuple[Any, ...], encoded: _Encoded, layout: Any, new: _Rows | None = None) -> None:
    """Writes all rows, or only the new ones."""

    def put(target: Any, value: jax.Array, layout: Any) -> None:
        if new is not None:
            old = plgpu.load(target, layout=layout, optimized=False).astype(value.dtype)
            value = jnp.where(_is_in(new, value.shape, layout), value, old)
        target[...] = value.astype(target.dtype)

    pages = stored
    if isinstance(stored, QuantizedArray):
        pages = stored.codes
        put(stored.scale.at[at], encoded.scale, layout.reduce(1))
        put(stored.zero.at[at], encoded.zero, layout.reduce(1))
    for i, part in enumerate(encoded.parts):
        put(pages.at[(*at, _columns(part, i))], part, layout)


def _over(x: jax.Array, divisors: jax.Array) -> jax.Array:
    """Returns rows divided by one normal number each.

    A GPU divides (div.full, to which XLA and Mosaic compile ``/``) by an approximate reciprocal, with scaling for
    divisors that are not normal. Written like this, it takes one instruction per element instead of three.
    """
    if is_interpreted():
        return x / divisors[:, None]
    return x * (1 / divisors)[:, None]


def _round(x: jax.Array, largest: int) -> jax.Array:
    """Returns ``clip(round(x), 0, largest)`` of numbers that are not negative, in the low byte of an int32.

    2**23 + x has no bits for a fraction, so the addition rounds (half to even), and its low bits are the integer. A GPU
    has four times fewer units to round and convert. The minimum also prevents the fusion of the addition with the
    division's multiplication, which would round only once.
    """
    return jax.lax.bitcast_convert_type(jnp.minimum(x, jnp.float32(largest)) + jnp.float32(2**23), jnp.int32)


def _merge(
    pages: Any, at: tuple[Any, ...], low: list[jax.Array], high: list[jax.Array], is_first: jax.Array, layout: Any
) -> None:
    """Merges minima and maxima, in parts of the channels, into a sub-page's statistics, which its first token sets."""

    def old(statistics: Any) -> list[jax.Array]:
        return [
            plgpu.load(statistics.at[(*at, _columns(x, i))], layout=layout, optimized=False) for i, x in enumerate(low)
        ]

    def merge() -> None:
        old_low, old_high = old(pages.k_min), old(pages.k_max)
        _set(pages, at, list(map(jnp.minimum, low, old_low)), list(map(jnp.maximum, high, old_high)))

    pl.when(is_first)(lambda: _set(pages, at, low, high))
    pl.when(~is_first)(merge)


def _set(pages: Any, at: tuple[Any, ...], low: list[jax.Array], high: list[jax.Array]) -> None:
    """Writes a sub-page's statistics in parts of the channels."""
    for statistics, parts in ((pages.k_min, low), (pages.k_max, high)):
        for i, part in enumerate(parts):
            statistics.at[(*at, _columns(part, i))][...] = part


def _columns(part: jax.Array, i: int) -> Any:
    """Returns the columns of the i-th of equal parts."""
    return pl.ds(i * part.shape[-1], part.shape[-1])
