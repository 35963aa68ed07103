"""`kv_write` for Hopper: one launch writes new tokens into the tail and seals the pages that they fill, of all heads.

The pools and the tail are updated in place: they become Refs (`jax.new_ref`) that the kernel closes over, and arrays
again afterwards (`jax.freeze`). JAX turns this into a custom call whose results alias its operands. So a program that
donates them copies nothing, also in loops; a program that keeps them makes one copy first.

There is one program per sequence, head and tile of rows in a page, over as many pages as a chunk may fill. It gathers
the rows of its tile in shared memory, from the chunk and, in the page in which the chunk begins, from the tail, and
stores what the pool keeps of them. Tiles consist of whole sub-pages, or are the pages themselves if a pool has their
means. The programs of the first page also write the same rows of the tail, when they have read it: no other program
touches these. A decode step is a chunk of one token, whose tiles are pages. Mostly it fills none, and its programs copy
one row directly from memory to memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.core.hopper import refuse_unless, require_hopper
from pallas_kernels.core.launch import configure
from pallas_kernels.core.paging import LayerKV, PageTables, pools, slots_of
from pallas_kernels.core.quantization import QuantizedArray, QuantizedKeys, reciprocals

_WARPS, _LANES = 4, 32
_PARAMETERS = plgpu.CompilerParams(unsafe_no_auto_barriers=True)
"""No barriers around stores: what threads write, none of them reads, and they wait for what the copy engine copies."""


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


@jax.jit
def kv_write(
    k: jax.Array, v: jax.Array, kv: LayerKV, tables: PageTables, starts: jax.Array, counts: jax.Array
) -> LayerKV:
    """Returns what `pallas_kernels.kv_write` defines.

    It is jitted for the cache: layers of one shape share one kernel, which takes a second or two to build.

    Raises:
      NotImplementedError: on any device but a Hopper GPU, and for shapes and dtypes that the kernel does not support.
    """
    device = require_hopper()
    _check(k, v, kv)
    batch, tokens, num_heads, head_dim = k.shape
    refs = jax.tree.map(jax.new_ref, kv)
    found = pools(kv, tables)
    classes = [_Pool(getattr(refs, name), table, range(num_heads)[heads]) for name, _, table, heads in found]
    sub_page_size = max(1 if pool.k_min is None else pool.sub_page_size for _, pool, *_ in found)
    config = Config(rows=kv.page_size)
    has_means = any(pool.k_mean is not None for _, pool, *_ in found)
    if tokens > 1 and not has_means:
        shape = f"page{kv.page_size}_sub{sub_page_size}_H{head_dim}"
        config = configure("kv_write", device.kind, shape, heuristic(kv.page_size, sub_page_size))
    _launch((k, v), classes, refs.tail, (starts, counts, slots_of(tables, batch)), config.rows)
    return jax.tree.map(jax.freeze, refs)


def _check(k: jax.Array, v: jax.Array, kv: LayerKV) -> None:
    stored = [pool for pool in (kv.retrieval, kv.streaming) if pool is not None]
    plain = [x for pool in (*stored, kv.tail) for x in pool if isinstance(x, jax.Array)]
    head_dim, page_size = k.shape[3], kv.page_size
    refuse_unless(k.dtype == v.dtype == jnp.bfloat16, f"the kernel writes bfloat16 tokens, not {k.dtype}, {v.dtype}")
    refuse_unless(
        all(x.dtype == jnp.bfloat16 for x in plain),
        "the tail, pages that are not quantised, bounds of keys and means must be bfloat16",
    )
    refuse_unless(head_dim in (64, 128), f"the kernel is made for a head_dim of 64 or 128, not {head_dim}")
    refuse_unless(
        page_size in (16, 32, 64, 128), f"the kernel is made for pages of 16, 32, 64 or 128 tokens, not {page_size}"
    )


def _launch(
    new: tuple[jax.Array, jax.Array],
    classes: list[_Pool],
    tail: Any,
    sequences: tuple[jax.Array, jax.Array, jax.Array],
    rows: int,
) -> None:
    """Writes new keys and values, in tiles of some rows. ``sequences`` are the starts, counts and slots."""
    batch, tokens, num_heads, head_dim = new[0].shape
    page_size = tail.k.shape[2]
    tiles_a_page = page_size // rows

    def kernel(*refs: Any, smem: list[Any], ready: Any) -> None:
        new_gmem, sequences_gmem, tables_gmem = refs[:2], refs[2:5], refs[5:]
        b, tile, head = (jax.lax.axis_index(name) for name in ("b", "tile", "head"))
        program = _Program(new_gmem, tail, smem, ready, rows, b, head, *(x[b] for x in sequences_gmem))
        token = program.token() if tokens == 1 else []  # arrives while the rest is looked up
        has_tokens, end = program.count > 0, program.start + program.count
        logical, row = program.start // page_size + tile // tiles_a_page, tile % tiles_a_page * rows

        def seal(pool: _Pool, table_gmem: Any) -> None:
            page = table_gmem[b, logical]

            @pl.when(page >= 0)
            def _() -> None:
                program.gather(logical, row)
                _seal(pool.pages, (page, head - pool.heads.start, row), *(x.at[pl.ds(0, rows)] for x in smem))

        @pl.when(has_tokens & ((logical + 1) * page_size <= end))
        def _() -> None:
            _in_class_of(head, classes, tables_gmem, seal)

        @pl.when(has_tokens & (tile < tiles_a_page))
        def _() -> None:
            if tokens == 1:
                program.put_token(token)
            else:
                program.put_tile((end - 1) // page_size, row)

    # The last rows are those that a late start moves out of the tile.
    gathered = plgpu.SMEM((rows + min(rows, tokens), head_dim), jnp.bfloat16)
    plgpu.kernel(
        kernel,
        grid=(batch, pl.cdiv(tokens, page_size) * tiles_a_page, num_heads),
        grid_names=("b", "tile", "head"),
        scratch_types={"smem": [gathered] * 2, "ready": plgpu.Barrier(num_arrivals=2)},
        compiler_params=_PARAMETERS,
    )(*new, *sequences, *(pool.table for pool in classes))


class _Program(NamedTuple):
    """What the program of one sequence, head and tile copies, keys and values alike.

    Attributes:
      new_gmem: the new keys and values [B, T, K, H].
      tail: the `Tail` of Refs.
      smem: the keys and values of the tile, in the first ``rows`` rows.
      ready: where the copy engine arrives.
      rows: rows of a tile.
      b, head, start, count, slot: the sequence, the head among all, and the sequence's tokens and row of the tail.
    """

    new_gmem: tuple[Any, Any]
    tail: Any
    smem: list[Any]
    ready: Any
    rows: int
    b: jax.Array
    head: jax.Array
    start: jax.Array
    count: jax.Array
    slot: jax.Array

    def token(self) -> list[jax.Array]:
        """Returns the only new token [H]."""
        layout = _channel_a_thread(self.smem[0].shape[1]).reduce((0,))
        return [plgpu.load(gmem.at[self.b, 0, self.head], layout=layout, optimized=False) for gmem in self.new_gmem]

    def put_token(self, token: list[jax.Array]) -> None:
        """Writes the only new token to the tail."""
        for target, value in zip(self.tail, token, strict=True):
            target.at[self.slot, self.head, self.start % target.shape[2]][...] = value

    def put_tile(self, logical: jax.Array, row: jax.Array) -> None:
        """Writes the rows of a page from ``row`` on to the tail, if any of them is new."""
        offset = self._offset(logical, row)

        @pl.when((offset > -self.rows) & (offset < self.count))
        def _() -> None:
            plgpu.commit_smem()  # all threads have read what is overwritten
            self.gather(logical, row)
            plgpu.commit_smem()  # for the interpreter: the tail has been read
            for smem, target in zip(self.smem, self.tail, strict=True):
                plgpu.copy_smem_to_gmem(
                    smem.at[pl.ds(0, self.rows)], target.at[self.slot, self.head, pl.ds(row, self.rows)]
                )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def gather(self, logical: jax.Array, row: jax.Array) -> None:
        """Copies the rows of a page from ``row`` on to shared memory; those after the chunk are anything."""
        offset, copied = self._offset(logical, row), self.smem[0].shape[0] - self.rows
        late = jnp.clip(-offset, 0, self.rows)

        def copy(sources: list[Any], first: Any, count: int) -> None:
            for source, smem in zip(sources, self.smem, strict=True):
                plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(first, count)], self.ready)
            plgpu.barrier_wait(self.ready)

        @pl.when(offset < 0)
        def _() -> None:
            copy([x.at[self.slot, self.head, pl.ds(row, self.rows)] for x in self.tail], 0, self.rows)

        @pl.when(offset > -self.rows)
        def _() -> None:
            tokens = pl.ds(jnp.maximum(offset, 0), copied)
            copy([x.at[self.b, tokens, self.head] for x in self.new_gmem], late, copied)

    def _offset(self, logical: jax.Array, row: jax.Array) -> jax.Array:
        """Returns which new token is in a row of a page; negative if the row is before the chunk."""
        return logical * self.tail.k.shape[2] + row - self.start


def _in_class_of(
    head: jax.Array, classes: list[_Pool], tables_gmem: tuple[Any, ...], seal: Callable[[_Pool, Any], None]
) -> None:
    """Calls ``seal`` with the pool and the page table of a head's class."""
    for pool, table_gmem in zip(classes, tables_gmem, strict=True):
        is_here = (head >= pool.heads.start) & (head < pool.heads.stop) if len(classes) > 1 else True
        pl.when(is_here)(lambda pool=pool, table_gmem=table_gmem: seal(pool, table_gmem))


def _seal(pages: Any, at: tuple[Any, Any, Any], keys_smem: Any, values_smem: Any) -> None:
    """Stores keys and values [rows, H] of a page, in the rows from ``at`` (page, head, row) on."""
    page, head, row = at
    target = (page, head, pl.ds(row, keys_smem.shape[0]))
    if isinstance(pages.v, QuantizedArray):
        _quantize_values(pages.v, at, values_smem)
    else:
        plgpu.copy_smem_to_gmem(values_smem, pages.v.at[target])
    if not isinstance(pages.k, QuantizedKeys):
        plgpu.copy_smem_to_gmem(keys_smem, pages.k.at[target])
    if pages.k_min is not None:
        _bound_keys(pages, at, keys_smem)
    if pages.k_mean is not None:
        for mean, smem in ((pages.k_mean, keys_smem), (pages.v_mean, values_smem)):
            mean.at[page, head][...] = _mean(smem).astype(mean.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _mean(rows_smem: Any) -> jax.Array:
    """Returns the mean [H] float32 of the rows of a whole page."""
    size, head_dim = rows_smem.shape
    layout, rows = _channel_a_thread(head_dim), 16  # in registers at a time

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        [some] = _parts(rows_smem.at[pl.ds(i * rows, rows)], 1, layout)
        return total + jnp.sum(some.astype(jnp.float32), axis=0)

    nothing = plgpu.layout_cast(jnp.zeros(head_dim, jnp.float32), layout.reduce((0,)))
    return jax.lax.fori_loop(0, size // rows, add, nothing) * (1 / size)


def _bound_keys(pages: Any, at: tuple[Any, Any, Any], keys_smem: Any) -> None:
    """Stores the bounds of whole sub-pages, as `key_bounds` does, and the codes of quantised keys."""
    (page, head, row), (rows, head_dim) = at, keys_smem.shape
    is_packed = isinstance(pages.k, QuantizedKeys) and pages.k.bits == 4
    parts, size = 2 if is_packed else 1, pages.sub_page_size
    layout = _channel_a_thread(head_dim // parts)

    @pl.loop(0, rows, step=size)
    def _(first: jax.Array) -> None:
        sub_smem, bounds = keys_smem.at[pl.ds(first, size)], []
        for i, keys in enumerate(_parts(sub_smem, parts, layout)):
            low, high = jnp.min(keys, axis=0), jnp.max(keys, axis=0)
            sub = (page, head, (row + first) // size, _columns(low, i))
            pages.k_min.at[sub][...], pages.k_max.at[sub][...] = low, high
            bounds.append((low.astype(jnp.float32), high.astype(jnp.float32)))
        if isinstance(pages.k, QuantizedKeys):
            _quantize_keys(pages.k, (page, head, row + first), sub_smem, bounds, layout)


def _quantize_keys(
    stored: QuantizedKeys,
    at: tuple[Any, Any, Any],
    keys_smem: Any,
    bounds: list[tuple[jax.Array, jax.Array]],
    layout: Any,
) -> None:
    """Stores the codes of one sub-page, of which each part of the channels has bounds, as `quantize_keys` does."""
    (page, head, row), size = at, keys_smem.shape[0]
    steps = [(high - low) * _unit(stored.bits) for low, high in bounds]
    rows = min(size, 16)  # in registers at a time

    @pl.loop(0, size, step=rows)
    def _(first: jax.Array) -> None:
        parts = _parts(keys_smem.at[pl.ds(first, rows)], len(bounds), layout)
        codes = [
            _codes(x, low, step, stored.bits, axis=0) for x, (low, _), step in zip(parts, bounds, steps, strict=True)
        ]
        _put_codes(stored, (page, head, pl.ds(row + first, rows)), codes)


def _quantize_values(stored: Any, at: tuple[Any, Any, Any], values_smem: Any) -> None:
    """Stores values row by row, as `quantize` does."""
    (page, head, row), (size, head_dim) = at, values_smem.shape
    rows = min(size, 32)  # in registers at a time
    layout = _rows_a_warp(rows, head_dim // 2)

    @pl.loop(0, size, step=rows)
    def _(first: jax.Array) -> None:
        at = (page, head, pl.ds(row + first, rows))
        halves = [x.astype(jnp.float32) for x in _parts(values_smem.at[pl.ds(first, rows)], 2, layout)]
        low = _half(jnp.min(jnp.minimum(*halves), axis=1))
        offset = low.astype(jnp.float32)
        spread = jnp.maximum(jnp.max(jnp.maximum(*halves), axis=1) - offset, 0.0)
        scale = _half(spread * _unit(stored.bits))
        stored.scale.at[at][...], stored.low.at[at][...] = scale, low
        codes = [_codes(x, offset, scale.astype(jnp.float32), stored.bits, axis=1) for x in halves]
        _put_codes(stored, at, codes)


def _half(x: jax.Array) -> jax.Array:
    """Returns float32 numbers as float16, which has none beyond ±65504."""
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -largest, largest).astype(jnp.float16)


def _channel_a_thread(channels: int) -> Any:
    """Returns the layout of rows of 32, 64 or 128 channels whose reduction over rows stays within a thread."""
    repeats = () if channels == 128 else (plgpu.Replicated(128 // channels),)
    return plgpu.Layout.TILED(
        plgpu.Tiling(((1, channels), (channels // _WARPS,), (1,))),
        warp_dims=(-3,),
        lane_dims=(*repeats, -2),
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


def _parts(ref: Any, count: int, layout: Any) -> list[jax.Array]:
    """Returns one or two equal parts of the channels of rows."""
    size = ref.shape[-1] // count
    return [plgpu.load(ref.at[:, pl.ds(i * size, size)], layout=layout, optimized=False) for i in range(count)]


def _unit(bits: int) -> float:
    """Returns the step between codes where all numbers are within 0 … 1."""
    return 1 / (2**bits - 1)


def _codes(x: jax.Array, low: jax.Array, step: jax.Array, bits: int, axis: int) -> jax.Array:
    """Returns ``clip(round((x − low) / step), 0, 2**bits − 1)`` in the low byte of an int32; 0 where the step is 0.

    2**23 + n has no bits for a fraction, so the addition rounds (half to even), and its low bits are the integer. A GPU
    has four times fewer units to round and convert. Clipping also prevents the fusion of the addition with the
    division's multiplication, which would round only once.

    Args:
      x: [rows, channels].
      low: [rows] or [channels] float32.
      step: as ``low``.
      bits: 8 or 4.
      axis: the axis of ``x`` that they do not have.
    """
    above = x.astype(jnp.float32) - jnp.expand_dims(low, axis)
    exact = above * jnp.expand_dims(reciprocals(step), axis)
    return jax.lax.bitcast_convert_type(jnp.clip(exact, 0.0, 2.0**bits - 1) + jnp.float32(2**23), jnp.int32)


def _put_codes(stored: Any, at: tuple[Any, ...], codes: list[jax.Array]) -> None:
    """Writes codes of one or two parts of the channels; 4-bit codes of two parts share their bytes."""
    for i, part in enumerate([codes[0] | (codes[1] << 4)] if stored.bits == 4 else codes):
        stored.codes.at[(*at, _columns(part, i))][...] = part.astype(jnp.uint8)


def _columns(part: jax.Array, i: int) -> Any:
    """Returns the columns of the i-th of equal parts."""
    return pl.ds(i * part.shape[-1], part.shape[-1])
